"""What a run survives: kills, stops and signals at random moments, full disks, damaged files.

    python bench/faults.py --faults 30          a table, and bench/faults.json
    python bench/faults.py --faults 100 --seed 7
    python bench/faults.py --faults 14 --engine     with a real vLLM as the sampler, the engine a victim

One run of two processes, with a tiny model, is broken again and again, and goes on each time with
`--resume_from_checkpoint true` in the same folder. In the end a run of as many steps that nothing
has broken says what each step should have told. A fault is a victim, what happens to it, and when:

    victims    rank 0, rank 1, the launcher (which stands for torchrun), a judge, its worker, files,
               the engine
    moments    while the run starts, in a step, in a save

Counted are processes left 15 s after the end, runs that did not end, checkpoints that are not
whole though nobody damaged them, starts that went on from another step than the newest whole
checkpoint's, and lines of metrics.jsonl that are missing, double or other than the unbroken run's.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


from conftest import EMBEDDED_MODEL, flags_for, read_metrics, tiny_model  # noqa: E402
from processes import FORK, Forked, places  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import run.judge  # noqa: E402
import train  # noqa: E402
from run import folder, stop  # noqa: E402
from run.lines import cut_after  # noqa: E402

LIMIT = 90.0  # seconds in which a run has to end, once it should
REWARD = '''
from rewards import orms
from run.judge import Judge

TOWER = r"\\boxed{\\dfrac{5^{\\left(5^{\\left(5^{\\left(5^5\\right)}\\right)} - 4\\right)} - 5}{16}}"
judge = Judge(0.3)


def vowels(completions, **columns):
    """And an answer that takes the judge's worker its whole limit."""
    judge([(TOWER, "5")])
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]


orms["vowels"] = vowels
'''
FAULTS = (
    [(f"rank {rank}", what) for rank in (0, 1) for what in ("KILL", "STOP", "TERM", "INT")]
    + [("launcher", "KILL"), ("launcher", "TERM"), ("judge", "KILL"), ("judge", "STOP")]
    + [("worker", "KILL"), ("worker", "STOP"), ("rank 0 in a save", "KILL")] * 2
    + [("rank 1 in a save", "KILL"), ("launcher in a save", "KILL"), ("start", "KILL")]
    + [("start", "TERM"), ("disk", "full"), ("checkpoint", "truncated")]
    + [("checkpoint", "garbled"), ("checkpoint", "not finite"), ("metrics", "cut")]
)

WITH_ENGINE = [("engine", what) for what in ("KILL", "STOP", "TERM", "INT")]
WITH_ENGINE += [("rank 0", "KILL"), ("rank 1", "KILL"), ("rank 0 in a save", "KILL")]
WITH_ENGINE += [("launcher", "KILL"), ("launcher", "TERM")]
# Sizes that vLLM's kernels take.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
SIZES["max_position_embeddings"] = 8192


# A run, and what there is of it -------------------------------------------------------------------


def launch(words: list[str], environments: list[dict]) -> None:
    """As torchrun: starts ranks, hands on signals, and ends all when one has failed."""
    ranks = []

    def rank(place):
        os.environ.update({name: str(value) for name, value in place.items()})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop.PARENT = os.getppid()
        run.judge.SILENCE = 6.0
        train.main(words)

    def hand_on(number, _):
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    for place in environments:
        ranks.append(FORK.Process(target=rank, args=(place,)))
        ranks[-1].start()
    signal.signal(signal.SIGTERM, hand_on)
    while all(process.exitcode in (None, 0) for process in ranks):
        if not any(process.is_alive() for process in ranks):
            sys.exit(0)
        time.sleep(0.05)
    hand_on(signal.SIGTERM, None)
    for process in ranks:
        process.join(20)
        process.kill()
    sys.exit(next(process.exitcode for process in ranks if process.exitcode))


class Trial:
    """One start of the run, and what its processes are."""

    def __init__(self, words: list[str], number: int, logs: Path):
        self.mark = f"fault-{os.getpid()}-{number}"
        environments = places(2, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RUN_ID=self.mark)
        for rank, place in enumerate(environments):
            place["LOCAL_RANK"] = rank
        self.process = Forked(logs / self.mark, launch, words, environments)
        self.launcher = self.process.process.pid

    def below(self, parent: int) -> list[int]:
        """The processes that another one has started."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid, rest = stat.read_text().split(" ", 1)
                state, above = rest.rpartition(")")[2].split()[:2]
                if int(above) == parent and state != "Z":
                    found.append(int(pid))
        return sorted(found)

    def find(self, victim: str) -> int | None:
        """A victim's process id, if there is such a process now."""
        if victim.startswith("launcher"):
            return self.launcher
        ranks = self.below(self.launcher)
        if victim.startswith("rank"):
            return ranks[int(victim[5])] if len(ranks) == 2 else None
        below = [pid for rank in ranks for pid in self.below(rank)]
        engines = [pid for pid in below if is_engine(pid)]
        if victim == "engine":
            return engines[0] if engines else None
        judges = [pid for pid in below if pid not in engines]
        if victim == "judge":
            return random.choice(judges) if judges else None
        workers = [pid for judge in judges for pid in self.below(judge)]
        return random.choice(workers) if workers else None

    def everything(self) -> set[int]:
        found, new = set(), [self.launcher]
        while new:
            found.update(new)
            new = [pid for parent in new for pid in self.below(parent)]
        return found

    def is_over(self) -> bool:
        return not self.process.process.is_alive()


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def is_engine(pid: int) -> bool:
    with suppress(OSError):
        return b"run.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def wait(holds, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def steps_of(out: Path) -> int:
    with suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


# Faults -------------------------------------------------------------------------------------------


def strike(trial: Trial, victim: str, what: str, out: Path) -> bool:
    """Have a fault happen to a run that is on its way → whether it did."""
    number = getattr(signal, f"SIG{what}", None)
    if victim == "start":
        time.sleep(random.uniform(0.0, 2.0))
        victim = random.choice(["rank 0", "rank 1"])
    else:
        first = steps_of(out)
        if not wait(lambda: steps_of(out) > first or trial.is_over(), LIMIT):
            return False
    if "save" in victim:
        wait(lambda: any(out.glob(f"*{folder.UNFINISHED}")) or trial.is_over(), LIMIT)
        time.sleep(random.uniform(0.0, 0.05))
    elif victim != "start":
        time.sleep(random.uniform(0.0, 1.0))
    if what == "full":  # no file may grow beyond that from now on
        victim, number = "rank 0", None
    wait(lambda: trial.find(victim) is not None or trial.is_over(), LIMIT)
    pid = trial.find(victim)
    if pid is None:
        return False
    with suppress(ProcessLookupError):
        if number is None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        else:
            os.kill(pid, number)
        return True
    return False


def damage(what: str, out: Path) -> str | None:
    """Break a file of a run that has ended → the checkpoint's name that is broken now."""
    if what == "cut":
        with (out / "metrics.jsonl").open("ab") as file:  # as a kill amid a write leaves it
            file.write(b'{"step": 1, "epoch": 0.01, "learning_rate"'[: random.randrange(1, 40)])
        return None
    kept = folder.checkpoints(out)
    if not kept:
        return None
    if what == "truncated":
        file = random.choice(list(kept[-1].glob("*.safetensors")))
        file.write_bytes(file.read_bytes()[: -random.randrange(1, 1000)])
    elif what == "garbled":
        (kept[-1] / folder.STATE).write_bytes(random.randbytes(40))
    else:
        state = load_file(kept[-1] / folder.OPTIMIZER)
        name = random.choice([name for name in state if name.startswith("exp_avg")])
        state[name].view(-1)[0] = float("nan")
        save_file(state, kept[-1] / folder.OPTIMIZER)
    return kept[-1].name


def end(trial: Trial, victim: str, out: Path) -> bool:
    """Wait for a run's end → whether it came. What judges and workers suffer ends no run: it has to
    make three more steps, and is asked to end then."""
    if victim in ("judge", "worker"):
        goal = steps_of(out) + 3
        went_on = wait(lambda: steps_of(out) >= goal or trial.is_over(), LIMIT)
        if not went_on or trial.is_over():
            return False
        os.kill(trial.launcher, signal.SIGTERM)
    return wait(trial.is_over, LIMIT)


# The whole ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", action="store_true", help="sample with vLLM")
    parser.add_argument("--minutes", type=float, default=600, help="no new fault after so many")
    options = parser.parse_args()
    random.seed(options.seed)
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as place:
        rows, counts = break_it(options.faults, until, Path(place), options.engine)
    result = {"seed": options.seed, "faults": len(rows), **counts, "rows": rows}
    name = "faults-engine.json" if options.engine else "faults.json"
    (ROOT / "bench" / name).write_text(json.dumps(result, indent=1) + "\n")
    print()
    for name, value in result.items():
        if name != "rows":
            print(f"{name:32} {value}")


def break_it(faults: int, until: float, place: Path, engine: bool) -> tuple[list[dict], dict]:
    """Break one run so often → a row a fault, and what was counted in all."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model, reward, out = place / "model", place / "vowels.py", place / "out"
    sizes = SIZES if engine else {}
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    reward.write_text(REWARD)
    settings = {"reward_funcs": "vowels", "per_device_train_batch_size": 8, "beta": 0.0}
    settings |= {"deepspeed": "zero2", "lr_scheduler_type": "constant", "node_timeout": 2}
    settings |= {"save_steps": 2, "save_total_limit": 3, "max_steps": 1_000_000}
    if engine:
        settings |= {"use_vllm": "true", "vllm_timeout": 15, "vllm_max_model_len": 256}

    def words(target, *more) -> list[str]:
        return [str(word) for word in (*flags_for(model, reward, target, **settings), *more)]

    deck, rows, broken = [], [], None
    for number in range(faults):
        if time.monotonic() > until:
            break
        faults_there = WITH_ENGINE if engine else FAULTS
        deck = deck or random.sample(faults_there, len(faults_there))
        victim, what = deck.pop()
        newest, _ = folder.newest_whole(out)
        expected = folder.checkpoint_step(newest) if newest else 0
        resume = ["--resume_from_checkpoint", "true"] if newest else []
        trial = Trial(words(out, *resume), number, place)
        row = {"victim": victim, "what": what, "expected": expected}
        if victim in ("checkpoint", "metrics"):  # a run that is asked to end, then the damage
            row["struck"] = strike(trial, "launcher", "TERM", out)
        else:
            row["struck"] = strike(trial, victim, what, out)
        known = trial.everything()
        row["ended"] = end(trial, victim, out)
        row["status"] = trial.process.process.exitcode
        wait(lambda known=known: not any(map(is_alive, known)), 15)
        row["left"] = sum(map(is_alive, known))
        for pid in filter(is_alive, known):
            os.kill(pid, signal.SIGKILL)
        row |= look_at(out, broken)
        row["resumed right"] = resumed_right(trial.process.said, newest, broken)
        row["traceback"] = "Traceback" in trial.process.said
        broken = damage(what, out) if victim in ("checkpoint", "metrics") else None
        if what == "not finite" and broken:  # which is refused: a user takes the one before
            row["resumed right"] &= refused(words, out, place, number)
            shutil.rmtree(out / broken)
            broken = None
        if row["traceback"]:
            print(trial.process.said[trial.process.said.index("Traceback") :][:4000])
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ", flush=True)
    return rows, count(rows) | compare(words, out, place)


def look_at(out: Path, broken: str | None) -> dict:
    """Checkpoints and metrics as a fault has left them."""
    bad = [path.name for path in folder.checkpoints(out) if folder.fault(path)]
    lines = []
    with suppress(OSError):
        lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = []
    for line in lines:
        with suppress(ValueError):
            steps.append(json.loads(line)["step"])
    whole = steps == list(range(1, len(steps) + 1)) and len(steps) >= len(lines) - 1
    return {"step": len(steps), "not whole": len(set(bad) - {broken}), "metrics whole": whole}


def resumed_right(said: str, newest: Path | None, broken: str | None) -> bool:
    """Whether a run said that it goes on from the newest whole checkpoint, and why not from a newer
    one; a run that ended before that says nothing."""
    if newest is None or "resumes from" not in said:
        return True
    why = broken is None or f"{broken} is not whole" in said
    return f"resumes from {newest}" in said and why


def refused(words, out: Path, place: Path, number: int) -> bool:
    """Whether a run refuses state that is not finite, in one line."""
    trial = Trial(words(out, "--resume_from_checkpoint", "true"), number + 10_000, place)
    ended = wait(trial.is_over, LIMIT)
    said = trial.process.said
    trial.process.kill()
    return ended and "holds numbers that are not finite" in said and "Traceback" not in said


def count(rows: list[dict]) -> dict:
    rows = [row for row in rows if row["struck"]]
    return {
        "struck": len(rows),
        "processes left": sum(row["left"] for row in rows),
        "hangs": sum(not row["ended"] for row in rows),
        "checkpoints not whole": sum(row["not whole"] for row in rows),
        "resumes wrong": sum(not row["resumed right"] for row in rows),
        "metrics not whole": sum(not row["metrics whole"] for row in rows),
        "tracebacks": sum(row["traceback"] for row in rows),
        "statuses": dict(Counter(str(row["status"]) for row in rows)),
    }


def compare(words, out: Path, place: Path) -> dict:
    """The run that was broken with one that was not: lines that tell of another reward."""
    cut_after(out / "metrics.jsonl", 1_000_000)  # the last fault may have cut a line
    lines = read_metrics(out)
    straight = place / "straight"
    trial = Trial(words(straight, "--max_steps", len(lines)), 20_000, place)
    trial.process._ends(timeout=LIMIT + 3 * len(lines))
    trial.process.kill()
    others = 0
    for one, other in zip(lines, read_metrics(straight), strict=True):
        others += abs(one["reward"] - other["reward"]) > 1e-6
        others += abs(one["grad_norm"] - other["grad_norm"]) > 1e-3 * other["grad_norm"]
    return {"steps compared": len(lines), "steps that differ": others}


if __name__ == "__main__":
    main()
