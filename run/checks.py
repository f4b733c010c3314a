"""What can be wrong is found before a model is loaded, and told by every rank or by none.

A mistake that one rank alone notices would leave the others waiting for it in a collective. So each
check runs on all ranks `together`, and what ranks must have in common they `agree` on: flags, rows,
plugins, weights.
"""

import argparse
import atexit
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import data
from data import UsageError
from rewards import RewardError
from run import combinations, models, placement, readers, start, templates
from run.display import phase
from run.fingerprint import Fingerprint
from run.judge import Judge
from run.log import say
from run.plugins import CheckedRewards, load_plugins

# Flags that may differ between ranks. Nodes may keep files under other names; `contents` compares
# what is in them.
NODES_OWN = {"output_dir", "model", "dataset", "val_dataset", "system", "external_plugins"}
NODES_OWN |= {"dataset_num_proc", "dataloader_num_workers"}


@dataclass
class Inputs:
    """What a run reads before it loads a model."""

    tokenizer: object
    train_rows: list[dict]
    val_rows: list[dict]
    rewards: CheckedRewards
    opening: str  # what the prompts have opened of every answer
    lock: object = None  # keeps other runs out of the output folder


@phase("read the data")
def prepare(args: argparse.Namespace, world) -> Inputs:
    """Read and check everything but the weights, on all ranks; then make the output folder.

    UsageError on every rank if one of them finds something that the user has to mend.
    """
    own = {flag: value for flag, value in vars(args).items() if flag not in NODES_OWN}
    agree(world, own)
    inputs = together(world, read_inputs, args, world)
    if world.size > 1:
        agree(world, contents(args, inputs))
    inputs.lock = together(world, start.start_folder, args, world)
    return inputs


def together(world, function: Callable, *args):
    """What the call returns; a UsageError that it raises on some rank is raised on every rank."""
    if world.size == 1:
        return function(*args)
    result = problem = None
    try:
        result = function(*args)
    except UsageError as error:
        problem = error
    problems = world.gather([None if problem is None else (str(problem), world.place)])
    for text, place in filter(None, problems):
        everywhere = all(problems)
        raise UsageError(text if everywhere else f"{text} (says {place})") from problem
    return result


def agree(world, values: dict[str, object]) -> None:
    """UsageError on every rank, of the first flag whose value is not the same on all."""
    (first, expected), *others = world.gather([(world.place, values)])
    for place, theirs in others:
        for flag, value in expected.items():
            if theirs.get(flag) != value:
                raise UsageError(
                    f"--{flag} {value}: on {first}, but {theirs.get(flag)} on {place}; "
                    "all ranks need the same"
                )


def agree_on_weights(world, model) -> None:
    """Nodes may have other files under a model's name."""
    if world.spans_nodes:
        weights = Fingerprint()
        for name, parameter in model.named_parameters():
            weights.add(name, parameter.detach())
        agree(world, {"model": f"(weights {weights.digest()[:12]})"})


def contents(args: argparse.Namespace, inputs: Inputs) -> dict[str, str]:
    """What the files that flags name hold, in short."""

    def digest(parts: Iterable[bytes]) -> str:
        sums = hashlib.sha256()
        for part in parts:
            sums.update(part)
        return sums.hexdigest()[:12]

    def told(rows: list[dict]) -> str:
        lines = (json.dumps(row, sort_keys=True, default=str).encode() for row in rows)
        return f"({len(rows)} rows, {digest(lines)})"

    return {
        "dataset": told(inputs.train_rows),
        "val_dataset": told(inputs.val_rows),
        "external_plugins": f"({digest(Path(file).read_bytes() for file in args.external_plugins)})",
    }


# One rank's part --------------------------------------------------------------------------------


def read_inputs(args: argparse.Namespace, world) -> Inputs:
    combinations.check(args, world.size)
    if args.use_vllm:
        placement.device_of(args)
    if world.is_main:  # it alone writes; other nodes may have disks of their own
        start.check_folder(args)
    load_plugins(args.external_plugins)
    judge = Judge(args.accuracy_timeout)
    settings = vars(args) | {"judge": judge, "device": world.device}
    rewards = CheckedRewards(args.reward_funcs, args.reward_weights, **settings)
    atexit.register(rewards.close)
    train_rows, val_rows = read_rows(args, world)
    config = models.model_config(args, has_checkpoint=world.is_main)
    tokenizer = models.load_tokenizer(args)
    needed = 0
    for rows, flag in ((train_rows, "--dataset"), (val_rows, "--val_dataset")):
        if rows:
            check_columns(rows, flag, args, rewards, world)
            needed = max(needed, encode(args, world, rows, flag, tokenizer, config))
            if rewards.reward_model:
                prompts = [row["prompt"] for row in rows]
                rewards.reward_model.check_prompts(prompts, args.max_completion_length)
    if args.use_vllm:
        fit_vllm(args, needed, models.context_of(config))
    if (
        combinations.evaluates(args) and not args.val_dataset
    ):  # only now: --max_length leaves no side empty
        train_rows, val_rows = readers.split(train_rows, args.split_dataset_ratio, args.seed)
    for note in rewards.notes:
        say(world, note)
    first = (train_rows or val_rows)[0]  # an evaluation has no rows to train on
    opened = templates.opening(tokenizer, first["prompt"], models.template_of(args))
    opening = opened + args.response_prefix
    return Inputs(tokenizer, train_rows, val_rows, rewards, opening)


def read_rows(args: argparse.Namespace, world) -> tuple[list[dict], list[dict]]:
    system = readers.read_system(args.system)
    settings = {"seed": args.seed, "num_proc": args.dataset_num_proc, "system": system}
    settings["read"] = readers.read
    train_rows = data.load_rows(args.dataset, **settings)
    if not args.val_dataset:
        return train_rows, []
    if not combinations.evaluates(args):
        hint = "never evaluated on without --eval_steps or --eval_on_start true"
        say(world, f"--val_dataset: {hint}")
    return train_rows, data.load_rows(args.val_dataset, flag="--val_dataset", **settings)


def check_columns(rows: list[dict], flag: str, args, rewards: CheckedRewards, world) -> None:
    """Whether the rows have what the rewards ask for."""
    given = " ".join([flag, *getattr(args, flag.removeprefix("--"))])
    rewards.check_columns([column for column in rows[0] if column != "prompt"], given)
    if {"accuracy", "cosine"} & set(rewards.names):
        missing = check_solutions(rows)
        if missing:
            what = f"{missing} of {len(rows)} rows have no reference"
            say(world, f"{flag}: {what}; accuracy and cosine skip them")


def check_solutions(rows: list[dict]) -> int:
    """How many rows have no reference for accuracy; UsageError if all, or if one is no text."""
    flag = "--reward_funcs accuracy"
    references = [row["solution"] for row in rows]
    for reference in references:
        if isinstance(reference, list | dict | bytes):
            kind = "of bytes" if isinstance(reference, bytes) else f"a {type(reference).__name__}"
            raise UsageError(f"{flag}: a row's reference is {kind}; text or a number works")
    missing = references.count(None)
    if missing == len(rows):
        raise UsageError(f"{flag}: no row has a reference; a column solution or answer works")
    return missing


def encode(args, world, rows: list[dict], flag: str, tokenizer, config) -> int:
    """Give the rows their prompt_ids, in place → tokens of the longest prompt and completion."""
    mapping = readers.map_in_processes(args.dataset_num_proc)
    more = {"prefix": args.response_prefix, "template": models.template_of(args)}
    rows[:], dropped = data.encode(rows, tokenizer, args.max_length, mapping, **more)
    if dropped:
        what = f"dropped {dropped} prompts of more than {args.max_length} tokens"
        say(world, f"{flag}: {what}, {len(rows)} are left")
    longest = max(len(row["prompt_ids"]) for row in rows)
    needed, context = longest + args.max_completion_length, models.context_of(config)
    if needed > context:
        works = [f"{context - longest}"] if context > longest else []
        room = context - args.max_completion_length
        if room >= min(len(row["prompt_ids"]) for row in rows):
            works.append(f"--max_length {room}")
        raise UsageError(
            f"--max_completion_length {args.max_completion_length}: with a prompt of {longest} "
            f"tokens that is more than the model's {context}; "
            f"{data.either(works or ['a model of a longer context'])} works"
        )
    check_vocabulary(args, rows, tokenizer, config.get_text_config().vocab_size)
    return needed


def check_vocabulary(args: argparse.Namespace, rows: list[dict], tokenizer, size: int) -> None:
    """Whether the model has an embedding for each token of the prompts."""
    largest = max(max(row["prompt_ids"], default=0) for row in rows)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UsageError(
            f"--model {args.model}: its tokenizer has {token} as token {largest}, but the model "
            f"embeds {size} tokens; a tokenizer that fits, or embeddings resized to it, works"
        )


def fit_vllm(args: argparse.Namespace, needed: int, context: int) -> None:
    """The length that vLLM makes room for: that of the longest prompt and completion, if not set."""
    args.vllm_max_model_len = args.vllm_max_model_len or needed
    if not needed <= args.vllm_max_model_len <= context:
        raise UsageError(
            f"--vllm_max_model_len {args.vllm_max_model_len}: from {needed} (the longest prompt "
            f"and --max_completion_length {args.max_completion_length}) to the model's {context} "
            "works"
        )


def check_rewards(args: argparse.Namespace, rewards: list[float]) -> None:
    """RewardError where a plugin gives what the objective cannot take (combinations.check_mean)."""
    if args.scale_rewards == "mean" and min(rewards) < 0:
        raise RewardError(
            f"--scale_rewards mean: a completion earned {min(rewards):g}, and what is divided by "
            "the mean is 0 or more; --scale_rewards group, batch or none works"
        )
