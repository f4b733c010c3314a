"""Flags: every option of a run, declared where it acts, set in a file or on the command line.

Each module declares its options as a dataclass whose name ends in `Options`:

    @dataclass(frozen=True)
    class Options:
        "GRPO"                                                        the group's title in --help

        epsilon: Annotated[float, "ε of the clipped objective", "from 0"] = 0.2

A field is a flag: its type, what it means, its bounds, its default. What is typed wins over what stands in the
file that --config names, and that over the default. args.json, which every run writes, is such a file.

To add a flag, add a field to the module that reads it.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import json
import os
import shlex
import sys
import time
import typing
from pathlib import Path

from data import UsageError
from run import adapters, combinations, console, display, moved, stop
from run.moved import EMBEDDED_MODEL, ROOT
from run.values import boolean, number, planned, refuse_hidden

SEVEN = ("train", "lora", "data", "rewards", "grpo", "sampler", "dist")
MODULES = (
    "run/setup",
    *SEVEN,
    "run/log",
    "run/checkpoints",
    "run/placement",
    "run/plan",
)  # in the order of --help
DEMO = (
    "--dataset arithmetic --val_dataset arithmetic-test "
    "--reward_funcs accuracy format --reward_weights 1 0.05 --response_prefix '<think>' "
    "--output_dir output/demo --train_type lora --lora_rank 16 --lora_alpha 32 "
    "--learning_rate 7e-4 --adam_beta2 0.98 --lr_scheduler_type linear --weight_decay 0 --beta 0 "
    "--scale_rewards mean --num_generations 8 --gradient_accumulation_steps 2 --max_steps 50 "
    "--certain_tail 0.99 --gradient_checkpointing false "
    "--temperature 1.2 --temperature_eval 1 --max_completion_length 22 --log_completions true "
    "--log_tokens 2 --log_tokens_steps 10 "
    "--num_generations_eval 1 --eval_on_start true --eval_steps 20"
)


# Flags that earlier versions had, and what does the same.
RENAMED = {
    "--vllm_importance_sampling_correction": "--rollout_importance_sampling_mode",
    "--vllm_importance_sampling_clip_max": "--rollout_importance_sampling_threshold",
}
# Newer names of ms-swift's for the guide's flags.
OTHER_NAMES = {"train_type": ["tuner_type"]}

# What the seven declare ------------------------------------------------------------------------


@functools.cache
def declared() -> list[type]:
    """The dataclasses of options of all modules, in the order of --help.

    They are read from the source, because importing it would import torch: two seconds before a
    wrong flag is answered. So nothing but the standard library's typing may stand in them.
    """
    found = []
    for module in MODULES:
        tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
                namespace = {**vars(typing), "dataclass": dataclasses.dataclass}
                code = compile(ast.Module([node], []), f"{module}.py", "exec")
                exec(code, namespace)
                found.append(namespace[node.name])
    return found


def add_flag(group, field: dataclasses.Field, **changes) -> None:
    """Add the flag that a field of a dataclass declares. changes: to what argparse is told."""
    kind, text, *bounds = typing.get_args(field.type)
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    settings = {"help": text, "default": default}
    if type(None) in typing.get_args(kind):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
        settings["nargs"] = "+"
    if typing.get_origin(kind) is typing.Literal:
        settings["choices"] = list(typing.get_args(kind))
    elif kind is bool:
        settings |= {"type": boolean, "metavar": "true|false"}
    elif kind == bool | int:
        settings |= {"type": planned, "metavar": "true|false|N"}
    elif kind in (int, float):
        settings["type"] = number(kind, *bounds)
    names = [field.name, *OTHER_NAMES.get(field.name, ())]
    group(*(f"--{name}" for name in names), **settings | changes)


def make_parser() -> "Parser":
    parser = Parser(
        prog="train.py",
        usage="torchrun --nproc_per_node N train.py --dataset NAME --reward_funcs NAME [--flag value ...]",
        description="GRPO for language models. Without flags: the demo.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    text = "a YAML or JSON file of flags, such as a run's args.json; flags that are typed win"
    parser.add_argument("--config", help=text)
    for options in declared():
        group = parser.add_argument_group(options.__doc__).add_argument
        for field in dataclasses.fields(options):
            add_flag(group, field)
    return parser


def given(words: list[str]) -> set[str]:
    """The names of the flags among the words of a command line."""
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


# Reading them ----------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    """What is typed, over what the file of --config says, over the defaults.

    Ends with status 2 and one line that names the flag, the value and what works.
    """
    parser = make_parser()
    refuse_unknown(parser, argv)
    file = parser.parse_args(argv).config
    from_file = []
    if file:
        parser.prefix = f"--config {file}: "
        from_file = as_words(values_of(file, parser), parser)
        parser.parse_args(from_file)  # a wrong value is said to be the file's
        parser.prefix = ""
    words = [*from_file, *argv]
    args = parser.parse_args(words)
    del args.config  # what it says is in `args`
    if not args.dataset:
        fail("--dataset: names no rows to train on; a hub id, a file or a built-in name works")
    try:
        for name in ("model", "adapters", "reward_model"):
            if path := getattr(args, name):
                refuse_hidden(f"--{name} {path}", path)
        for path in args.external_plugins:
            refuse_hidden(f"--external_plugins {path}", path)
        adapters.take(args, given(words))
    except UsageError as error:
        fail(str(error))
    complete(args)
    return args


def answer_early(argv: list[str]) -> None:
    """End with one line for flags that are wrong whatever the model and the data are, or give a sign
    of life. What is said from now on ends no run, and a Ctrl-C is quiet while the rest is imported."""
    console.settle()
    stop.end_quietly()
    args = parse_args(expand(argv))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    try:
        combinations.check(args, processes if isinstance(args.dry_run, bool) else args.dry_run)
    except UsageError as error:
        fail(str(error))
    if not args.dry_run:
        display.start()


def refuse_unknown(parser: "Parser", argv: list[str]) -> None:
    known = parser.names()
    for word in argv:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists all"
            if now := RENAMED.get(flag):
                hint = f"it is {now} now"
            parser.error(f"{flag}: no such flag; {hint}")


def values_of(file: str | Path, parser: "Parser") -> dict:
    """What a file of flags says, not checked yet."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        parser.error(f"{(error.strerror or 'cannot be read').lower()}; a YAML or JSON file works")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"is not YAML ({first_line(error)}); a line 'flag: value' for each works")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        parser.error("holds no flags; a line 'flag: value' for each works")
    return {name: moved.here(value) for name, value in values.items()}


def as_words(values: dict, parser: "Parser") -> list[str]:
    """Flags as the words that one would type."""
    words = []
    for name, value in values.items():
        refuse_unknown(parser, [f"--{name}"])
        if isinstance(value, list):
            if name not in parser.lists():
                parser.error(f"--{name}: takes one value, not the list {value}")
            if value:
                words += [f"--{name}", *map(as_word, value)]
        elif value is not None:  # null is a flag that is not set
            words.append(f"--{name}={as_word(value)}")
    return words


def as_word(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags."""
    if args.resume_from_checkpoint == "false":
        args.resume_from_checkpoint = None
    args.model = args.model or str(EMBEDDED_MODEL)
    args.num_generations_eval = args.num_generations_eval or args.num_generations
    if args.kl_in_reward is None:
        args.kl_in_reward = args.advantage_estimator != "grpo"
    if args.rollout_importance_sampling_mode is None:
        args.rollout_importance_sampling_mode = "token_truncate" if args.use_vllm else "off"
    if args.temperature_eval is None:
        args.temperature_eval = args.temperature
    args.cosine_max_len = args.cosine_max_len or args.max_completion_length
    args.soft_max_length = args.soft_max_length or args.max_completion_length
    args.soft_cache_length = args.soft_cache_length or max(1, args.soft_max_length // 5)
    if args.learning_rate is None:
        args.learning_rate = {"lora": 1e-4, "full": 1e-6}[args.train_type]


def expand(argv: list[str], bfloat16: bool = False) -> list[str]:
    """The words of a command line, with those of the demo for `demo` or nothing at all."""
    if argv and argv[0] != "demo":
        return argv
    return [*demo(int(os.environ.get("WORLD_SIZE", 1)), bfloat16), *argv[1:]]


def demo(processes: int, bfloat16: bool) -> list[str]:
    """The demo's flags: 256 completions a step for any number of processes that divides 128."""
    return [
        *shlex.split(DEMO),
        *("--torch_dtype", "bfloat16" if bfloat16 else "float32"),
        *("--per_device_train_batch_size", str(128 // processes)),
        *("--per_device_eval_batch_size", str(256 // processes)),
    ]


# What argparse says ---------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None:  # the text says what holds
            return action.help
        return super()._get_help_string(action)


program = "train.py"  # what the last line begins with


class Parser(argparse.ArgumentParser):
    prefix = ""  # which file the flags are from

    def error(self, message: str):
        """One line and exit status 2."""
        fail(self.prefix + message.removeprefix("argument "))

    def names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def lists(self) -> list[str]:
        """Flags that take several values."""
        return [action.dest for action in self._actions if action.nargs == "+"]


# The last line ---------------------------------------------------------------------------------


def fail(message: str, status: int = 2):
    """End with one line. What is wrong with flags (status 2) is said once, or once on each node
    before the ranks have met."""
    distributed = sys.modules.get("torch.distributed")  # not imported for a wrong flag
    have_met = distributed is not None and distributed.is_initialized()
    rank = int(os.environ.get("RANK" if have_met else "LOCAL_RANK", 0))
    if status != 2 or rank == 0:
        write_line(f"{program}: {message}")
    elif not have_met:
        time.sleep(30)  # torchrun ends all as soon as one has ended, perhaps before rank 0 speaks
    sys.exit(status)


def write_line(line: str) -> None:
    """The last line, on stderr: what follows the run on a terminal is taken away before it. It may
    hold what a completion says, which no terminal obeys."""
    display.screen.close()
    print(console.harmless(line), file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
