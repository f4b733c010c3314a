"""What a run leaves behind and goes on from: its checkpoints.

    checkpoint-<step>/    model or adapter, tokenizer, optimizer.safetensors, trainer_state.json

A checkpoint is whole or not there: it is written under another name and renamed at the end, when
the disk has it. The optimizer's state is stored as full tensors by parameter name, so a run resumes
on any number of ranks. There is no pickle in it.
"""

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as torch_dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import dist
import lora
from data import UsageError, one_line
from run import adapters
from run import folder as folders
from run import reference as run_reference
from run.display import phase, warn


@dataclass(frozen=True)
class Options:
    """folder and checkpoints"""

    output_dir: Annotated[str, "folder for all that the run writes"] = "output"
    save_steps: Annotated[int, "write a checkpoint so often, and at the end", "from 1"] = 500
    save_total_limit: Annotated[int | None, "keep so many, the newest", "from 1"] = None
    resume_from_checkpoint: Annotated[
        str | None, "checkpoint folder, or true for the newest in output_dir"
    ] = None


class SaveError(RuntimeError):
    """A checkpoint could not be written: one line, the same on every rank."""


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside the optimizer's state."""

    step: int = 0  # optimizer steps made
    num_tokens: int = 0  # in all prompts and completions so far
    draws: int = 0  # batches sampled, which number the random numbers
    prompts: int = 0  # places of the data's order that they took
    unlogged: list[dict] = field(default_factory=list)  # metrics of steps that no line told yet
    completions_per_step: int | None = None


def step_size(args: argparse.Namespace, world) -> int:
    """Completions of one optimizer step, on all ranks."""
    return world.size * args.per_device_train_batch_size * args.gradient_accumulation_steps


def rollout_size(args: argparse.Namespace, world_size: int) -> int:
    """Completions that are sampled together, on all ranks: those of one optimizer step, or more."""
    micro_batches = args.steps_per_generation or args.gradient_accumulation_steps
    size = world_size * args.per_device_train_batch_size * micro_batches
    return args.generation_batch_size or size


# Saving -----------------------------------------------------------------------------------------


@phase("save")
def save(args, world, model, tokenizer, optimizer, progress: Progress, reference=None) -> None:
    """Write checkpoint-<step>. A collective call: every rank gives its part of the state.

    SaveError on every rank where it cannot be written; earlier checkpoints stay as they are.
    """
    state = optimizer_state(optimizer)
    reference_state = run_reference.state_of(args, reference)
    problem = None
    if world.is_main:
        folder = Path(args.output_dir) / f"checkpoint-{progress.step}"
        unfinished = folder.with_name(folder.name + folders.UNFINISHED)
        try:
            folders.keep(folder.parent)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished = folders.free(unfinished)  # a link leads to somebody else's files
            refuse_not_finite(state)
            save_model(args, model, state, unfinished)
            save_tokenizer(tokenizer, unfinished)
            save_file(state, unfinished / folders.OPTIMIZER)
            run_reference.write(reference_state, unfinished)
            (unfinished / folders.STATE).write_text(json.dumps(asdict(progress)) + "\n")
            folders.finish(unfinished, folder)  # a checkpoint that is there is whole
        except (OSError, SafetensorError, FloatingPointError) as error:  # no room, no right
            shutil.rmtree(unfinished, ignore_errors=True)
            problem = f"--output_dir {args.output_dir}: {folder.name} could not be written"
            problem += f" ({one_line(error)})"
    problem = world.from_main(problem)
    if problem:
        raise SaveError(problem)
    if world.is_main and args.save_total_limit:
        try:
            folders.prune(Path(args.output_dir), progress.step, args.save_total_limit)
        except OSError as error:  # which loses nothing
            warn(f"an old checkpoint could not be removed ({one_line(error)})")


def save_tokenizer(tokenizer, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a bare one on a full disk
        raise OSError(one_line(error)) from error


def refuse_not_finite(state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")


def save_model(args, model, state: dict[str, Tensor], folder: Path) -> None:
    """The model's weights, or the adapters', in their own type, made of the float32 masters.

    The model itself may hold but a part of each (ZeRO-3).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {n: tensor for n, tensor in model.state_dict().items() if n not in parameters}
    trained = {n: p for n, p in parameters.items() if f"master.{n}" in state}
    weights = buffers | {n: state[f"master.{n}"].to(p.dtype) for n, p in trained.items()}
    if args.train_type == "lora":
        save_adapters(model, weights, folder, str(args.model), args.target_modules)
    else:
        keep_valid(model.generation_config)
        model.save_pretrained(folder, state_dict=weights)


def keep_valid(config) -> None:
    """Models are published whose generation_config says temperature 0.6 and do_sample false, which
    transformers reads and refuses to write. The settings are kept, and used when it samples."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def save_adapters(
    model, weights: dict[str, Tensor], folder: Path, base_model: str, target_modules: list[str]
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT names them.

    weights: the parameters by name, the adapters' among them.
    """
    adapted = dict(lora.layers(model))
    tensors = {}
    for name in adapted:
        for part in lora.ADAPTER:
            tensor = weights[f"{name}.{part}"].detach()
            tensors[adapters.tensor_name(name, part)] = tensor.contiguous().cpu()
    targets = list(target_modules)
    if targets == lora.EVERYTHING:  # PEFT writes names, too
        targets = sorted({lora.last_part(name) for name in adapted})
    layer = next(iter(adapted.values()))  # all are alike
    rank = len(layer.lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": layer.scale * rank,  # which PEFT divides by r
        "lora_dropout": layer.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,  # W lies as (out, in)
        "inference_mode": True,  # frozen when loaded, unless is_trainable is asked for
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


# The optimizer's state: full tensors by parameter name ------------------------------------------


def optimizer_state(optimizer: dist.ZeroAdamW) -> dict[str, Tensor]:
    """The full state on the CPU of rank 0, empty on the others. Every rank has to call it."""
    state = {"steps": torch.tensor(optimizer.steps)}
    for bucket in optimizer.buckets:
        for kind in folders.KEPT:
            flat = full_state(optimizer, bucket, getattr(bucket, kind))  # collective
            if optimizer.rank > 0:
                continue
            for name, piece in zip(bucket.names, dist.views(flat, bucket.parameters)):
                state[f"{kind}.{name}"] = piece.to("cpu", copy=True)
    return state


@torch.no_grad()
def load_optimizer_state(optimizer: dist.ZeroAdamW, state: dict[str, Tensor]) -> None:
    """Take a full state, and the parameters with it; all that it needs to have is `state[name]`,
    of these parameters' shapes."""
    optimizer.steps = int(state["steps"])
    for bucket in optimizer.buckets:
        for kind in folders.KEPT:
            values = (state[f"{kind}.{name}"] for name in bucket.names)  # one at a time
            flat = flat_state(optimizer, bucket, values)
            if kind == "master":  # the parameters are these, rounded to their dtype
                bucket.flat.copy_(flat)
            getattr(bucket, kind).copy_(flat[bucket.owned])


def full_state(optimizer: dist.ZeroAdamW, bucket: dist.Bucket, shard: Tensor) -> Tensor:
    """The ranks' shards (S,) of a bucket's state in one tensor, as long as its parameters."""
    if optimizer.is_zero3:
        p = bucket.parameters[0]
        part, sizes = shard.view(dist.local(p).shape), {"shape": p.shape, "stride": p.stride()}
        whole = DTensor.from_local(part, p.device_mesh, p.placements, **sizes)
        return dist.full(whole).flatten()
    if not optimizer.is_zero2:
        return shard
    flat = shard.new_empty(optimizer.num_shards * len(shard))  # (N·S,)
    dist.all_gather(flat, shard)
    return flat


def flat_state(optimizer: dist.ZeroAdamW, bucket: dist.Bucket, values: Iterator[Tensor]) -> Tensor:
    """State of the parameters' shapes laid out as `bucket.flat` is."""
    if optimizer.is_zero3:
        p = bucket.parameters[0]
        cut = distribute_tensor(next(values), p.device_mesh, p.placements, src_data_rank=None)
        return dist.local(cut).flatten()
    flat = torch.zeros(len(bucket.flat))
    for piece, value in zip(dist.views(flat, bucket.parameters), values):
        piece.copy_(value)
    return flat


# Resuming ---------------------------------------------------------------------------------------


def resume(args: argparse.Namespace, world, optimizer, reference=None) -> Progress:
    """Take the optimizer's state of the checkpoint that --resume_from_checkpoint names, which
    holds the weights, too, and a reference that moves. Only rank 0 needs to have it on its disk."""
    if not args.resume_from_checkpoint:
        return Progress()
    folder = Path(args.resume_from_checkpoint)
    state = None
    if world.is_main:
        state = json.loads((folder / folders.STATE).read_text(encoding="utf-8"))
    load_optimizer_state(optimizer, FileOfMain(world, folder / folders.OPTIMIZER))
    if args.sync_ref_model and world.from_main((folder / run_reference.FILE).exists()):
        run_reference.load(reference, FileOfMain(world, folder / run_reference.FILE))
    state = world.from_main(state)
    known = {own.name: state[own.name] for own in fields(Progress) if own.name in state}
    progress = Progress(**known)
    if not progress.draws:  # an earlier version counted steps alone; a rollout cut short is used up
        progress.draws = math.ceil(progress.step / args.num_iterations)
        prompts = rollout_size(args, world.size) // args.num_generations
        progress.prompts = progress.draws * prompts
    return progress


class FileOfMain:
    """A safetensors file on rank 0's disk, as every rank reads it: `file[name]`, the same names in
    the same order.

    Rank 0 reads one tensor at a time and sends it to the others, so no rank holds more than that.
    UsageError on every rank for one that is damaged.
    """

    def __init__(self, world, path: Path):
        self.world = world
        self.folder = world.from_main(str(path.parent) if world.is_main else None)
        self.file = safe_open(path, "pt") if world.is_main else None
        names = self.file.keys() if world.is_main else ()
        shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in names}
        self.shapes = world.from_main(shapes)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]  # a KeyError is every rank's
        tensor = self.file.get_tensor(name) if self.world.is_main else None
        if self.world.size > 1:
            dtype = self.world.from_main(None if tensor is None else tensor.dtype)
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype)
            tensor = tensor.to(self.world.device)
            torch_dist.broadcast(tensor, src=0)
        if not tensor.isfinite().all():
            raise UsageError(
                f"--resume_from_checkpoint {self.folder}: its {name} holds numbers that are not "
                "finite; an earlier checkpoint, that is not damaged, works"
            )
        return tensor


def how_to_resume(args: argparse.Namespace) -> str:
    """The end of a line that tells why a run ended."""
    if int(os.environ.get("GROUP_RANK", 0)):  # not rank 0's node, whose disk has the checkpoints
        return (
            "--resume_from_checkpoint true, on every node, goes on from rank 0's newest "
            "checkpoint, if there is one"
        )
    newest, _ = folders.newest_whole(Path(args.output_dir))
    if newest is None:
        return "there is no checkpoint yet"
    return f"--resume_from_checkpoint true goes on from {newest}"
