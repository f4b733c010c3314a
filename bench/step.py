"""A whole GRPO step, its training pass and generation, beside TRL, transformers' generate and vLLM.

    python bench/step.py [ROW …]       prints each row when it is done and puts it into bench/step.json (of other rows
                                       and precisions the last figures stay); needs requirements-test.txt, vLLM for
                                       its rows, and 24 GB of memory

Every row is the same work for all, on CPUs: the embedded model in bfloat16 (in float32 on a CPU that has no instructions
for bfloat16), questions of the built-in task, G = 8, completions of exactly TOKENS tokens (nobody may stop earlier),
micro-batches of the same size, a thread for each core. Every contestant lives in a process of its own and works when it
is told to, one at a time and in turns, so that what else the machine does hits all alike. Seconds are medians of
REPEATS turns, by kind of work, after a first one that does not count; memory is the peak, summed over a contestant's processes.

Two limits of the machine are measured before and after a row, the better one counts: the speed of one large matrix
product, and of a copy in memory. A row's share of the first counts the products that its work needs (see `operations`),
each prompt once, whatever a contestant computes beyond that; generation's share of the second, reading all weights once
a token. vLLM compiles its model (it needs a C++ compiler), uses all cores, and leaves its tokens undecoded as the others do.
"""

import contextlib
import importlib.util
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TOKENS, G, BETA, RANK, ALPHA, LEARNING_RATE = 128, 8, 0.04, 16, 32, 1e-6
REPEATS = {"step": 3, "pass": 5, "generate": 5}
PAUSE = 5  # seconds between turns: after its own, vLLM's worker goes on asking for work on a core of its own

# row → what is measured, completions, full training or LoRA, contestants
ROWS = {
    "step, 16 completions, full": ("step", 16, "full", ["ours", "trl"]),
    "step, 64 completions, LoRA": ("step", 64, "lora", ["ours", "trl"]),
    "training pass, 16 completions, full": ("pass", 16, "full", ["ours", "trl"]),
    "generation, 16 completions": ("generate", 16, "full", ["ours", "transformers", "vllm"]),
    "generation, 64 completions": ("generate", 64, "full", ["ours", "transformers", "vllm"]),
}


def precision() -> str:
    import torch

    import dist

    return "bfloat16" if dist.has_bfloat16(torch.device("cpu")) else "float32"


def load_model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, precision()))


def micro_batch(count: int) -> int:
    """Completions at once in training: in float32, 16 of 64 take TRL more memory than the 24 GB of a small machine."""
    return 16 if count == 16 else 8


def reward(completions, **_) -> list[float]:
    """Numbers that differ within a group, so that every completion is trained on."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [random.Random(text).random() for text in texts]


def prompts() -> list[dict]:
    import data

    return data.load_rows(["arithmetic"], seed=0)


def prompt_ids(count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    import data

    rows, _ = data.encode(prompts()[: count // G], AutoTokenizer.from_pretrained(MODEL))
    return [row["prompt_ids"] for row in rows for _ in range(G)]


# Contestants. What each does between two calls of `turn` is one turn's work. --------------------------------------


def our_step(count: int, kind: str, turn: Callable[[], None]) -> None:
    """train.py itself, which waits for its turn whenever it has logged a step."""
    import dist
    import fast
    import rewards
    import train
    from run import flags, setup
    from run.log import Log

    make, log = setup.make_sampler, Log.step

    def without_ends(*args):
        sampler = make(*args)
        sampler.eos, sampler.ends = sampler.eos[:0], set()
        return sampler

    def step(*args):
        log(*args)
        turn()

    rewards.orms["bench"], setup.make_sampler, Log.step = reward, without_ends, step
    words = [
        "--dataset", "arithmetic", "--reward_funcs", "bench", "--output_dir", tempfile.mkdtemp(), "--train_type", kind,
        "--lora_rank", RANK, "--lora_alpha", ALPHA, "--learning_rate", LEARNING_RATE, "--beta", BETA, "--num_generations",
        G, "--per_device_train_batch_size", micro_batch(count), "--gradient_accumulation_steps",
        count // micro_batch(count), "--max_completion_length", TOKENS, "--temperature", "1.0", "--max_steps", 1000,
        "--torch_dtype", precision(), "--gradient_checkpointing", "false",
    ]  # fmt: skip
    world = dist.find_world()
    dist.start(world)
    fast.use_cpu_well(1)
    train.train(flags.parse_args([str(word) for word in words]), world)


def trl_trainer(count: int, kind: str, callbacks=()):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="grpo",
        use_bias_correction_kl=False,  # as in the paper
        beta=BETA,
        learning_rate=LEARNING_RATE,
        temperature=1.0,
        num_generations=G,
        per_device_train_batch_size=micro_batch(count),
        gradient_accumulation_steps=count // micro_batch(count),
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        max_steps=1000,
        model_init_kwargs={"dtype": precision()},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    rows = [{"prompt": row["prompt"]} for row in prompts()[:1000]]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return GRPOTrainer(
        model=str(MODEL),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora if kind == "lora" else None,
        callbacks=list(callbacks),
    )


def trl_step(count: int, kind: str, turn: Callable[[], None]) -> None:
    """TRL's trainer, which waits for its turn at every step's end."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turn()

    trl_trainer(count, kind, [Turns()]).train()


def a_batch(count: int):
    """Prompts, completions, advantages, and log-probabilities of a reference that is not quite the policy."""
    import torch

    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    completions = [[rng.randrange(100, 40_000) for _ in range(TOKENS)] for _ in range(count)]
    return (
        prompt_ids(count),
        completions,
        torch.randn(count, generator=noise),
        torch.randn(count, TOKENS, generator=noise),
    )


def our_pass(count: int, kind: str, turn: Callable[[], None]) -> None:
    import dist
    import fast
    import grpo

    dist.start(dist.find_world())
    fast.use_cpu_well(1)
    model, _reference = load_model().train(), load_model()  # TRL's trainer holds a reference, too
    fast.prepare(model)
    ids, completions, advantages, noise = a_batch(count)
    settings = {
        "options": grpo.Options(beta=BETA),
        "normalizers": grpo.Normalizers(count, count * TOKENS, TOKENS),
    }
    while True:
        model.zero_grad()
        logps, entropies, mask = fast.completion_logps(model, ids, completions, 1.0)
        old = logps.detach()
        ref = old + 0.1 * noise
        loss, _ = grpo.grpo_loss(logps, entropies, old, ref, advantages, mask, **settings)
        loss.backward()
        turn()


def trl_pass(count: int, kind: str, turn: Callable[[], None]) -> None:
    import torch

    trainer = trl_trainer(count, kind)
    trainer.current_gradient_accumulation_steps = 1
    ids, completions, advantages, ref = a_batch(count)
    width = max(map(len, ids))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "prompt_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.ones(count, TOKENS, dtype=torch.long),
        "advantages": advantages,
        "ref_per_token_logps": 0.1 * ref - 10,
    }
    model = trainer.model.train()
    while True:
        model.zero_grad()
        trainer._compute_loss(model, dict(inputs)).backward()
        turn()


def our_generate(count: int, kind: str, turn: Callable[[], None]) -> None:
    import dist
    import fast
    from sampler import ModelSampler

    dist.start(dist.find_world())
    fast.use_cpu_well(1)
    model, ids = load_model(), prompt_ids(count)
    fast.prepare(model)
    settings = {"eos_token_ids": [], "max_new_tokens": TOKENS}
    sampler = ModelSampler(model, **settings, decoder=fast.decoder_for(model))
    while True:
        assert all(len(c.ids) == TOKENS for c in sampler.generate(ids, range(count)))
        turn()


def transformers_generate(count: int, kind: str, turn: Callable[[], None]) -> None:
    import torch

    model, ids = load_model(), prompt_ids(count)
    width = max(map(len, ids))
    rows = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    while True:
        with torch.inference_mode():
            out = model.generate(
                rows, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == width + TOKENS
        turn()


def vllm_generate(count: int, kind: str, turn: Callable[[], None]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(MODEL), dtype=precision(), max_model_len=512, kv_cache_memory_bytes=2 << 30,
        generation_config="vllm", enable_chunked_prefill=False,
    )  # fmt: skip
    ids = prompt_ids(count)[::G]
    settings = [
        SamplingParams(
            n=G,
            temperature=1.0,
            max_tokens=TOKENS,
            ignore_eos=True,
            logprobs=0,
            seed=i,
            detokenize=False,
        )
        for i in range(len(ids))
    ]
    while True:
        assert llm.reset_prefix_cache()  # as after every change of the weights
        outs = llm.generate([{"prompt_token_ids": row} for row in ids], settings, use_tqdm=False)
        assert sum(len(c.token_ids) for out in outs for c in out.outputs) == count * TOKENS
        turn()


CONTESTANTS = {
    ("step", "ours"): our_step,
    ("step", "trl"): trl_step,
    ("pass", "ours"): our_pass,
    ("pass", "trl"): trl_pass,
    ("generate", "ours"): our_generate,
    ("generate", "transformers"): transformers_generate,
    ("generate", "vllm"): vllm_generate,
}


# Turns -----------------------------------------------------------------------------------------------------------


def contestant(what: str, who: str, count: str, kind: str) -> None:
    """The process of one contestant: a line on stdin is a turn, a line on the real stdout its seconds and peak MB."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    started = None

    def turn() -> None:
        nonlocal started
        if started:
            with contextlib.suppress(BrokenPipeError):
                print(
                    time.perf_counter() - started, peak_MB(os.getsid(0)), file=answers, flush=True
                )
        if not sys.stdin.readline():  # the benchmark is gone, however it ended
            os.killpg(0, signal.SIGKILL)  # vLLM's worker, too
        started = time.perf_counter()

    turn()
    CONTESTANTS[what, who](int(count), kind, turn)


def peak_MB(session: int) -> float:
    """The peak resident memory of every process of a session, summed."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(status.parent.name)) == session:
                total += int(status.read_text().partition("VmHWM:")[2].split()[0])
    return total * 1024 / 1e6


def end(processes: dict[str, subprocess.Popen]) -> None:
    for process in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(
                process.pid, signal.SIGKILL
            )  # vLLM's engine and worker are processes of their own
        process.wait()


def measure(row: str) -> dict:
    what, count, kind, names = ROWS[row]
    names = [n for n in names if n != "vllm" or importlib.util.find_spec("vllm")]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it keeps a core free, of two
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    log = Path(tempfile.gettempdir()) / "bench-step.log"
    processes, results, peaks, before = {}, {name: [] for name in names}, {}, limits()
    try:
        for name in names:
            command = [sys.executable, __file__, what, name, str(count), kind]
            with log.open("a") as file:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
                processes[name] = subprocess.Popen(
                    command, text=True, env=environment, start_new_session=True, **pipes
                )
        for name, process in list(processes.items()) * (1 + REPEATS[what]):
            time.sleep(PAUSE)
            process.stdin.write("\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                sys.exit(f"bench/step.py: {name} ended; {log} tells why")
            seconds, peaks[name] = map(float, answer.split())
            results[name].append(seconds)
    finally:
        end(processes)
    machine = {limit: max(value, before[limit]) for limit, value in limits().items()}
    tokens, needed = count * TOKENS, operations(what, count, kind)
    table = {}
    for name, turns in results.items():
        seconds = statistics.median(turns[1:])
        times = [theirs / ours for theirs, ours in zip(turns[1:], results["ours"][1:])]
        table[name] = {
            "seconds": seconds,
            "turns": turns[1:],
            "completions_per_s": count / seconds,
            "tokens_per_s": tokens / seconds,
            "times_ours": statistics.median(times),
            "peak_MB": peaks[name],
            "memory_of_ours": peaks[name] / peaks["ours"],
            "of_matmul_peak": needed / seconds / machine["matmul_GFLOP_per_s"] / 1e9,
        }
        if what == "generate":
            bytes_read = TOKENS * sum(p.nbytes for p in load_model().parameters())
            table[name]["of_memory_bandwidth"] = (
                bytes_read / seconds / machine["memory_GB_per_s"] / 1e9
            )
    return {
        "row": row,
        "torch_dtype": precision(),
        "turns": REPEATS[what],
        "machine": machine,
        "contestants": table,
    }


def operations(what: str, count: int, kind: str) -> float:
    """Additions and multiplications in the matrix products that a row's work needs, attention left out.

    2 a weight and token forward, as many backward to the inputs and, for full training, to the weights. What prompts
    share is computed once.
    """
    from fast.packed import Pack

    model = load_model()
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head
    ids, completions, *_ = a_batch(count)
    rows, tokens = Pack(ids, completions, model.config, "cpu").ids.numel(), count * TOKENS
    forward, generated = 2 * (rows * body + tokens * head), 2 * tokens * (body + head)
    train = {"lora": 2, "full": 3}[kind] * forward
    return {"generate": generated, "pass": train, "step": generated + train + forward}[
        what
    ]  # with a reference


def limits() -> dict[str, float]:
    """What the machine can do at best: matrix products in the precision of the rows, and copying memory."""
    import torch

    a, b = torch.randn(2, 2048, 2048).to(getattr(torch, precision()))
    source, target = torch.ones(2, 1 << 28, dtype=torch.uint8)

    def best(work) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return {
        "matmul_GFLOP_per_s": 2 * 2048**3 / best(lambda: a @ b) / 1e9,
        "memory_GB_per_s": 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9,
    }


def cpu() -> str:
    """The processor's name, and which vector instructions it has."""
    text = Path("/proc/cpuinfo").read_text()
    name, flags = (
        re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "flags")
    )
    vectors = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(
        flags[1].split() if flags else ()
    )
    return " ".join([name[1] if name else platform.machine(), *sorted(vectors)])


def main(rows: list[str]) -> None:
    import torch

    if unknown := set(rows) - set(ROWS):
        sys.exit(
            f"bench/step.py: {unknown.pop()}: there is no such row; there are: {'; '.join(ROWS)}"
        )
    columns = [
        ("seconds", 9),
        ("tokens/s", 10),
        ("× ours", 8),
        ("peak MB", 9),
        ("× ours", 8),
        ("of matmul", 11),
    ]
    print(
        f"{precision():38}{'':14}"
        + "".join(f"{name:>{width}}" for name, width in [*columns, ("of memory", 11)])
    )
    file = Path(__file__).with_suffix(".json")
    for row in rows or ROWS:
        result = measure(row)
        result["machine"] |= {"cpu": cpu(), "cores": os.cpu_count(), "torch": torch.__version__}
        for i, (name, r) in enumerate(result["contestants"].items()):
            print(
                f"{row if i == 0 else '':38}{name:14}{r['seconds']:9.2f}{r['tokens_per_s']:10.0f}{r['times_ours']:8.2f}"
                f"{r['peak_MB']:9.0f}{r['memory_of_ours']:8.2f}{r['of_matmul_peak']:11.0%}"
                + (f"{r['of_memory_bandwidth']:11.0%}" if "of_memory_bandwidth" in r else ""),
                flush=True,
            )
        known = json.loads(file.read_text()) if file.exists() else []
        measured = {(r["row"], r["torch_dtype"]): r for r in [*known, result]}
        file.write_text(json.dumps(list(measured.values()), indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ("step", "pass", "generate"):
        contestant(*sys.argv[1:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contestants end with it
        main(sys.argv[1:])
