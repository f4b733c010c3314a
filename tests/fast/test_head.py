"""The head in chunks against log_softmax over all logits, and what memory it needs."""

import itertools
from functools import partial

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from torch.profiler import ProfilerActivity, profile

from fast import head

TEMPERATURE = 0.7


def plain_logps(model, hidden, targets, temperature):
    log_p = (head.logits_from_hidden_states(model, hidden) / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_a_head_that_does_more_is_found():
    assert all(head.head_is_plain(tiny_model(architecture)) for architecture in ARCHITECTURES)
    model = tiny_model("llama")
    model.config.logit_scale = 0.5  # a Llama's forward pass knows nothing of it
    assert not head.head_is_plain(model)


@pytest.mark.parametrize("asked", ["logps", "entropies", "both"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_the_heads_gradients_are_those_of_log_softmax(architecture, trained, asked, monkeypatch):
    """With a head that is trained and a frozen one, whose gradient is made ahead; in chunks of two
    tokens."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2 * 97)
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 32, generator=noise, dtype=torch.float64)
    slopes = torch.randn(2, 7, generator=noise, dtype=torch.float64)
    targets = torch.randint(97, (7,), generator=noise)
    results = []
    for ours in (False, True):
        model, x = tiny_model(architecture, dtype=torch.float64), hidden.clone().requires_grad_()
        weight = model.get_output_embeddings().weight.requires_grad_(trained)
        if ours:
            both = head.logps_from_hidden_states(model, x, targets, TEMPERATURE)
        else:
            both = plain_logps(model, x, targets, TEMPERATURE)
        parts = [value @ slope for value, slope in zip(both, slopes)]
        {"logps": parts[0], "entropies": parts[1], "both": sum(parts)}[asked].backward()
        results.append([*(value.detach() for value in both), x.grad])
        if trained:
            results[-1].append(weight.grad)
    for plain, own in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)


@pytest.mark.parametrize("with_entropies, passes", [(False, 1), (True, 2)])
def test_logits_are_made_once_unless_the_entropies_have_a_gradient(with_entropies, passes):
    """Of a frozen head; every token is counted."""
    model = tiny_model("llama").requires_grad_(False)
    tokens = []
    model.lm_head.register_forward_hook(lambda module, inputs, _: tokens.append(len(inputs[0])))
    hidden = torch.randn(7, 32, requires_grad=True)
    logps, entropies = head.logps_from_hidden_states(model, hidden, torch.arange(7), 1.0)
    total = logps.sum() + entropies.sum() if with_entropies else logps.sum()
    total.backward()
    assert sum(tokens) == 1 + 7 * passes  # one tells how many words there are


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_log_probabilities_need_no_table_of_tokens_by_vocabulary(
    trained, entropy_coef, monkeypatch
):
    """Every allocation is counted, forward and backward; the plain way takes several tables."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 5000)
    model = tiny_model("llama", vocab_size=1000).requires_grad_(False)
    model.lm_head.weight.requires_grad_(trained)
    hidden = torch.randn(400, 32, requires_grad=True)
    targets = torch.randint(1000, (400,))

    def work(function):
        logps, entropies = function(model, hidden, targets, 0.9)
        total = logps.sum()
        if entropy_coef:
            total = total + entropy_coef * entropies.sum()
        total.backward()

    table = 4 * 400 * 1000  # bytes
    assert peak_bytes(partial(work, head.logps_from_hidden_states)) < 0.5 * table
    assert peak_bytes(partial(work, plain_logps)) > 2 * table


def peak_bytes(work) -> int:
    """The most that `work` had allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        work()
    events = [e for e in told.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_a_trained_heads_gradient_is_that_of_one_product_however_many_chunks(monkeypatch):
    """In bfloat16, as far from the exact one as the plain product's: a sum in bfloat16 loses what
    late chunks add."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(2000, 32).bfloat16(), torch.randint(0, 97, (2000,))
    gradients = []
    for dtype, size in (("float64", 10**9), ("bfloat16", 10**9), ("bfloat16", 97)):
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", size)
        model = tiny_model(dtype=torch.bfloat16).to(getattr(torch, dtype))
        x = hidden.to(model.dtype)
        head.logps_from_hidden_states(model, x, targets, 1.0)[0].sum().backward()
        gradients.append(model.lm_head.weight.grad.double())
    exact, whole, chunks = gradients
    assert (chunks - exact).norm() < 1.5 * (whole - exact).norm() < 0.02 * exact.norm()
