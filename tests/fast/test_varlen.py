"""Attention by one kernel for runs of any length, with a slow stand-in: the kernel runs on GPUs alone,
where bench/gpu/kit.py compares it (part `packed`)."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, tiny_model
from test_packed import gradients_of

import fast
import grpo
from fast import packed, varlen

# The last two have windows, of all layers and of every other one.
ARCHITECTURES = ["llama", "qwen3", "gemma2", "mistral", "gemma3"]


def slow_kernel(query, key, value, ends, path_ends, longest, longest_path, scale, window_size, **_):
    """What torch says of varlen_attn, run by run: the last query of a run sees its last key, and each
    sees so many keys to its left as the window has."""
    out = []
    left, right = window_size
    assert right == 0
    runs = list(zip(ends.tolist(), ends[1:].tolist(), path_ends.tolist(), path_ends[1:].tolist()))
    assert longest == max(end - start for start, end, _, _ in runs)
    assert longest_path == max(last - first for _, _, first, last in runs)
    assert ends[-1] == len(query) and path_ends[-1] == len(key) == len(value)
    for start, end, first, last in runs:
        q, k, v = (
            x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last])
        )
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        at_query = torch.arange(last - first - (end - start), last - first)[:, None]
        distance = at_query - torch.arange(last - first)
        hidden = distance < 0
        if left >= 0:
            hidden |= distance > left
        scores = (scale * q @ k.mT).masked_fill(hidden, float("-inf"))
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runs_attend_as_the_plain_pass_does(architecture, monkeypatch):
    attended = []
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda *a, **k: attended.append(1) or slow_kernel(*a, **k)
    )
    prompts, completions, _ = make_batch(longest=30)
    completions[3] = completions[3][:1]  # nothing is read of its last token: no run of its own
    plain, model = (tiny_model(architecture, dtype=torch.float64).train() for _ in range(2))
    monkeypatch.setattr(packed, "serves", lambda query: True)
    assert "packed rows" in fast.prepare(model.eval())
    expected = gradients_of(grpo.completion_logps, plain, prompts, completions)
    own = gradients_of(fast.completion_logps, model.train(), prompts, completions)
    assert attended
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"device": SimpleNamespace(type="cpu")}, False),
        ({"dtype": torch.float32}, False),
        ({"shape": (3, 2, 60)}, False),
        ({"shape": (3, 2, 264)}, False),
        ({"capability": (7, 5)}, False),
    ],
)
def test_the_kernel_is_for_gpus_in_half_precision(change, serves, monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    query = {"device": gpu, "dtype": torch.bfloat16, "shape": (3, 2, 64), "capability": (9, 0)}
    query = SimpleNamespace(**query | change)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: query.capability)
    assert varlen.serves(query) == serves
