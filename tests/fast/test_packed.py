"""The quick pass as a whole, and the row without padding, against grpo.completion_logps."""

import pytest
import torch
from conftest import ARCHITECTURES, make_batch, tiny_model

import fast
import grpo
import lora
from fast import packed

TEMPERATURE = 0.7
# part → the architectures that leave it off
LEFT_OFF = {
    "packed rows": {"deepseek3"},
    "quick decoder": {"deepseek3"},
    "remade norms": {"gemma", "gemma2", "gemma3", "cohere"},
    "remade gates": {"gemma", "gemma2", "gemma3"},
}


def gradients_of(function, model, prompts, completions):
    """Log-probabilities and entropies, and the gradient of both by every parameter that has one."""
    logps, entropies, mask = function(model, prompts, completions, TEMPERATURE)
    slopes = torch.randn(2, *logps.shape, generator=torch.Generator().manual_seed(0))
    (logps * slopes[0] + 0.3 * entropies * slopes[1]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [logps.detach(), entropies.detach(), mask, *grads]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_quick_pass_equals_the_plain_one(architecture, checkpointing, monkeypatch):
    """In float64, with tables and pieces so small that every path is taken."""
    monkeypatch.setattr("fast.packed.QUERIES_AT_ONCE", 8)
    monkeypatch.setattr("fast.packed.MAX_SCORES", 2000)
    monkeypatch.setattr("fast.head.LOGITS_AT_ONCE", 10 * 97)
    prompts, completions, _ = make_batch(longest=30)
    plain, model = (tiny_model(architecture, dtype=torch.float64).train() for _ in range(2))
    parts = fast.prepare(model.eval())
    taken = {part for part in parts if not part.startswith("no ")}
    expected = {"chunked head"}
    for part, without in LEFT_OFF.items():
        if architecture not in without:
            expected.add(part)
    assert taken == expected
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    results = [
        gradients_of(grpo.completion_logps, plain, prompts, completions),
        gradients_of(fast.completion_logps, model.train(), prompts, completions),
    ]
    for expected, own in zip(*results, strict=True):
        # Some norms are in float32 whatever the model is in.
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_was_not_prepared_takes_the_plain_pass():
    prompts, completions, _ = make_batch()
    model = tiny_model("llama")
    own = fast.completion_logps(model, prompts, completions, TEMPERATURE)
    expected = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    assert all(torch.equal(a, b) for a, b in zip(own, expected))


def test_a_model_whose_head_does_more_takes_the_plain_pass():
    """It has the model's own logits, and its decoder is the plain one."""

    class Doubling(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config
            self.get_decoder = model.get_decoder
            self.get_output_embeddings = model.get_output_embeddings

        def forward(self, **settings):
            out = self.model(**settings)
            out.logits = 2 * out.logits
            return out

    prompts, completions, _ = make_batch()
    model = Doubling(tiny_model("llama"))
    expected = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    (line,) = fast.prepare(model)
    assert line.startswith("no others (it does more with its logits")
    assert model.config._attn_implementation == "sdpa"
    own = fast.completion_logps(model, prompts, completions, TEMPERATURE)
    assert all(torch.equal(a, b) for a, b in zip(own, expected))


def test_a_model_that_drops_attention_out_packs_nothing():
    model = tiny_model("llama", attention_dropout=0.5)
    assert "no packed rows (it drops attention out)" in fast.prepare(model)
    prompts, completions, _ = make_batch()
    model.train()
    a, b = (fast.completion_logps(model, prompts, completions, TEMPERATURE)[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_a_pack_holds_every_token_once_and_no_padding():
    prompts, completions, _ = make_batch()
    pack = packed.Pack(prompts, completions, tiny_model("llama").config, "cpu")
    rests = sum(len(prompt) - 4 for prompt in {tuple(prompt) for prompt in prompts})
    expected = (1, 4 + rests + sum(len(c) - 1 for c in completions))
    assert pack.shared == 4 and pack.ids.shape == expected


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_quick_pass_equals_the_plain_one_within_bfloat16_rounding(kind, monkeypatch):
    """Both differ from float32 by as much; the head is applied to one token at a time."""
    prompts, completions, _ = make_batch(longest=20)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 4}
    grads = {}
    for name, dtype in (("exact", "float32"), ("plain", "bfloat16"), ("quick", "bfloat16")):
        model = tiny_model("llama", dtype=getattr(torch, dtype), **shape)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.5 * p.bfloat16())  # the same weights in either precision
        if kind == "lora":
            for _, layer in lora.layers(lora.inject(model, 16, 32)):
                torch.nn.init.normal_(layer.lora_B, std=0.01)
        function = grpo.completion_logps
        if name == "quick":
            function = fast.completion_logps
            parts = fast.prepare(model)
            assert {"packed rows", "remade norms", "remade gates"} <= set(parts)
            assert ("adapters" in parts) == (kind == "lora")
            monkeypatch.setattr("fast.head.LOGITS_AT_ONCE", 97)
        logps, _, _ = function(model, prompts, completions, TEMPERATURE)
        slopes = torch.linspace(-1, 1, logps.numel()).view_as(logps)
        (logps * slopes).sum().backward()
        grads[name] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    keys = {"full": ("", "lm_head", "norm", "mlp"), "lora": ("lora_A", "lora_B")}
    for key in keys[kind]:
        exact, plain, quick = (
            torch.cat([g.float().flatten() for n, g in grads[name].items() if key in n])
            for name in ("exact", "plain", "quick")
        )
        of_plain, of_quick = ((other - exact).norm() / exact.norm() for other in (plain, quick))
        assert of_quick < 1.3 * of_plain < 0.3, key
