"""A run's folder: one run at a time in it, which checkpoints it holds, and which of them are whole.

    output/
      args.json  metrics.jsonl  completions.jsonl
      checkpoint-<step>/    whole or not there (run/checkpoints.py writes it)
      earlier-<n>/          what an earlier run left in this folder
      .lock  .holder        who writes here

A checkpoint of ours is a folder named checkpoint-<number> with the optimizer's state in it. What
has another name, such as checkpoint-best, and what is a link, is somebody else's, and left alone.
"""

import os
import re
import shutil
import socket
import weakref
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from data import UsageError, one_line
from run import display
from run.values import from_json

OF_A_RUN = ("args.json", "*.jsonl", "vllm.log", "runs", "evaluations")
OF_A_RUN += ("report.html", "curve.png", "evaluation.json")
STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
KEPT = ("master", "exp_avg", "exp_avg_sq")  # of each parameter, and of each dist.Bucket
# Endings of folders that are not whole yet, or not whole any more: a kill may leave them.
UNFINISHED, REMOVED = ".unfinished", ".removed"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
COUNTS = ("num_tokens", "draws", "prompts", "completions_per_step")  # beside the step
LEFT = re.compile(rf"{NAME.pattern}({UNFINISHED}|{REMOVED})(-[0-9]+)?")


# One run at a time ------------------------------------------------------------------------------


def lock(folder: Path) -> FileLock:
    """Take a folder for this process, for as long as the lock lives or the process does.

    UsageError while another process has it. The kernel gives it back however a process ends.
    """
    held = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        who = holder(folder) or "another process"
        raise UsageError(
            f"--output_dir {folder}: {who} trains there; another folder, or the end of that "
            "run, works"
        ) from error
    (folder / ".holder").write_text(this_process() + "\n", encoding="utf-8")
    return held


def holder(folder: Path) -> str:
    """Who had the lock last; "" where that cannot be told."""
    with suppress(OSError, ValueError):
        return (folder / ".holder").read_text(encoding="utf-8").strip()
    return ""


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def refuse_taken(folder: Path) -> None:
    """The same UsageError before anything is read, as far as that can be told by then."""
    if (folder / ".lock").exists():
        with suppress(OSError):
            lock(folder).release()


class Hold:
    """A folder that is this process's for as long as this lives. A lock is a file: whoever removes
    the folder amid the run removes it, too, and another run could start there."""

    def __init__(self, folder: Path, args: str):
        self.folder, self.args = folder, args  # args: the text of args.json
        self.lock = lock(folder)
        self.file = (folder / ".lock").stat()  # which one it is; None while there is none
        HOLDS[folder] = self

    def write_args(self) -> None:
        write_whole(self.folder / "args.json", self.args.encode())

    def renew(self) -> None:
        """Take the folder anew if it, or its lock, is not the one that was taken. UsageError if
        another process has it."""
        with suppress(FileNotFoundError):
            there = (self.folder / ".lock").stat()
            if self.file and os.path.samestat(there, self.file):
                return
        self.file = None
        self.lock.release(force=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        last = holder(self.folder)
        self.lock = lock(self.folder)
        if last not in ("", this_process()):  # a run that has come and gone
            move_away(of_a_run(self.folder), self.folder, "another run")
        self.write_args()
        self.file = (self.folder / ".lock").stat()
        display.warn(
            f"--output_dir {self.folder}: its lock was removed amid the run; it is taken anew, with "
            "args.json"
        )


HOLDS = weakref.WeakValueDictionary()  # a folder → this process's Hold, if there is one


def keep(folder: Path) -> None:
    """Whoever writes to a run's folder asks first whether it is still this run's: see `Hold.renew`."""
    if folder in HOLDS:
        HOLDS[folder].renew()


# What is in it ----------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            found.append(path)
    return sorted(found, key=checkpoint_step)


def of_a_run(folder: Path) -> list[Path]:
    """All that a run has written there."""
    files = [path for name in OF_A_RUN for path in folder.glob(name)]
    return files + checkpoints(folder)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def fault(checkpoint: Path) -> str:
    """Why one cannot go on from here, in a few words; "" for a whole checkpoint."""
    for name in (STATE, OPTIMIZER):
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    try:
        state = from_json((checkpoint / STATE).read_text(encoding="utf-8"))
        step, named = state["step"], NAME.fullmatch(checkpoint.name)
        if not is_count(step):
            return f"{STATE} has no step"
        if named and int(named[1]) != step:  # by which it would be sorted, kept and moved away
            return f"{STATE} is of step {step}"
        for name in COUNTS:  # of which an earlier version wrote but some
            if state.get(name) is not None and not is_count(state[name]):
                return f"{STATE} says {name} {state[name]!r:.40}"
        if not all(map(is_metrics, state.get("unlogged", []))):
            return f"{STATE} has metrics that are none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} cannot be read: {one_line(error)}"
    files = list(checkpoint.glob("*.safetensors"))
    if not any(file.name.startswith(("model", "adapter_model")) for file in files):
        return "it has no weights"
    for file in files:
        try:
            shapes_of(file)
        except (OSError, SafetensorError) as error:
            return f"{file.name} cannot be read: {one_line(error)}"
    return fault_of_state(checkpoint / OPTIMIZER, step)


def is_count(value) -> bool:
    return isinstance(value, int) and value >= 0


def is_metrics(line) -> bool:
    """Whether it is what Log.step keeps of a step: numbers, and its seconds among them."""
    is_timed = isinstance(line, dict) and "time/step" in line
    return is_timed and all(isinstance(value, int | float) for value in line.values())


def shapes_of(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor by its name. It compares the file's size with its table."""
    with safe_open(file, "np") as tensors:
        names = list(tensors.keys())
        return {name: list(tensors.get_slice(name).get_shape()) for name in names}


def fault_of_state(file: Path, step: int) -> str:
    """Why the optimizer's state is not whole: what it holds of one parameter belongs together.
    Whether it is of a run's parameters, models.check_checkpoint tells."""
    shapes = shapes_of(file)
    if shapes.get("steps") != []:
        return f"{file.name} has no number of steps"
    with safe_open(file, "np") as state:
        for name in sorted(shapes):
            kind, right = state.get_slice(name).get_dtype(), "I64" if name == "steps" else "F32"
            if kind != right:
                return f"{file.name}: {name} is of type {kind}, not {right}"
        steps = int(state.get_tensor("steps"))
    if steps != step:
        return f"{file.name} is of step {steps}"
    parameters = {name.partition(".")[2] for name in shapes if name != "steps"}
    for parameter in sorted(parameters):
        first, *others = (shapes.get(f"{kind}.{parameter}", "absent") for kind in KEPT)
        for kind, shape in zip(KEPT[1:], others):
            if shape != first:
                return f"{file.name}: {kind}.{parameter} is {shape}, its {KEPT[0]} {first}"
    return ""


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line about each newer one that is not."""
    notes = []
    for checkpoint in reversed(checkpoints(folder)):
        problem = fault(checkpoint)
        if not problem:
            return checkpoint, notes
        notes.append(f"{checkpoint.name} is not whole ({problem})")
    return None, notes


# Moving and removing ----------------------------------------------------------------------------


def move_away(paths: list[Path], folder: Path, what: str) -> None:
    """What would mix with this run's files moves to a folder beside them."""
    if not paths:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    earlier = folder / f"earlier-{number}"
    earlier.mkdir()
    for path in paths:
        path.rename(earlier / path.name)
    print(f"{folder} held {what}; now in {earlier}")


def sweep(folder: Path) -> None:
    """Remove what a kill left of checkpoints that were being written or removed."""
    for path in folder.glob("checkpoint-*"):
        if LEFT.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def finish(unfinished: Path, checkpoint: Path) -> None:
    """Give a checkpoint its name, once all of it is on the disk."""
    # safetensors keeps its files from others; the user's umask says who may read them.
    mode = (unfinished / STATE).stat().st_mode
    for file in filter(Path.is_file, unfinished.iterdir()):
        file.chmod(mode)
        sync(file)
    sync(unfinished)
    doomed = free(checkpoint.with_name(checkpoint.name + REMOVED))
    if checkpoint.is_symlink():  # somebody's: it stays, under another name
        checkpoint.rename(free(checkpoint.with_name(checkpoint.name + ".link")))
    elif checkpoint.exists():  # as one may have been copied here
        checkpoint.rename(doomed)
    unfinished.rename(checkpoint)
    sync(checkpoint.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def free(path: Path) -> Path:
    """This name, or the next with a number that nothing has."""
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def write_whole(file: Path, text: bytes) -> None:
    """A file is as it was, or as it shall be: never in between, and nothing beside it is left."""
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_bytes(text)
        beside.replace(file)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path) -> None:
    """Under another name first: a kill in between leaves no half of a checkpoint."""
    doomed = free(checkpoint.with_name(checkpoint.name + REMOVED))
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all checkpoints up to `step` but the newest `keep`. One from beyond it is not this
    run's, nor is one without our optimizer's state."""
    own = []
    for path in checkpoints(folder):
        if checkpoint_step(path) <= step and (path / OPTIMIZER).exists():
            own.append(path)
    for checkpoint in own[:-keep]:
        remove(checkpoint)
