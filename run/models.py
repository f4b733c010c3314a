"""What can be told of a model without its weights: whether it can be trained here, and how long it reads."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dist
import lora
from data import UsageError, either
from run import adapters
from run.flags import EMBEDDED_MODEL, first_line
from run.log import say


def model_config(args: argparse.Namespace, has_checkpoint: bool = False):
    """The model's configuration. What LoRA adapts is looked for in a model without weights."""
    folder = Path(args.model)
    if folder == EMBEDDED_MODEL and not folder.exists():
        raise UsageError(
            f"--model {args.model}: the embedded model is not on disk yet; make model puts it there"
        )
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        refuse_code("--model", args.model, error)
        why = f"not a model folder or hub id ({first_line(error)})"
        if adapters.is_recorded(args):
            why += f"; {args.adapters} has it as its base, and --model BASE names another place"
        raise UsageError(f"--model {args.model}: {why}") from error
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else None
    if weights == [] and not args.dry_run:
        raise UsageError(
            f"--model {args.model}: no weights in this folder; it needs model.safetensors"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=args.trust_remote_code
            )
    except ValueError as error:
        raise UsageError(
            f"--model {args.model}: not a causal language model ({first_line(error)})"
        ) from error
    refuse_recurrent(args, model)
    if args.train_type == "lora":
        adapters.inject(args, model)
    if args.resume_from_checkpoint and has_checkpoint:
        check_checkpoint(args, model)
    return config


def refuse_code(flag: str, model: str, error: Exception) -> None:
    """UsageError, if transformers would read this model with the model's own code alone."""
    if "trust_remote_code" in str(error):
        raise UsageError(
            f"{flag} {model}: brings Python of its own, which runs with your rights; "
            "--trust_remote_code true allows it, once you have read it"
        ) from error


def refuse_recurrent(args: argparse.Namespace, model) -> None:
    """A state that passes from token to token would read the padding of a batch, and the prompts
    that others share a row with: what samples would not be what is trained."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    others = sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind)
    if others or getattr(model, "_is_stateful", False):
        what = either(others) if others else "recurrent"
        raise UsageError(
            f"--model {args.model}: a {model.config.model_type} has {what} layers, which keep a "
            "state from token to token; a model whose layers all attend works"
        )


def tell_frozen(world, model) -> None:
    """LoRA adapts linear layers; say what else is as large and stays as it is."""
    frozen = []
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 3 and not parameter.requires_grad:
            frozen.append(lora.last_part(name.removesuffix(".weight")))
    if frozen:
        names = ", ".join(sorted(set(frozen)))
        what = f"{len(frozen)} weights that are no linear layers stay frozen ({names})"
        say(world, f"--train_type lora: {what}; --train_type full trains them, too")


def load(args: argparse.Namespace, from_pretrained: Callable, dtype: torch.dtype):
    """A model with its weights, all of them from the files. UsageError if these do not fit."""
    try:
        model, info = from_pretrained(
            args.model,
            dtype=dtype,
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which then are told, and refused here
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UsageError(
            f"--model {args.model}: its weights cannot be loaded ({first_line(error)}); "
            "a whole checkpoint works"
        ) from error
    refuse_missing(args, info)
    for name, there, here in sorted(info["mismatched_keys"])[:1]:
        raise UsageError(
            f"--model {args.model}: {name} is {list(there)} in its files and {list(here)} by its "
            "config.json; a checkpoint whose two fit works"
        )
    return model


def refuse_not_finite(args: argparse.Namespace, model) -> None:
    """This rank's part of the weights: a sum of what is not finite is not either."""
    for name, parameter in model.named_parameters():
        if not dist.local(parameter.detach()).sum().isfinite():
            raise UsageError(
                f"--model {args.model}: {name} holds numbers that are not finite; "
                "a checkpoint that is not damaged works"
            )


def refuse_missing(args: argparse.Namespace, info: dict) -> None:
    """What a checkpoint lacks, transformers makes up at random. info: of from_pretrained."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"--model {args.model}: its weights lack {', '.join(missing[:3])}{more}; "
            "a whole checkpoint works"
        )


def context_of(config) -> float:
    """The longest sequence that the model takes; infinite where its configuration says nothing."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if getattr(text, name, None):
            return getattr(text, name)
    return math.inf


def load_tokenizer(args: argparse.Namespace):
    try:
        return AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # a broken tokenizer.json is a bare Exception
        refuse_code("--model", args.model, error)
        message = f"--model {args.model}: no tokenizer there ({first_line(error)})"
        raise UsageError(message) from error


def end_tokens(policy, tokenizer) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those of the model's two configs."""
    ends = {tokenizer.eos_token_id}
    for config in (policy.config, policy.config.get_text_config(), policy.generation_config):
        ids = getattr(config, "eos_token_id", None)  # which a composite one may not have
        ends.update(ids if isinstance(ids, list) else [ids])
    return sorted(ends - {None})


def template_of(args: argparse.Namespace) -> dict:
    """The arguments of --chat_template_kwargs."""
    text = args.chat_template_kwargs or "{}"
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError) as error:
        works = """an object of JSON, such as '{"enable_thinking": false}', works"""
        raise UsageError(f"--chat_template_kwargs {text}: {works}") from error


def check_checkpoint(args: argparse.Namespace, model) -> None:
    """Whether the checkpoint to resume is of the parameters that this model trains."""
    folder = Path(args.resume_from_checkpoint)
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
