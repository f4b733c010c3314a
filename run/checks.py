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

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import data
import lora
from data import UsageError
from run import checkpoints, flags, placement, readers
from run.fingerprint import Fingerprint
from run.flags import EMBEDDED_MODEL, first_line
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


def prepare(args: argparse.Namespace, world) -> Inputs:
    """Read and check everything but the weights, on all ranks; then make the output folder.

    UsageError on every rank if one of them finds something that the user has to mend.
    """
    own = {flag: value for flag, value in vars(args).items() if flag not in NODES_OWN}
    agree(world, own)
    inputs = together(world, read_inputs, args, world)
    if world.size > 1:
        agree(world, contents(args, inputs))
    together(world, checkpoints.start_folder, args, world)
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
    flags.check(args, world.size)
    if args.use_vllm:
        placement.device_of(args)
    if world.is_main:  # it alone writes; other nodes may have disks of their own
        checkpoints.check_folder(args)
    load_plugins(args.external_plugins)
    judge = Judge(args.accuracy_timeout)
    rewards = CheckedRewards(
        args.reward_funcs, args.reward_weights, judge=judge, device=world.device, **vars(args)
    )
    atexit.register(rewards.close)
    train_rows, val_rows = read_rows(args, world)
    config = model_config(args, has_checkpoint=world.is_main)
    tokenizer = load_tokenizer(args.model)
    needed = 0
    for rows, flag in ((train_rows, "--dataset"), (val_rows, "--val_dataset")):
        if rows:
            check_columns(rows, flag, rewards, world)
            needed = max(needed, encode(args, world, rows, flag, tokenizer, config))
    if args.use_vllm:
        fit_vllm(args, needed, context_of(config))
    if args.eval_steps and not args.val_dataset:  # only now: --max_length leaves neither side empty
        train_rows, val_rows = data.split(train_rows, args.split_dataset_ratio, args.seed)
    for note in rewards.notes:
        say(world, note)
    return Inputs(tokenizer, train_rows, val_rows, rewards)


def read_rows(args: argparse.Namespace, world) -> tuple[list[dict], list[dict]]:
    system = readers.read_system(args.system)
    settings = {"seed": args.seed, "num_proc": args.dataset_num_proc, "system": system}
    settings["read"] = readers.read
    train_rows = data.load_rows(args.dataset, **settings)
    if not args.val_dataset:
        return train_rows, []
    if not (args.eval_steps or args.eval_on_start):
        hint = "never evaluated on without --eval_steps or --eval_on_start true"
        say(world, f"--val_dataset: {hint}")
    return train_rows, data.load_rows(args.val_dataset, flag="--val_dataset", **settings)


def check_columns(rows: list[dict], flag: str, rewards: CheckedRewards, world) -> None:
    """Whether the rows have what the rewards ask for."""
    rewards.check_columns([column for column in rows[0] if column != "prompt"])
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
        if isinstance(reference, list | dict):
            kind = type(reference).__name__
            raise UsageError(f"{flag}: a row's reference is a {kind}; text or a number works")
    missing = references.count(None)
    if missing == len(rows):
        raise UsageError(f"{flag}: no row has a reference; a column solution or answer works")
    return missing


def encode(args, world, rows: list[dict], flag: str, tokenizer, config) -> int:
    """Give the rows their prompt_ids, in place → tokens of the longest prompt and completion."""
    mapping = readers.map_in_processes(args.dataset_num_proc)
    rows[:], dropped = data.encode(rows, tokenizer, args.max_length, mapping)
    if dropped:
        what = f"dropped {dropped} prompts of more than {args.max_length} tokens"
        say(world, f"{flag}: {what}, {len(rows)} are left")
    longest = max(len(row["prompt_ids"]) for row in rows)
    needed, context = longest + args.max_completion_length, context_of(config)
    if needed > context:
        raise UsageError(
            f"--max_completion_length {args.max_completion_length}: with a prompt of {longest} "
            f"tokens that is more than the model's {context}; a shorter one, or "
            f"--max_length {context - args.max_completion_length}, works"
        )
    return needed


def fit_vllm(args: argparse.Namespace, needed: int, context: int) -> None:
    """The length that vLLM makes room for: that of the longest prompt and completion, if not set."""
    args.vllm_max_model_len = args.vllm_max_model_len or needed
    if not needed <= args.vllm_max_model_len <= context:
        raise UsageError(
            f"--vllm_max_model_len {args.vllm_max_model_len}: from {needed} (the longest prompt "
            f"and --max_completion_length {args.max_completion_length}) to the model's {context} "
            "works"
        )


# The model, without its weights -----------------------------------------------------------------


def model_config(args: argparse.Namespace, has_checkpoint: bool = False):
    """The model's configuration. What LoRA adapts is looked for in a model without weights."""
    folder = Path(args.model)
    if folder == EMBEDDED_MODEL and not folder.exists():
        raise UsageError(
            f"--model {args.model}: the embedded model is not on disk yet; make model puts it there"
        )
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model {args.model}: not a model folder or hub id ({first_line(error)})"
        ) from error
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else None
    if weights == [] and not args.dry_run:
        raise UsageError(
            f"--model {args.model}: no weights in this folder; it needs model.safetensors"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UsageError(
            f"--model {args.model}: not a causal language model ({first_line(error)})"
        ) from error
    if args.train_type == "lora":
        rank, alpha, dropout = args.lora_rank, args.lora_alpha, args.lora_dropout
        lora.inject(model, rank, alpha, dropout, args.target_modules)
    if args.resume_from_checkpoint and has_checkpoint:
        check_checkpoint(args, model)
    return config


def context_of(config) -> int:
    return config.get_text_config().max_position_embeddings


def load_tokenizer(model: str):
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        message = f"--model {model}: no tokenizer there ({first_line(error)})"
        raise UsageError(message) from error


def end_tokens(policy, tokenizer) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those of the model's two configs."""
    ends = {tokenizer.eos_token_id}
    for config in (policy.config, policy.generation_config):
        ids = config.eos_token_id
        ends.update(ids if isinstance(ids, list) else [ids])
    return sorted(ends - {None})


def check_checkpoint(args: argparse.Namespace, model) -> None:
    """Whether the checkpoint to resume is of the parameters that this model trains."""
    folder = checkpoints.checkpoint_to_resume(args)
    try:
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith("master.")]  # noqa: SIM118
            there = {n.removeprefix("master."): file.get_slice(n).get_shape() for n in names}
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--resume_from_checkpoint {folder}: not a whole checkpoint ({first_line(error)})"
        ) from error
    here = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise UsageError(
                f"--resume_from_checkpoint {folder}: {name} is {there.get(name, 'absent')} there "
                f"and {here.get(name, 'absent')} in this run; the --model, --train_type, "
                "--lora_rank and --target_modules of then work"
            )
