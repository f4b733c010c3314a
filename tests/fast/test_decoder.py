"""The quick decoders against the plain one: logits step by step, and with equal seeds equal tokens."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from test_sampler import ENDS, prompts_of

import fast
import lora
from fast.decoder import KEPT, ROOM, LlamaDecoder, PackedDecoder, fused_weight, is_fused, serves
from fast.graphs import GraphDecoder
from fast.tree import TreeLlamaDecoder, TreePackedDecoder
from sampler import Decoder, ModelSampler

LIKE_LLAMA = ["llama", "llama-mha", "qwen2", "qwen3"]
OF_ANOTHER_SHAPE = [name for name in ARCHITECTURES if name not in LIKE_LLAMA]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def prepared(architecture="llama", **changes):
    model = tiny_model(architecture, **changes)
    fast.prepare(model)
    return model


@torch.inference_mode()
def compare(kinds: list, prompts, rows, close) -> list[Decoder]:
    """Decoders of models, the first of which is right: feed the same tokens to all, and drop two
    rows on the way. Caches grow, and more than once."""
    decoders = [kind(model, prompts, rows) for kind, model in kinds]
    expected, *others = decoders
    for decoder in others:
        torch.testing.assert_close(decoder.logits.float(), expected.logits.float(), **close)
    for t in range(2 * ROOM + 1):
        token = (torch.arange(len(expected.mask)) * 7 + 11 * t) % 97
        logits = expected.step(token).float()
        for decoder in others:
            torch.testing.assert_close(decoder.step(token).float(), logits, **close)
        if t == 2:
            for decoder in decoders:
                decoder.keep(torch.tensor([0, 2, 4]))
    return decoders


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("beginning", [(5, 6), ()])
def test_the_chosen_decoder_gives_the_plain_ones_logits(architecture, beginning):
    prompts = [[*beginning, *rest] for rest in ([7, 8], [9], [3, 4, 5, 6])]
    rows = torch.tensor([0, 0, 1, 2, 2])
    model = prepared(architecture)
    kinds = [(Decoder, tiny_model(architecture)), (fast.decoder_for(model), model)]
    compare(kinds, prompts, rows, CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_seeds_draw_equal_tokens(architecture):
    prompts, settings = prompts_of(), {"eos_token_ids": ENDS, "max_new_tokens": ROOM + 4}
    model = prepared(architecture)
    quick = ModelSampler(model, **settings, decoder=fast.decoder_for(model))
    plain = ModelSampler(tiny_model(architecture), **settings)
    drawn, expected = (sampler.generate(prompts, range(12)) for sampler in (quick, plain))
    assert [c.ids for c in drawn] == [c.ids for c in expected]
    assert [c.finished for c in drawn] == [c.finished for c in expected]
    for a, b in zip(drawn, expected):
        torch.testing.assert_close(a.logps, b.logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", LIKE_LLAMA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_biases_are_in_the_fused_products(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora.inject(model, 4, 8.0, target_modules=targets)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 3, 4, 5, 6]]
    rows = torch.tensor([0, 0, 1, 2, 2])
    plain = copy.deepcopy(model)
    fast.prepare(model)
    assert fast.decoder_for(model) is TreeLlamaDecoder
    close = CLOSE if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.1}
    quick_ones = (PackedDecoder, TreePackedDecoder, GraphDecoder, TreeLlamaDecoder, LlamaDecoder)
    kinds = [(Decoder, plain), *((kind, model) for kind in quick_ones)]
    *_, quick = compare(kinds, prompts, rows, close)
    assert dtype == torch.bfloat16 or quick.head.weight is not None  # in oneDNN's layout


def test_a_decoder_of_graphs_lets_ended_rows_go_when_its_cache_grows(monkeypatch):
    """On a CPU its steps are those that a graph would record."""
    monkeypatch.setattr("fast.graphs.STEPS", ROOM + 1)
    prompts, rows = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 3, 4, 5, 6]], torch.tensor([0, 0, 1, 2, 2])
    kinds = [(Decoder, tiny_model()), (GraphDecoder, prepared())]
    _, quick = compare(kinds, prompts, rows, CLOSE)
    assert len(quick.token) == len(quick.cache.layers[0].keys[0]) == 3


def test_each_model_takes_the_decoder_that_gives_its_own_logits():
    for architecture in OF_ANOTHER_SHAPE:
        model = prepared(architecture)
        packs = model.config._attn_implementation == "grouped"
        expected = TreePackedDecoder if packs else Decoder
        assert fast.decoder_for(model) is expected, architecture
    assert fast.decoder_for(prepared("llama")) is TreeLlamaDecoder
    # Gathered layer by layer: the model's own forward does that, for each layer.
    assert fast.decoder_for(prepared("llama"), layerwise=True) is PackedDecoder
    assert fast.decoder_for(tiny_model("llama")) is Decoder


def test_a_model_that_trains_and_recomputes_is_tried_as_it_samples():
    """With dropout, and without a cache, it would have other logits, and decode slowly."""
    model = tiny_model("llama")
    lora.inject(model, 4, 8, dropout=0.5)
    fast.prepare(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert fast.decoder_for(model.train()) is TreeLlamaDecoder and model.training


def test_a_completion_is_the_same_in_any_batch_of_the_quick_decoder():
    model, prompts = prepared(), prompts_of()
    decoder = fast.decoder_for(model)
    sampler = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12, decoder=decoder)
    together = sampler.generate(prompts, range(100, 112))
    apart = [sampler.generate([p], [100 + i])[0] for i, p in enumerate(prompts)]
    assert [c.ids for c in together] == [c.ids for c in apart]


@pytest.mark.skipif(not is_fused(torch.zeros(1)), reason="oneDNN packs no weights here")
def test_frozen_weights_are_packed_once_and_again_when_they_change(monkeypatch):
    packed = []

    def counted(linears):
        packed.append(1)
        return fused_weight(linears)

    monkeypatch.setattr("fast.decoder.fused_weight", counted)
    settings = {"eos_token_ids": [], "max_new_tokens": 12}
    plain = lora.inject(tiny_model(), 4, 8.0)
    model = copy.deepcopy(plain)
    fast.prepare(model)
    samplers = (
        ModelSampler(plain, **settings),
        ModelSampler(model, **settings, decoder=LlamaDecoder),
    )
    products = 4 * len(model.model.layers) + 1  # the head's is the last

    def draws_alike() -> list:
        plainly, quickly = (s.generate(prompts_of(), range(12)) for s in samplers)
        assert [c.ids for c in quickly] == [c.ids for c in plainly]
        return [c.ids for c in quickly]

    before = draws_alike()
    assert sum(packed) == products
    with torch.no_grad():
        for policy in (plain, model):  # an optimizer step
            for layer in policy.model.layers:
                layer.mlp.up_proj.lora_B.copy_(torch.arange(4.0) / 4)
    stepped = draws_alike()
    assert sum(packed) == products and stepped != before
    with torch.no_grad():
        for policy in (plain, model):  # another base
            policy.model.layers[0].self_attn.o_proj.weight.mul_(3)
    assert draws_alike() != stepped and sum(packed) == products + 1
    for policy in (plain, model):  # one that is trained
        policy.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    draws_alike()
    draws_alike()
    assert sum(packed) == products + 3


@pytest.mark.parametrize("architecture", ["granite", "gemma2"])
def test_a_decoder_that_does_not_serve_keeps_no_weights(architecture):
    model = lora.inject(tiny_model(architecture), 4, 8.0)
    fast.prepare(model)
    assert fast.decoder_for(model) is TreePackedDecoder
    assert not any(module in KEPT for module in model.modules())


@pytest.mark.parametrize("kind", [PackedDecoder, LlamaDecoder])
def test_what_all_prompts_begin_with_is_prefilled_once_and_ended_rows_leave(monkeypatch, kind):
    model, prompts = prepared(), prompts_of()
    prefilled, rows, forward, step = [], [], type(model.model).forward, kind.step

    def counted_forward(self, **settings):
        prefilled.append(tuple(settings["input_ids"].shape))
        return forward(self, **settings)

    def counted_step(self, token):
        rows.append(len(token))
        return step(self, token)

    monkeypatch.setattr(type(model.model), "forward", counted_forward)
    monkeypatch.setattr(kind, "step", counted_step)
    sampler = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12, decoder=kind)
    lengths = [len(c.ids) for c in sampler.generate(prompts, range(12))]
    # The common beginning and the rests of three prompts, once each.
    assert prefilled[0] == (1, 4 + 3 + 6 + 1)
    for t, batch in enumerate(rows, start=1):
        alive = sum(n > t for n in lengths)
        assert alive <= batch <= max(alive / 0.75, 12 * (t == 1), 1)
    assert len(rows) > 5 and rows[-1] < 12


def test_the_quick_decoder_does_not_go_for_lack_of_memory_without_a_word(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LlamaDecoder, "__init__", full)
    model = prepared()
    with pytest.raises(torch.OutOfMemoryError):
        serves(LlamaDecoder, model)
