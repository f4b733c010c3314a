"""What a run has left: a checkpoint's folder, its kind, and how its model was asked.

    python -m run.evaluate | run.chat | run.merge     CHECKPOINT
        a checkpoint of LoRA or of full training, or any model's folder
        a run's folder, for its newest checkpoint that is whole

What is not said of system prompt, template, temperature, lengths and rewards is taken from the
run's own args.json, which lies beside the checkpoint or above it. Nothing in here needs torch.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Collection
from pathlib import Path

from data import UsageError
from run import adapters, flags
from run.console import harmless
from run.folder import checkpoints, newest_whole
from run.values import from_json, number, refuse_hidden

# The flags of how a model is asked, and of how it is loaded.
ASKING = ("system", "chat_template_kwargs", "response_prefix", "max_completion_length")
ASKING += ("temperature", "top_p", "top_k", "seed", "torch_dtype", "plain", "trust_remote_code")
# What trains draws with a temperature above 0.
HELP = "of the sampling distribution; 0 takes the likeliest token"
CHANGES = {"temperature": {"type": number(float, "from 0"), "help": HELP}}
# Not taken from a run's folder, which somebody else may have written.
TYPED = {"trust_remote_code"}


@dataclasses.dataclass
class Checkpoint:
    folder: Path
    is_lora: bool
    args_file: Path | None = None  # its run's flags, if they are there

    @property
    def step(self) -> int:
        """The optimizer step that it was saved at; 0 of a model that no run has trained."""
        file = self.folder / "trainer_state.json"
        try:
            return from_json(file.read_text())["step"] if file.exists() else 0
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{file}: cannot be read; a whole checkpoint works") from None

    @property
    def run_folder(self) -> Path:
        return self.args_file.parent if self.args_file else self.folder.parent


def find(text: str) -> Checkpoint:
    """UsageError for a folder that is none."""
    folder = Path(text)
    refuse_hidden(text, text)
    if not folder.is_dir():
        raise UsageError(f"{text}: no such folder; a checkpoint-N folder of a run works")
    kept = checkpoints(folder)
    if kept and not has_weights(folder):
        newest, notes = newest_whole(folder)
        folder = newest or kept[-1]  # of which but the optimizer's state may be gone
        if notes and os.environ.get("RANK", "0") == "0":
            told = notes if newest else notes[:1]
            line = "; ".join([f"takes {folder}", *told])
            print(harmless(f"{flags.program}: {line}"), file=sys.stderr, flush=True)
    if not has_weights(folder):
        raise UsageError(
            f"{text}: no checkpoint; a folder works that holds config.json and model.safetensors, "
            f"or {adapters.CONFIG} and {adapters.WEIGHTS}"
        )
    above = folder.parent if folder.name else folder.resolve().parent  # of "."
    files = (folder / "args.json", above / "args.json")
    args_file = next((file for file in files if file.is_file()), None)
    return Checkpoint(folder, adapters.is_adapter(folder), args_file)


def has_weights(folder: Path) -> bool:
    if adapters.is_adapter(folder):
        return (folder / adapters.WEIGHTS).is_file()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return (folder / "config.json").is_file() and bool(weights)


def begin(checkpoint: Checkpoint) -> None:
    """The first sign of life, before torch is imported."""
    say(f"loading {checkpoint.folder}")


def say(line: str) -> None:
    """On a terminal alone, and not on standard output, which may be what somebody keeps."""
    if os.environ.get("RANK", "0") == "0" and sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


# Flags ------------------------------------------------------------------------------------------


def make_parser(prog: str, description: str, names: Collection[str]) -> flags.Parser:
    """A command's parser: CHECKPOINT, and these of train.py's flags, which have no default here."""
    usage = f"python -m {prog} CHECKPOINT [--flag value ...]"
    settings = {"formatter_class": flags.Help, "allow_abbrev": False}
    settings["argument_default"] = argparse.SUPPRESS
    parser = flags.Parser(prog=prog, usage=usage, description=description, **settings)
    text = "a checkpoint's folder, or a run's for its newest one"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=text)
    text = "of a LoRA checkpoint: its base, where that has moved"
    parser.add_argument("--model", metavar="BASE", help=text)
    group = parser.add_argument_group("as in training; what is not said is the run's").add_argument
    every = [field for options in flags.declared() for field in dataclasses.fields(options)]
    for field in every:
        if field.name in names:
            changes = CHANGES.get(field.name, {})
            flags.add_flag(group, field, default=argparse.SUPPRESS, **changes)
    return parser


def typed(parser: flags.Parser, argv: list[str]) -> dict:
    """The flags that somebody has typed, with their values."""
    flags.refuse_unknown(parser, argv)
    return vars(parser.parse_args(argv))


def flags_of(checkpoint: Checkpoint, names: Collection[str], typed: dict) -> argparse.Namespace:
    """A field for every option of a run: what is typed, over the run's own for these names, over
    the defaults. The model is the checkpoint."""
    parser = flags.make_parser()
    words = []
    if checkpoint.args_file:
        parser.prefix = f"{checkpoint.args_file}: "
        values = flags.values_of(checkpoint.args_file, parser)
        kept = {name: value for name, value in values.items() if name in set(names) - TYPED}
        words = flags.as_words(kept, parser)
    args = parser.parse_args(words)
    del args.config
    vars(args).update({name: value for name, value in typed.items() if name in names})
    args.model, args.adapters = str(checkpoint.folder), None
    if base := typed.get("model"):
        if not checkpoint.is_lora:
            what = f"{checkpoint.folder} is a whole model and has no base; without --model it works"
            raise UsageError(f"--model {base}: {what}")
        args.model, args.adapters = base, str(checkpoint.folder)
    args.train_type = "lora" if checkpoint.is_lora else "full"
    adapters.take(args, given=(), helps="--model BASE")
    flags.complete(args)
    return args
