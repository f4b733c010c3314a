"""What several completions begin with is computed once: in a pack, and in decoding."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from test_packed import TEMPERATURE, gradients_of
from test_sampler import ENDS, prompts_of

import fast
import grpo
from fast import packed
from fast.decoder import LlamaDecoder
from fast.tree import TreeLlamaDecoder
from sampler import ModelSampler

PROMPTS = [[5, 6, 7, 8]] * 6 + [[5, 6, 9]] * 4
LONG = [*range(20, 45)]
# Equal ones, ones that part early, late and more than once, beginnings of others, and a short one.
COMPLETIONS = [LONG, LONG, [*LONG[:12], 3], [*LONG[:12], 4, 5], LONG[:9], [11]]
COMPLETIONS += [LONG, [*LONG[:2], 50, 51], LONG[:1], [*LONG[:20], 60, 61, 62]]


def tree_of(prompts, completions) -> packed.Pack:
    return packed.Pack(prompts, completions, tiny_model("llama").config, "cpu")


def test_a_pack_has_what_completions_begin_with_once():
    pack = tree_of(PROMPTS[:4], COMPLETIONS[:4])
    # 5 6 7 8, the 12 tokens of all, then 12 more of the first two, which are equal, and none or one
    # of the others: nothing is read of a completion's last token.
    assert sorted(pack.ids[0].tolist()) == sorted([5, 6, 7, 8, *LONG[:24], 4])
    ends = [len(c) for c in COMPLETIONS[:4]]
    first, second, third, fourth = pack.predicting.split(ends)
    assert first.tolist() == second.tolist()
    assert third[:13].tolist() == fourth[:13].tolist() == first[:13].tolist()


def test_few_tokens_are_not_worth_a_run_of_their_own():
    apart = [[1, 2, 3, *range(30, 40)], [1, 2, 3, *range(50, 60)]]
    pack = tree_of([[5, 6, 7]] * 2, apart)
    assert len(pack.runs) == 4 and pack.ids.shape == (1, 3 + 12 + 12)
    more = [[*range(packed.WORTH), *row] for row in apart]
    assert tree_of([[5, 6, 7]] * 2, more).ids.shape == (1, 3 + packed.WORTH + 3 + 9 + 9)


def test_every_completion_reads_its_own_tokens_at_its_own_positions():
    pack = tree_of(PROMPTS, COMPLETIONS)
    at = pack.predicting.split([len(c) for c in COMPLETIONS])
    for prompt, completion, places in zip(PROMPTS, COMPLETIONS, at):
        read = [*prompt[-1:], *completion[:-1]]
        assert pack.ids[0, places].tolist() == read
        positions = range(len(prompt) - 1, len(prompt) - 1 + len(completion))
        assert pack.positions[0, places].tolist() == list(positions)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "mistral"])
def test_values_and_gradients_are_those_of_the_plain_pass(architecture, monkeypatch):
    monkeypatch.setattr("fast.packed.QUERIES_AT_ONCE", 8)
    monkeypatch.setattr("fast.packed.MAX_SCORES", 2000)
    plain, model = (tiny_model(architecture, dtype=torch.float64).train() for _ in range(2))
    assert "packed rows" in fast.prepare(model.eval())
    expected = gradients_of(grpo.completion_logps, plain, PROMPTS, COMPLETIONS)
    own = gradients_of(fast.completion_logps, model.train(), PROMPTS, COMPLETIONS)
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_random_trees_give_the_plain_log_probabilities():
    generator = torch.Generator().manual_seed(0)
    plain, model = (tiny_model("llama", dtype=torch.float64) for _ in range(2))
    fast.prepare(model)
    for _ in range(20):
        # Three letters: much is alike. Lengths from 1.
        lengths = torch.randint(1, 24, (12,), generator=generator).tolist()
        completions = [
            (torch.rand(n, generator=generator) ** 4 * 3).long().add(9).tolist() for n in lengths
        ]
        prompts = [[5, 6, 7 + i // 6] for i in range(12)]
        with torch.no_grad():
            expected = grpo.completion_logps(plain, prompts, completions, TEMPERATURE)
            own = fast.completion_logps(model, prompts, completions, TEMPERATURE)
        for a, b in zip(own, expected):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_completions_that_are_alike_are_one_row_and_come_out_the_same(
    architecture, temperature, monkeypatch
):
    prompts = [prompts_of()[0]] * 8 + [prompts_of()[-1]] * 8
    settings = {"eos_token_ids": ENDS, "max_new_tokens": 20, "temperature": temperature}
    model = tiny_model(architecture)
    fast.prepare(model)
    plain = ModelSampler(tiny_model(architecture), **settings)
    quick = ModelSampler(model, **settings, decoder=fast.decoder_for(model))
    drawn, expected = (sampler.generate(prompts, range(16)) for sampler in (quick, plain))
    assert [c.ids for c in drawn] == [c.ids for c in expected]
    for a, b in zip(drawn, expected):
        torch.testing.assert_close(a.logps, b.logps, atol=1e-4, rtol=1e-4)


def test_a_sure_policy_decodes_few_rows(monkeypatch):
    """As many as there are different beginnings among the completions."""
    rows, run = [], LlamaDecoder.run

    def counted(self, token, mask):
        rows.append(len(token))
        return run(self, token, mask)

    monkeypatch.setattr(LlamaDecoder, "run", counted)
    model, prompts = tiny_model(), [prompts_of()[0]] * 12
    fast.prepare(model)
    settings = {"eos_token_ids": [], "max_new_tokens": 15, "temperature": 0.02}
    sampler = ModelSampler(model, **settings, decoder=TreeLlamaDecoder)
    drawn = [c.ids for c in sampler.generate(prompts, range(12))]
    different = [len({tuple(ids[:t]) for ids in drawn}) for t in range(1, 15)]
    assert rows == different and 1 < different[-1] < 12
