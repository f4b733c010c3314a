"""Rows that have drawn the same tokens so far are decoded as one, until they differ.

The G completions of a prompt begin as one row. A policy that is sure of itself draws the same token
for most of them, so that they stay one row for long:

    completions   p1 p1 p1 p1   p2 p2 p2 p2          G = 4
    first step    p1            p2                   a row for each prompt
    later         p1a p1b       p2                   a row for each beginning that was drawn

Each completion draws with its own random numbers from its row's logits (`draw.Shared`). So nothing
changes but the work: 64 completions of the arithmetic task are 16 to 27 rows once the policy is
sure of its answers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fast.decoder import LlamaDecoder, PackedDecoder
from fast.draw import Shared
from sampler import COMPACT_AT


class Tree:
    """A mixin: outside it decodes B rows, and the decoder behind it the different ones among them.

    Its logits are `Shared`, in the place of (B, V).
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        super().__init__(model, prompts, torch.arange(len(prompts), device=row_of.device))
        self.different, self.vocabulary = self.logits.shape
        self.row = row_of  # (B,) where each stands among the different ones
        self.logits = Shared(self.logits, row_of)

    def step(self, token: Tensor) -> Shared:
        drawn = self.row * self.vocabulary + token
        drawn, row = drawn.unique(return_inverse=True)
        parents, tokens = drawn // self.vocabulary, drawn % self.vocabulary
        forks = len(parents.unique()) < len(parents)
        if forks or len(parents) <= COMPACT_AT * self.different:
            super().keep(parents)
            self.different, self.row = len(parents), row
        else:  # rows that no completion is in any more may go on for a while
            tokens = tokens.new_zeros(self.different).index_copy(0, parents, tokens)
        return Shared(super().step(tokens), self.row)

    def keep(self, rows: Tensor) -> None:
        self.row = self.row[rows]


class TreeLlamaDecoder(Tree, LlamaDecoder):
    """`LlamaDecoder` of the different rows."""


class TreePackedDecoder(Tree, PackedDecoder):
    """`PackedDecoder` of the different rows."""
