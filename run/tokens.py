"""What a step did to each token: tokens.jsonl, with --log_tokens N.

A logged step, or with --log_tokens_steps each so many-th, tells of the first N groups that it trained
on, one line a group:

    {"step": 12, "drawn": 11, "prompt": "…", "solution": "43", "completions": [
      {"index": 4, "rewards": {"accuracy": 1.0}, "advantage": 0.87, "length": 23, "finished": true,
       "ids": [44, 13431, …],
       "tokens": ["<", "think", …],  their texts, which add up to the completion's
       "sampled": [-0.02, …],        log-probability that it was drawn with
       "before": [-0.02, …],         the same under the policy that the step began with
       "after": [-0.01, …],          and under the one that it left
       "entropy": [0.11, …],         of the policy before, in nats
       "ratio": [1.0, …],            ρ of the objective
       "importance": [1.0, …]}]}     what corrects for the sampler; absent where nothing does

`drawn` is the step whose completions completions.jsonl has, and `index` counts them: a rollout may
serve several steps. A completion that the step did not train on, because its advantage is 0, has
no numbers but `sampled`. About 75 bytes a token, so N bounds what a run writes.

The numbers before come from the pass that trains. Those after take one more, of these groups alone.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from run import display
from run.lines import Lines
from run.log import records_of

DIGITS = 4  # that are worth keeping of a number
OF_A_COMPLETION = ("rewards", "advantage", "length", "finished")


class Recorder:
    """`keep` while a step trains, `write` when it is done, a collective call: any rank may have
    trained on a part of a group, and rank 0 writes.

    run: train.Run. frozen_logps: (micro-batch) → log-probabilities (B, T) of the policy as it is.
    tells: (step) → whether it is to be recorded.
    """

    def __init__(self, run, frozen_logps: Callable, tells: Callable):
        self.run, self.frozen_logps, self.tells = run, frozen_logps, tells
        self.groups = run.args.log_tokens
        self.lines = Lines(Path(run.args.output_dir) / "tokens.jsonl")
        self.batch, self.drawn = None, 0  # all completions, and the step that they were drawn for
        self.kept = []  # of each micro-batch: its completions, and what is known of their tokens

    def keep(self, micro, logps: Tensor, entropies: Tensor, importance: Tensor | None) -> None:
        """Remember a micro-batch's tensors, each (B, T), until the step is done."""
        if not self.groups:
            return
        logps = logps.detach()
        ratio = torch.exp(logps - micro.old_logps)
        tensors = {"before": logps, "entropy": entropies.detach(), "ratio": ratio}
        if importance is not None:
            tensors["importance"] = importance
        self.kept.append((micro, tensors))

    def write(self, step: int, batch) -> dict[str, float]:
        """Tell of a step that is done → the seconds that it took, as a metric. batch: all that was
        drawn for it, and perhaps for steps behind it."""
        kept, self.kept = self.kept, []
        if batch is not self.batch:
            self.batch, self.drawn = batch, step
        if not self.groups:
            return {}
        if not self.tells(step):
            return {"time/tokens": 0.0}
        started = time.perf_counter()
        places = {id(done): i for i, done in enumerate(batch.completions)}
        rows = {}  # of this rank: place in the batch → numbers by name
        for micro, tensors in kept:
            for row, done in enumerate(micro.completions):
                length = len(done.ids)
                numbers = {name: tensor[row, :length] for name, tensor in tensors.items()}
                rows[places[id(done)]] = numbers
        groups, trained = self._first_groups(rows)
        numbers = self._everyones({place: rows[place] for place in trained if place in rows})
        for place, values in self._everyones(self._after(trained)).items():
            numbers[place] |= values
        self._write(step, numbers, groups)
        return {"time/tokens": time.perf_counter() - started}

    def _first_groups(self, rows: dict) -> tuple[list[int], list[int]]:
        """The first groups that some rank trained on, and the places of their completions that were
        trained on."""
        G = self.run.args.num_generations
        trained = sorted(self.run.world.gather(list(rows)))
        groups = list(dict.fromkeys(place // G for place in trained))[: self.groups]
        return groups, [place for place in trained if place // G in groups]

    def _after(self, places: list[int]) -> dict[int, dict[str, Tensor]]:
        """Log-probabilities under the policy as the step has left it, of this rank's part."""
        world, size = self.run.world, self.run.args.per_device_train_batch_size
        own = [places[i] for i in world.part_of(len(places))]
        longest = math.ceil(len(places) / world.size)
        found = {}
        # With ZeRO-3 a forward pass is a collective call: as many on every rank.
        for first in range(0, longest, size):
            part = own[first : first + size]
            logps = self.frozen_logps(self.batch.select(part))  # (B, T)
            for place, row in zip(part, logps):
                found[place] = {"after": row[: len(self.batch.completions[place].ids)]}
        return found

    def _everyones(self, rows: dict) -> dict[int, dict[str, list]]:
        """The ranks' rows, as numbers that JSON can hold."""
        own = []
        for place, tensors in rows.items():
            numbers = {name: rounded(values) for name, values in tensors.items()}
            own.append((place, numbers))
        return dict(self.run.world.gather(own))

    def _write(self, step: int, numbers: dict, groups: list[int]) -> None:
        if not self.run.world.is_main:
            return
        G = self.run.args.num_generations
        told = []
        for group in groups:
            places = range(group * G, (group + 1) * G)
            told.append({"step": step, "drawn": self.drawn, **self._group(places, numbers)})
        problem = self.lines.write(told)
        if problem:
            display.warn(problem)

    def _group(self, places: range, numbers: dict) -> dict:
        records = records_of(self.batch.select(places), self.run)
        group = {name: records[0][name] for name in ("prompt", "solution")}
        group["completions"] = []
        for place, record in zip(places, records):
            done = self.batch.completions[place]
            told = {name: record[name] for name in OF_A_COMPLETION}
            told["ids"] = done.ids
            told["tokens"] = pieces(self.run.tokenizer, done.ids)
            told["sampled"] = rounded(torch.tensor(done.logps))
            group["completions"].append({"index": place, **told, **numbers.get(place, {})})
        return group


def rounded(values: Tensor) -> list[float | None]:
    """Numbers to four digits; None where one is not finite."""
    return [float(f"{v:.{DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token, which together are the text of all. Of a character that several
    tokens make, the last one has it, and the others are empty."""
    texts, told, start = [], 0, 0  # tokens before `told` have their text
    for end in range(1, len(ids) + 1):
        # Some tokenizers leave out the space in front of the first token: so one stands in front.
        before = tokenizer.decode(ids[start:told], skip_special_tokens=False)
        now = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, told = told, end
    return texts
