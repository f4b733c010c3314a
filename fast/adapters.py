"""Adapters: `lora.LoRALinear.forward` in fewer copies.

    plain   base = W x + b          delta = B A x          y = base + delta
    here    y = W x + b             y += B A x             in place

The plain way holds three tensors of the size of y, the largest here, and so does its backward with
the input's gradient. Adding into the first leaves one of each. The product then is one function to
autograd, which keeps x and A x for the gradients of A and B:

    ∂x = ∂y W + ∂y B A              ∂A = (∂y B)ᵀ x           ∂B = ∂yᵀ (A x)

`prepare` compares it with the plain forward first, so that a `LoRALinear` that computes something
else keeps its own.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora


class AdaptedProduct(torch.autograd.Function):
    """W x + b + B A x. W and b are frozen and get no gradient.

    x (…, in), weight (out, in), bias (out,) or None, A (r, in), B (out, r), scaled → (…, out).
    The products are in x's precision, the gradients of A and B in their own.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)  # (N, in): addmm knows matrices only
        A_, B_ = A.to(x.dtype), B.to(x.dtype)
        low_rank = rows @ A_.T  # (N, r)
        ctx.save_for_backward(rows, weight, A_, B_, low_rank)
        ctx.dtype, ctx.shape = A.dtype, x.shape
        y = F.linear(rows, weight, bias).addmm_(low_rank, B_.T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B, low_rank = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # (N, out)
        grad_low_rank = grad @ B  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:  # not so in the first layer, whose input nothing learns
            grad_x = (grad @ weight).addmm_(grad_low_rank, A).view(ctx.shape)
        grad_A = (grad_low_rank.T @ rows).to(ctx.dtype)
        grad_B = (grad.T @ low_rank).to(ctx.dtype)
        return grad_x, None, None, grad_A, grad_B


def lean_forward(self: lora.LoRALinear, x: Tensor) -> Tensor:
    """`LoRALinear.forward`, x (…, in) → (…, out).

    Dropout, adapters that are switched off, and a W that learns take the plain way.
    """
    drops = self.dropout > 0 and self.training
    if drops or not self.enabled or self.weight.requires_grad:
        return type(self).forward(self, x)
    B = self.scale * self.lora_B  # outside of the product, which so leaves the scale to autograd
    return AdaptedProduct.apply(x, self.weight, self.bias, self.lora_A, B)


def prepare(model: nn.Module) -> int:
    """Give every adapted layer the lean forward, as an attribute of its own → how many have it.

    Layers keep their own where their class computes something else, or another `forward` was put on
    them. Asked again, it changes nothing.
    """
    agrees = functools.cache(computes_the_same)
    count = 0
    for _, module in lora.layers(model):
        if "forward" not in vars(module) and agrees(type(module)):
            module.forward = functools.partial(lean_forward, module)
        count += is_lean(module)
    return count


def is_lean(module: nn.Module) -> bool:
    """Whether a layer has the lean forward."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is lean_forward


@torch.enable_grad()
def computes_the_same(kind: type[lora.LoRALinear]) -> bool:
    """Whether the forward of this class and the lean one agree, in values and in gradients.

    They are compared on a small layer of the class, in float32. A class that is made from other
    arguments is taken for one that does something else.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # no draw of the run's own
        torch.manual_seed(0)
        try:
            layer = kind(nn.Linear(6, 5).requires_grad_(False), 2, 3.0)
        except TypeError:
            return False
        nn.init.normal_(layer.lora_B)  # or it would be zero, and nothing would differ
        x = torch.randn(2, 4, 6, requires_grad=True)
        weights = torch.randn(2, 4, 5)
    trained = [p for p in layer.parameters() if p.requires_grad]
    results = []
    for forward in (layer.forward, functools.partial(lean_forward, layer)):
        y = forward(x)
        gradients = torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True)
        results.append([y, *gradients])
    for plain, lean in zip(*results):
        if plain is None or lean is None:  # a parameter that one of the two knows nothing of
            return False
        if not torch.allclose(plain, lean, rtol=1e-4, atol=1e-5):
            return False
    return True
