"""The own sampler: its log-probabilities against plain forward passes, its samples against exact probabilities."""

import random

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model

import grpo
import lora
from sampler import ROOM, Decoder, LlamaDecoder, ModelSampler, decodes_like_llama, sample_tokens

ENDS = [2, *range(11, 21)]  # many end-of-sequence tokens, so that rows end at different times


def prompts_of(counts=(4, 4, 4), lengths=(3, 6, 1), beginning=(5, 6, 7, 8)):
    rng = random.Random(0)
    prompts = [list(beginning) + [rng.randrange(3, 97) for _ in range(n)] for n in lengths]
    return [p for p, count in zip(prompts, counts) for _ in range(count)]


def p_value(observed, expected) -> float:
    """Of a chi-square test."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2.0).double(), statistic.double() / 2).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("beginning", [(5, 6, 7, 8), ()])
def test_logps_equal_a_plain_forward_pass(architecture, beginning):
    model, prompts = tiny_model(architecture), prompts_of(beginning=beginning)
    plain = tiny_model(architecture)
    grpo.prepare(model)
    ends, longest = ENDS[:4], 2 * ROOM + 1  # long enough for caches to grow twice
    sampler = ModelSampler(model, eos_token_ids=ends, max_new_tokens=longest, temperature=0.8)
    completions = sampler.generate(prompts, range(len(prompts)))
    for prompt, completion in zip(prompts, completions):
        logits = plain(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=0)
        assert completion.finished == (completion.ids[-1] in ends)
        assert not set(completion.ids[:-1]) & set(ends)
        assert completion.finished or len(completion.ids) == longest
    lengths = {len(c.ids) for c in completions}
    assert len(lengths) > 3 and max(lengths) > ROOM + 12  # rows did end at different times, some after the caches grew


def test_samples_follow_the_distribution():
    """Pairs of tokens against their exact probabilities, by chi-square, through prefill and one decoding step."""
    model = tiny_model(vocab_size=7)
    sampler = ModelSampler(model, eos_token_ids=[2], max_new_tokens=2, temperature=1.3)
    prompt, count = [3, 4, 5, 3], 6000
    drawn = [tuple(c.ids) for c in sampler.generate([prompt] * count, range(count))]
    first = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
    exact = {}
    for a in range(7):
        second = (model(torch.tensor([prompt + [a]])).logits[0, -1] / 1.3).softmax(-1)
        exact |= {(a,): first[a].item()} if a == 2 else {(a, b): (first[a] * second[b]).item() for b in range(7)}
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5) and set(drawn) <= set(exact)
    often = [pair for pair, p in exact.items() if p * count >= 5]
    rare = [pair for pair in exact if pair not in often]
    observed = [sum(d == pair for d in drawn) for pair in often] + [sum(d in rare for d in drawn) + 1e-9]
    expected = [exact[pair] * count for pair in often] + [sum(exact[pair] for pair in rare) * count + 1e-9]
    assert p_value(torch.tensor(observed), torch.tensor(expected)) > 1e-3


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3), (0.7, 4)])
def test_truncated_sampling_draws_from_the_renormalized_head(top_p, top_k):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = [
        i for rank, i in enumerate(order) if probabilities[order[:rank]].sum() < top_p and (not top_k or rank < top_k)
    ]
    expected = torch.zeros(6)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens, logps = sample_tokens(logits.expand(20_000, 6), uniforms, 1.0, top_p, top_k)
    torch.testing.assert_close(logps, probabilities.log()[tokens])  # of the whole distribution, as in the objective
    observed = torch.bincount(tokens, minlength=6).float()
    assert not observed[expected == 0].any()
    assert p_value(observed[expected > 0], expected[expected > 0] * 20_000) > 1e-3


def test_no_uniform_number_draws_a_token_of_probability_zero():
    logits = torch.full((3, 1000), float("-inf"))
    logits[:, 400:500] = torch.randn(100)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24, 0.5]), 1.0)
    assert ((tokens >= 400) & (tokens < 500)).all()


def test_a_completion_is_the_same_in_any_batch():
    model, prompts = tiny_model(), prompts_of()
    grpo.prepare(model)
    sampler = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12)
    together = sampler.generate(prompts, range(100, 112))
    apart = [sampler.generate([p], [100 + i])[0] for i, p in enumerate(prompts)]
    assert [c.ids for c in together] == [c.ids for c in apart]
    assert [c.ids for c in sampler.generate(prompts, range(100, 112))] == [c.ids for c in together]
    assert [c.ids for c in sampler.generate(prompts, range(200, 212))] != [c.ids for c in together]


@pytest.mark.parametrize("kind", [Decoder, LlamaDecoder])
def test_equal_prompts_are_prefilled_once_and_ended_rows_leave_the_batch(monkeypatch, kind):
    model, prompts = tiny_model(), prompts_of()
    grpo.prepare(model)
    prefilled, rows, forward, step = [], [], type(model.model).forward, kind.step
    monkeypatch.setattr(
        type(model.model),
        "forward",
        lambda self, **kw: prefilled.append(tuple(kw["input_ids"].shape)) or forward(self, **kw),
    )
    monkeypatch.setattr(kind, "step", lambda self, token: rows.append(len(token)) or step(self, token))
    sampler = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12)
    sampler.decoder = kind
    prefilled.clear()
    rows.clear()
    completions = sampler.generate(prompts, range(12))
    assert prefilled[0] == (1, 4 + 3 + 6 + 1)  # the common beginning and the rests of three prompts, once each
    lengths = [len(c.ids) for c in completions]
    for t, batch in enumerate(rows, start=1):
        alive = sum(n > t for n in lengths)
        assert alive <= batch <= max(alive / 0.75, 12 * (t == 1), 1)
    assert len(rows) > 5 and rows[-1] < 12


@pytest.mark.parametrize("rows, waves", [(5, [5, 5, 2]), (12, [12]), (0, [1] * 12)])
def test_what_memory_has_no_room_for_is_decoded_later_and_comes_out_the_same(monkeypatch, rows, waves):
    model, prompts, batches = tiny_model(), prompts_of(), []
    sampler = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12)
    together = sampler.generate(prompts, range(12))
    row = 2 * 4 * 3 * 2 * 8 * (max(map(len, prompts)) + 12 + ROOM) + 40 * 97  # float32, 3 layers, 2 key heads of 8
    monkeypatch.setattr("sampler.free_memory", lambda device: 2 * rows * row)
    generate = sampler._generate
    monkeypatch.setattr(sampler, "_generate", lambda ids, seeds: batches.append(len(ids)) or generate(ids, seeds))
    assert [c.ids for c in sampler.generate(prompts, range(12))] == [c.ids for c in together]
    assert batches == waves
    assert sampler.generate([], []) == []


@pytest.mark.parametrize("architecture", ["llama", "llama-mha", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_quick_decoder_equals_the_general_one(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    grpo.prepare(model)
    lora.inject(model, 4, 8.0, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    prompts = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 3, 4, 5, 6]]
    rows = torch.tensor([0, 0, 1, 2, 2])
    assert decodes_like_llama(model)
    with torch.inference_mode():
        general, quick = (kind(model, prompts, rows) for kind in (Decoder, LlamaDecoder))
        assert dtype == torch.bfloat16 or quick.head.weight is not None  # packed
        for t in range(ROOM + 4):  # the caches grow on the way
            token = (torch.arange(len(general.mask)) * 7 + 11 * t) % 97
            expected, logits = general.step(token), quick.step(token)
            close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.1}
            torch.testing.assert_close(logits, expected, **close)
            if t == 2:
                for decoder in (general, quick):
                    decoder.keep(torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(
    "architecture", ["gemma", "gemma3", "mistral", "granite", "cohere", "smollm3", "hunyuan", "deepseek3"]
)
def test_models_of_another_shape_take_the_general_decoder(architecture):
    model = tiny_model(architecture)
    grpo.prepare(model)
    assert not decodes_like_llama(model)


def test_the_sampler_leaves_the_model_in_training_mode_and_takes_no_gradient():
    model = tiny_model().train()
    completions = ModelSampler(model, eos_token_ids=[2], max_new_tokens=3).generate([[5, 6]], [0])
    assert model.training and len(completions) == 1 and all(p.grad is None for p in model.parameters())
    assert ModelSampler(model, eos_token_ids=[2], max_new_tokens=3).generate([], []) == []
