"""Train a language model by GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1).

    python train.py                              the demo: a small model learns sums, on any machine
    torchrun --nproc_per_node 7 train.py --model … --dataset … --reward_funcs accuracy format

`train` below is the algorithm. By the paper's line numbers:

    1        the policy π_θ is --model, and so is the reference π_ref
    2, 3     the outer loop, which takes a new reference: only with --sync_ref_model
    5 to 7   take P questions and sample G outputs of each from π_old = π_θ: --num_generations
    8, 9     score them (--reward_funcs, --reward_model) and compare each with its group
    10, 11   update μ times (--num_iterations) on the clipped objective (--epsilon, --beta)
    12       training the reward model further: left out

Beyond the paper: sampling again where a group teaches nothing (--dynamic_sample), several steps'
completions at once (--steps_per_generation), the KL as a part of the reward (--kl_in_reward).

All probabilities are those of softmax(logits / temperature), which the sampler draws from. Beside the
paper's defaults G is 8, for 64, and LoRA is trained, unless --train_type full.

Ranks share the work: each samples and scores an equal slice of a batch, and trains on a slice of as
many tokens as every other's. A group may lie across slices. A completion's random numbers are its
own, so the number of ranks changes neither what is drawn to train on nor the gradient.

To try a new idea: how a batch comes about is in `draw`, what a rank trains on in `share_out`, the
objective in grpo.py. A metric that the loss returns reaches metrics.jsonl under its name. How policy,
optimizer and sampler are made of the flags is in run/setup.py.
"""

import sys

from run import flags

if __name__ == "__main__":  # a wrong flag is answered at once, before torch is imported
    flags.answer_early(sys.argv[1:])

import argparse
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
import dist
import grpo
import lora
from rewards import Rewards, total
from run import (
    checkpoints,
    checks,
    combinations,
    display,
    drift,
    finite,
    health,
    log,
    models,
    passes,
    plan,
    session,
    setup,
    tokens,
)
from sampler import Completion, Sampler

try:
    import fast
except ImportError:  # the folder may be deleted: training is slower, and right
    fast = None

# Random numbers have streams of their own: training batches from 0 on, and these.
EVALUATION = 1 << 40
DROPOUT = 1 << 41


@dataclass(frozen=True)
class TrainingOptions:
    """training"""

    num_train_epochs: Annotated[float, "passes over the dataset", "above 0"] = 1.0
    max_steps: Annotated[int | None, "optimizer steps; else num_train_epochs'", "from 1"] = None
    per_device_train_batch_size: Annotated[int, "completions a rank and micro-batch", "from 1"] = 8
    per_device_eval_batch_size: Annotated[int, "completions a rank evaluates at once", "from 1"] = 8
    gradient_accumulation_steps: Annotated[int, "micro-batches a step", "from 1"] = 1
    learning_rate: Annotated[float | None, "else 1e-4 for lora, 1e-6 for full", "from 0"] = None
    lr_scheduler_type: Annotated[Literal["linear", "cosine", "constant"], "decay"] = "cosine"
    warmup_ratio: Annotated[float, "share of the steps that warm up", "0 to 1"] = 0.0
    eval_steps: Annotated[int | None, "evaluate every so many steps", "from 1"] = None
    eval_on_start: Annotated[bool, "evaluate before the first step, too"] = False
    seed: Annotated[int, "of everything that is random", "0 to 9223372036854775808"] = 42


@dataclass(frozen=True)
class RolloutOptions:
    """rollouts and reference"""

    steps_per_generation: Annotated[
        int | None, "micro-batches a rollout, K; else gradient_accumulation_steps", "from 1"
    ] = None
    generation_batch_size: Annotated[
        int | None, "the same by its size: completions a rollout", "from 1"
    ] = None
    dynamic_sample: Annotated[bool, "draw anew in place of groups whose rewards are equal"] = False
    max_resample_times: Annotated[int, "so often at most", "from 1"] = 3
    sync_ref_model: Annotated[bool, "let the reference follow the policy"] = False
    ref_model_sync_steps: Annotated[int, "every so many steps", "from 1"] = 512
    ref_model_mixup_alpha: Annotated[float, "ref ← α policy + (1 - α) ref", "0 to 1"] = 0.6


def train(args: argparse.Namespace, world: dist.World) -> None:
    """Algorithm 1. args has a field for every option (run/flags.py)."""
    inputs = checks.prepare(args, world)  # what can be wrong is found here
    N = checkpoints.step_size(args, world)  # completions of one optimizer step, on all ranks
    M = checkpoints.rollout_size(args, world.size) // N  # steps that walk through a rollout once
    P = M * N // args.num_generations  # prompts of a rollout
    steps_per_rollout = M * args.num_iterations
    num_rows = len(inputs.train_rows)
    steps_per_epoch = steps_per_rollout * num_rows / P
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * steps_per_epoch)

    policy, reference = setup.load_policy(args, world, quick(args))
    waits = log.Waits(world.device)  # a stopwatch: how long this rank waits for others
    optimizer = setup.make_optimizer(args, policy, waits)
    # Step 0, or where a checkpoint stands.
    progress = checkpoints.resume(args, world, optimizer, reference)
    run = make_run(args, world, policy, inputs)
    inputs.rewards.start()
    lines, facts = health.before_the_first_step(args, policy, num_rows, P, max_steps)
    for line in lines:
        log.warn(world, line)
    inputs.rewards.max_steps = max_steps
    journal = log.Log(args, world, max_steps, steps_per_epoch, progress, facts)
    recorder = tokens.Recorder(run, partial(frozen_logps, args, policy), journal.tells_tokens)
    if args.eval_on_start and progress.step == 0:
        evaluate(run, inputs.val_rows, 0, journal)

    while progress.step < max_steps:
        started = time.perf_counter()
        # Sample G completions of each of P prompts, score them, compare each with its group:
        # M·N completions with their rewards (M·N,) and advantages (M·N,), on every rank.
        rollout = draw_rollout(run, inputs.train_rows, P, progress)
        if reference is not None and args.kl_in_reward:
            take_off_kl(run, policy, reference, rollout)  # compares anew
        metrics = log.metrics_of(rollout, run.rewards.names)
        journal.completions(progress.step + 1, rollout, run)

        # This rank's part of each step's N completions, of those with a gradient: micro-batches of
        # B completions, few if they are long, with their advantages (B,).
        steps = [share_out(run, part) for part in rollout.split(M)]
        for k, step in enumerate(steps):
            for micro in display.counted("compare", step.micro_batches):
                if reference is not None and not args.kl_in_reward:
                    micro.ref_logps = reference_logps(args, reference, micro)  # (B, T)
                if k > 0:  # the policy will have left the one that sampled
                    micro.old_logps = frozen_logps(args, policy, micro)  # (B, T)

        # Update on each of the M parts, μ times. From the second update on the policy is no longer
        # the one that sampled: the ratio leaves 1, and the clip acts.
        for step in (steps * args.num_iterations)[: max_steps - progress.step]:
            training = time.perf_counter()
            # Dropout's random numbers, the same when a run is resumed.
            stream = DROPOUT + progress.step
            torch.manual_seed(seed_of(args.seed, stream, world.rank))
            least_entropy = least_entropy_of(args, world, policy, step.micro_batches)
            tally = log.Tally()
            for micro in display.counted("train", step.micro_batches):
                # All (B, T); the mask is 1 on completion tokens and 0 on padding.
                logps, entropies, mask = logps_of(args, policy, micro)
                if not micro.completions:
                    optimizer.backward(0.0 * logps.sum())
                    continue
                if micro.old_logps is None:
                    # The policy of the first update is the one that sampled: no pass of its own.
                    micro.old_logps = logps.detach()
                importance = importance_of(args, micro, mask)
                loss, parts = grpo.grpo_loss(
                    logps,
                    entropies,
                    micro.old_logps,
                    micro.ref_logps,
                    micro.advantages,
                    mask,
                    importance,
                    least_entropy,
                    options=args,
                    normalizers=step.normalizers,
                )
                # Gradients add up over micro-batches and ranks; the loss is divided for that.
                optimizer.backward(loss)
                recorder.keep(micro, logps, entropies, importance)
                for name in ("entropy", "ratio/mean"):  # of those alone that are trained on
                    parts[name] *= N / step.num_trained
                tally.add(parts)
            learning_rate = args.learning_rate * setup.schedule(args, progress.step, max_steps)
            grad_norm = optimizer.step(learning_rate)
            run.sampler.take_weights(policy)
            progress.step += 1
            if args.sync_ref_model and progress.step % args.ref_model_sync_steps == 0:
                follow(reference, policy, args.ref_model_mixup_alpha)

            metrics |= tally.over(world) | drift.metrics(args, world, step.micro_batches)
            metrics |= {"grad_norm": grad_norm, "time/comm": waits.seconds()}
            metrics["time/train"] = time.perf_counter() - training
            metrics |= recorder.write(progress.step, rollout)
            metrics["time/step"] = time.perf_counter() - started
            journal.step(progress, learning_rate, metrics)
            metrics = log.later_in_the_batch(metrics)
            started = time.perf_counter()

        at_end = progress.step == max_steps
        at_last = at_end and combinations.evaluates(args)
        if at_last or setup.reached(args.eval_steps, progress.step, steps_per_rollout):
            evaluate(run, inputs.val_rows, progress.step, journal)
        at_end |= journal.asked_to_stop  # by a signal to any of the ranks
        if at_end or setup.reached(args.save_steps, progress.step, steps_per_rollout):
            # A policy that cannot be sampled from is not saved: one completion a rank tells.
            trial = rollout.select(list(world.part_of(M * N)[:1]))
            finite.check_policy(world, frozen_logps(args, policy, trial), progress.step)
            progress.completions_per_step = N
            checkpoints.save(args, world, policy, inputs.tokenizer, optimizer, progress, reference)
        if at_end:
            break
    journal.close()


# One batch --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What drawing a batch takes beside the prompts."""

    args: argparse.Namespace
    world: dist.World
    sampler: Sampler
    tokenizer: object
    rewards: Rewards
    opening: str = ""  # what the prompts have opened of every answer, such as "<think>"
    silent: set[int] = frozenset()  # tokens that end or pad

    def texts(self, completions: list[Completion]) -> list[str]:
        """Completions as the model's answers, with what their prompts have opened of them. Special
        tokens stay, since they may be tags; those that end or pad are left out."""
        said = []
        for done in completions:
            said.append([token for token in done.ids if token not in self.silent])
        decoded = self.tokenizer.batch_decode(said, skip_special_tokens=False)
        return [self.opening + text for text in decoded]


@dataclass
class Batch:
    """N completions, the G of a group side by side, and what is known of each."""

    rows: list[dict]  # of the dataset, one for each completion
    completions: list[Completion]  # their tokens, and the log-probabilities they were drawn with
    scores: list[list[float | None]]  # by each reward function; None where it does not apply
    rewards: Tensor  # (N,) their weighted sums
    advantages: Tensor  # (N,)
    metrics: dict[str, float]  # of drawing it
    old_logps: Tensor | None = None  # (N, T) of the policy that sampled, in a micro-batch
    ref_logps: Tensor | None = None  # (N, T) of the reference

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [row["prompt_ids"] for row in self.rows]

    @property
    def completion_ids(self) -> list[list[int]]:
        return [completion.ids for completion in self.completions]

    def teaching_ids(self, certain: float) -> list[list[int]]:
        """The tokens of each completion without its certain tail (--certain_tail)."""
        if certain == 1:
            return self.completion_ids
        lengths = [grpo.length_that_teaches(done.logps, certain) for done in self.completions]
        return [done.ids[:length] for done, length in zip(self.completions, lengths)]

    @property
    def num_tokens(self) -> int:
        prompts = sum(map(len, self.prompt_ids))
        return prompts + sum(map(len, self.completion_ids))

    @property
    def truncated(self) -> Tensor:
        """Which completions were cut at their largest length, bool (N,)."""
        return torch.tensor([not completion.finished for completion in self.completions])

    def tokens_that_count(self, overlong_filter: bool) -> int:
        """Of all completions, or of those that were not cut."""
        lengths = torch.tensor([len(ids) for ids in self.completion_ids])  # (N,)
        return int(lengths[~self.truncated | (not overlong_filter)].sum())

    def select(self, rows: list[int]) -> "Batch":
        """Some of the completions, as a batch."""
        return Batch(
            [self.rows[i] for i in rows],
            [self.completions[i] for i in rows],
            [self.scores[i] for i in rows],
            self.rewards[rows],
            self.advantages[rows],
            self.metrics,
        )

    def split(self, parts: int) -> list["Batch"]:
        """As many equal batches, in order."""
        size = len(self.completions) // parts
        return [self.select(list(range(i, i + size))) for i in range(0, parts * size, size)]

    def __add__(self, other: "Batch") -> "Batch":
        """Both, one after the other; what was counted and timed adds up."""
        metrics = dict(self.metrics)
        for name, value in other.metrics.items():
            metrics[name] = metrics.get(name, 0) + value
        return Batch(
            self.rows + other.rows,
            self.completions + other.completions,
            self.scores + other.scores,
            torch.cat([self.rewards, other.rewards]),
            torch.cat([self.advantages, other.advantages]),
            metrics,
        )


def draw_rollout(run: Run, rows: list[dict], num_prompts: int, progress) -> Batch:
    """The completions of the next prompts.

    With --dynamic_sample a group whose rewards are all equal, which teaches nothing, makes room for
    one of the prompts behind, until there is none or the tries are used up (DAPO, arXiv 2503.14476,
    section 3.2).
    """
    G, draws, prompts = run.args.num_generations, progress.draws, progress.prompts
    rollout = draw_next(run, rows, num_prompts, progress)
    for _ in range(run.args.max_resample_times if run.args.dynamic_sample else 0):
        teaches = rollout.advantages.view(-1, G).any(dim=1)  # (P,)
        missing = num_prompts - int(teaches.sum())
        if missing == 0:
            break
        # Keep the groups that teach, and draw as many prompts as are missing.
        kept = teaches.repeat_interleave(G).nonzero().flatten().tolist()
        rollout = rollout.select(kept) + draw_next(run, rows, missing, progress)
        # Anew, since the whole rollout may be what rewards are scaled by.
        compare(run, rollout, rollout.rewards, G)
    rollout.metrics["draws"] = progress.draws - draws
    rollout.metrics["drawn_completions"] = G * (progress.prompts - prompts)
    return rollout


def draw_next(run: Run, rows: list[dict], num_prompts: int, progress) -> Batch:
    """Go on in the data, with random numbers that no other draw has."""
    order = data.rows_at(progress.prompts, num_prompts, len(rows), run.args.seed)
    prompts = [rows[i] for i in order]
    batch = draw(run, prompts, run.args.num_generations, progress.draws, progress.step + 1)
    progress.prompts += num_prompts
    progress.draws += 1
    progress.num_tokens += batch.num_tokens
    return batch


def draw(run: Run, rows: list[dict], G: int, stream: int, step: int, temperature=None) -> Batch:
    """Sample G completions for each row, score them, compare each with its group.

    stream: names the batch's random numbers. step: the next one, for rewards. temperature: else
    --temperature. A collective call: a rank samples and scores its slice, and every rank gets all.
    """
    world, started = run.world, time.perf_counter()
    everyone = [row for row in rows for _ in range(G)]
    N = len(everyone)
    mine = world.part_of(N)
    own = [everyone[i] for i in mine]

    # Sample. A completion's random numbers are its own, whatever rank draws it.
    prompt_ids = [row["prompt_ids"] for row in own]
    seeds = [seed_of(run.args.seed, stream, i) for i in mine]
    other = () if temperature is None else (temperature,)
    with display.phase("generate"):
        completions = run.sampler.generate(prompt_ids, seeds, *other)
    sampled = time.perf_counter()

    # Score. A group may lie across ranks, so every rank needs to know all.
    with display.phase("score"):
        scores = score(run, own, completions, step)
    together = world.gather(list(zip(completions, scores)))
    completions, scores = (list(column) for column in zip(*together))
    finite.check_drawn(run.args, completions, step - 1, temperature)
    rewards = torch.tensor(total(scores, run.rewards.weights))  # (N,)
    scored = time.perf_counter()

    metrics = world.sum(run.rewards.metrics()) | run.sampler.metrics
    metrics["time/generate"] = sampled - started - metrics.get("time/sync", 0.0)
    metrics["time/reward"] = scored - sampled
    batch = Batch(everyone, completions, scores, rewards, torch.zeros(N), metrics)

    # Compare. Evaluations may draw single completions.
    if G > 1:
        compare(run, batch, rewards, G)
    return batch


def compare(run: Run, batch: Batch, rewards: Tensor, G: int) -> None:
    """Each completion's reward (N,) with those of its group: the advantages of a batch, in place."""
    checks.check_rewards(run.args, rewards.tolist())
    batch.advantages, stds = grpo.group_advantages(  # (N,), (N / G,)
        rewards, G, run.args, batch.scores, run.rewards.weights
    )
    teaches = batch.advantages.view(-1, G).any(dim=1)  # (N / G,)
    batch.metrics["reward_std"] = stds.mean().item()
    batch.metrics["zero_std_groups"] = (~teaches).float().mean().item()


def score(run: Run, rows: list[dict], completions: list[Completion], step: int) -> list[list]:
    """What each reward function says of each completion of this rank, (n, functions)."""
    if not completions:
        return []
    ids = [completion.ids for completion in completions]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["prompts"] = columns.pop("prompt")
    columns["is_truncated"] = [not completion.finished for completion in completions]
    del columns["prompt_ids"]
    return run.rewards(run.texts(completions), completion_ids=ids, step=step, **columns)


@dataclass
class Step:
    """What one optimizer step takes on this rank."""

    micro_batches: list[Batch]
    num_trained: int  # completions that all ranks train on
    normalizers: grpo.Normalizers


def share_out(run: Run, batch: Batch) -> Step:
    """This rank's part of a step's N completions.

    Those with a gradient are shared out by tokens, whoever sampled them. Every rank has as many
    micro-batches, perhaps empty ones: with ZeRO-3 its forward passes are part of the others'.
    """
    args, world = run.args, run.world
    # Completions without a gradient, often more than half, cost no pass.
    useful = grpo.has_gradient(batch.advantages, args, batch.truncated)  # (N,)
    trained = useful.nonzero().flatten().tolist()
    lengths = [len(ids) for ids in batch.teaching_ids(args.certain_tail)]
    shares = split_evenly(trained, lengths, world.size)
    parts = split_evenly(shares[world.rank], lengths, args.gradient_accumulation_steps)
    micro_batches = [batch.select(part) for part in parts]
    for micro in micro_batches:
        micro.advantages = micro.advantages.to(world.device)
    # What sums are divided by counts all N: those of other ranks, and those left out here.
    normalizers = grpo.Normalizers(
        completions=len(batch.completions),
        tokens=batch.tokens_that_count(args.overlong_filter),
        longest=args.max_completion_length,
    )
    return Step(micro_batches, len(trained), normalizers)


def split_evenly(items: list[int], lengths: list[int], parts: int) -> list[list[int]]:
    """Cut a list of items into consecutive parts, some perhaps empty, of about the same length in
    all. lengths: by item."""
    whole = sum(lengths[item] for item in items)
    cut: list[list[int]] = [[] for _ in range(parts)]
    before = 0  # the length of all items in front
    for item in items:
        # The part in which its middle lies.
        middle = before + lengths[item] / 2
        cut[int(middle * parts / whole)].append(item)
        before += lengths[item]
    return cut


def logps_of(args: argparse.Namespace, model: torch.nn.Module, micro: Batch) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies and mask of a micro-batch, each (B, T), or (1, 1) for none."""
    function = (quick(args) or grpo).completion_logps
    # An empty micro-batch passes one token, for with ZeRO-3 all ranks have to take part.
    prompt_ids = micro.prompt_ids or [[0]]
    teaching_ids = micro.teaching_ids(args.certain_tail) or [[0]]
    found = dist.forward(function, model, prompt_ids, teaching_ids, args.temperature)
    if args.certain_tail == 1 or not micro.completions:
        return found
    return with_tails(micro.completions, *found)


def with_tails(
    completions: list[Completion], logps: Tensor, entropies: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    """The three of the tokens that teach, (B, t), with certain tails behind them, (B, T): these have
    the log-probabilities that they were drawn with, no entropy, and no gradient."""
    drawn = [logps.new_tensor(completion.logps) for completion in completions]
    whole = pad_sequence([torch.ones_like(row) for row in drawn], batch_first=True)  # (B, T)
    drawn = pad_sequence(drawn, batch_first=True)
    room = (0, drawn.shape[1] - logps.shape[1])
    logps, entropies, teaches = (F.pad(x, room) for x in (logps, entropies, mask))
    return torch.where(teaches.bool(), logps, drawn), entropies, whole.to(mask)


def frozen_logps(args: argparse.Namespace, model: torch.nn.Module, micro: Batch) -> Tensor:
    """Log-probabilities (B, T) without a gradient and without dropout."""
    training = model.training
    with torch.no_grad():
        logps, _, _ = logps_of(args, model.eval(), micro)
    model.train(training)
    return logps


def reference_logps(args: argparse.Namespace, reference: torch.nn.Module, micro: Batch) -> Tensor:
    """The reference policy's log-probabilities, (B, T): for LoRA the policy's without adapters."""
    with lora.disabled(reference):
        return frozen_logps(args, reference, micro)


def take_off_kl(run: Run, policy, reference, batch: Batch) -> None:
    """--kl_in_reward: compare r - β log π/π_ref of the whole completion, whose mean is the KL.

    Both are the trainer's own: the sampler's rounding would tell completions apart that are alike.
    """
    args, N = run.args, len(batch.completions)
    lengths = [len(ids) for ids in batch.completion_ids]
    own = list(run.world.part_of(N))
    passes = math.ceil(N / (run.world.size * args.per_device_train_batch_size))
    # The completion's log π/π_ref is the sum over its tokens.
    sums = []
    parts = split_evenly(own, lengths, passes)  # as many on every rank
    for part in display.counted("compare", parts):
        micro = batch.select(part)
        difference = frozen_logps(args, policy, micro) - reference_logps(args, reference, micro)
        sums += difference.sum(dim=1).tolist()[: len(part)]
    log_ratios = torch.tensor(run.world.gather(sums))  # (N,)
    batch.metrics["kl"] = (log_ratios / torch.tensor(lengths)).mean().item()  # of a token
    compare(run, batch, batch.rewards - args.beta * log_ratios, args.num_generations)


@torch.no_grad()
def follow(reference: torch.nn.Module, policy: torch.nn.Module, alpha: float) -> None:
    """The reference moves towards the policy: ref ← α policy + (1 - α) ref."""
    for old, new in zip(reference.parameters(), policy.parameters()):
        old, new = dist.local(old), dist.local(new)  # with ZeRO-3 a part of each
        old.copy_(old.float().lerp(new.float(), alpha))


def least_entropy_of(
    args: argparse.Namespace, world: dist.World, policy: torch.nn.Module, micro_batches: list[Batch]
) -> float | None:
    """What --top_entropy_quantile asks of a token's entropy, by all tokens that the ranks train on:
    a pass of its own, since the first micro-batch needs to know of the last one's."""
    if args.top_entropy_quantile == 1:
        return None
    own = []
    for micro in micro_batches:
        with torch.no_grad():
            _, entropies, mask = logps_of(args, policy, micro)
        if micro.completions:
            own.append(entropies[mask.bool()].cpu())
    everyone = world.gather(own)
    if not everyone:
        return None
    return grpo.entropy_threshold(torch.cat(everyone), args.top_entropy_quantile)


def importance_of(args: argparse.Namespace, micro: Batch, mask: Tensor) -> Tensor | None:
    """What corrects for a sampler that is not quite the trainer's own model, (B, T); else None."""
    if args.rollout_importance_sampling_mode == "off":
        return None
    # The sampler told the log-probabilities with which it drew.
    rows = [torch.tensor(completion.logps) for completion in micro.completions]
    sampler_logps = pad_sequence(rows, batch_first=True).to(micro.old_logps.device)
    return grpo.importance_weights(micro.old_logps, sampler_logps, mask, args)


def evaluate(run: Run, rows: list[dict], step: int, journal: log.Log) -> None:
    """Log the means over the completions of all rows."""
    G = run.args.num_generations_eval
    batches = []
    for batch in evaluation(run, rows, G, run.args.temperature_eval, step):
        journal.completions(step, batch, run, phase="eval")
        batches.append(batch)
    journal.evaluation(step, passes.means(run, batches, G))


def evaluation(run: Run, rows: list[dict], G: int, temperature: float, step: int):
    """G completions of each row, scored as in training: a Batch of some rows after the other."""
    prompts_at_once = run.world.size * run.args.per_device_eval_batch_size // G
    for first in display.counted("evaluate", range(0, len(rows), prompts_at_once)):
        part = rows[first : first + prompts_at_once]
        yield draw(run, part, G, EVALUATION + first, step + 1, temperature)


def seed_of(seed: int, stream: int, index: int) -> int:
    """The seed of one completion's random numbers, whatever rank samples it."""
    sequence = numpy.random.SeedSequence([seed, stream, index])
    return int(sequence.generate_state(1)[0])


def make_run(args: argparse.Namespace, world: dist.World, policy, inputs: checks.Inputs) -> Run:
    tokenizer = inputs.tokenizer
    sampler = make_sampler(args, world, policy, tokenizer)
    silent = {*models.end_tokens(policy, tokenizer), tokenizer.pad_token_id}
    return Run(args, world, sampler, tokenizer, inputs.rewards, inputs.opening, silent)


def make_sampler(args: argparse.Namespace, world: dist.World, policy, tokenizer) -> Sampler:
    """To sample in another way, return a sampler of yours."""
    return setup.make_sampler(args, world, policy, tokenizer, quick(args))


def quick(args: argparse.Namespace):
    """The folder fast/, unless it is gone or --plain asks for none of it."""
    return None if args.plain else fast


def main(argv: list[str]) -> None:
    args, world = session.read_flags(argv)
    with session.session(args, world):
        if args.dry_run:
            sys.exit(plan.dry_run(args, world))
        if quick(args):
            fast.use_cpu_well(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        train(args, world)


if __name__ == "__main__":
    main(sys.argv[1:])
