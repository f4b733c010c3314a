"""Drawing by parts of the vocabulary draws what the plain running sum draws."""

import pytest
import torch
from conftest import tiny_model

import fast
import sampler

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


def test_no_uniform_number_draws_a_token_of_probability_zero():
    logits = torch.full((3, 1000), float("-inf"))
    logits[:, 400:500] = torch.randn(100)
    tokens, _ = fast.sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24, 0.5]), 1.0)
    assert ((tokens >= 400) & (tokens < 500)).all()


def least_probability(logits, uniforms, temperature, top_p=1.0, top_k=0):
    """Somebody's idea: nothing is drawn that has less than a twentieth of the likeliest's share."""
    probabilities = (logits.float() / temperature).softmax(-1)
    unlikely = probabilities < 0.05 * probabilities.max(-1, keepdim=True).values
    return PLAIN(logits.masked_fill(unlikely, -torch.inf), uniforms, temperature, top_p, top_k)


def without_a_token(logits, *settings):
    logits[:, 7] = -torch.inf
    return PLAIN(logits, *settings)


@pytest.mark.parametrize("vocabulary", [97, 5_000])
@pytest.mark.parametrize("settings", [(0.9, 1.0, 0), (0.7, 0.9, 0), (1.0, 0.95, 50)])
def test_whoever_changes_the_plain_way_to_draw_gets_it(vocabulary, settings, monkeypatch):
    model = tiny_model(vocab_size=vocabulary)
    assert fast.draw_for(model, *settings) is fast.sample_tokens
    monkeypatch.setattr("sampler.sample_tokens", without_a_token)
    if not settings[2]:  # the largest 50 need not have it
        assert fast.draw_for(model, *settings) is without_a_token
    monkeypatch.setattr("sampler.sample_tokens", least_probability)
    assert fast.draw_for(model, *settings) is least_probability
