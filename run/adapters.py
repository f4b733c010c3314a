"""A LoRA folder as --model: training goes on from its adapters, on top of their base.

    --model output/checkpoint-140   becomes   --model <its base>  --adapters output/checkpoint-140
                                              --lora_rank, --lora_alpha … of its adapter_config.json

The folder is PEFT's, whoever wrote it. What it says beyond plain LoRA is refused, not passed over.
"""

import argparse
import math
import os
import re
from collections.abc import Collection
from pathlib import Path

from data import UsageError, one_line
from run import folder as folders
from run import moved
from run.values import from_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"}
READ |= {"base_model_name_or_path", "peft_type", "bias"}
NEEDED = {"r": int, "lora_alpha": int | float, "base_model_name_or_path": str}
# Which layers have an adapter: their names are read from the weights.
SELECT = {"exclude_modules", "layers_to_transform", "layers_pattern"}
# How it was made, and how to run it.
SILENT = {"task_type", "auto_mapping", "inference_mode", "peft_version", "runtime_config"}
SILENT |= {"megatron_config", "megatron_core", "qalora_group_size", "eva_config", "loftq_config"}
# Ways of starting that leave the base as it is; others change it, so that W is another.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def take(args: argparse.Namespace, given: Collection[str], helps: str | None = None) -> None:
    """Let args train on from the adapters that --model or --adapters names, if one does.

    given: the flags that somebody has set. helps: what names a base that has moved. UsageError where
    these or the folder say what cannot be.
    """
    flag = f"--adapters {args.adapters}"
    refuse_runs_folder(args.model)
    if args.model and is_adapter(args.model):
        if args.adapters not in (None, args.model):
            raise UsageError(f"{flag}: --model {args.model} has adapters; one of the two works")
        flag = f"--model {args.model}"
        args.adapters, args.model = args.model, None
    if not args.adapters:
        return
    if args.train_type == "full":
        raise UsageError(
            f"--train_type full: {flag} holds LoRA adapters; lora goes on with them, and "
            f"python -m run.merge {args.adapters} OUT makes a model of them"
        )
    config = read_config(args.adapters, flag)
    if not args.model:
        args.model = base_of(config, args.adapters, flag, helps)
    for name, value in settings_of(config, args.adapters).items():
        wanted = getattr(args, name)
        if name not in given:
            setattr(args, name, value)
        elif name == "lora_dropout" or wanted == ["all-linear"]:  # whose names are compared later
            continue
        elif wanted != value:
            raise UsageError(f"--{name} {shown(wanted)}: {flag} has {shown(value)}; that works")


def refuse_runs_folder(model: str | None) -> None:
    """Which of a run's checkpoints to train is for somebody to say; UsageError names the newest."""
    if model and folders.checkpoints(Path(model)) and not (Path(model) / "config.json").exists():
        newest, _ = folders.newest_whole(Path(model))
        works = f"its newest checkpoint, {newest}, works" if newest else "and none of it is whole"
        raise UsageError(f"--model {model}: a run's folder, not a model's; {works}")


def read_config(folder: str, flag: str) -> dict:
    """What adapter_config.json says, if it is of plain LoRA."""
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UsageError(f"{flag}: no {name} there; a folder that PEFT or a run saved works")
    try:
        config = from_json((path / CONFIG).read_text(encoding="utf-8"))
        problem = beyond_lora(config)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{flag}: {CONFIG} is not PEFT's; a LoRA checkpoint works") from error
    if problem:
        raise UsageError(f"{flag}: {CONFIG} says {problem}; plain LoRA works")
    return config


def base_of(config: dict, folder: str, flag: str, helps: str | None) -> str:
    """The base model: where the config says, where that is now, or on the hub."""
    recorded = config["base_model_name_or_path"]
    looked = moved.places(recorded, Path(folder), Path(folder).parent)
    for place in looked:
        # Of the embedded model models.py tells more.
        if os.path.exists(place) or place == moved.EMBEDDED_MODEL:
            if place != looked[0]:
                moved.tell(f"{flag}: its base {recorded} is not there: {place} takes its place")
                return str(place)
            return recorded
    if HUB_ID.fullmatch(recorded):
        return recorded
    helps = helps or f"--adapters {folder} --model BASE"
    raise UsageError(
        f"{flag}: its base model is in none of {', '.join(map(str, looked))}; {helps} names its "
        "place"
    )


def is_recorded(args: argparse.Namespace) -> bool:
    """Whether it is the adapters that name this model."""
    if not args.adapters:
        return False
    file = Path(args.adapters) / CONFIG
    return from_json(file.read_text(encoding="utf-8"))["base_model_name_or_path"] == args.model


def beyond_lora(config: dict) -> str | None:
    """The first thing that it asks for and that is not done here."""
    if config["peft_type"] != "LORA":
        return f"peft_type {config['peft_type']}"
    if config.get("bias", "none") != "none":
        return f"bias {config['bias']}"
    if config.get("init_lora_weights", True) not in STARTS:
        return f"init_lora_weights {config['init_lora_weights']}"
    for name, kind in NEEDED.items():
        if not config[name] or not isinstance(config[name], kind):
            return f"{name} {config[name]}"
    if not isinstance(config.get("lora_dropout", 0.0), int | float):
        return f"lora_dropout {config['lora_dropout']}"
    for name, value in config.items():
        if value and name not in READ | SELECT | SILENT:
            return f"{name} {shown(value)}"
    return None


def settings_of(config: dict, folder: str) -> dict:
    """The same as flags."""
    alpha = config["lora_alpha"]
    if config.get("use_rslora"):  # scaled by α / √r, where plain LoRA has α / r
        alpha *= math.sqrt(config["r"])
    targets = config["target_modules"]
    is_names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not is_names or any(config.get(name) for name in SELECT):
        targets = sorted(names_of(folder))
    return {
        "lora_rank": config["r"],
        "lora_alpha": alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets,
    }


def shown(value) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# Its weights ------------------------------------------------------------------------------------


def tensor_name(layer: str, part: str) -> str:
    """PEFT's name of a layer's lora_A or lora_B."""
    return f"base_model.model.{layer}.{part}.weight"


def shapes_of(folder: str | Path) -> dict[str, list[int]]:
    """The shape of each tensor by its name there."""
    from safetensors import SafetensorError

    try:
        return folders.shapes_of(Path(folder) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        problem = f"{WEIGHTS} cannot be read ({one_line(error)}); a whole checkpoint works"
        raise UsageError(f"--adapters {folder}: {problem}") from error


def names_of(folder: str | Path) -> set[str]:
    """The names of the layers that have an adapter."""
    prefix, _, suffix = tensor_name("|", "lora_A").partition("|")
    there = [name for name in shapes_of(folder) if name.endswith(suffix)]
    return {name.removeprefix(prefix).removesuffix(suffix) for name in there}


def inject(args: argparse.Namespace, model) -> None:
    """Put adapters beside the model's layers: new ones, or those of --adapters.

    A model without weights is given none, and tells what is wrong with the folder: UsageError.
    """
    import lora

    rank, alpha, dropout = args.lora_rank, args.lora_alpha, args.lora_dropout
    lora.inject(model, rank, alpha, dropout, args.target_modules)
    if args.adapters:
        layers = dict(lora.layers(model))
        check(args, layers)
        load(args.adapters, layers)


def check(args: argparse.Namespace, layers: dict) -> None:
    """UsageError unless the folder has one pair of tensors for each adapted layer."""
    here = {}
    for name, layer in layers.items():
        here[tensor_name(name, "lora_A")] = list(layer.lora_A.shape)
        here[tensor_name(name, "lora_B")] = list(layer.lora_B.shape)
    there = shapes_of(args.adapters)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise UsageError(
                f"--adapters {args.adapters}: {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} in --model {args.model}; the model that they were "
                "trained on, without --target_modules, works"
            )


def load(folder: str | Path, layers: dict) -> None:
    """Put the folder's adapters into these layers, in place."""
    import torch
    from safetensors import safe_open

    with safe_open(Path(folder) / WEIGHTS, "pt") as file, torch.no_grad():
        for name, layer in layers.items():
            if layer.lora_A.is_meta:
                continue
            layer.lora_A.copy_(file.get_tensor(tensor_name(name, "lora_A")))
            layer.lora_B.copy_(file.get_tensor(tensor_name(name, "lora_B")))
