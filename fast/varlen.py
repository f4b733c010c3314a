"""A pack's attention in one kernel a layer, on GPUs: FlashAttention over runs of any length.

Block by block, as `PackedAttention` goes, a pass is tens of thousands of small kernels, and a GPU
waits for Python to start them. Here the queries of a run are its tokens, its keys those of its path,
gathered one path after the other, and the causal mask is aligned at their common end:

    queries   [ run 1 | run 2 | run 3 | … ]               the row as it is
    keys      [ path of run 1 | path of run 2 | … ]       shared beginnings once a run

FlashAttention is Dao's (arXiv 2307.08691), called through torch.nn.attention.varlen.
"""

import inspect
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Newer versions want to be told that query heads share key heads.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def serves(query: Tensor) -> bool:
    """Whether the kernel takes such queries, (N, heads, d)."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    dim = query.shape[2]
    return dim % 8 == 0 and dim <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


class Runs:
    """The runs of a row as the kernel takes them.

    runs: (the places of a run's tokens, the path that ends with them), in the order of the row.
    ends, path_ends: (runs + 1,) where each begins and ends; keys: the places of all paths.
    """

    def __init__(self, runs: list[tuple[list[int], list[int]]], device: torch.device):
        lengths = [len(places) for places, _ in runs]
        path_lengths = [len(path) for _, path in runs]
        self.longest, self.longest_path = max(lengths), max(path_lengths)
        both = [[0, *accumulate(lengths)], [0, *accumulate(path_lengths)]]
        self.ends, self.path_ends = torch.tensor(both, dtype=torch.int32, device=device)
        self.keys = torch.tensor([place for _, path in runs for place in path], device=device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query (N, heads, d), key and value of all paths (L, key heads, d) → like query."""
        sizes = self.ends, self.path_ends, self.longest, self.longest_path
        left = -1 if window is None else window - 1  # a window counts the query's own place
        return varlen_attn(query, key, value, *sizes, scale=scale, window_size=(left, 0), **GROUPED)


class VarlenAttention(torch.autograd.Function):
    """`PackedAttention` with that kernel: query (N, heads, d), key and value (N, key heads, d) →
    (N, heads, d). The gathered keys are not kept for backward, which gathers and attends once more."""

    @staticmethod
    def forward(ctx, query, key, value, runs: Runs, scale: float, window: int | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.runs, ctx.scale, ctx.window = runs, scale, window
        paths = (x.index_select(0, runs.keys) for x in (key, value))
        return runs.attend(query, *paths, scale, window)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        keys = ctx.runs.keys
        leaves = query, key.index_select(0, keys), value.index_select(0, keys)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            out = ctx.runs.attend(*leaves, ctx.scale, ctx.window)
        grad_query, *of_paths = torch.autograd.grad(out, leaves, grad)
        # Many paths add to one key, so in float32.
        sums = key.new_zeros((2, *key.shape), dtype=torch.promote_types(key.dtype, torch.float32))
        for total, own in zip(sums, of_paths):
            total.index_add_(0, keys, own.to(total.dtype))
        grad_key, grad_value = sums.to(key.dtype)
        return grad_query, grad_key, grad_value, None, None, None
