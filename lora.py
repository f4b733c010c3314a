"""LoRA by hand: low-rank adapters beside frozen linear layers (Hu et al., arXiv 2106.09685, eq. 3).

    y = W x + b + (α / r) · B A dropout(x)         W (out, in)   A (r, in)   B (out, r)

       ┌── W x + b ───────────────────── + ── y    W stays frozen, in its own precision.
    x ─┤                                 │         A (random) and B (zero, so that training starts
       └── dropout ── A ── B ── · α / r ─┘         at the base model) are float32 and learn.

With its adapters switched off the same model is the reference policy of the KL term, so LoRA needs
no second copy. Adapters are saved in PEFT's own format: `PeftModel.from_pretrained` loads them.

To try a new idea (DoRA, rsLoRA, another initialization), change `LoRALinear`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UsageError

ADAPTER = ("lora_A", "lora_B")
EVERYTHING = ["all-linear"]  # PEFT's word for every linear layer but the output head


@dataclass(frozen=True)
class Options:
    """LoRA"""

    lora_rank: Annotated[int, "r, the adapters' rank", "from 1"] = 8
    lora_alpha: Annotated[float, "α; adapters are scaled by α / r", "above 0"] = 32
    lora_dropout: Annotated[float, "dropout in front of adapters", "0 to 1"] = 0.0
    target_modules: Annotated[list[str], "linear layers to adapt: all but the head, or names"] = (
        "all-linear",
    )


class LoRALinear(nn.Linear):
    """A linear layer with an adapter, made from the layer whose place it takes.

    `weight` and `bias` are that layer's own and keep their names, so the model's names still hold.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)  # nn.Linear's own would allocate another W
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # Float32 whatever W is: bfloat16's 8 bits would round most steps away.
        kind = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT does, and nn.Linear
        self.scale = alpha / rank
        self.dropout = dropout
        self.enabled = True  # `disabled` switches it

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → y (…, out), all products in x's precision, which is W's."""
        base = F.linear(x, self.weight, self.bias)  # (…, out)
        if not self.enabled:
            return base
        A = self.lora_A.to(x.dtype)
        B = (self.scale * self.lora_B).to(x.dtype)  # rounded once, after it is scaled
        low_rank = F.linear(F.dropout(x, self.dropout, self.training), A)  # (…, r)
        return base + F.linear(low_rank, B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + (α / r) B A in W's precision, summed in float32: a new tensor, W stays as it is."""
        delta = self.scale * self.lora_B @ self.lora_A  # (out, in)
        return (self.weight.float() + delta).to(self.weight.dtype)


# Putting adapters into a model, and out again ---------------------------------------------------


def find_targets(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt.

    target_modules: "all-linear" for all but the output head, or the last parts of names, such as
    "q_proj" or "mlp.up_proj". UsageError for a name that fits no layer; it lists those that would.
    """
    head = model.get_output_embeddings()  # often the embeddings' own weight, which stays
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            linears.append(name)
    if list(target_modules) == EVERYTHING:
        if not linears:
            flag = "--target_modules all-linear"
            raise UsageError(f"{flag}: the model has no linear layer; --train_type full works")
        return linears
    wanted = set()
    for target in target_modules:
        # With a dot in front of both, "proj" does not fit "q_proj".
        fitting = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not fitting:
            known = sorted({last_part(name) for name in linears})
            works = f"there are: all-linear, {', '.join(known)}"
            raise UsageError(f"--target_modules {target}: no such linear layer; {works}")
        wanted.update(fitting)
    return [name for name in linears if name in wanted]  # in the model's order


def last_part(name: str) -> str:
    """model.layers.0.self_attn.q_proj → q_proj"""
    return name.rpartition(".")[2]


def inject(
    model: nn.Module, rank: int, alpha: float, dropout=0.0, target_modules=("all-linear",)
) -> nn.Module:
    """Freeze the model and put adapters beside its linear layers, in place."""
    model.requires_grad_(False)  # embeddings and norms, too; the adapters come after
    for name in find_targets(model, target_modules):
        linear = model.get_submodule(name)
        model.set_submodule(name, LoRALinear(linear, rank, alpha, dropout))
    return model


def layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this block the model is its base: the reference policy."""
    adapted = [module for _, module in layers(model)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:  # after an error, too: who catches it trains on
        for module in adapted:
            module.enabled = True


# Its weights, for a sampler ---------------------------------------------------------------------


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model as it was before `inject`, by its own names, tied ones once."""
    for name, parameter in model.named_parameters():  # which skips what it has given before
        if last_part(name) not in ADAPTER:
            yield name, parameter.detach()


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same with adapters merged in, one layer at a time; the model itself stays as it is."""
    adapted = {f"{name}.weight": module for name, module in layers(model)}
    for name, parameter in plain_parameters(model):
        if name in adapted:
            parameter = adapted[name].merged_weight()  # made when asked for: one is held at a time
        yield name, parameter
