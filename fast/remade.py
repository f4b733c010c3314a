"""Norms and gates whose outputs are made again for the backward pass instead of being kept.

Replaces the `forward` of a model's RMS norms and gated MLPs, and, within `remaking()`, what
autograd keeps. A product keeps its input for the gradient of its weights. Where that input is what
a norm or a gate gave, it is cheap to make again from what these read, which is kept anyway:

    x ─ norm ─> y ─ W ─> …     plain: y is kept, and x with a float32 copy of it
                               here: x is kept; y is made again when the backward pass needs it

A third less memory of a layer (selective recomputation: Korthikanti et al., arXiv 2205.05198).
To have another part of a model made again, wrap its function in `remade`.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import SiLUActivation


class Remade:
    """How to make a tensor again from others: what autograd keeps in the tensor's place.

    It is made when the backward pass needs it, once for all products that read it. What `remade`
    did not give is kept as it is, in the same wrapper, because autograd's hooks turn off its check
    for changes.
    """

    # memory_of what `remade` gave → that, while it lives. Hooks see another object, so its memory
    # is all that tells.
    known: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __init__(self, function: Callable[..., Tensor], *inputs):
        self.function, self.inputs = function, inputs
        self.readers, self.tensor = 0, None
        self.versions = self.versions_now()

    def versions_now(self) -> list[int]:
        return [x._version for x in self.inputs if isinstance(x, Tensor)]

    def make(self) -> Tensor:
        """The tensor, for one of its readers; RuntimeError if what it is made of has changed."""
        if self.versions_now() != self.versions:
            raise RuntimeError("a tensor that the backward pass needs was changed in place")
        tensor = self.tensor
        if tensor is None:
            tensor = self.function(*self.inputs)
        self.readers -= 1
        self.tensor = tensor if self.readers > 0 else None  # the last reader lets go of it
        return tensor

    @staticmethod
    def pack(tensor: Tensor) -> "tuple[Remade, torch.Size]":
        """What autograd keeps of a tensor."""
        known = None
        if tensor.is_contiguous():
            known = Remade.known.get(memory_of(tensor))
        kept = Remade(lambda x: x, tensor) if known is None else known.remade
        kept.readers += 1
        return kept, tensor.shape

    @staticmethod
    def unpack(packed: "tuple[Remade, torch.Size]") -> Tensor:
        kept, shape = packed
        return kept.make().view(shape)


def memory_of(tensor: Tensor) -> tuple:
    """The same for a contiguous tensor and all contiguous views of the whole of it, until it is
    changed in place."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version


def remaking() -> torch.autograd.graph.saved_tensors_hooks:
    """Within this block what `remade` gives is not kept."""
    return torch.autograd.graph.saved_tensors_hooks(Remade.pack, Remade.unpack)


def remade(function: Callable[..., Tensor], *inputs) -> Tensor:
    """function(*inputs), of which autograd keeps the inputs alone within `remaking()`."""
    out = function(*inputs)
    if out.requires_grad and out.is_contiguous():
        out.remade = Remade(function, *inputs)
        Remade.known[memory_of(out)] = out
    return out


# What is replaced -------------------------------------------------------------------------------


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that look like RMS norms."""
    attributes = ("weight", "variance_epsilon")
    return [m for m in model.modules() if all(hasattr(m, name) for name in attributes)]


def gates_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that look like MLPs with a SiLU gate."""
    parts = ("gate_proj", "up_proj", "down_proj")
    modules = [m for m in model.modules() if all(hasattr(m, name) for name in parts)]
    return [m for m in modules if isinstance(getattr(m, "act_fn", None), SiLUActivation)]


def replace(modules: Sequence[torch.nn.Module], forward: Callable) -> list[torch.nn.Module]:
    """Give modules that take one argument another `forward`, which can be deleted to have their
    own again → those that it fits."""
    fitting = []
    for module in modules:
        takes_one = len(inspect.signature(module.forward).parameters) == 1
        if takes_one and "forward" not in vars(module):
            fitting.append(module)
    for module in fitting:
        module.forward = functools.partial(forward, module)
    return fitting


def norm_forward(module: torch.nn.Module, x: Tensor) -> Tensor:
    return remade(RMSNorm.apply, x, module.weight, module.variance_epsilon)


def gate_forward(module: torch.nn.Module, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(remade(SwiGLU.apply, gate, up))


class RMSNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + eps) (Zhang and Sennrich, arXiv 1910.07467), keeping x alone.

    x (…, D), weight (D,) → (…, D), normalized in float32. As single operations it keeps a float32
    copy of x and what the weight scales, too: in bfloat16 three times as much.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        normalized, _ = RMSNorm.normalized(x, eps)
        return normalized.to(x.dtype) * weight

    @staticmethod
    def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.float()
        variance = x.square().mean(-1, keepdim=True)
        inverse = torch.rsqrt(variance + eps)
        return x * inverse, inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        normalized, inverse = RMSNorm.normalized(x, ctx.eps)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad * normalized.to(grad.dtype)
            grad_weight = grad_weight.flatten(0, -2).sum(0)
        # With n = normalized and s = grad · weight:  dx = (s - n · mean(s · n)) · inverse
        slope = (grad * weight).float()
        mean = (slope * normalized).mean(-1, keepdim=True)
        slope.sub_(normalized.mul_(mean)).mul_(inverse)
        return slope.to(x.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, any shape (Shazeer, arXiv 2002.05202), of which silu(gate) is not kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad * F.silu(gate)
