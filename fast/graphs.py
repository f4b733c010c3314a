"""A decoding step as one CUDA graph, on GPUs.

A step is a thousand kernels or two, each of which takes a GPU less time than Python takes to start
it. A graph is such kernels recorded once, and started by one call:

    first step    run as it is                     loads what kernels need
    second step   recorded, then replayed          a graph
    all others    replayed                         one call each

What is replayed reads and writes the same memory each time. So a row keeps its place until the cache
has no more room. Then ended rows leave, the cache grows, and a new graph is recorded.

See CUDA graphs in PyTorch: https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.decoder import DecodingLayer, LlamaDecoder, with_room

STEPS = 128  # of a graph, at most: the cache has room for so many tokens more
LEAST_FREE = 2 << 30  # bytes: while it records, PyTorch frees nothing that it holds on to


class GraphLayer(DecodingLayer):
    """A `DecodingLayer` whose place and mask are tensors: a number of Python's would be recorded as
    it is, and be the same in every replay.

    place (1,): where the next token goes. bias (B, 1, size): 0 where a row may look, very negative
    elsewhere. All layers share them, and the decoder moves them on.
    """

    place: Tensor
    bias: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        self.keys.index_copy_(2, self.place, key_states.transpose(0, 1))
        self.values.index_copy_(2, self.place, value_states.transpose(0, 1))
        return self, self

    def hide(self, scores: Tensor, mask: Tensor | None) -> None:
        scores.add_(self.bias)

    def make_room(self, rows: Tensor, tokens: int) -> None:
        self.keys = with_room(self.keys.index_select(1, rows), tokens)
        self.values = with_room(self.values.index_select(1, rows), tokens)


class GraphDecoder(LlamaDecoder):
    """`LlamaDecoder` on a GPU, its step a graph; on a CPU the same without one."""

    layer_type = GraphLayer

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        super().__init__(model, prompts, row_of)
        first = self.cache.layers[0]
        self.token = row_of.clone()  # (B,) of each row, the last that was put behind it
        self.place = row_of.new_tensor([first.length])
        self.lowest = torch.finfo(first.keys.dtype).min
        seen = self.mask[:, None, first.shared :]  # (B, 1, length)
        bias = torch.zeros(seen.shape, dtype=first.keys.dtype, device=seen.device)
        bias.masked_fill_(seen == 0, self.lowest)
        self.room = first.keys.shape[2] - first.length
        self.bias = F.pad(bias, (0, self.room), value=self.lowest)
        # The rows that go on, among those that are decoded.
        self.rows = torch.arange(len(row_of), device=row_of.device)
        self._make_room(STEPS - self.room)

    def step(self, token: Tensor) -> Tensor:
        if self.room == 0:
            self._make_room(STEPS)
        self.room -= 1
        self.token[self.rows] = token
        return self._replay()[self.rows]

    def keep(self, rows: Tensor) -> None:
        """Ended rows stay until the next graph; what they draw is not looked at."""
        self.rows = self.rows[rows]

    def _make_room(self, tokens: int) -> None:
        """Let the ended rows go, and take room for so many tokens more."""
        self.graph = self.out = None
        self.loaded = False
        self.token, self.position = self.token[self.rows], self.position[self.rows]
        self.bias = F.pad(self.bias[self.rows], (0, tokens), value=self.lowest)
        for layer in self.cache.layers:
            layer.make_room(self.rows, tokens)
            layer.place, layer.bias = self.place, self.bias
        self.rows = torch.arange(len(self.rows), device=self.rows.device)
        self.room += tokens

    def _replay(self) -> Tensor:
        """A step of all rows → their logits, (B, V), which the next one overwrites.

        The first of each size is not recorded: it loads kernels, which a recording may not.
        """
        if self.graph is None and self.loaded and self.token.is_cuda:
            self.graph, self.out = record(self._advance)
        if self.graph is not None:
            self.graph.replay()
            return self.out
        self.loaded = True
        return self._advance()

    def _advance(self) -> Tensor:
        """What is recorded: read the tokens, and move on by one place."""
        self.bias.index_fill_(2, self.place, 0.0)
        logits = self.run(self.token, None)
        self.place += 1
        self.position += 1
        return logits


@functools.cache
def recording_stream() -> "torch.cuda.Stream":
    return torch.cuda.Stream()


def record(work) -> tuple["torch.cuda.CUDAGraph", Tensor]:
    """A graph of what `work` does, and the tensor that it returns. It is recorded and not yet run."""
    if torch.cuda.mem_get_info()[0] < LEAST_FREE:
        torch.cuda.empty_cache()
    graph, stream = torch.cuda.CUDAGraph(), recording_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Other threads of this process may go on with the GPU meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            out = work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, out
