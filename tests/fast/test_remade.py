"""Norms and gates that are made again: where they are taken, and their gradients."""

from functools import partial

import pytest
import torch
from conftest import make_batch, tiny_model

import fast
from fast import remade


def replaced(model) -> list[str]:
    names = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return sorted({name.rpartition(".")[2] for name in names})


def test_norms_and_gates_are_replaced_where_they_are_the_models_own():
    model = tiny_model("llama")
    assert {"remade norms", "remade gates"} <= set(fast.prepare(model))
    assert replaced(model) == ["input_layernorm", "mlp", "norm", "post_attention_layernorm"]

    model = tiny_model("llama")
    kind = type(model.model.norm)
    doubled = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = doubled  # looks like any other
        layer.mlp.forward = partial(
            lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x))), layer.mlp
        )
    prompts, completions, _ = make_batch()
    expected = fast.completion_logps(model, prompts, completions, 0.7)[0]
    parts = fast.prepare(model)
    assert "no remade norms (its own do something else)" in parts
    assert "no remade gates (it has none)" in parts
    torch.testing.assert_close(fast.completion_logps(model, prompts, completions, 0.7)[0], expected)
    assert replaced(model) == ["mlp"]


def test_what_is_made_again_is_made_once_for_all_readers_and_has_the_same_gradients():
    x, *weights = (torch.randn(6, 6, 6, dtype=torch.float64).requires_grad_() for _ in range(4))
    made, gradients = [], []

    def square(x):
        made.append(x)
        return x * x

    for again in (False, True):
        with remade.remaking():
            y = remade.remade(square, x) if again else square(x)
            # The last is no view as it lies, …
            kept = [y @ weights[0], y.view(36, 6) @ weights[1][0], y.mT @ weights[2]]
            # … nor was this one when it was made.
            z = (remade.remade(torch.square, x.mT) if again else x.mT.square()).mT
            kept.append(z * weights[0])
        del y, z
        made.clear()
        total = sum(part.sum() for part in kept)
        gradients.append(torch.autograd.grad(total, [x, *weights]))
    assert len(made) == 1 and not remade.Remade.known
    for plain, own in zip(*gradients):
        torch.testing.assert_close(own, plain)


def test_what_is_changed_in_place_is_not_made_again_and_what_it_is_made_of_must_not_change():
    x, weight = (torch.randn(6, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    with remade.remaking():
        y = remade.remade(torch.mul, x, 2.0)
        y += 1.0
        (y @ weight).sum().backward()
        torch.testing.assert_close(weight.grad, y.detach().sum(0)[:, None].expand(6, 6))
        inner = x * 1.0
        out = remade.remade(torch.mul, inner, 2.0) @ weight
    inner += 1.0
    with pytest.raises(RuntimeError, match="was changed in place"):
        out.sum().backward()


def test_norms_and_gates_have_the_gradients_of_single_operations():
    """In float32, where a norm computes, against float64."""
    x, up = (torch.randn(5, 16, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = torch.rand(16, dtype=torch.float64).requires_grad_()
    slope = torch.randn(5, 16, dtype=torch.float64)
    norm = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = norm, torch.nn.functional.silu(x) * up
    own = remade.RMSNorm.apply(x, weight, 1e-5), remade.SwiGLU.apply(x, up)
    for inputs, a, b in zip(([x, weight], [x, up]), expected, own):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)
        grads = (torch.autograd.grad((out * slope).sum(), inputs) for out in (a, b))
        for plain, quick in zip(*grads):
            torch.testing.assert_close(quick, plain, atol=1e-5, rtol=1e-5)
