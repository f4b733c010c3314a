"""Sampling completions from the policy, with the model that is trained or with vLLM.

The model itself, `ModelSampler`. Each different prompt is prefilled once and copied to the rows of
its G completions. A step feeds one token a row; rows whose completion has ended leave the batch.

    prompts   [ p1 | p2 | … ]      once each
    rows      p1 p1 p1 p2 …        one a completion, its own random numbers each
    step t    a token for each     → (token, log-probability), until end-of-sequence

A token is drawn by inverting the cumulative distribution F at a uniform number u: the first token
with F(token) > u. That is exact and takes one random number. Every completion has a random stream of
its own, named by its seed, so it comes out the same in whatever batch, on however many ranks.

vLLM, `VLLMSampler`. The engine is a process of its own beside rank 0. All ranks' prompts go there
together, and each rank gets its own completions back. After an optimizer step the policy's weights
stream into the running engine, one tensor at a time (`VLLMSampler._send`, run/weights.py).

    rank 0    ── names and shapes, over a pipe ──────────────────>   engine
              ── each tensor, over a process group of two ───────>   loads it over the old one
              <── fingerprint of all that came, over the pipe ────   must equal that of what was sent

A sampler is anything with what `Sampler` lists. To try a new way to draw, change `sample_tokens`:
a run takes the quick one (fast/draw.py) only as long as this one is unchanged. What makes decoding
quick stands in the place of `Decoder` (fast/decoder.py); --plain true takes the one here.
"""

import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

import lora
from dist import World, full, gathered, is_sharded
from grpo import Rows, pad, positions

GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 1}  # the likeliest token at any temperature
COMPACT_AT = 0.75  # drop ended rows when this share is alive: copying the cache costs about a step


@dataclass(frozen=True)
class Options:
    """sampling"""

    max_completion_length: Annotated[int, "longest completion in tokens", "from 1"] = 512
    temperature: Annotated[float, "of the sampling distribution", "above 0"] = 0.9
    temperature_eval: Annotated[
        float | None, "evaluations'; 0 takes the likeliest token; else temperature", "from 0"
    ] = None
    top_p: Annotated[float, "sample from this much mass; 1 is off", "above 0 to 1"] = 1.0
    top_k: Annotated[int, "sample from this many tokens; 0 is off", "from 0"] = 0


@dataclass
class Completion:
    """One sampled completion.

    ids: with the end-of-sequence token, if it has one. logps: log softmax(logits / temperature) of
    each token when it was drawn; but see VLLMSampler.
    """

    ids: list[int]
    logps: list[float]
    finished: bool  # by an end-of-sequence token, not by max_new_tokens


class SamplerError(RuntimeError):
    """The sampler cannot go on: one line that says what happened, the same on every rank."""


class Sampler(Protocol):
    """What train.py needs of a sampler."""

    metrics: dict[str, float]  # of the last call of generate

    def generate(
        self, prompt_ids: Rows, seeds: Sequence[int], temperature: float | None = None
    ) -> list[Completion]:
        """One completion for each prompt; equal prompts lie side by side.

        temperature: instead of the sampler's own; at 0 the likeliest token is taken.
        """

    def take_weights(self, model: torch.nn.Module) -> None:
        """From now on sample from `model` as it is at this moment."""


# Drawing a token --------------------------------------------------------------------------------


def uniform_stream(seed: int, length: int) -> Tensor:
    """`length` uniform numbers in [0, 1) that belong to one completion alone, (length,)."""
    generator = torch.Generator().manual_seed(int(seed))
    return torch.rand(length, generator=generator)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw a token a row: the first whose cumulative probability F exceeds the uniform number.

    logits (B, V), uniforms (B,) in [0, 1) → tokens (B,) and their log-probabilities (B,) under
    softmax(logits / temperature). F is in float64: among 50,000 tokens of like probability,
    float32's rounding would draw another one whenever the batch is split anew.
    """
    logits = logits.float() / temperature
    probabilities = logits.softmax(-1)  # (B, V)
    weights = probabilities
    if top_p < 1.0 or top_k > 0:
        dropped = truncate(logits, top_p, top_k) == float("-inf")
        weights = weights.masked_fill(dropped, 0.0)  # they need not add up to 1
    cdf = weights.cumsum(-1, dtype=torch.float64)  # (B, V) F times their sum
    tokens = first_above(cdf, uniforms[:, None] * cdf[:, -1:])  # (B, 1)
    logps = probabilities.gather(1, tokens).log()
    return tokens[:, 0], logps[:, 0]


def first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """For each row the first index where cdf (B, n) exceeds target (B, 1).

    Such a token has a probability above 0. Rounding may put the target below 0 or at the cdf's end,
    where none lies. Where the cdf is NaN it is the last index, whose probability is NaN, too.
    """
    end = cdf[:, -1:]
    below_end = torch.nextafter(end, torch.zeros_like(end))
    target = torch.minimum(target.clamp(min=0.0), below_end)
    return torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)


def truncate(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """logits (B, V) with -inf for all but the top_k largest and the smallest set of mass top_p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = float("-inf")
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of what ranks higher; 0 of the first
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


# The model itself -------------------------------------------------------------------------------


class Decoder:
    """Rows that each continue a prompt by one token a step, with any transformers model.

    prompts: P different ones; row_of (B,): the prompt of each row. The model runs as it is, so
    whatever it does to its logits is in them. `logits` (B, V) are those of the first token.
    """

    def __init__(self, model: torch.nn.Module, prompts: Rows, row_of: Tensor):
        self.model = model
        ids, mask = pad(prompts, "left", row_of.device)  # (P, L)
        # Made without the configuration it keeps every token, of models with sliding windows too:
        # the mask hides what lies outside of one.
        self.cache = DynamicCache()
        settings = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            settings["logits_to_keep"] = 1  # not those of all prompt tokens
        logits = self._forward(ids, mask, positions(mask), **settings)  # (P, V)
        self.logits = logits[row_of]  # (B, V)
        self.cache.batch_select_indices(row_of)
        self.mask = mask[row_of]  # (B, L) 0 on padding
        self.position = self.mask.sum(1)  # (B,) of each row's next token

    def step(self, token: Tensor) -> Tensor:
        """Put a token (B,) behind each row → logits (B, V) of the next one."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        ids, position = token[:, None], self.position[:, None]  # (B, 1)
        self.position = self.position + 1
        return self._forward(ids, self.mask, position)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, none of them twice."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.position = self.position[rows]

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, **settings) -> Tensor:
        """Run tokens (rows, n) behind what is in the cache → the last one's logits, (rows, V)."""
        settings |= {"past_key_values": self.cache, "use_cache": True}
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=places, **settings)
        return out.logits[:, -1]


class ModelSampler:
    """Samples from the training model itself, so there are no weights to move.

    eos_token_ids: any of them ends a completion. top_k 0 and top_p 1.0 are off. They narrow what can
    be drawn, while log-probabilities stay those of softmax(logits / temperature), the distribution
    of the training objective. decoder, draw: what is plain here, or what stands in for it.
    rows_at_once: from the model and a length in tokens to the rows that memory has room for; what
    is beyond waits its turn. None decodes all together. report: told after each token how many there
    are, of how many, and how many rows go on, of how many.

    Every rank calls `generate`, because sharded parameters (ZeRO-3) are gathered for it. With
    gather=False they are not: less memory, and each layer's parameters travel at every step.
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
        decoder: type = Decoder,
        draw: Callable = sample_tokens,
        rows_at_once: Callable | None = None,
        report: Callable | None = None,
    ):
        self.model, self.decoder, self.draw = model, decoder, draw
        self.rows_at_once, self.report = rows_at_once, report
        self.max_new_tokens, self.metrics = max_new_tokens, {}
        self.distribution = (temperature, top_p, top_k)
        self.ends = set(eos_token_ids)
        device = next(model.parameters()).device
        self.eos = torch.tensor(sorted(self.ends), device=device)
        # A layer is gathered for a step of all ranks, so all decode as long as any does.
        self.layerwise = is_sharded(model) and not gather

    def take_weights(self, model: torch.nn.Module) -> None:
        self.model = model

    def generate(
        self, prompt_ids: Rows, seeds: Sequence[int], temperature: float | None = None
    ) -> list[Completion]:
        distribution = self.distribution
        if temperature == 0:
            distribution = tuple(GREEDY.values())
        elif temperature is not None:
            distribution = (temperature, *distribution[1:])
        training = self.model.training
        self.model.eval()
        try:
            if self.layerwise:
                # No inference mode: what FSDP gathers into is kept, and trained with. A rank
                # without prompts takes part with one of its own.
                with torch.no_grad():
                    drawn = self._decode(prompt_ids or [[0]], seeds or [0], distribution)
                return drawn[: len(prompt_ids)]
            with gathered(self.model), torch.inference_mode():
                rows = len(prompt_ids) or 1
                if self.rows_at_once:
                    longest = max(map(len, prompt_ids), default=0) + self.max_new_tokens
                    rows = self.rows_at_once(self.model, longest)
                drawn = []
                for start in range(0, len(prompt_ids), rows):
                    part = slice(start, start + rows)
                    drawn += self._decode(prompt_ids[part], seeds[part], distribution)
                return drawn
        finally:
            self.model.train(training)

    def _decode(self, prompt_ids: Rows, seeds: Sequence[int], distribution) -> list[Completion]:
        """One wave: completions that are decoded together."""
        B, T = len(seeds), self.max_new_tokens
        device = self.eos.device
        prompts, row_of = distinct(prompt_ids, device)
        decoder = self.decoder(self.model, prompts, row_of)
        logits = decoder.logits  # (B, V) of each row's next token
        streams = [uniform_stream(seed, T) for seed in seeds]
        uniforms = torch.stack(streams).to(device)  # (B, T) one for each token

        tokens = torch.zeros(B, T, dtype=torch.long, device=device)
        logps = torch.zeros(B, T, device=device)
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        alive = torch.arange(B, device=device)  # the completion that each row of the batch decodes
        for t in range(T):
            token, logp = self.draw(logits, uniforms[alive, t], *distribution)  # (rows,)
            tokens[alive, t] = token
            logps[alive, t] = logp
            ended[alive] |= torch.isin(token, self.eos)
            going_on = (~ended[alive]).nonzero()[:, 0]  # places among the rows
            if self.report:
                self.report(t + 1, T, len(going_on), B)
            if t + 1 == T or self._all_ended(len(going_on) == 0):
                break
            # An ended row may go on for a while: what it draws is cut off below.
            if 0 < len(going_on) <= COMPACT_AT * len(alive):
                decoder.keep(going_on)
                alive, token = alive[going_on], token[going_on]
            logits = decoder.step(token)
        rows = zip(tokens.tolist(), logps.tolist())
        return [self._cut(ids, values) for ids, values in rows]

    def _all_ended(self, ended: bool) -> bool:
        """Whether no row goes on; where layers are gathered at each step, none of any rank."""
        if not self.layerwise:
            return ended
        running = torch.tensor(int(not ended), dtype=torch.int32, device=self.eos.device)
        torch_dist.all_reduce(running)  # summed
        return running.item() == 0

    def _cut(self, ids: list[int], logps: list[float]) -> Completion:
        """Up to and with the first end-of-sequence token; ids and logps (max_new_tokens,)."""
        for length, token in enumerate(ids, start=1):
            if token in self.ends:
                return Completion(ids[:length], logps[:length], finished=True)
        return Completion(ids, logps, finished=False)


def distinct(prompt_ids: Rows, device: torch.device) -> tuple[list, Tensor]:
    """B prompts → the P different ones among them, and for each of the B its row there, (B,)."""
    rows = {}  # prompt → its row; dictionaries keep their order
    row_of = []
    for prompt in prompt_ids:
        row = rows.setdefault(tuple(prompt), len(rows))
        row_of.append(row)
    return list(rows), torch.tensor(row_of, device=device)


# vLLM -------------------------------------------------------------------------------------------


class VLLMSampler:
    """Samples with vLLM. Every rank makes one and calls it at the same time as the others.

    engine: run.engine.OnRank0, or what else can `load` and `complete` on all ranks together.
    Weights are sent when `generate` needs them, so several `take_weights` in a row cost one transfer.
    Log-probabilities are of what vLLM drew from: with top_k or top_p, of what these leave,
    renormalized, so they differ from the trainer's by the logarithm of what was left.
    SamplerError on every rank when the engine has ended.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        world: World,
        engine,
        *,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ):
        self.model, self.world, self.engine = model, world, engine
        self.metrics = {}
        # In vLLM's own words.
        self.sampling = {"max_tokens": max_new_tokens, "stop_token_ids": sorted(eos_token_ids)}
        self.sampling |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.stale = True  # the engine has other weights than the model

    def take_weights(self, model: torch.nn.Module) -> None:
        self.model, self.stale = model, True

    def generate(
        self, prompt_ids: Rows, seeds: Sequence[int], temperature: float | None = None
    ) -> list[Completion]:
        started = time.perf_counter()
        self.metrics = {"time/sync": 0.0}
        if self.stale:
            self._send()
            self.stale = False
            self.metrics["time/sync"] = time.perf_counter() - started
        rank = self.world.rank
        mine = [(list(prompt), seed, rank) for prompt, seed in zip(prompt_ids, seeds, strict=True)]
        rows = self.world.gather(mine)  # of all ranks: a group may lie across two
        requests = []
        for prompt, group in itertools.groupby(rows, key=lambda row: row[0]):
            # One for a group: vLLM gives its i-th completion the seed of the request plus i.
            seeds = [seed for _, seed, _ in group]
            requests.append((prompt, len(seeds), seeds[0]))
        sampling = dict(self.sampling)
        if temperature == 0:
            sampling |= GREEDY  # vLLM refuses a group at its own temperature 0
        elif temperature is not None:
            sampling["temperature"] = temperature
        completions = self.engine.complete(requests, sampling)
        return [done for row, done in zip(rows, completions) if row[-1] == rank]

    def _send(self) -> None:
        """Adapters are merged one layer at a time, and sharded weights put together so."""
        # Adapters change no shape, so all are known before the first is merged.
        plain = lora.plain_parameters(self.model)
        announced = [(name, p.shape, p.dtype) for name, p in plain]
        merged = lora.merged_parameters(self.model)
        weights = ((name, full(tensor)) for name, tensor in merged)
        self.engine.load(announced, weights, collective=is_sharded(self.model))
