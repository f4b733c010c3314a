"""The reference policy in a checkpoint, where it is not --model's for good (--sync_ref_model)."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import dist

FILE = "reference.safetensors"


def state_of(args, reference) -> dict[str, Tensor]:
    """Its weights on the CPU, whole. With ZeRO-3 a collective call."""
    if not args.sync_ref_model:
        return {}
    return {name: dist.full(p.detach()).to("cpu") for name, p in reference.named_parameters()}


def write(state: dict[str, Tensor], folder: Path) -> None:
    if state:
        save_file(state, folder / FILE)


@torch.no_grad()
def load(reference: torch.nn.Module, state) -> None:
    """Take the weights of `state[name]`, each rank its part."""
    for name, parameter in reference.named_parameters():
        value = state[name].to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        dist.local(parameter).copy_(dist.local(value))
