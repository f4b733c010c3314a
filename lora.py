"""LoRA by hand: low-rank adapters beside frozen linear layers (Hu et al., arXiv 2106.09685).

    y = W x + b + (α / r) · B A dropout(x)        A (r, in) random, B (out, r) zero, so training starts at the base model

W stays frozen in its own precision, A and B are float32 and are all that is trained: for rank 8 on the embedded model
2.4 of 137 million numbers. Their product is computed in W's precision. With the adapters switched off the same model
is the reference policy of the KL term, so LoRA needs no second copy.

Adapters are saved in PEFT's own format and load with `PeftModel.from_pretrained`; PEFT's load here.
To try a new idea (DoRA, rsLoRA, another initialization), change `LoRALinear`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer with an adapter. `weight` and `bias` keep their names, so the model's own names still hold."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT does, and nn.Linear
        self.scale, self.dropout, self.enabled = alpha / rank, dropout, True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if self.dropout and self.training:
            low_rank = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            return F.linear(x, self.weight, self.bias) + F.linear(low_rank, (self.scale * self.lora_B).to(x.dtype))
        return AdaptedProduct.apply(x, self.weight, self.bias, self.lora_A, self.scale * self.lora_B)

    def merged_weight(self) -> Tensor:
        """W + (α/r) B A in W's precision, computed in float32: a new tensor, W itself stays as it is."""
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


class AdaptedProduct(torch.autograd.Function):
    """W x + b + B A x without a copy of W x or of the input's gradient, both larger than all else here.

    x (…, in), weight (out, in), bias (out,) or None, A (r, in), B (out, r) → (…, out). W and b get no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows, A_, B_ = x.flatten(0, -2), A.to(x.dtype), B.to(x.dtype)
        low_rank = rows @ A_.T
        ctx.save_for_backward(rows, weight, A_, B_, low_rank)
        ctx.dtype, ctx.shape = A.dtype, x.shape
        return F.linear(rows, weight, bias).addmm_(low_rank, B_.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B, low_rank = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_low_rank = grad @ B
        grad_x = (grad @ weight).addmm_(grad_low_rank, A).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_A, grad_B = (grad_low_rank.T @ rows).to(ctx.dtype), (grad.T @ low_rank).to(ctx.dtype)
        return grad_x, None, None, grad_A, grad_B


def find_targets(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt: all but the output head, or those whose last name parts are given.

    ValueError if a name fits no linear layer; it lists the names that would.
    """
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if list(target_modules) == ["all-linear"]:
        if not linears:
            raise ValueError("--target_modules all-linear: the model has no linear layer; --train_type full works")
        return linears

    def fits(name: str, target: str) -> bool:
        return name == target or name.endswith("." + target)

    for target in target_modules:
        if not any(fits(name, target) for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(
                f"--target_modules {target}: no such linear layer; there are: all-linear, {', '.join(known)}"
            )
    return [name for name in linears if any(fits(name, target) for target in target_modules)]


def inject(
    model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, target_modules: Sequence[str] = ("all-linear",)
) -> nn.Module:
    """Freeze the model and put adapters beside its linear layers, in place."""
    model.requires_grad_(False)
    for name in find_targets(model, target_modules):
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha, dropout))
    return model


def layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this block the model is its base: the reference policy."""
    adapted = [module for _, module in layers(model)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model as it was before `inject`, tied ones once, by the names they have without adapters."""
    adapters = ("lora_A", "lora_B")
    return ((n, p.detach()) for n, p in model.named_parameters() if n.rpartition(".")[2] not in adapters)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same with adapters merged in, one layer at a time; the model stays, bit for bit, what it is."""
    adapted = {f"{name}.weight": module for name, module in layers(model)}
    with torch.no_grad():
        for name, parameter in plain_parameters(model):
            yield name, adapted[name].merged_weight() if name in adapted else parameter


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its layer, in place: a plain model again, as fast as the base."""
    for name, module in list(layers(model)):
        parent, _, child = name.rpartition(".")
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        with torch.no_grad():
            linear.weight = nn.Parameter(module.merged_weight(), requires_grad=False)
        linear.bias = module.bias
        setattr(model.get_submodule(parent), child, linear)
    return model


def save(
    model: nn.Module, weights: dict[str, Tensor], folder: str | Path, base_model: str, target_modules: Sequence[str]
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT names them.

    weights: the parameters by name, the adapters' among them; the model itself may hold but a part of each.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapted = list(layers(model))
    names = [f"{name}.{part}" for name, _ in adapted for part in ("lora_A", "lora_B")]
    tensors = {f"base_model.model.{name}.weight": weights[name].detach().contiguous().cpu() for name in names}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    first = adapted[0][1]
    everything = list(target_modules) == ["all-linear"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.lora_A.shape[0],
        "lora_alpha": first.scale * first.lora_A.shape[0],
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in adapted})
        if everything
        else list(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
