"""Sampling completions from the policy: the own sampler, on any transformers model, and vLLM.

The own sampler. One call decodes all completions of a rank at once, or as many as memory has room for. Every prompt is
prefilled once, what all prompts begin with is kept once for all rows, the rest is copied to the rows of its G
completions; each step feeds one token a row; rows whose completion has ended leave the batch.

    prompts   [ beginning | p1 | p2 ]   prefilled once each
    rows      p1 p1 p1 p2 …             one a completion, its own random numbers each
    step t    one token a row           → (token, log-probability), until end-of-sequence or max_new_tokens

A token is drawn by inverting the cumulative distribution at a uniform number: exact, one random number a token. Every
completion has a random stream of its own, named by its seed, so it comes out the same in whatever batch, and on
however many ranks, it is sampled.

vLLM. Rank 0 starts the engine as a process of its own, `python sampler.py`, so that it can be watched and ended whatever
it does; all ranks' prompts go there together and each rank gets its own completions back:

    rank 0   ── requests, replies over a pipe ─────────────────────>   vllm.LLM, on a device of its own
             ── weights over a process group of two (NCCL, gloo) ──>

After an optimizer step the weights stream into the running engine, one tensor at a time, and a fingerprint of what the
engine received must equal that of what was sent.

A sampler is anything with the two methods of `Sampler`. To try a new decoding idea, change `sample_tokens`.
"""

import atexit
import ctypes
import datetime
import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import lora
from dist import World, forward, free_memory, gathered, has_bfloat16, is_sharded, whole
from grpo import Pack, distinct, logits_from_hidden_states, pad, positions

BLOCK = 256  # tokens whose probabilities are summed together; see sample_tokens
START_TIMEOUT = 600.0  # seconds in which an engine starts; a large model is read from disk, graphs are captured
ROOM = 16  # tokens, of which every cache's size is a multiple; see DecodingLayer
COMPACT_AT = 0.75  # drop ended rows once at most this share is alive: copying the cache costs about one decoding step


@dataclass
class Completion:
    """One sampled completion: its token ids, the end-of-sequence token among them, and their log-probabilities."""

    ids: list[int]
    logps: list[float]  # of each token when it was drawn: log softmax(logits / temperature), but see VLLMSampler
    finished: bool  # ended by an end-of-sequence token, not by max_new_tokens


class SamplerError(RuntimeError):
    """The sampler cannot go on; one line that says what happened, the same on every rank."""


class Sampler(Protocol):
    """What train.py needs of a sampler."""

    metrics: dict[str, float]  # of the last call of generate

    def generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """One completion for each prompt; equal prompts side by side are prefilled once."""

    def take_weights(self, model: torch.nn.Module) -> None:
        """From now on sample from `model` as it is at this moment."""


class ModelSampler:
    """Samples from the training model itself, so there are no weights to move.

    eos_token_ids: any of them ends a completion. top_k 0 and top_p 1.0 are off. They narrow what can be drawn, while
    the log-probabilities stay those of softmax(logits / temperature), the distribution of the training objective.
    A model with sharded parameters (ZeRO-3) is gathered for each call of `generate`, or with gather=False decodes as it
    is: less memory, and every layer's parameters travel at every step. Either way every rank calls it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        gather: bool = True,
    ):
        self.model, self.max_new_tokens, self.temperature = model, max_new_tokens, temperature
        self.top_p, self.top_k, self.metrics = top_p, top_k, {}
        self.eos = torch.tensor(sorted(eos_token_ids), device=next(model.parameters()).device)
        self.layerwise = is_sharded(model) and not gather  # so all ranks decode as long as any
        with nullcontext() if self.layerwise else gathered(model):
            self.decoder = LlamaDecoder if not self.layerwise and decodes_like_llama(model) else Decoder

    def take_weights(self, model: torch.nn.Module) -> None:
        self.model = model

    def generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        training = self.model.training
        self.model.eval()
        try:
            if self.layerwise:  # no inference mode: what FSDP gathers into is kept, and trained with
                with torch.no_grad():
                    return self._generate(prompt_ids or [[0]], seeds or [0])[: len(prompt_ids)]
            with gathered(self.model), torch.inference_mode():
                longest = max(map(len, prompt_ids), default=0) + self.max_new_tokens
                waves = range(0, len(prompt_ids), rows_at_once(self.model, longest))
                parts = [slice(start, start + waves.step) for start in waves]
                return [c for part in parts for c in self._generate(prompt_ids[part], seeds[part])]
        finally:
            self.model.train(training)

    def _generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        device = self.eos.device
        prompts, row_of = distinct(prompt_ids, device)
        decoder = forward(self.decoder, self.model, prompts, row_of)
        logits = decoder.logits
        uniforms = torch.stack([uniform_stream(seed, self.max_new_tokens) for seed in seeds]).to(device)

        alive = torch.arange(len(seeds), device=device)  # the completion that each row of the batch decodes
        ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        tokens = torch.zeros(len(seeds), self.max_new_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(len(seeds), self.max_new_tokens, device=device)
        lengths = torch.full((len(seeds),), self.max_new_tokens, device=device)
        for t in range(self.max_new_tokens):
            token, logp = sample_tokens(logits, uniforms[alive, t], self.temperature, self.top_p, self.top_k)
            tokens[alive, t], logps[alive, t] = token, logp
            stops = torch.isin(token, self.eos) & ~ended[alive]
            lengths[alive[stops]] = t + 1
            ended[alive[stops]] = True
            keep = (~ended[alive]).nonzero()[:, 0]
            if t + 1 == self.max_new_tokens or self._all_ended(len(keep) == 0):
                break
            if 0 < len(keep) <= COMPACT_AT * len(alive):
                decoder.keep(keep)
                alive, token = alive[keep], token[keep]
            logits = decoder.step(token)
        return [
            Completion(ids[:n], values[:n], done)
            for ids, values, n, done in zip(tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist())
        ]

    def _all_ended(self, ended: bool) -> bool:
        if self.layerwise:
            running = torch.tensor(not ended, dtype=torch.int32, device=self.eos.device)
            dist.all_reduce(running)
            return running.item() == 0
        return ended


def rows_at_once(model: torch.nn.Module, length: int) -> int:
    """How many sequences of `length` tokens can be decoded together in half of the memory that is free; one at least.

    A row takes its keys and values, and of one token the logits and what `sample_tokens` makes of them.
    """
    config, parameter = model.config.get_text_config(), next(model.parameters())
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * dim
    row = 2 * parameter.itemsize * keys * (length + ROOM) + 40 * config.vocab_size
    return max(1, free_memory(parameter.device) // 2 // row)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF: the first token whose cumulative probability exceeds the uniform number.

    logits (B, V), uniforms (B,) in [0, 1) → tokens (B,), log-probabilities (B,) under softmax(logits / temperature).
    The sums of BLOCK tokens each find the block, so that only its own tokens need a running sum. They are in float64:
    among 50,000 tokens of like probability, float32's rounding would draw another one whenever the batch is split anew.
    """
    if temperature != 1.0:
        logits = logits.to(torch.float32, copy=True).div_(temperature)
    weights = probabilities = logits.softmax(-1, dtype=torch.float32)
    if top_p < 1.0 or top_k > 0:
        weights = weights.masked_fill(truncate(logits, top_p, top_k) == float("-inf"), 0.0)
    if rest := -weights.shape[1] % BLOCK:
        weights = F.pad(weights, (0, rest))
    blocks = weights.view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = first_above(ends, target)
    target = target - F.pad(ends, (1, 0)).gather(1, block)  # what is left of it inside the block
    own = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]]
    tokens = block * BLOCK + first_above(own.cumsum(-1, dtype=torch.float64), target)
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log()


def first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """For each row the first index where cdf (B, n) exceeds target (B, 1): a token with a probability above 0.

    Rounding may put the target below 0 or at the cdf's end, where no such token lies.
    """
    end = cdf[:, -1:]
    target = torch.minimum(target.clamp(min=0.0), torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(cdf, target, right=True)


def truncate(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """logits (B, V) with all but the top_k largest, and all outside the smallest set of mass top_p, set to -inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = float("-inf")
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens ranked higher; the first always stays
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


def uniform_stream(seed: int, length: int) -> Tensor:
    """`length` uniform numbers in [0, 1) that belong to one completion alone, (length,)."""
    return torch.rand(length, generator=torch.Generator().manual_seed(int(seed)))


class Decoder:
    """Rows that each continue a prompt by one token a step, with any transformers model.

    prompts: P different ones, prefilled once; row_of (B,): the prompt of each row. `logits` (B, V) are those of the first
    token. The cache of a model that packs (grpo.Pack) holds what all prompts begin with once for all rows.
    """

    def __init__(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        self.model, config = model, model.config
        if config._attn_implementation == "grouped":
            pack = Pack(prompts, [], config.get_text_config(), row_of.device)
            pack.keys_and_values = []
            hidden = pack.run(model.get_decoder())[[rest[-1] for rest in pack.rests]]
            places, mask = pad(pack.rests, "left", row_of.device)
            layers = [DecodingLayer(*tensors, pack.shared, places[row_of]) for tensors in pack.keys_and_values]
            self.cache = Cache(layers=layers)
            mask = torch.cat([mask.new_ones(len(mask), pack.shared), mask], dim=1)
        else:
            ids, mask = pad(prompts, "left", row_of.device)
            self.cache = DynamicCache()  # without the configuration: sliding windows keep all, the mask hides it
            settings = {"attention_mask": mask, "position_ids": positions(mask), "past_key_values": self.cache}
            hidden = model.get_decoder()(input_ids=ids, use_cache=True, **settings).last_hidden_state[:, -1]
            self.cache.batch_select_indices(row_of)
        self.logits = logits_from_hidden_states(model, hidden)[row_of]
        self.mask = mask[row_of]
        self.position = self.mask.sum(1)  # of each row's next token

    def step(self, token: Tensor) -> Tensor:
        """Put a token (B,) behind each row → logits (B, V) of the next one."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        position, self.position = self.position[:, None], self.position + 1
        settings = {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
        return self.model(input_ids=token[:, None], position_ids=position, **settings).logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]


class DecodingLayer(DynamicLayer):
    """One layer's keys and values, laid out for one query a row, and attention to them.

    keys, values: (N, key heads, d) of a pack, the first `shared` of them those that all rows begin with; places (B, L):
    where each row's own are. Their buffers have room for up to ROOM tokens more and are made anew every ROOM steps,
    not once for the longest completion: products read them whole, since oneDNN copies a part of a buffer to multiply it.
    """

    def __init__(self, keys: Tensor, values: Tensor, shared: int, places: Tensor):
        super().__init__()
        self.shared, self.length = shared, places.shape[1]
        self.shared_keys, self.shared_values = (x[:shared].transpose(0, 1).contiguous() for x in (keys, values))
        ahead = (0, 0, 0, ROOM - self.length % ROOM)
        self.keys, self.values = (F.pad(x[places].permute(2, 0, 1, 3), ahead) for x in (keys, values))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Take a position more of each row, (B, heads, 1, d)."""
        if self.length == self.keys.shape[2]:
            self.keys, self.values = (F.pad(x, (0, 0, 0, ROOM)) for x in (self.keys, self.values))
        self.keys[:, :, self.length] = key_states[:, :, 0].transpose(0, 1)
        self.values[:, :, self.length] = value_states[:, :, 0].transpose(0, 1)
        self.length += 1
        return self, self

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """query (B, query heads, d); mask (B, 1, 1, shared + own), True where a row may look → (B, query heads, d).

        One matrix product for all rows attends to the beginning, which is read once and not once a row; the query
        heads that share a key head are queries of that head, so that no key or value is repeated.
        """
        heads, rows, size, dim = self.keys.shape
        query = (query * scale).view(rows, heads, -1, dim).transpose(0, 1).contiguous()
        keys, values = self.keys.view(-1, size, dim), self.values.view(-1, size, dim)
        scores = torch.bmm(query.view(heads * rows, -1, dim), keys.mT).view(heads, rows, -1, size)
        lowest = torch.finfo(scores.dtype).min
        scores[..., self.length :].fill_(lowest)  # room where nothing is yet
        if mask is not None:
            scores[..., : self.length].masked_fill_(~mask[:, 0, :, self.shared :], lowest)
        if self.shared:
            beginning = torch.bmm(query.view(heads, -1, dim), self.shared_keys.mT).view(heads, rows, -1, self.shared)
            scores = torch.cat([scores, beginning], dim=-1)
        weights = scores.softmax(-1)
        out = torch.bmm(weights[..., :size].flatten(0, 1), values).view(heads, rows, -1, dim)
        if self.shared:
            out += torch.bmm(weights[..., size:].flatten(1, 2), self.shared_values).view(out.shape)
        return out.transpose(0, 1).reshape(rows, -1, dim)

    def batch_select_indices(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)

    def get_seq_length(self) -> int:
        return self.shared + self.length


class LlamaDecoder(Decoder):
    """The same for models of Llama's shape (Qwen 2 and 3, SmolLM 2, …), in a third of the operations: what a step of few
    rows costs is their number, and reading the weights."""

    def __init__(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        super().__init__(model, prompts, row_of)
        self.layers = []
        for layer, cache in zip(model.model.layers, self.cache.layers):
            a, m = layer.self_attn, layer.mlp
            projections = FusedLinear(a.q_proj, a.k_proj, a.v_proj), FusedLinear(a.o_proj)
            mlp = FusedLinear(m.gate_proj, m.up_proj), FusedLinear(m.down_proj)
            self.layers.append((layer, cache, *projections, *mlp))
        self.head = FusedLinear(model.lm_head)
        self.padded = len({len(prompt) for prompt in prompts}) > 1

    def step(self, token: Tensor) -> Tensor:
        model = self.model.model
        x = model.embed_tokens(token)
        cos, sin = (table[0, :, None] for table in model.rotary_emb(x, self.position[None]))  # (B, 1, d)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        self.mask, self.position = F.pad(self.mask, (0, 1), value=1), self.position + 1
        mask = self.mask.bool()[:, None, None] if self.padded else None
        for layer, cache, qkv, o, gate_up, down in self.layers:
            a = layer.self_attn
            heads = qkv(norm(layer.input_layernorm, x)).view(len(x), -1, a.head_dim)
            to_rotate, v = heads.tensor_split([-len(cache.keys)], dim=1)
            if hasattr(a, "q_norm"):
                q, k = to_rotate.tensor_split([-len(cache.keys)], dim=1)
                to_rotate = torch.cat([norm(a.q_norm, q), norm(a.k_norm, k)], dim=1)
            rotated = torch.addcmul(to_rotate * cos, to_rotate.roll(half, -1), sin)
            q, k = rotated.tensor_split([-len(cache.keys)], dim=1)
            cache.update(k[:, :, None], v[:, :, None])
            x = o(cache.attend(q, mask, a.scaling).flatten(1), plus=x)
            gate, up = gate_up(norm(layer.post_attention_layernorm, x)).chunk(2, dim=1)
            x = down(layer.mlp.act_fn(gate) * up, plus=x)
        return self.head(norm(model.norm, x))


def norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


@torch.inference_mode()
def decodes_like_llama(model: torch.nn.Module) -> bool:
    """Whether `LlamaDecoder` gives the model's own logits, tried on two prompts, long enough that positions count."""
    config = model.config.get_text_config()
    if model.config._attn_implementation != "grouped" or getattr(config, "sliding_window", None):
        return False
    a, b, c, d = ((config.vocab_size // 2 + i) % config.vocab_size for i in range(4))
    rows = torch.tensor([0, 1, 1], device=next(model.parameters()).device)
    prompts = [a, b] + [a, c, d] * 20 + [b], [a, c] + [b, d, a, a] * 20
    limit = 0.05 if model.dtype == torch.bfloat16 else 1e-3
    try:
        decoders = [kind(model, prompts, rows) for kind in (Decoder, LlamaDecoder)]
        for token in (rows.new_tensor([b, c, d]), rows.new_tensor([d, d, a])):
            own, ours = (decoder.step(token) for decoder in decoders)
    except (AttributeError, RuntimeError, TypeError):  # it has other parts
        return False
    return bool((own - ours).norm() <= limit * own.norm())


class FusedLinear:
    """Linear layers that read the same input, with their adapters beside them.

    On a CPU they become one product with its weights in the layout that oneDNN wants, which F.linear makes anew at every
    call. An adapter is columns more of that product, and their input is A x:  y = [W, s B] [x, A x].
    """

    def __init__(self, *linears: torch.nn.Linear):
        self.linears, weight = linears, linears[0].weight
        self.A = self.weight = None
        fast = [torch.float32] + [torch.bfloat16] * has_bfloat16(weight.device)
        if weight.device.type != "cpu" or weight.dtype not in fast or not torch.backends.mkldnn.is_available():
            return
        adapted = [linear for linear in linears if isinstance(linear, lora.LoRALinear) and linear.enabled]
        self.A = torch.cat([linear.lora_A for linear in adapted]).to(weight.dtype) if adapted else None
        sizes = [linear.out_features for linear in linears]
        whole = weight.new_zeros(sum(sizes), weight.shape[1] + (len(self.A) if adapted else 0))
        column = weight.shape[1]
        for linear, rows in zip(linears, whole.split(sizes)):
            rows[:, : weight.shape[1]] = linear.weight
            if linear in adapted:
                rank = len(linear.lora_A)
                rows[:, column : column + rank] = linear.scale * linear.lora_B
                column += rank
        biases = [linear.bias for linear in linears]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(whole)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """x (B, in) → all layers' outputs side by side, (B, out), added to `plus`."""
        if self.weight is None:
            parts = [linear(x) for linear in self.linears]
            y = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            return y if plus is None else plus + y
        if self.A is not None:
            x = torch.cat([x, F.linear(x, self.A)], dim=1)
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.bias, "add")


# vLLM: the trainer's side ------------------------------------------------------------------------------------


class VLLMSampler:
    """Samples with vLLM on `device`; every rank makes one, when it returns the engine runs, and calls it at the same time.

    The policy's weights are sent when `generate` needs them, so several `take_weights` in between cost one transfer.
    Log-probabilities are those vLLM drew with: with top_k or top_p, of what these leave, renormalized, so that they
    differ from the trainer's by the logarithm of what was left.
    `timeout`: seconds without a sign of life after which the engine is killed, once it has started. SamplerError when
    it has ended.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        world: World,
        device: torch.device,
        engine_args: dict,
        *,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        timeout: float = 300.0,
        log: str | Path = "vllm.log",
    ):
        self.model, self.world, self.stale, self.metrics = model, world, True, {}
        self.sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.sampling["stop_token_ids"] = sorted(eos_token_ids)
        backend = "nccl" if device.type == "cuda" and device != world.device else "gloo"  # NCCL needs two GPUs
        self.engine: Engine | None = None  # on rank 0 only
        self._on_main(lambda: self._start(device, engine_args, backend, timeout, log))

    def take_weights(self, model: torch.nn.Module) -> None:
        self.model, self.stale = model, True

    def generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        rows = self.world.gather([(self.world.rank, list(p), s) for p, s in zip(prompt_ids, seeds, strict=True)])
        weights = ((n, whole(t)) for n, t in lora.merged_parameters(self.model)) if self.stale else None
        completions, self.metrics = self._on_main(lambda: self._generate(rows, weights), weights)
        self.stale = False
        return [completion for (rank, _, _), completion in zip(rows, completions) if rank == self.world.rank]

    def _start(self, *args) -> None:
        self.engine = Engine(*args)
        self.engine.wait_until_started()

    def _generate(self, rows: list[tuple[int, list[int], int]], weights) -> tuple[list[Completion], dict[str, float]]:
        metrics = {"time/sync": 0.0}
        if self.stale:
            started = time.perf_counter()
            self.engine.send_weights(self.model, weights)
            metrics["time/sync"] = time.perf_counter() - started
        groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row[1])]
        # One request a group: vLLM gives its i-th completion the seed of the request plus i.
        requests = [(prompt, len(group), seed) for group in groups for _, prompt, seed in group[:1]]
        return self.engine.generate(requests, self.sampling), metrics

    def _on_main(self, function: Callable, weights: Iterator | None = None):
        """What rank 0's call returns, or the SamplerError that it raises, on every rank.

        weights: what it goes through; the other ranks help to gather them, if they are sharded.
        """
        outcome = None
        if self.world.is_main:
            try:
                outcome = function()
            except SamplerError as error:
                outcome = error
            except OSError as error:  # no room for a log, no process to be had
                outcome = SamplerError(f"--use_vllm true: {error}")
        if is_sharded(self.model):
            for _ in weights or ():  # on rank 0, those that it came to no more
                pass
        outcome = self.world.from_main(outcome)
        if isinstance(outcome, SamplerError):
            raise outcome
        return outcome

    def close(self) -> None:
        if self.engine:
            self.engine.close()


class Engine:
    """vLLM in a process of its own. When it ends or says nothing for `timeout` seconds, calls end with a SamplerError."""

    def __init__(self, device: torch.device, engine_args: dict, backend: str, timeout: float, log: str | Path):
        self.backend, self.timeout, self.log = backend, timeout, log
        self.silent, self.ended = 0.0, False  # after how many seconds of silence it was killed; killed and waited for
        self.pipe, theirs = multiprocessing.Pipe()
        self.store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        self.group: WeightGroup | None = None
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=engine_environment(device),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # signals meant for the run miss it
            )
        theirs.close()
        atexit.register(self.close)
        with self.watched():
            self.pipe.send((engine_args, backend, self.store.port))

    def wait_until_started(self) -> None:
        self.reply(max(self.timeout, START_TIMEOUT))

    def generate(self, requests: list[tuple[list[int], int, int]], sampling: dict) -> list[Completion]:
        """(prompt, number of completions, seed) … → the completions of all, in that order."""
        with self.watched():
            self.pipe.send(("generate", requests, sampling))
        return [Completion(*parts) for parts in self.reply()]

    def send_weights(self, model: torch.nn.Module, weights: Iterator[tuple[str, Tensor]] | None = None) -> None:
        """Stream the policy's weights, adapters merged one layer at a time, and check that they arrived.

        weights: lora.merged_parameters(model), whole, if the model's own are sharded.
        """
        sent = Fingerprint()
        with self.watched():
            self.pipe.send(("take_weights", [(n, p.shape, p.dtype) for n, p in lora.plain_parameters(model)]))
            if self.group is None:
                self.group = WeightGroup(self.store, 0, self.backend, next(model.parameters()).device)
        for name, tensor in weights or lora.merged_parameters(model):
            tensor = tensor.to(self.group.device).contiguous()
            with self.watched():
                self.group.send(tensor, self.process, self.timeout)
            sent.add(name, tensor)
        if self.reply() != sent.digest():
            raise self.failure("received other weights than were sent")

    def reply(self, timeout: float | None = None):
        """What the engine's command returns; each of its signs of life starts the time limit anew."""
        while True:
            with self.watched(timeout):
                kind, value = self.pipe.recv()
            if kind == "error":
                raise self.failure(value)
            if kind == "done":
                return value

    @contextmanager
    def watched(self, timeout: float | None = None) -> Iterator[None]:
        """What blocks in here fails as soon as the engine is gone, and the engine is gone after `timeout` seconds."""
        timeout = timeout or self.timeout
        watchdog = threading.Timer(timeout, self._silence, [timeout])
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except (EOFError, OSError, RuntimeError) as error:
            watchdog.cancel()  # how long the engine takes to end is not silence
            raise self.failure() from error
        finally:
            watchdog.cancel()

    def _silence(self, timeout: float) -> None:
        self.silent = timeout
        self.kill()

    def failure(self, what: str = "") -> SamplerError:
        """End the engine; the error tells what is known of why."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if what else 10)  # its pipe closes before it has ended, on a busy machine by seconds
        status = self.process.poll()
        with suppress(EOFError, OSError):
            while not what and self.pipe.poll():  # its last words, if the trainer was not listening
                kind, value = self.pipe.recv()
                what = value if kind == "error" else what
        self.kill()
        if self.silent:
            flag = " (--vllm_timeout)" if self.silent == self.timeout else ""
            what = f"gave no sign of life for {self.silent:g} s{flag} and was killed"
        elif not what:
            ended = f"was killed by signal {-status}" if (status or 0) < 0 else f"ended with status {status}"
            what = "could not be reached" if status is None else ended
        return SamplerError(f"--use_vllm true: the engine {what}; its log is {self.log}")

    def close(self) -> None:
        """Let the engine end, for at most 5 seconds."""
        self.pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()

    def kill(self) -> None:
        if not self.ended:
            self.ended = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with whatever vLLM may have started
        self.process.wait()


class WeightGroup:
    """A process group of two beside all others: the trainer, 0, and the engine, 1, which run on one machine."""

    def __init__(self, store: dist.Store, rank: int, backend: str, device: torch.device):
        both_there = datetime.timedelta(seconds=20)  # time for the two to meet, which wait for each other
        self.backend = backend
        if backend == "nccl":
            self.device, self.group = device, dist.ProcessGroupNCCL(store, rank, 2)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(interface="lo")], both_there
            self.device, self.group = torch.device("cpu"), dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, tensor: Tensor, peer: subprocess.Popen, timeout: float) -> None:
        work = self.group.send([tensor], 1, 0)
        while self.backend == "nccl" and not work.is_completed():  # NCCL does not notice that its peer is gone
            if peer.poll() is not None:
                self.group.abort()
                raise ConnectionError("the engine is gone")
            time.sleep(1e-4)
        work.wait(datetime.timedelta(seconds=timeout))

    def receive(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self.group.recv([tensor], 0, 0).wait(datetime.timedelta(days=1))  # the trainer watches; its end is this one's
        return tensor


class Fingerprint:
    """Of tensors in their order: their names, shapes, types, and the sums of their bits, 1,024 for each tensor.

    Summed are whole numbers of the elements' size, element i with all others whose place is the same modulo 1,024.
    """

    def __init__(self):
        self.hash = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        self.hash.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        bits = tensor.flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
        whole = len(bits) // 1024 * 1024
        table = bits[:whole].view(-1, 1024)
        # Few enough for one thread: on CPUs the engine's and the trainer's threads would wait for each other.
        at_once = 31 if tensor.device.type == "cpu" else max(1, len(table))
        sums = sum((part.sum(0, dtype=torch.int64) for part in table.split(at_once)), torch.tensor(0))
        for part in (sums, bits[whole:]):
            self.hash.update(part.cpu().numpy())

    def digest(self) -> str:
        return self.hash.hexdigest()


def vllm_device(wanted: str, gpus: int, trainers: int) -> torch.device:
    """The device that `--vllm_device` means, with GPUs numbered as this process sees them; the CPU where there is none.

    `trainers` processes train here, on the first GPUs. ValueError when the device is not there or not free.
    """
    if wanted == "auto" and not gpus:
        return torch.device("cpu")
    training = 0 if gpus == trainers == 1 else trainers  # a single GPU is shared
    free = [f"cuda:{i}" for i in range(training, gpus)]
    if wanted == "auto" and (free or not gpus):
        return torch.device(free[0] if free else "cpu")
    if wanted in free:
        return torch.device(wanted)
    if not gpus:
        raise ValueError(f"--vllm_device {wanted}: there is no GPU; auto, the CPU, works")
    if wanted == "auto":
        problem = f"{trainers} processes train on {gpus} GPUs"
    elif wanted in [f"cuda:{i}" for i in range(min(training, gpus))]:
        problem = "a process trains on it"
    else:
        problem = f"there is no such GPU among {gpus}"
    fewer = "one process would share it" if gpus == 1 else f"{gpus - 1} processes would leave one free"
    raise ValueError(f"--vllm_device {wanted}: {problem}; " + (f"auto or {' or '.join(free)} works" if free else fewer))


def engine_environment(device: torch.device) -> dict[str, str]:
    """The environment of the engine's process: its one GPU, all CPU cores, and nothing of torchrun's."""
    torchrun = r"(RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|NAME|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|OMP_NUM_THREADS)"
    environment = {name: value for name, value in os.environ.items() if not re.fullmatch(torchrun, name)}
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device.index] if visible else str(device.index)
    else:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # training uses the same cores in turn
    return environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


# vLLM: the engine's side, a process of its own -----------------------------------------------------------------


def serve(pipe: Connection, trainer: int) -> None:
    """Carry out the trainer's commands until it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not a moment longer than the trainer
    if os.getppid() != trainer:
        os._exit(1)
    try:
        engine_args, backend, port = pipe.recv()
        from vllm import LLM

        llm, group = LLM(**engine_args), None
        generate(llm, pipe, [([0], 2, 0)], {"max_tokens": 2})  # what vLLM compiles for it belongs to the start
        pipe.send(("done", None))
        while True:
            command, *args = pipe.recv()
            if command == "take_weights":
                if group is None:
                    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
                    group = WeightGroup(store, 1, backend, torch.device("cuda", 0))
                pipe.send(("done", take_weights(llm, group, *args)))
            else:
                pipe.send(("done", generate(llm, pipe, *args)))
    except (EOFError, BrokenPipeError):
        status = 0  # the trainer is gone
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        with suppress(OSError):
            pipe.send(("error", f"failed ({first[:200]})"))
        status = 1
    sys.stdout.flush()
    os._exit(status)  # threads of vLLM's may not want to end


def generate(llm, pipe: Connection, requests: list[tuple[list[int], int, int]], sampling: dict) -> list[tuple]:
    """The parts of the completions; Completion itself has another name in this process."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, outputs, last = llm.llm_engine, {}, time.monotonic()
    for i, (prompt, n, seed) in enumerate(requests):
        params = SamplingParams(
            n=n, seed=seed, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **sampling
        )
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs |= {int(output.request_id): output.outputs for output in engine.step() if output.finished}
        if time.monotonic() > last + 1.0:
            last = time.monotonic()
            pipe.send(("alive", None))
    return [
        (
            list(o.token_ids),
            [step[token].logprob for step, token in zip(o.logprobs, o.token_ids)],
            o.finish_reason == "stop",
        )
        for i in range(len(requests))
        for o in outputs[i]
    ]


def take_weights(llm, group: WeightGroup, tensors: list[tuple[str, torch.Size, torch.dtype]]) -> str:
    """Load the weights as they arrive, over the old ones, and forget what was computed with those."""
    received = Fingerprint()

    def arriving() -> Iterator[tuple[str, Tensor]]:
        for name, shape, dtype in tensors:
            tensor = group.receive(shape, dtype)
            received.add(name, tensor)
            yield name, tensor

    def load(worker) -> None:
        model, loaded = worker.model_runner.get_model(), set()
        load_weights = model.load_weights
        model.load_weights = lambda weights: loaded.update(load_weights(weights))
        try:
            worker.model_runner.reload_weights(weights_iterator=arriving())
        finally:
            del model.load_weights
        if missing := {name for name, _ in model.named_parameters()} - loaded:  # reload_weights only logs them
            raise RuntimeError(f"{len(missing)} of its weights were not sent, {min(missing)} among them")
        # A head tied to the embedding is passed over, but on CPUs it has packed a copy.
        head = getattr(model, "lm_head", None)
        if hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)

    llm.collective_rpc(load)
    if not llm.llm_engine.reset_prefix_cache():
        raise RuntimeError("its prefix cache could not be reset")
    return received.digest()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), trainer=int(sys.argv[2]))
