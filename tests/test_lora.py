"""LoRA against its closed form and PEFT: the same numbers, and files that both read."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from safetensors.torch import load_file

import lora
from data import UsageError
from run.checkpoints import save_adapters

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])


def adapted(architecture="llama", targets=("all-linear",), dtype=torch.float32):
    """A model whose adapters do something, and its base folder's worth of settings."""
    model = lora.inject(tiny_model(architecture, dtype=dtype), 4, 8, target_modules=targets)
    with torch.no_grad():
        for _, layer in lora.layers(model):
            layer.lora_B.normal_(std=0.1)
    return model


def layer_and_input(bias=True, **settings):
    """A layer whose adapter does something, in float64, and an input (2, 3, 6)."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(6, 5, bias).requires_grad_(False), 2, 3.0, **settings)
    torch.nn.init.normal_(layer.lora_B)
    return layer.double(), torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)


# The layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_formula_and_so_are_its_gradients(bias):
    layer, x = layer_and_input(bias)
    W, A, B = layer.weight, layer.lora_A, layer.lora_B
    dense = W + 3.0 / 2 * B @ A  # one matrix, (out, in)
    expected = x @ dense.T + (layer.bias if bias else 0)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    towards = torch.randn_like(y)
    (y * towards).sum().backward()
    delta = torch.einsum("bto,bti->oi", towards, x)  # the gradient of the dense matrix
    torch.testing.assert_close(x.grad, towards @ dense)
    torch.testing.assert_close(A.grad, 1.5 * B.T @ delta)
    torch.testing.assert_close(B.grad, 1.5 * delta @ A.T)
    assert W.grad is None


def test_dropout_is_in_front_of_the_adapter_alone():
    layer, x = layer_and_input(dropout=0.4)
    base = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(x, 0.4)
    assert (kept == 0).any() and (kept != 0).any()
    torch.testing.assert_close(y, base + 1.5 * kept @ layer.lora_A.T @ layer.lora_B.T)
    layer.enabled = False
    assert torch.equal(layer(x), base)


def test_a_layer_holds_the_weights_of_the_one_whose_place_it_takes():
    linear = torch.nn.Linear(6, 5)
    layer = lora.LoRALinear(linear, 2, 3.0)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert [tuple(p.shape) for p in (layer.lora_A, layer.lora_B)] == [(2, 6), (5, 2)]
    assert not layer.lora_B.any() and layer.lora_A.all()  # so that training starts at the base


# Against PEFT ------------------------------------------------------------------------------------


# PEFT takes the dense layers of DeepSeek's models for experts, and renames their adapters.
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "deepseek3"])
def test_peft_loads_what_is_saved_here(architecture, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(architecture)
    save_adapters(model, dict(model.named_parameters()), tmp_path, "base", ["all-linear"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0)
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(IDS).logits, tiny_model(architecture)(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_peft_adapts_the_same_layers_in_the_same_way(targets, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(tiny_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = lora.inject(
        tiny_model(), 4, 8, target_modules=[targets] if isinstance(targets, str) else targets
    )
    weights = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        for name, layer in lora.layers(model):
            for part in ("lora_A", "lora_B"):
                getattr(layer, part).copy_(weights.pop(f"base_model.model.{name}.{part}.weight"))
    assert not weights
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_gradients_equal_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted()
    save_adapters(model, dict(model.named_parameters()), tmp_path, "base", ["all-linear"])
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    for m in (model, theirs):
        m(IDS).logits.square().mean().backward()
    gradients = {
        n.replace("base_model.model.", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    for name, layer in lora.layers(model):
        torch.testing.assert_close(
            layer.lora_A.grad, gradients[f"{name}.lora_A.default.weight"], atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            layer.lora_B.grad, gradients[f"{name}.lora_B.default.weight"], atol=1e-5, rtol=1e-4
        )
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("lora" not in name for name in frozen)


# Models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 has biases
def test_a_merged_model_equals_the_adapted_one(architecture):
    model = adapted(architecture)
    before = model(IDS).logits
    weights = {name: layer.weight.clone() for name, layer in lora.layers(model)}
    for name, layer in lora.layers(model):
        layer.merged_weight()
        assert torch.equal(
            layer.weight, weights[name]
        )  # merging on the fly leaves the training weights alone
    plain = [name for name, _ in tiny_model(architecture).named_parameters()]
    merged = {name: tensor.clone() for name, tensor in lora.merged_parameters(model)}
    assert list(merged) == [name for name, _ in lora.plain_parameters(model)] == plain
    whole = tiny_model(architecture)
    whole.load_state_dict(merged, strict=False)
    torch.testing.assert_close(whole(IDS).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_folded_into_the_weights_it_is_a_plain_frozen_model(architecture):
    model = adapted(architecture)
    before = model(IDS).logits
    assert lora.merge(model) is model
    assert not list(lora.layers(model)) and not any(p.requires_grad for p in model.parameters())
    plain = {name: value.shape for name, value in tiny_model(architecture).state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == plain
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


def test_without_adapters_the_model_is_its_base_bit_for_bit():
    model = adapted()
    with lora.disabled(model):
        assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    assert not torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    with pytest.raises(KeyError), lora.disabled(model):  # an error switches them on again, too
        raise KeyError
    assert all(layer.enabled for _, layer in lora.layers(model))
    fresh = lora.inject(tiny_model(), 4, 8)
    assert torch.equal(fresh(IDS).logits, tiny_model()(IDS).logits)  # B starts at zero


def test_adapters_stay_float32_over_a_bfloat16_base():
    model = adapted(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    model = lora.inject(tiny_model(), 4, 8, dropout=0.5)
    with torch.no_grad():
        for _, layer in lora.layers(model):
            layer.lora_B.normal_()
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)


def test_every_linear_layer_but_the_head_is_adapted():
    names = lora.find_targets(tiny_model(), ["all-linear"])
    assert len(names) == 3 * 7 and not any("lm_head" in name for name in names)


def test_targets_are_last_parts_of_names_in_the_models_order():
    names = lora.find_targets(tiny_model(), ["mlp.up_proj", "q_proj"])
    parts = ("self_attn.q_proj", "mlp.up_proj")
    assert names == [f"model.layers.{i}.{part}" for i in range(3) for part in parts]
    with pytest.raises(UsageError):
        lora.find_targets(tiny_model(), ["proj"])  # no part of a part


def test_an_unknown_target_is_named_with_those_there_are():
    with pytest.raises(UsageError, match=r"^--target_modules c_attn: .*q_proj") as error:
        lora.find_targets(tiny_model(), ["q_proj", "c_attn"])
    assert "\n" not in str(error.value)


def test_a_model_without_linear_layers_is_told_what_works():
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList()
    message = (
        "^--target_modules all-linear: the model has no linear layer; --train_type full works$"
    )
    with pytest.raises(UsageError, match=message):
        lora.inject(model, 4, 8)
