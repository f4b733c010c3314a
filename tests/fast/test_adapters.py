"""The lean forward of adapted layers against lora.py's own: numbers, memory, exceptions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from fast import adapters

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])


def make_layer(kind=lora.LoRALinear, bias=True, dtype=torch.float32, sizes=(16, 12), **settings):
    """A layer of rank 2 whose adapter does something."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(*sizes, bias).requires_grad_(False).to(dtype)
    layer = kind(linear, 2, 3.0, **settings)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def both_ways(layer, x, towards):
    """Output and gradients (x, A, B), plain and lean."""
    results = []
    for prepare in (lambda layer: 0, adapters.prepare):
        prepare(layer)
        inputs = [x.clone().requires_grad_(), layer.lora_A, layer.lora_B]
        y = layer(inputs[0])
        results.append([y, *torch.autograd.grad((y * towards).sum(), inputs)])
    assert adapters.is_lean(layer)
    return results


def adapted_model(**settings):
    model = lora.inject(tiny_model("qwen2"), 4, 8, **settings)
    with torch.no_grad():
        for _, layer in lora.layers(model):
            layer.lora_B.normal_(std=0.1)
    return model


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
def test_values_and_gradients_are_the_plain_ones(shape, bias, dtype):
    layer = make_layer(bias=bias, dtype=dtype)
    if dtype == torch.float64:
        layer.double()  # the adapters, too
    x, towards = torch.randn(*shape, 16, dtype=dtype), torch.randn(*shape, 12, dtype=dtype)
    for plain, lean in zip(*both_ways(layer, x, towards), strict=True):
        torch.testing.assert_close(lean, plain)


def test_an_input_may_lie_in_any_order():
    layer = make_layer()
    x, towards = torch.randn(16, 7, 2).permute(2, 1, 0), torch.randn(2, 12, 7).mT
    for plain, lean in zip(*both_ways(layer, x, towards), strict=True):
        torch.testing.assert_close(lean, plain)


def test_in_bfloat16_both_are_equally_far_from_float32():
    x, towards = torch.randn(64, 48), torch.randn(64, 40)
    exact_layer = make_layer(sizes=(48, 40))
    exact, _ = both_ways(exact_layer, x, towards)
    layer = make_layer(sizes=(48, 40), dtype=torch.bfloat16)
    assert torch.equal(layer.lora_A, exact_layer.lora_A)  # float32 as they are
    plain, lean = both_ways(layer, x.bfloat16(), towards.bfloat16())
    for a, b, c in zip(exact, plain, lean, strict=True):
        assert b.dtype == c.dtype  # float32 for A and B
        off, lean_off = ((t.float() - a).norm() / a.norm() for t in (b, c))
        assert 0 < lean_off < 1.3 * off < 0.03


def test_a_models_logits_and_gradients_are_the_plain_ones():
    results = []
    for prepare in (lambda model: 0, adapters.prepare):
        model = adapted_model()
        assert prepare(model) in (0, 3 * 7)
        logits = model(IDS).logits
        logits.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        with lora.disabled(model):
            base = model(IDS).logits
        results.append([logits, base, *gradients])
    for plain, lean in zip(*results, strict=True):
        torch.testing.assert_close(lean, plain, atol=1e-5, rtol=1e-4)


# Memory -----------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts the tensors of at least `size` numbers that operations allocate."""

    def __init__(self, size):
        super().__init__()
        self.size, self.held = size, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size:
                self.held[tensor.untyped_storage().data_ptr()] = tensor  # held, so none is reused
        return out


def test_nothing_of_the_outputs_or_the_inputs_size_is_copied():
    layer = make_layer(sizes=(64, 64))
    allocated = {}
    for name in ("plain", "lean"):
        if name == "lean":
            adapters.prepare(layer)
        x, towards = torch.randn(256, 64, requires_grad=True), torch.randn(256, 64)
        with Allocations(256 * 64) as forward:
            y = layer(x)
        with Allocations(256 * 64) as backward:
            torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], towards)
        given = {t.untyped_storage().data_ptr() for t in (x, y, towards)}
        kept = backward.held.keys() - given
        allocated[name] = len(forward.held.keys() - {x.data_ptr()}), len(kept)
    assert allocated["lean"] == (1, 1)  # y, and the gradient of x
    assert min(allocated["plain"]) > 1  # so the count sees what it is to count


# When it stands back ----------------------------------------------------------------------------


def test_dropout_in_training_takes_the_plain_way_with_the_same_draws():
    layer = make_layer(dropout=0.5)
    x, results = torch.randn(2, 7, 16), []
    for prepare in (lambda layer: 0, adapters.prepare):
        prepare(layer)
        torch.manual_seed(1)
        results.append([layer.train()(x), layer.eval()(x)])
    assert adapters.is_lean(layer)
    (plain, plain_eval), (lean, lean_eval) = results
    assert torch.equal(lean, plain) and not torch.allclose(lean, lean_eval)
    torch.testing.assert_close(lean_eval, plain_eval)


def test_without_adapters_a_layer_is_its_base_bit_for_bit():
    layer = make_layer()
    adapters.prepare(layer)
    x, layer.enabled = torch.randn(2, 7, 16), False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_weight_that_learns_gets_its_gradient():
    layer = make_layer()
    adapters.prepare(layer)
    layer.weight.requires_grad_()
    layer(torch.randn(7, 16)).sum().backward()
    assert layer.weight.grad.any()


class Doubled(lora.LoRALinear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + 2 * super().forward(x)


class Bounded(lora.LoRALinear):
    """The same values and gradients as long as B is zero."""

    def forward(self, x):
        base = F.linear(x, self.weight, self.bias)
        return base + torch.tanh(super().forward(x) - base)


class Detached(lora.LoRALinear):
    """The same values, but A learns nothing."""

    def forward(self, x):
        low_rank = F.linear(x, self.lora_A.detach())
        delta = F.linear(low_rank, self.scale * self.lora_B)
        return F.linear(x, self.weight, self.bias) + delta


class Magnitude(lora.LoRALinear):
    """A parameter more, that does nothing yet."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.magnitude = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.magnitude * super().forward(x)


class Named(lora.LoRALinear):
    def __init__(self, linear, rank, alpha, dropout=0.0, *, name="layer"):
        super().__init__(linear, rank, alpha, dropout)
        self.name, self.scale = name, alpha / rank**0.5  # rsLoRA


def test_a_class_that_computes_something_else_keeps_its_own_forward():
    x = torch.randn(7, 16)
    for kind in (Doubled, Bounded, Detached, Magnitude):
        layer = make_layer(kind)
        expected = layer(x)
        assert adapters.prepare(layer) == 0 and not adapters.is_lean(layer)
        assert torch.equal(layer(x), expected)
    assert adapters.prepare(make_layer(Named)) == 1  # another scale is no other formula


def test_a_forward_that_was_put_on_a_layer_stays():
    layer = make_layer()
    layer.forward = own = lambda x: x
    assert adapters.prepare(layer) == 0
    assert layer.forward is own and not adapters.is_lean(layer)


# As a part of a model ---------------------------------------------------------------------------


def test_preparing_twice_or_without_adapters_changes_nothing():
    model = adapted_model()
    assert adapters.prepare(model) == adapters.prepare(model) == len(list(lora.layers(model)))
    assert adapters.prepare(tiny_model()) == 0


def test_preparing_draws_no_random_number_of_the_run():
    model = adapted_model()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    adapters.prepare(model)
    assert torch.equal(torch.rand(4), expected)


def test_preparing_works_where_gradients_are_off():
    with torch.no_grad():
        assert adapters.prepare(make_layer()) == 1


def test_a_copy_of_a_prepared_model_uses_its_own_weights():
    layer = make_layer()
    adapters.prepare(layer)
    other = copy.deepcopy(layer)
    torch.nn.init.zeros_(other.lora_B)
    x = torch.randn(7, 16)
    torch.testing.assert_close(other(x), F.linear(x, layer.weight, layer.bias))
    assert not torch.allclose(other(x), layer(x))
