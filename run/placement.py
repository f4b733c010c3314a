"""Which device a run trains on, and what the flags of vLLM mean: its engine's device and settings."""

import argparse
import functools
import glob
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from data import UsageError
from run.engine import Engine, OnRank0
from run.flags import first_line
from run.log import say

DRIVER = "/proc/driver/nvidia/version"  # where the kernel's module of a GPU says what it is


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


def check_device(wanted: str) -> None:
    """UsageError where a run would train on another device than the user may expect: a GPU that is
    there, but that torch cannot use, is never left aside in silence."""
    if wanted == "cpu":
        return
    problem, works = why_no_gpu(), "cpu works, more slowly"
    if torch.cuda.is_available():
        gpus, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
        problem = f"process {number} of this machine needs GPU {number}, and torch sees {gpus}"
        works = f"--nproc_per_node {gpus} works"
        if number < gpus:
            return
    elif wanted == "cuda":
        problem = problem or "there is no GPU"
    if problem:
        raise UsageError(f"--device {wanted}: {problem}; {works}")


def why_no_gpu() -> str:
    """Why torch cannot use the GPU that this machine has; "" where there is none, or it is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not glob.glob("/dev/nvidia[0-9]*") or torch.cuda.is_available():
        return ""
    driver = "an NVIDIA driver"
    with suppress(OSError):
        version = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", Path(DRIVER).read_text())
        driver = f"NVIDIA's driver {version[1]}" if version else driver
    if torch.version.cuda is None:
        return f"there is a GPU with {driver}, but torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
        reason = "it does not say why"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
    return f"there is a GPU with {driver}, but {built}, cannot use it ({reason})"


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
        "trust_remote_code": args.trust_remote_code,
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
