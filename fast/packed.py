"""A micro-batch as one row without padding, each prompt once, and attention along the paths in it.

Replaces the padded forward pass of `grpo.completion_logps`. G completions of one prompt need its
keys and values once, and so do all prompts what they begin with:

    [ what all prompts begin with | rest of p1 | rest of p2 | … | o1 | o2 | o3 | … ]

A completion continues the rest of its prompt, which continues the shared beginning. Completions of
one prompt that begin alike share that, too, until they differ: they are a tree. So a token's path,
what it attends to, is a list of places in the row, with its own at the end. 64 completions of the
arithmetic task, 16 groups of 4, are some 1,800 tokens instead of 11,000, and 800 once the
policy is sure of most answers.

    Pack              the row, and who attends to whom
    Block             tokens of the row that attend together, padded to one size
    PackedAttention   softmax(Q Kᵀ) V along the paths, block by block; on GPUs, in half precision, one
                      kernel does it (varlen.py)
    grouped_attention where a transformers model meets it: attn_implementation "grouped"

To try another layout, change `Pack`; to bring a kernel of your own, change `PackedAttention`.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fast.remade import remaking
from fast.varlen import Runs, VarlenAttention, serves
from grpo import Rows, pad, positions
from sampler import distinct

QUERIES_AT_ONCE = 256  # of one completion: what the causal mask hides behind them is not computed
WORTH = 8  # tokens that sharing has to save, to be worth a run of its own
MAX_SCORES = 1 << 23  # attention scores at once, some 100 MiB while they are worked on


def completion_hidden_states(
    model: torch.nn.Module, prompt_ids: Rows, completion_ids: Rows
) -> Tensor:
    """The last hidden states that predict each completion token, one completion after the other,
    (tokens, D)."""
    hidden, predicting = hidden_states(model, prompt_ids, completion_ids)
    return hidden.index_select(0, predicting)


def hidden_states(
    model: torch.nn.Module, prompt_ids: Rows, completion_ids: Rows
) -> tuple[Tensor, Tensor]:
    """Last hidden states, (N, D), and the place of the one that predicts each completion token,
    (tokens,): tokens that several completions have in common are predicted by one state.

    Models that cannot pack (`fast.prepare` tries) run on a padded batch.
    """
    decoder = model.get_decoder()
    device = next(model.parameters()).device
    if model.config._attn_implementation == "grouped":
        config = model.config.get_text_config()
        pack = Pack(prompt_ids, completion_ids, config, device)
        with remaking():
            return pack.run(decoder), pack.predicting

    prompts, prompt_mask = pad(prompt_ids, "left", device)
    completions, completion_mask = pad(completion_ids, "right", device)
    ids = torch.cat([prompts, completions], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    settings = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    with remaking():
        hidden = decoder(input_ids=ids, **settings).last_hidden_state  # (B, P + T, D)
    is_target = torch.cat([torch.zeros_like(prompt_mask), completion_mask], dim=1)
    targets = is_target.flatten().nonzero()[:, 0]
    return hidden.flatten(0, 1), targets - 1  # a token is predicted by the one in front of it


# The row ----------------------------------------------------------------------------------------


class Pack:
    """A micro-batch as one row of N tokens, and who attends to whom.

    ids, positions: (1, N); shared: length of the beginning; runs: (places, path) of each part that
    was appended, in the order of the row; predicting: for each completion token the place of the
    token in front of it; rests: the places of each distinct prompt's rest; keys_and_values: a list
    for those of all layers, (N, key heads, d) each, or None.
    """

    def __init__(self, prompt_ids: Rows, completion_ids: Rows, config, device: torch.device):
        prompts, row_of = distinct(prompt_ids, device)
        row = Row()
        beginning = row.append(shared_beginning(prompts, config), [])
        shared = len(beginning)
        prompt_paths = [row.append(prompt[shared:], beginning) for prompt in prompts]
        groups = [[] for _ in prompts]
        for i, completion in zip(row_of.tolist(), completion_ids):
            groups[i].append(completion[:-1])  # nothing is read of its last token
        paths = [iter(row.branch(group, path)) for group, path in zip(groups, prompt_paths)]
        predicting = []
        for i in row_of.tolist()[: len(completion_ids)]:
            first = len(prompt_paths[i]) - 1
            predicting += next(paths[i])[first:]

        self.shared, self.runs, self.heads = shared, row.runs, config.num_attention_heads
        self.ids = torch.tensor([row.ids], device=device)
        self.positions = torch.tensor([row.positions], device=device)
        self.predicting = torch.tensor(predicting, device=device)
        self.rests = [path[shared:] for path in prompt_paths]
        self.keys_and_values = None

    @functools.cached_property
    def blocks(self) -> "list[Block]":
        """All of the row's tokens, in parts that attend together."""
        positions = self.positions[0]
        # The beginning's own tokens have nothing before them that other rows of a block share.
        first = 1 if self.shared else 0
        blocks = [Block([run], [path], 0, positions) for run, path in cut(self.runs[:first])]
        for part in like_sizes(cut(self.runs[first:]), self.heads):
            blocks.append(Block(*zip(*part), self.shared, positions))
        return blocks

    @functools.cached_property
    def varlen(self) -> Runs:
        """The same for one kernel that takes all runs."""
        return Runs(self.runs, self.ids.device)

    def run(self, decoder: torch.nn.Module) -> Tensor:
        """The last hidden state of each token, (N, D)."""
        # Without any mask transformers makes one of N × N.
        no_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=self.ids.device)
        settings = {"attention_mask": no_mask, "use_cache": False, "pack": self}
        out = decoder(input_ids=self.ids, position_ids=self.positions, **settings)
        return out.last_hidden_state[0]


class Row:
    """The tokens of a row while it grows, their positions, and its runs: (the places of tokens that
    were appended together, the path that ends with them)."""

    def __init__(self):
        self.ids, self.positions, self.runs = [], [], []

    def append(self, tokens: Sequence[int], behind: list[int]) -> list[int]:
        """Put tokens into the row that continue the path `behind` → the path with them."""
        count, position = len(tokens), len(behind)
        first = len(self.ids)
        places = list(range(first, first + count))
        self.ids.extend(tokens)
        self.positions.extend(range(position, position + count))
        path = behind + places
        if places:
            self.runs.append((places, path))
        return path

    def branch(self, continuations: Rows, behind: list[int]) -> list[list[int]]:
        """Append several continuations of the path `behind`, and what they begin with but once → the
        path that ends with each."""
        paths = [behind] * len(continuations)
        todo = [(range(len(continuations)), behind)]  # whose tokens are the same up to this path
        while todo:
            members, path = todo.pop()
            rests = {i: list(continuations[i][len(path) - len(behind) :]) for i in members}
            common = os.path.commonprefix(list(rests.values()))
            groups = {}  # by the token that tells them apart
            for i, rest in rests.items():
                token = rest[len(common)] if len(rest) > len(common) else None
                groups.setdefault(token, []).append(i)
            ended = groups.pop(None, [])
            shares = len(common) * (len(members) - 1) >= WORTH or not groups
            if shares:  # else each appends it with its rest, further below
                path = self.append(common, path)
            for i in ended:
                paths[i] = path if shares else self.append(common, path)
            todo += [(group, path) for group in groups.values()]
        return paths


def cut(runs: Sequence[tuple]) -> Iterator[tuple]:
    """Runs in parts of QUERIES_AT_ONCE tokens: (their places, the places that they attend to)."""
    for places, path in runs:
        behind = len(path) - len(places)
        for start in range(0, len(places), QUERIES_AT_ONCE):
            end = start + QUERIES_AT_ONCE
            yield places[start:end], path[: behind + end]


def shared_beginning(prompts: Rows, config) -> list[int]:
    """What all prompts begin with (the system prompt, a worked example), without the last token
    of any.

    Nothing for models with sliding windows: each row would have its own part of it in sight.
    """
    if getattr(config, "sliding_window", None):
        return []
    return os.path.commonprefix([list(prompt[:-1]) for prompt in prompts])


def like_sizes(paths: Iterable[tuple], heads: int) -> Iterator[list[tuple]]:
    """Cut a list of (queries, path), the longest queries first, into parts of like length whose
    tables of scores have MAX_SCORES numbers at most."""
    part, longest, columns = [], 0, 0
    paths = sorted(paths, key=lambda pair: tuple(map(len, pair)), reverse=True)
    for queries, path in paths:
        columns = max(columns, len(path))
        rows = len(part) + 1
        scores = rows * heads * longest * columns
        is_short = len(queries) < 0.6 * longest
        if part and (is_short or scores > MAX_SCORES):
            yield part
            part, columns = [], len(path)
        if not part:
            longest = len(queries)
        part.append((queries, path))
    if part:
        yield part


class Block:
    """R rows of a pack that attend together, padded to T queries and L keys, of which the first
    `shared` are the same for all."""

    def __init__(self, queries: Rows, paths: Rows, shared: int, positions: Tensor):
        device = positions.device
        self.queries, query_mask = pad(queries, "right", device)  # (R, T): places in the pack
        self.keys, self.key_mask = pad(paths, "right", device)  # (R, L)
        self.query_mask = query_mask.bool()
        # The queries without padding: their places in the pack, and in the rows one after the other.
        # Made here, since to look for them in a mask would let a GPU wait in every layer.
        T = self.queries.shape[1]
        filled = [i * T + j for i, row in enumerate(queries) for j in range(len(row))]
        self.filled = torch.tensor(filled, device=device)
        self.places = torch.tensor([place for row in queries for place in row], device=device)
        self.shared, self.positions = shared, positions
        self.own_keys = self.keys[:, shared:]  # (R, L - shared)
        self.biases: dict[int | None, Tensor] = {}  # by sliding window; the layers share them

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 for the own keys that a query attends to, very negative elsewhere:
        (R, 1, T, L - shared)."""
        if window in self.biases:
            return self.biases[window]
        at_query = self.positions[self.queries]
        at_key = self.positions[self.own_keys]
        distance = at_query[:, :, None] - at_key[:, None]  # (R, T, L - shared)
        padding = self.key_mask[:, None, self.shared :] == 0
        hidden = padding | (distance < 0)
        if window is not None:
            hidden |= distance >= window
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        bias.masked_fill_(hidden, torch.finfo(dtype).min)
        self.biases[window] = bias[:, None]
        return self.biases[window]

    def weights(self, query: Tensor, key: Tensor, window: int | None) -> tuple[Tensor, ...]:
        """Attention weights P, and the block's own q and k.

        query (N, heads, d), scaled; key (N, key heads, d) → q, k, and P (key heads, R, queries, L):
        all query heads that share a key head are queries of it.
        """
        q = take(query, self.queries, key.shape[1])
        k = take(key, self.keys, key.shape[1])
        scores = q @ k.mT
        bias = self.bias(window, query.dtype)  # the shared beginning needs none: all may see it
        own = scores.unflatten(2, (-1, bias.shape[2]))
        own = own[..., self.shared :]  # (key heads, R, heads a key, T, L - shared)
        own.add_(bias)
        return q, k, scores.softmax(-1)

    def padding(self, queries: int) -> Tensor:
        """Where rows of `queries` queries, as `take` gives them, hold padding, (R, queries, 1)."""
        T = self.queries.shape[1]
        is_query = self.query_mask[:, None].expand(-1, queries // T, -1)
        return ~is_query.flatten(1)[..., None]

    def put_back(self, q: Tensor, out: Tensor) -> None:
        """Write rows of queries as `take` gives them to their places in out (N, heads, d)."""
        T = self.queries.shape[1]
        rows = q.unflatten(2, (-1, T))  # (key heads, R, heads a key, T, d)
        rows = rows.permute(1, 3, 0, 2, 4)
        rows = rows.flatten(2, 3).flatten(0, 1)  # (R · T, heads, d)
        out.index_copy_(0, self.places, rows.index_select(0, self.filled))

    def add_back(self, k: Tensor, sums: Tensor) -> None:
        """Add rows of keys, transposed, (key heads, R, d, L), to their places in sums
        (N, key heads, d)."""
        shared = k[..., : self.shared]
        shared = shared.sum(1, dtype=sums.dtype)
        sums[: self.shared] += shared.permute(2, 0, 1)
        own = k[..., self.shared :]
        own = own.permute(1, 3, 0, 2).flatten(0, 1)  # (R · (L - shared), key heads, d)
        places = self.own_keys.flatten()
        sums.index_add_(0, places, own.to(sums.dtype))


def take(x: Tensor, places: Tensor, key_heads: int) -> Tensor:
    """x (N, heads, d) at places (R, n) → (key heads, R, heads / key heads · n, d)."""
    R, n = places.shape
    rows = x.index_select(0, places.flatten())
    rows = rows.view(R, n, key_heads, -1, x.shape[2])
    rows = rows.permute(2, 0, 3, 1, 4)  # (key heads, R, heads a key, n, d)
    return rows.flatten(2, 3)


# Attention --------------------------------------------------------------------------------------


class PackedAttention(torch.autograd.Function):
    """Attention along the paths of a pack, without a table of N × N, and none kept for backward.

    query (N, heads, d), key and value (N, key heads, d) → (N, heads, d). As FlashAttention does
    (Dao et al., arXiv 2205.14135), the backward pass makes the weights P once more:

        dV = Pᵀ dO    dP = dO Vᵀ    dS = P ∘ (dP - rowsum(P ∘ dP))    dQ = dS K    dK = dSᵀ Q

    Of two tables, those of tokens and not those of weights are transposed.
    """

    @staticmethod
    def forward(ctx, query, key, value, pack: Pack, scale: float, window: int | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.pack, ctx.scale, ctx.window = pack, scale, window
        scaled = query * scale
        out = query.new_empty(query.shape)
        for block in pack.blocks:
            _, _, weights = block.weights(scaled, key, window)
            v = take(value, block.keys, value.shape[1])
            block.put_back(weights @ v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        key_heads = key.shape[1]
        scaled = query * ctx.scale
        grad_query = query.new_empty(query.shape)
        # Many rows add to one key, so in float32.
        dtype = torch.promote_types(key.dtype, torch.float32)
        shape = (2, *key.shape)
        grad_key, grad_value = torch.zeros(shape, dtype=dtype, device=key.device)
        for block in ctx.pack.blocks:
            q, k, weights = block.weights(scaled, key, ctx.window)
            v = take(value, block.keys, key_heads)
            dout = take(grad, block.queries, key_heads)
            dout.masked_fill_(block.padding(q.shape[2]), 0.0)
            block.add_back(dout.mT @ weights, grad_value)
            dweights = dout @ v.mT
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            block.put_back(dscores @ k, grad_query)
            block.add_back(q.mT @ dscores, grad_key)
        grad_query.mul_(ctx.scale)
        grad_key = grad_key.to(key.dtype)
        grad_value = grad_value.to(value.dtype)
        return grad_query, grad_key, grad_value, None, None, None


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention, with two more ways: for a pack, and for a cache that attends
    by itself.

    query (B, heads, T, d), key and value (B, key heads, L, d), attention_mask (B, 1, T, L) →
    (B, T, heads, d).
    """
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if not isinstance(key, Tensor):  # the sampler's cache
        out = key.attend(query[:, :, 0], attention_mask, scale)
        return out[:, None], None
    pack = kwargs.pop("pack", None)
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    if pack.keys_and_values is not None:
        pack.keys_and_values.append((key, value))
    window = kwargs.get("sliding_window")
    if serves(query):
        out = VarlenAttention.apply(query, key, value, pack.varlen, scale, window)
    else:
        out = PackedAttention.apply(query, key, value, pack, scale, window)
    return out[None], None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)
