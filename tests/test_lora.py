"""LoRA against PEFT: the same numbers, and files that each reads of the other."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from safetensors.torch import load_file

import lora

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 4, 5, 6, 7, 8]])


def adapted(architecture="llama", targets=("all-linear",), dtype=torch.float32):
    """A model whose adapters do something, and its base folder's worth of settings."""
    model = lora.inject(tiny_model(architecture, dtype=dtype), 4, 8, target_modules=targets)
    with torch.no_grad():
        for _, layer in lora.layers(model):
            layer.lora_B.normal_(std=0.1)
    return model


# PEFT takes the dense layers of DeepSeek's models for experts, and renames their adapters.
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "deepseek3"])
def test_peft_loads_what_is_saved_here(architecture, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(architecture)
    lora.save(model, dict(model.named_parameters()), tmp_path, "base", ["all-linear"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(IDS).logits, tiny_model(architecture)(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_peft_adapts_the_same_layers_in_the_same_way(targets, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = lora.inject(tiny_model(), 4, 8, target_modules=[targets] if isinstance(targets, str) else targets)
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
    lora.save(model, dict(model.named_parameters()), tmp_path, "base", ["all-linear"])
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    for m in (model, theirs):
        m(IDS).logits.square().mean().backward()
    gradients = {n.replace("base_model.model.", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, layer in lora.layers(model):
        torch.testing.assert_close(layer.lora_A.grad, gradients[f"{name}.lora_A.default.weight"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.lora_B.grad, gradients[f"{name}.lora_B.default.weight"], atol=1e-5, rtol=1e-4)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("lora" not in name for name in frozen)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2 has biases
def test_a_merged_model_equals_the_adapted_one(architecture):
    model = adapted(architecture)
    before = model(IDS).logits
    weights = {name: layer.weight.clone() for name, layer in lora.layers(model)}
    for name, layer in lora.layers(model):
        layer.merged_weight()
        assert torch.equal(layer.weight, weights[name])  # merging on the fly leaves the training weights alone
    lora.merge(model)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)
    assert not list(lora.layers(model))


def test_without_adapters_the_model_is_its_base_bit_for_bit():
    model = adapted()
    with lora.disabled(model):
        assert torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
    assert not torch.equal(model(IDS).logits, tiny_model()(IDS).logits)
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


def test_an_unknown_target_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"^--target_modules c_attn: .*q_proj") as error:
        lora.find_targets(tiny_model(), ["q_proj", "c_attn"])
    assert "\n" not in str(error.value)
