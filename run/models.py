"""What can be told of a model without its weights: whether it can be trained here, and how long it reads."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import dist
import lora
from data import UsageError, either
from run import adapters
from run import folder as folders
from run import reference as run_reference
from run.flags import EMBEDDED_MODEL, first_line
from run.log import say
from run.values import from_json

# Files of a model's folder that are an object of JSON each, where they are there.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OBJECTS = ("config.json", "generation_config.json", *TOKENIZER, "added_tokens.json")
OBJECTS += ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def model_config(args: argparse.Namespace, has_checkpoint: bool = False):
    """The model's configuration. What LoRA adapts is looked for in a model without weights."""
    folder = Path(args.model)
    if folder == EMBEDDED_MODEL and not folder.exists():
        raise UsageError(
            f"--model {args.model}: the embedded model is not on disk yet; make model puts it there"
        )
    check_files("--model", args.model)
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # of any kind, where a value is of another type than it should be
        refuse_code("--model", args.model, error)
        why = f"not a model folder or hub id ({reason(error)})"
        if (folder / "config.json").is_file():
            why = f"its config.json cannot be used ({reason(error)})"
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
    except Exception as error:
        raise UsageError(
            f"--model {args.model}: not a causal language model ({reason(error)})"
        ) from error
    refuse_recurrent(args, model)
    if args.train_type == "lora":
        adapters.inject(args, model)
    if args.resume_from_checkpoint and has_checkpoint:
        check_checkpoint(args, model)
    return config


def check_files(flag: str, model: str) -> None:
    """UsageError, of the first file in a model's folder that is damaged, of those that transformers
    reads: some of them it would pass over, and of others not say which."""
    folder = Path(model)
    files = [folder / name for name in OBJECTS]
    files += sorted([*folder.glob("model*.safetensors"), *folder.glob("*.jinja")])
    for file in filter(Path.is_file, files):
        try:
            if file.suffix == ".safetensors":
                folders.shapes_of(file)
                continue
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".json":
                said = from_json(text)
                if not isinstance(said, dict):
                    raise ValueError("no object of JSON")
                token_ids(said.get("eos_token_id"))
        except (OSError, ValueError, SafetensorError) as error:
            problem = f"{file.name} cannot be read ({reason(error)}); a whole one works"
            raise UsageError(f"{flag} {model}: {problem}") from error


def token_ids(said) -> list[int]:
    """What a configuration says of eos_token_id: one token, several or none. Else ValueError."""
    ids = said if isinstance(said, list) else [said]
    for value in ids:
        if not isinstance(value, int | None):
            raise ValueError(f"eos_token_id {value!r:.40} is no token's number")
    return [value for value in ids if value is not None]


def reason(error: Exception) -> str:
    """Why a library could not read something, with the error's kind where that tells more."""
    kind, told = type(error).__name__, first_line(error)
    if told.endswith(":"):  # what is wrong stands below
        return " ".join(str(error).split())[:200]
    is_told = isinstance(error, OSError | ValueError | RuntimeError | SafetensorError)
    return told if is_told or told == kind else f"{kind}: {told}"


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


def load(from_pretrained: Callable, flag: str, path: str, dtype, trust_remote_code: bool):
    """A model with its weights, all of them from the files. UsageError, of the flag that names it,
    if these do not fit."""
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of what does not fit
    try:
        model, info = from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which then are told, and refused here
        )
    except Exception as error:  # of any kind: pickled weights raise what they like
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise UsageError(
            f"{flag} {path}: its weights cannot be loaded ({reason(error)}); "
            "a whole checkpoint works"
        ) from error
    finally:
        logging.set_verbosity(told)
    refuse_missing(f"{flag} {path}", info)
    for name, there, here in sorted(info["mismatched_keys"])[:1]:
        raise UsageError(
            f"{flag} {path}: {name} is {list(there)} in its files and {list(here)} by its "
            "config.json; a checkpoint whose two fit works"
        )
    return model


def refuse_not_finite(args: argparse.Namespace, model) -> None:
    """This rank's part of the weights: a sum of what is not finite is not either."""
    for name, parameter in model.named_parameters():
        if not dist.local(parameter.detach()).sum().isfinite():
            flag = f"--model {args.model}"
            if args.adapters and lora.last_part(name) in lora.ADAPTER:
                flag = f"--adapters {args.adapters}"
            raise UsageError(
                f"{flag}: {name} holds numbers that are not finite; "
                "a checkpoint that is not damaged works"
            )


def refuse_missing(given: str, info: dict) -> None:
    """What a checkpoint lacks, transformers makes up at random. info: of from_pretrained."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"{given}: its weights lack {', '.join(missing[:3])}{more}; a whole checkpoint works"
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
        there = [name for name in TOKENIZER if (Path(args.model) / name).is_file()]
        problem = f"its tokenizer cannot be read from {', '.join(there)}"
        if not there:
            problem = "no tokenizer there"
        message = f"--model {args.model}: {problem} ({reason(error)}); a whole tokenizer.json works"
        raise UsageError(message) from error


def end_tokens(policy, tokenizer) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those of the model's two configs."""
    ends = {tokenizer.eos_token_id}
    for config in (policy.config, policy.config.get_text_config(), policy.generation_config):
        said = getattr(config, "eos_token_id", None)  # which a composite one may not have
        try:
            ends.update(token_ids(said))
        except ValueError as error:
            raise UsageError(f"--model: in its configuration {error}; a number works") from error
    return sorted(ends - {None})


def template_of(args: argparse.Namespace) -> dict:
    """The arguments of --chat_template_kwargs."""
    text = args.chat_template_kwargs or "{}"
    try:
        return dict(from_json(text).items())
    except (ValueError, AttributeError) as error:
        works = """an object of JSON, such as '{"enable_thinking": false}', works"""
        raise UsageError(f"--chat_template_kwargs {text}: {works}") from error


def check_checkpoint(args: argparse.Namespace, model) -> None:
    """Whether the checkpoint to resume is of the parameters that this model trains, and a reference
    in it of those that it has."""
    folder = Path(args.resume_from_checkpoint)
    every = {name: list(p.shape) for name, p in model.named_parameters()}
    trained = {name: every[name] for name, p in model.named_parameters() if p.requires_grad}
    compare(folder, folders.OPTIMIZER, folders.KEPT[0] + ".", trained)  # the moments are as these
    if args.sync_ref_model and (folder / run_reference.FILE).exists():
        compare(folder, run_reference.FILE, "", every)


def compare(folder: Path, file: str, prefix: str, here: dict[str, list[int]]) -> None:
    """UsageError unless the tensors of this prefix in a checkpoint's file have these shapes."""
    there = folders.shapes_of(folder / file)
    there = {n.removeprefix(prefix): shape for n, shape in there.items() if n.startswith(prefix)}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise UsageError(
                f"--resume_from_checkpoint {folder}: in {file} {name} is "
                f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} in this run; "
                "the --model, --train_type, --lora_rank and --target_modules of then work"
            )
