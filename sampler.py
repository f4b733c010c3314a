"""Sampling completions from the policy: the own sampler, on any transformers model.

One call decodes all completions of a rank at once. A prompt is prefilled once and its keys and values are then copied
to the rows of its G completions; each step feeds one token a row; rows whose completion has ended leave the batch.

    prompts   p1 p2            prefill once each
    rows      p1 p1 p1 p2 …    one a completion, its own random numbers each
    step t    one token a row  → (token, log-probability), until end-of-sequence or max_new_tokens

A token is drawn by inverting the cumulative distribution at a uniform number: exact, one random number a token. Every
completion has a random stream of its own, named by its seed, so it comes out the same in whatever batch, and on
however many ranks, it is sampled.

A sampler is anything with the two methods of `Sampler`. To try a new decoding idea, change `sample_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from grpo import Layer, distinct, logits_from_hidden_states, prefill

BLOCK = 256  # tokens whose probabilities are summed together; see sample_tokens
COMPACT_AT = 0.75  # drop ended rows once at most this share is alive: copying the cache costs about one decoding step


@dataclass
class Completion:
    """One sampled completion: its token ids, the end-of-sequence token among them, and their log-probabilities."""

    ids: list[int]
    logps: list[float]  # log softmax(logits / temperature) of each token when it was drawn
    finished: bool  # ended by an end-of-sequence token, not by max_new_tokens


class Sampler(Protocol):
    """What train.py needs of a sampler."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """One completion for each prompt; equal prompts side by side are prefilled once."""

    def take_weights(self, model: torch.nn.Module) -> None:
        """From now on sample from `model` as it is at this moment."""


class ModelSampler:
    """Samples from the training model itself, so there are no weights to move.

    eos_token_ids: any of them ends a completion. top_k 0 and top_p 1.0 are off. They narrow what can be drawn, while
    the log-probabilities stay those of softmax(logits / temperature), the distribution of the training objective.
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
    ):
        self.model, self.max_new_tokens, self.temperature = model, max_new_tokens, temperature
        self.top_p, self.top_k = top_p, top_k
        self.eos = torch.tensor(sorted(eos_token_ids), device=next(model.parameters()).device)

    def take_weights(self, model: torch.nn.Module) -> None:
        self.model = model

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        if not prompt_ids:
            return []
        training = self.model.training
        self.model.eval()
        try:
            return self._generate(prompt_ids, seeds)
        finally:
            self.model.train(training)

    def _generate(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        device = self.eos.device
        prompts, row_of = distinct(prompt_ids, device)
        hidden, prefix, mask = prefill(self.model, prompts)
        logits = logits_from_hidden_states(self.model, hidden)[row_of]
        cache = Cache(layers=[PreallocatedLayer(layer, row_of, self.max_new_tokens) for layer in prefix.layers])
        mask = mask[row_of]
        position = mask.sum(1)  # of each row's next token
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
            if len(keep) == 0 or t + 1 == self.max_new_tokens:
                break
            if len(keep) <= COMPACT_AT * len(alive):
                cache.batch_select_indices(keep)
                alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            position = position + 1
        return [
            Completion(ids[:n], values[:n], done)
            for ids, values, n, done in zip(tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist())
        ]


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF: the first token whose cumulative probability exceeds the uniform number.

    logits (B, V), uniforms (B,) in [0, 1) → tokens (B,), log-probabilities (B,) under softmax(logits / temperature).
    The sums of BLOCK tokens each find the block, so that only its own tokens need a running sum. They are in float64:
    among 50,000 tokens of like probability, float32's rounding would draw another one whenever the batch is split anew.
    """
    logits = logits.to(torch.float32, copy=True)
    if temperature != 1.0:
        logits.div_(temperature)
    largest = logits.amax(1, keepdim=True)
    weights = (logits - largest).exp_()
    log_normalizer = largest + weights.sum(1, keepdim=True).log()
    if top_p < 1.0 or top_k > 0:
        weights.masked_fill_(truncate(logits, top_p, top_k) == float("-inf"), 0.0)
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = first_above(ends, target)
    target = target - F.pad(ends, (1, 0)).gather(1, block)  # what is left of it inside the block
    own = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]]
    tokens = block * BLOCK + first_above(own.cumsum(-1, dtype=torch.float64), target)
    return tokens[:, 0], (logits.gather(1, tokens) - log_normalizer)[:, 0]


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


class PreallocatedLayer(Layer):
    """One layer's keys and values in buffers that are made once, (rows, heads, capacity, head_dim).

    They start as those of the prompts, each copied to the rows of its completions; what all prompts begin with stays
    apart. A sliding window keeps its full history here: the model's attention mask hides what lies outside the window.
    """

    def __init__(self, prompts: Layer, row_of: Tensor, max_new_tokens: int):
        super().__init__(
            prompts.beginning, *(self._spread(x, row_of, max_new_tokens) for x in (prompts.keys, prompts.values))
        )
        self.length = prompts.keys.shape[2]

    @staticmethod
    def _spread(prompts: Tensor, row_of: Tensor, max_new_tokens: int) -> Tensor:
        _, heads, length, dim = prompts.shape
        buffer = prompts.new_empty(len(row_of), heads, length + max_new_tokens, dim)
        buffer[:, :, :length] = prompts[row_of]
        return buffer

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def own_length(self) -> int:
        return self.length
