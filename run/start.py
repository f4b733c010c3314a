"""The output folder as a run starts: what it goes on from, and what moves out of its way."""

import argparse
import json
from pathlib import Path

from data import UsageError, one_line
from run import folder as folders
from run.checkpoints import step_size
from run.values import from_json, refuse_hidden


def check_folder(args: argparse.Namespace) -> None:
    """What rank 0 writes to and resumes from. `true` becomes the newest whole checkpoint."""
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    refuse_hidden(f"--output_dir {folder}", args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder}: is a file; a folder, there or not, works")
    folders.refuse_taken(folder)
    if not wanted:
        return
    refuse_hidden(f"--resume_from_checkpoint {wanted}", wanted)
    checkpoint, notes = Path(wanted), []
    if wanted == "true":
        checkpoint, notes = folders.newest_whole(folder)
    if checkpoint is None or not (checkpoint / folders.STATE).exists():
        why = f" ({notes[0]})" if notes else ""
        raise UsageError(
            f"--resume_from_checkpoint {wanted}: no checkpoint there{why}; "
            "true, for the newest in --output_dir, or a checkpoint-N folder works"
        )
    problem = folders.fault(checkpoint)
    if problem:
        raise UsageError(
            f"--resume_from_checkpoint {wanted}: not a whole checkpoint ({problem}); "
            "true, for the newest in --output_dir that is whole, works"
        )
    if wanted == "true":
        print("; ".join([f"resumes from {checkpoint}", *notes]), flush=True)
    args.resume_from_checkpoint = str(checkpoint)


def start_folder(args: argparse.Namespace, world):
    """Make the output folder and write args.json; an earlier run's files move out of the way.

    Returns what keeps other runs out for as long as it lives, on rank 0.
    """
    if not world.is_main:
        return None
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = folders.Hold(folder, json.dumps(vars(args), indent=2) + "\n")
        folders.sweep(folder)
        resumed = Path(args.resume_from_checkpoint or ".")
        step = tell_differences(args, world) if args.resume_from_checkpoint else 0
        if args.resume_from_checkpoint and resumed.resolve().parent == folder.resolve():
            newer = [p for p in folders.checkpoints(folder) if folders.checkpoint_step(p) > step]
            folders.move_away(newer, folder, "checkpoints beyond the resumed one")
        else:
            folders.move_away(folders.of_a_run(folder), folder, "an earlier run")
        held.write_args()
    except OSError as error:
        reason = error.strerror or one_line(error)
        message = f"--output_dir {folder}: cannot be made or written to ({reason.lower()})"
        raise UsageError(f"{message}; a folder that you may write to works") from error
    return held


def tell_differences(args: argparse.Namespace, world) -> int:
    """Say how a resumed run differs from the one it goes on from → the step it goes on from."""
    checkpoint = Path(args.resume_from_checkpoint)
    file = checkpoint.parent / "args.json"
    before = {}
    try:
        before = dict(from_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        print(f"{file}: cannot be read ({one_line(error)}), so nothing is told of other flags")
    told = []
    for name, value in vars(args).items():
        if name in before and before[name] != value and name != "resume_from_checkpoint":
            told.append(f"--{name} {value} (was {before[name]})")
    if told:
        line = "resumed with other flags: " + ", ".join(told)
        print(line.replace("True", "true").replace("False", "false"))

    state = from_json((checkpoint / folders.STATE).read_text(encoding="utf-8"))
    size, now = state.get("completions_per_step"), step_size(args, world)
    if size not in (None, now):
        line = f"resumed with {now} completions a step (was {size}): the order of prompts and the "
        line += "number of steps are others"
        kept, rest = divmod(size, world.size * args.gradient_accumulation_steps)
        if rest == 0:
            line += f"; --per_device_train_batch_size {kept} keeps them"
        print(line)
    return state["step"]
