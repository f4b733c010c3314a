"""The GRPO objective: advantages, the clipped loss, log-probabilities.

DeepSeekMath (arXiv 2402.03300), equations 3 and 4. For one prompt the policy samples a group of G
completions o_1 … o_G, which earn the rewards r_1 … r_G. There is no value network: the group
itself is the baseline.

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)                      group_advantages
    ρ_it = π(o_it) / π_old(o_it)                                  π_old is the policy that sampled
    J_it = min(ρ_it A_i, clip(ρ_it, 1-ε, 1+ε) A_i) - β k3_it      objective
    k3   = exp(ref - new) - (ref - new) - 1                       k3, an estimate of KL(π ‖ π_ref)
    loss = - mean over i of mean over t of J_it                   aggregate

i counts completions and t the tokens of one. On a fresh batch every ρ is 1, so the loss is the mean
advantage with its sign changed plus β·KL: close to zero, whatever the model has learned. Its
gradient is not. Left out: rewards for the steps of a solution (process supervision).

To try a new idea, change the function that it belongs to. The published ones are a line or two
(tests/test_grpo.py, `PEER`, compares with them):

    Dr. GRPO (2503.20783)   group_advantages without the std; aggregate: Σ / (completions · longest)
    RLOO (2402.14740)       group_advantages: (r_i - mean) · G / (G - 1), without the std
    DAPO (2503.14476)       aggregate: Σ / tokens; objective: an upper ε of its own
    GSPO (2507.18071)       objective: one ratio, exp(mean over tokens of log ρ)
    CISPO (2506.13585)      objective: detach(min(ρ, ε_high)) · A · logp; aggregate as DAPO
    entropy bonus           objective: + coefficient · entropies; has_gradient: every completion
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

ADVANTAGE_EPS = 1e-4  # added to the group's standard deviation, as TRL and ms-swift do
MAX_LOG_RATIO = 10.0  # that k3 takes; see there
Rows = Sequence[Sequence[int]]  # ragged token ids


@dataclass(frozen=True)
class Options:
    """GRPO"""

    num_generations: Annotated[int, "G, completions a prompt", "from 2"] = 8
    num_generations_eval: Annotated[int | None, "the same in evaluations; else G", "from 1"] = None
    num_iterations: Annotated[int, "optimizer steps on each batch", "from 1"] = 1
    epsilon: Annotated[float, "ε of the clipped objective", "from 0"] = 0.2
    beta: Annotated[float, "β of the KL term; 0 needs no reference model", "from 0"] = 0.04


@dataclass(frozen=True)
class Normalizers:
    """What a sum over tokens may be divided by, counted over all micro-batches and ranks of an
    optimizer step: so the parts that each computes add up, however the step is split."""

    completions: int  # N
    tokens: int  # of all N completions
    longest: int  # tokens that a completion may have: max_completion_length


# The objective ----------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
    """Advantages of completions whose groups lie side by side (section 4.1.2, outcome supervision).

    rewards (N,) with N = groups × G → advantages (N,) and the groups' standard deviations
    (N / G,), both with G - 1 in the denominator. A group whose rewards are all equal teaches
    nothing: its advantages are exactly 0.
    """
    groups = rewards.view(-1, num_generations)  # (N / G, G)
    std = groups.std(dim=1, keepdim=True)
    # Of equal rewards rounding may leave a little, which the division would make large.
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    std = std.masked_fill(equal, 0.0)
    centred = groups - groups.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(std == 0, 0.0)
    advantages = centred / (std + ADVANTAGE_EPS)
    return advantages.flatten(), std.flatten()


def has_gradient(advantages: Tensor, options: Options) -> Tensor:
    """Which completions move the policy under the loss below, (N,) → bool (N,): with a KL term
    all, without one those whose advantage is not 0. The others need not be trained on."""
    return (advantages != 0) | (options.beta > 0)


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate of KL(policy ‖ reference) for each token, any shape: unbiased, never negative
    (equation 4; Schulman, "Approximating KL divergence", 2020).

    A token that the reference finds more than e^10 times as likely counts as one of e^10, without a
    gradient: one absurd token would otherwise rule the step, or make it infinite. (verl bounds the
    logarithm by 20 and the estimate by 10.) Metrics count such tokens as kl_bounded.
    """
    difference = (ref_logps - logps).clamp(max=MAX_LOG_RATIO)
    return torch.exp(difference) - difference - 1


def importance_weights(old_logps: Tensor, sampler_logps: Tensor, clip_max: float) -> Tensor:
    """π_old / π_sampler for each token, any shape, at most clip_max: what corrects for a sampler
    whose kernels round differently, so that it drew from a policy that is not quite π_old.

    The bound keeps one odd token from ruling the step (truncated importance sampling: Yao et al.,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025).
    """
    return torch.exp(old_logps - sampler_logps).clamp(max=clip_max)


def grpo_loss(
    logps: Tensor,
    entropies: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    importance: Tensor | None = None,
    *,
    options: Options,
    normalizers: Normalizers,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the loss of an optimizer step, and of its metrics by name.

    logps, entropies, old_logps, ref_logps, completion_mask (B, T); advantages (B,); importance
    (B, T) from `importance_weights`, or None where the sampler's policy is π_old exactly. Without
    ref_logps (β = 0) there is no KL term. options: anything with epsilon and beta.

    The parts of all micro-batches and ranks add up. Metrics are means over a completion's tokens,
    then over completions, whatever `aggregate` does.
    """
    per_token, metrics = objective(
        logps, entropies, old_logps, ref_logps, advantages, completion_mask, importance, options
    )
    loss = -aggregate(per_token, completion_mask, normalizers)
    parts = {"loss": loss.detach()}
    for name, value in metrics.items():
        means = mean_over_tokens(value.detach(), completion_mask)  # (B,)
        parts[name] = means.sum() / normalizers.completions
    return loss, parts


def objective(
    logps, entropies, old_logps, ref_logps, advantages, mask, importance, options
) -> tuple[Tensor, dict[str, Tensor]]:
    """J_it of equation 3, to be made large, (B, T), and metrics of each token, by name, (B, T).

    Arguments as in `grpo_loss`. A metric that is put here reaches metrics.jsonl.
    """
    advantages = advantages[:, None]  # (B, 1): one for all tokens of a completion
    log_ratio = logps - old_logps  # (B, T)
    ratio = torch.exp(log_ratio)
    low, high = 1 - options.epsilon, 1 + options.epsilon
    clipped = ratio.clamp(low, high)
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    # Where the clip takes the gradient away: further than ε in the advantage's own direction.
    fell = (ratio < low) & (advantages < 0)
    rose = (ratio > high) & (advantages > 0)
    metrics = {"clip_ratio": (fell | rose).float()}

    if importance is not None:
        surrogate = surrogate * importance
    if ref_logps is not None:
        kl = k3(logps, ref_logps)
        surrogate = surrogate - options.beta * kl
        metrics["kl"] = kl
        metrics["kl_bounded"] = (ref_logps - logps > MAX_LOG_RATIO).float()
    return surrogate, metrics


def aggregate(per_token: Tensor, mask: Tensor, normalizers: Normalizers) -> Tensor:
    """This micro-batch's part of the mean over the step, (B, T) → a scalar: the mean over the
    tokens of a completion, then over completions (equation 3)."""
    return mean_over_tokens(per_token, mask).sum() / normalizers.completions


def mean_over_tokens(per_token: Tensor, mask: Tensor) -> Tensor:
    """The mean of each completion's own tokens, (B, T) → (B,)."""
    return (per_token * mask).sum(dim=1) / mask.sum(dim=1)


# Log-probabilities ------------------------------------------------------------------------------


def completion_logps(
    model: torch.nn.Module,
    prompt_ids: Rows,
    completion_ids: Rows,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of completions under softmax(logits / temperature), which draws them.

    B prompts and B completions, ragged → logps and entropies (B, T), both with a gradient, in
    float32 (float64 for a float64 model), and completion_mask (B, T): 1 on tokens, 0 on padding,
    where the others are 0. One forward pass of the model's own, on a batch padded on both sides
    (a run has fast.completion_logps in its place, which pads nothing):

        _  p  p  p | o  o  o
        p  p  p  p | o  o  _
    """
    device = next(model.parameters()).device
    prompts, prompt_mask = pad(prompt_ids, "left", device)  # (B, P)
    completions, completion_mask = pad(completion_ids, "right", device)  # (B, T)
    ids = torch.cat([prompts, completions], dim=1)  # (B, P + T)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)

    # Logits predict the next token: from those at the prompt's last token on, without the last.
    T = completions.shape[1]
    settings = {"position_ids": positions(mask), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        settings["logits_to_keep"] = T + 1  # those of other prompt tokens need not be made
    logits = model(input_ids=ids, attention_mask=mask, **settings).logits
    logits = logits[:, -T - 1 : -1]  # (B, T, V)

    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype) / temperature
    log_probabilities = logits.log_softmax(dim=-1)
    logps = log_probabilities.gather(2, completions[..., None]).squeeze(2)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    padding = completion_mask == 0
    logps, entropies = logps.masked_fill(padding, 0.0), entropies.masked_fill(padding, 0.0)
    return logps, entropies, completion_mask


def pad(rows: Rows, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged token ids → ids (B, T) padded with 0 on one side, and their mask (B, T) of 1 and 0."""
    width = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        row = list(row)
        ones = [1] * len(row)
        blanks = [0] * (width - len(row))
        if side == "left":
            row, ones = blanks + row, blanks + ones
        else:
            row, ones = row + blanks, ones + blanks
        ids.append(row)
        mask.append(ones)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask: Tensor) -> Tensor:
    """Position ids (B, T) that count the tokens of a padded batch, whichever side is padded."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
