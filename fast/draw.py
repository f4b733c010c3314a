"""Drawing tokens with few running sums.

A running sum over a whole vocabulary is slow, so the sums of parts of it find the part, and only
its tokens are summed one by one:

    weights     [ 256 | 256 | 256 | … ]     a sum each, and a running sum of these
                        └─ the part that the target lies in: 256 running sums

Where completions share rows (fast/tree.py), each row's sums are made once for all that draw from it.

`draw_for` takes the plain function once somebody has changed it.
"""

import hashlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import sampler
from sampler import first_above, truncate

SUMMED_TOGETHER = 256  # tokens of a part
# What `source` says of the functions in sampler.py that this file was written for.
WRITTEN_FOR = "1529c3f9240ab098"


class Shared(NamedTuple):
    """Logits that several completions draw from."""

    logits: Tensor  # (R, V)
    row: Tensor  # (B,) each completion's

    def float(self) -> Tensor:
        """Those of each completion, (B, V): what the plain way to draw begins with."""
        return self.logits[self.row].float()


def draw_for() -> Callable:
    """The quick function, if the plain one is still what it was written for, else the plain one.

    Their results are not enough to go by: a token that is never drawn changes few of them.
    """
    return sample_tokens if source() == WRITTEN_FOR else plainly


def plainly(logits: Tensor | Shared, *settings) -> tuple[Tensor, Tensor]:
    """`sampler.sample_tokens`, whatever it has become."""
    return sampler.sample_tokens(logits.float(), *settings)


def source() -> str:
    """A fingerprint of the text of the plain function and of what it calls."""
    functions = (sampler.sample_tokens, sampler.first_above, sampler.truncate)
    try:
        text = "".join(map(inspect.getsource, functions))
    except (OSError, TypeError):  # a function without a file
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample_tokens(
    logits: Tensor | Shared,
    uniforms: Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """`sampler.sample_tokens`: logits (B, V), uniforms (B,) → tokens (B,) and logps (B,)."""
    row = torch.arange(len(uniforms), device=uniforms.device)
    if isinstance(logits, Shared):
        logits, row = logits  # (R, V) and (B,)
    if temperature != 1.0:
        logits = logits.to(torch.float32, copy=True).div_(temperature)
    probabilities = logits.softmax(-1, dtype=torch.float32)  # (R, V)
    weights = probabilities
    if top_k > 0:
        # The largest alone are sorted, not the whole vocabulary.
        ordered, order = logits.float().topk(min(top_k, logits.shape[1]))
        left = truncate(ordered, top_p, 0) > float("-inf")
        kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order, left)
        weights = weights * kept
    elif top_p < 1.0:
        dropped = truncate(logits.float(), top_p, 0) == float("-inf")
        weights = weights.masked_fill(dropped, 0.0)
    rest = -weights.shape[1] % SUMMED_TOGETHER
    if rest:
        weights = F.pad(weights, (0, rest))
    parts = weights.view(len(weights), -1, SUMMED_TOGETHER)  # (R, n, SUMMED_TOGETHER)
    ends = parts.sum(-1, dtype=torch.float64).cumsum(-1)[row]  # (B, n) F at the end of each part

    target = uniforms[:, None] * ends[:, -1:]  # (B, 1)
    part = first_above(ends, target)
    starts = F.pad(ends, (1, 0))  # F in front of each part
    left = target - starts.gather(1, part)
    own = parts[row, part[:, 0]]  # (B, SUMMED_TOGETHER)
    inside = first_above(own.cumsum(-1, dtype=torch.float64), left)
    tokens = (part * SUMMED_TOGETHER + inside)[:, 0]  # (B,)
    # Of what is not a number the last one, which may be padding.
    tokens = tokens.clamp(max=probabilities.shape[1] - 1)
    return tokens, probabilities[row, tokens].log()
