"""Rows that have drawn the same tokens so far are decoded as one, until they differ.

The G completions of a prompt begin as one row. A policy that is sure of itself draws the same token
for most of them, so that they stay one row for long:

    completions   p1 p1 p1 p1   p2 p2 p2 p2          G = 4
    first step    p1            p2                   a row for each prompt
    later         p1a p1b       p2                   a row for each beginning that was drawn

Each completion draws with its own random numbers from its row's logits. So nothing changes but the
work: 64 completions of the arithmetic task are some 20 rows in most steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fast.decoder import LlamaDecoder, PackedDecoder
from sampler import COMPACT_AT


class Tree:
    """A decoder of B rows whose own are the different ones among them. Stands in front of one."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        super().__init__(model, prompts, torch.arange(len(prompts), device=row_of.device))
        self.own_rows, V = self.logits.shape
        self.size = V
        self.row = row_of  # (B,) the own row of each
        self.logits = self.logits[row_of]  # (B, V)

    def step(self, token: Tensor) -> Tensor:
        different, place = (self.row * self.size + token).unique(return_inverse=True)
        parents, tokens = different // self.size, different % self.size
        forks = len(parents.unique()) < len(parents)
        if forks or len(parents) <= COMPACT_AT * self.own_rows:
            super().keep(parents)
            self.own_rows, self.row = len(parents), place
        else:  # to copy the cache would cost more than the rows that nobody needs any more
            tokens = tokens.new_zeros(self.own_rows).index_copy(0, parents, tokens)
        return super().step(tokens)[self.row]

    def keep(self, rows: Tensor) -> None:
        self.row = self.row[rows]


class TreeLlamaDecoder(Tree, LlamaDecoder):
    """`LlamaDecoder` of the different rows."""


class TreePackedDecoder(Tree, PackedDecoder):
    """`PackedDecoder` of the different rows."""
