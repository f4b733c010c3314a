"""Drawing by parts of the vocabulary draws what the plain running sum draws."""

import pytest
import torch

import fast
import sampler
from fast import draw

PLAIN = sampler.sample_tokens


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (0.9, 40)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [6, 256, 49_152, 50_001])
def test_the_same_tokens_with_the_same_probabilities(vocabulary, temperature, top_p, top_k):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(64, vocabulary, generator=generator)
    logits[::2] /= 100  # as good as uniform
    uniforms = torch.rand(64, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])
    settings = (temperature, top_p, top_k)
    tokens, logps = fast.sample_tokens(logits, uniforms, *settings)
    plain_tokens, plain_logps = sampler.sample_tokens(logits, uniforms, *settings)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logps, plain_logps)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (0.9, 5)])
def test_completions_that_share_logits_draw_what_they_would_from_their_own(top_p, top_k):
    shared = draw.Shared(2 * torch.randn(3, 1000), torch.tensor([2, 0, 0, 2, 2]).repeat(20))
    uniforms = torch.rand(100)
    tokens, logps = fast.sample_tokens(shared, uniforms, 0.8, top_p, top_k)
    plain_tokens, plain_logps = sampler.sample_tokens(shared.float(), uniforms, 0.8, top_p, top_k)
    assert torch.equal(tokens, plain_tokens) and len(tokens.unique()) > 5
    torch.testing.assert_close(logps, plain_logps)


def test_no_uniform_number_draws_a_token_of_probability_zero():
    logits = torch.full((3, 1000), float("-inf"))
    logits[:, 400:500] = torch.randn(100)
    tokens, _ = fast.sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24, 0.5]), 1.0)
    assert ((tokens >= 400) & (tokens < 500)).all()


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (1.0, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_of_logits_that_are_not_finite_a_token_is_drawn_that_has_no_probability(
    value, top_p, top_k
):
    logits = torch.randn(3, 1000)  # which leaves padding behind the last part
    logits[1, slice(None) if value < 0 else 7] = value
    tokens, logps = fast.sample_tokens(logits, torch.tensor([0.0, 0.5, 0.9]), 0.8, top_p, top_k)
    assert ((tokens >= 0) & (tokens < 1000)).all()
    assert logps.isfinite().tolist() == [True, False, True]


def without_a_token(logits, *settings):
    """Somebody's idea."""
    logits[:, 7] = -torch.inf
    return PLAIN(logits, *settings)


def test_the_quick_way_to_draw_knows_the_plain_one():
    """After a change of sampler.py that is in fast/draw.py, too, WRITTEN_FOR is what source() says."""
    assert draw.source() == draw.WRITTEN_FOR
    assert fast.draw_for() is fast.sample_tokens


@pytest.mark.parametrize("name", ["sample_tokens", "first_above", "truncate"])
def test_whoever_changes_the_plain_way_to_draw_gets_it(name, monkeypatch):
    monkeypatch.setattr(sampler, name, without_a_token)
    assert fast.draw_for() is draw.plainly


def test_the_changed_way_draws_from_shared_logits_too(monkeypatch):
    monkeypatch.setattr(sampler, "sample_tokens", without_a_token)
    likely = torch.full((2, 9), -30.0)
    likely[:, 7] = 30.0
    shared, uniforms = draw.Shared(likely, torch.tensor([1, 0, 1])), torch.tensor([0.2, 0.9, 0.5])
    assert fast.sample_tokens(shared, uniforms, 1.0)[0].tolist() == [7, 7, 7]
    tokens, _ = fast.draw_for()(shared, uniforms, 1.0)
    assert len(tokens) == 3 and 7 not in tokens
