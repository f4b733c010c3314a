"""What the flags of vLLM mean: which device its engine gets, and with what settings it starts there."""

import argparse
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from data import UsageError
from run.engine import Engine, OnRank0
from run.log import say


@dataclass(frozen=True)
class Options:
    """vLLM"""

    use_vllm: Annotated[bool, "sample with vLLM"] = False
    vllm_device: Annotated[str, "auto, the first GPU no training process uses, or cuda:x"] = "auto"
    vllm_gpu_memory_utilization: Annotated[
        float | None,
        "share of the GPU, passed to vLLM; 0.9, or 0.3 of one that trains, when absent",
        "above 0 to 1",
    ] = None
    vllm_max_model_len: Annotated[
        int | None, "passed to vLLM; the longest prompt and completion when absent", "from 1"
    ] = None
    vllm_timeout: Annotated[
        float, "seconds the engine may give no sign of life, once started", "above 0"
    ] = 300.0


def engine_for(args: argparse.Namespace, world) -> OnRank0:
    """The engine that the flags describe, started."""
    device = device_of(args)
    shared = device.type == "cuda" and device == world.device
    memory = args.vllm_gpu_memory_utilization or (0.3 if shared else 0.9)
    if shared:
        what = f"vLLM shares {device}, the only GPU, with training"
        say(world, f"{what}; --vllm_gpu_memory_utilization is {memory}")
    settings = {
        "model": args.model,
        "dtype": args.torch_dtype,
        "seed": args.seed % 2**32,
        "max_model_len": args.vllm_max_model_len,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
        "generation_config": "vllm",
    }
    if device.type == "cuda":
        settings["gpu_memory_utilization"] = memory
        settings["async_scheduling"] = False  # nothing in flight when weights change
    else:
        settings["kv_cache_memory_bytes"] = 2 << 30
        settings["enforce_eager"] = True  # compiling takes minutes and brings a tenth
        # With seeds, 0.32.0 fails on half a prompt: "CPU Generator does not use offset".
        settings["enable_chunked_prefill"] = False
    log = Path(args.output_dir) / "vllm.log"
    start = functools.partial(
        Engine, settings, device, trainer=world.device, timeout=args.vllm_timeout, log=log
    )
    return OnRank0(world, start)


def device_of(args: argparse.Namespace) -> torch.device:
    """The engine's device, of rank 0's node; on other nodes there is none to find."""
    if int(os.environ.get("GROUP_RANK", 0)):
        return torch.device("cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return vllm_device(args.vllm_device, gpus, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def vllm_device(wanted: str, gpus: int, trainers: int) -> torch.device:
    """The device that `--vllm_device` means, with GPUs numbered as this process sees them.

    `trainers` processes train here, on the first GPUs; a single GPU is shared. The CPU where there
    is no GPU. UsageError when the device is not there or not free.
    """
    if wanted == "auto" and not gpus:
        return torch.device("cpu")
    training = 0 if gpus == trainers == 1 else trainers
    free = [f"cuda:{i}" for i in range(training, gpus)]
    if wanted == "auto" and free:
        return torch.device(free[0])
    if wanted in free:
        return torch.device(wanted)
    if not gpus:
        raise UsageError(f"--vllm_device {wanted}: there is no GPU; auto, the CPU, works")

    if wanted == "auto":
        problem = f"{trainers} processes train on {gpus} GPUs"
    elif wanted in [f"cuda:{i}" for i in range(min(training, gpus))]:
        problem = "a process trains on it"
    else:
        problem = f"there is no such GPU among {gpus}"
    if free:
        hint = f"auto or {' or '.join(free)} works"
    elif gpus == 1:
        hint = "one process would share it"
    else:
        hint = f"{gpus - 1} processes would leave one free"
    raise UsageError(f"--vllm_device {wanted}: {problem}; {hint}")
