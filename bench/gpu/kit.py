"""One machine with one GPU, one command: is the trainer right on CUDA, and how fast is it there?

    python3 bench/gpu/kit.py --out FOLDER                        in six minutes, without a network
    python3 bench/gpu/kit.py --out FOLDER --device cpu --tiny    the same lines, small: to try the kit
    python3 bench/gpu/kit.py --out FOLDER --only parity learn    some of the parts

Every part has a time limit and a line of verdict. FOLDER/kit.json has the figures of all parts so
far; a part that fails, or hangs, or leaves the GPU unusable does not stop those behind it.

    env           what the machine has
    parity        log-probabilities, loss and every gradient beside those of the CPU
    packed, head  the packed row and the chunked head beside plain ones, in three precisions
    optimizer     ZeroAdamW beside torch.optim.AdamW with clipping
    collectives   every collective of dist.py in a world of one: ZeRO-2 and ZeRO-3, by NCCL on a GPU
    sampling      what was drawn beside the trainer's log-probabilities, the CPU's draws, chi-square
    learn         train.py: does the reward rise, does a stopped run go on?
    memory        the plan's peak (--dry_run) beside the measured one
    own_tests     the repository's tests, on the GPU by bench/gpu/on_device.py, and on the CPU
    train_speed   a training pass beside that of an ordinary trainer, and what the GPU does in it
    decode_speed  sampling beside transformers' generate, and beside reading the weights
    whole_run     three steps of train.py: where their time goes

What is right is in right.py, what is quick in speed.py. Models are random, of the real shapes. A tokenizer is
read from models/SmolLM2-135M-Instruct, or from .kit/tokenizer where there is no model.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from part import OutOfTime, Part  # noqa: E402
from right import (  # noqa: E402
    collectives,
    env,
    head,
    learn,
    optimizer,
    own_tests,
    packed,
    parity,
    sampling,
    start_tests,
)
from speed import decode_speed, memory, train_speed, whole_run  # noqa: E402

# part → seconds that it may take
PARTS = {env: 20, parity: 90, packed: 30, head: 15, optimizer: 15, collectives: 30, sampling: 45}
PARTS |= {learn: 90, own_tests: 100, memory: 70}
PARTS |= {train_speed: 80, decode_speed: 110, whole_run: 70}
PATIENCE = 5  # times as long for --tiny, which runs on few cores
BEGAN = "GPU_KIT_BEGAN"  # seconds since 1970, in the environment: it outlasts a new start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for kit.json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes: to try the kit")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts together")
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--go-on", action="store_true", help="leave out what kit.json has")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/gpu-kit"), help="for models and logs"
    )
    args = parser.parse_args()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    args.out.mkdir(parents=True, exist_ok=True)
    patience = PATIENCE if args.tiny else 1
    ends = float(os.environ.setdefault(BEGAN, str(time.time()))) + 60 * patience * args.minutes
    file = args.out / "kit.json"
    results = json.loads(file.read_text()) if args.go_on and file.exists() else {}
    wanted = [f for f in PARTS if not args.only or f.__name__ in args.only]
    wanted = [f for f in wanted if f.__name__ not in results]
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as work:
        parts = {f: Part(f.__name__, device, args.tiny, args.out, Path(work)) for f in wanted}
        if own_tests in parts:
            start_tests(parts[own_tests])
        for function, part in parts.items():
            limit = min(patience * PARTS[function], ends - time.time())
            results[part.name] = run(function, part, max(1.0, limit), results, file)
            print_verdict(part, results[part.name])
            if part.on_gpu:
                go_on_if_broken(results[part.name])
    bad = [name for name, result in results.items() if not result["ok"]]
    print(f"{len(results) - len(bad)} of {len(results)} parts are right", *bad)
    return bool(bad)


def run(function, part: Part, limit: float, results: dict, file: Path) -> dict:
    """A part's verdict and figures, on disk before it is returned."""
    started, error = time.perf_counter(), None

    def note() -> dict:
        ok = not part.wrong and error is None
        seconds = round(time.perf_counter() - started, 1)
        result = {"ok": ok, "seconds": seconds, "wrong": part.wrong, "error": error, **part.found}
        file.write_text(json.dumps(results | {part.name: result}, indent=1) + "\n")
        return result

    def end_hang() -> None:
        """The alarm was not heard: a call of CUDA or NCCL does not return."""
        nonlocal error
        error = "it hangs"
        print_verdict(part, note())
        start_again()

    watchdog = threading.Timer(limit + 15, end_hang)
    watchdog.daemon = True
    watchdog.start()
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        function(part)
    except (Exception, OutOfTime) as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {str(problem)[-600:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watchdog.cancel()
        part.close()
    return note()


def out_of_time(*_) -> None:
    raise OutOfTime("its time is over")


def go_on_if_broken(result: dict) -> None:
    """After a fault in a kernel nothing more works in this process: the rest runs in a new one."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        print(f"the GPU is lost to this process ({result['error']})", flush=True)
        start_again()


def start_again() -> None:
    for part in Part.everyone:
        part.close()
    again = [word for word in sys.argv if word != "--go-on"]
    os.execv(sys.executable, [sys.executable, *again, "--go-on"])


def print_verdict(part: Part, result: dict) -> None:
    verdict = "right" if result["ok"] else "WRONG"
    why = "; ".join([*part.wrong, *([result["error"]] if result["error"] else [])])
    print(f"{part.name:13}{verdict:6}{result['seconds']:6.1f} s  {why}", flush=True)
    print(f"    {json.dumps(part.found)[:2500]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
