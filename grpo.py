"""The GRPO objective and its family: advantages, the clipped loss, log-probabilities.

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

The family is what these flags make of it. They combine freely; docs/family.md tells how to choose.

    name           arXiv       what it changes                         flags
    RLOO           2402.14740  A: r less the mean of the others        advantage_estimator rloo
    REINFORCE++    2501.03262  A: r - mean, over the batch's std of it advantage_estimator reinforce_…
                               both: the KL is taken off the reward    kl_in_reward
    MaxRL          2602.02710  A: (r - mean) / mean                    scale_rewards mean
    GDPO           2601.05242  A: z-scores of each reward, weighted    scale_rewards gdpo
    Dr. GRPO       2503.20783  A: without the std                      scale_rewards none
                               loss: Σ over tokens / (N · longest)     loss_type dr_grpo
    DAPO           2503.14476  loss: Σ over tokens / their number      loss_type dapo (or bnpo)
                               an upper ε of its own                   epsilon_high
                               groups of equal rewards are drawn anew  dynamic_sample (train.py)
                               completions that were cut do not count  overlong_filter
    CISPO          2506.13585  detach(min(ρ, ε_high)) A log π          loss_type cispo, epsilon_high
    SAPO           2511.20347  4/τ σ(τ (ρ - 1)) A: no hard clip        loss_type sapo, tau_pos, tau_neg
    GSPO           2507.18071  ρ: exp(mean over tokens of log ρ)       importance_sampling_level
    INTELLECT-2    2505.07291  min(ρ, δ): a bound where A < 0          delta
    DeepSeek-V3.2  2512.02556  ρ k3, whose gradient is the KL's        kl_unbiased
                               none of A < 0 that became unlikely      off_policy_sequence_mask_delta
    80/20          2506.01939  only the step's most uncertain tokens   top_entropy_quantile
    certain tail   (ours)      none of the last tokens that are certain certain_tail
    TIS            Yao et al.  × π_old / π_sampler, bounded            rollout_importance_sampling_mode
    entropy bonus  1602.01783  + coefficient · entropy                 entropy_coef

To try a new idea, change the function that it belongs to.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

ADVANTAGE_EPS = 1e-4  # added to the group's standard deviation, as TRL and ms-swift do
ROUNDING = 1e-5  # nats by which equal entropies may seem to differ
MAX_LOG_RATIO = 10.0  # that k3 takes; see there
Rows = Sequence[Sequence[int]]  # ragged token ids
Scores = Sequence[Sequence[float | None]]  # by reward function; None where one does not apply


@dataclass(frozen=True)
class Options:
    """GRPO"""

    num_generations: Annotated[int, "G, completions a prompt", "from 2"] = 8
    num_generations_eval: Annotated[int | None, "the same in evaluations; else G", "from 1"] = None
    num_iterations: Annotated[int, "optimizer steps on each batch", "from 1"] = 1
    epsilon: Annotated[float, "ε of the clipped objective", "from 0"] = 0.2
    epsilon_high: Annotated[float | None, "ε upwards; else epsilon", "from 0"] = None
    beta: Annotated[float, "β of the KL term; 0 needs no reference model", "from 0"] = 0.04
    advantage_estimator: Annotated[
        Literal["grpo", "rloo", "reinforce_plus_plus"], "what a reward is compared with"
    ] = "grpo"
    scale_rewards: Annotated[
        Literal["group", "batch", "none", "mean", "gdpo"] | None,
        "whose std divides; mean: the group's mean does; else group, none for rloo, batch for "
        "reinforce_plus_plus",
    ] = None
    loss_type: Annotated[
        Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"], "the clip, and what divides"
    ] = "grpo"
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], "sequence: one ratio a completion, GSPO's"
    ] = "token"
    delta: Annotated[float | None, "a bound on the ratio where it has none", "above 1"] = None
    tau_pos: Annotated[float, "SAPO's τ where the advantage is above 0", "above 0"] = 1.0
    tau_neg: Annotated[float, "SAPO's τ elsewhere", "above 0"] = 1.05
    kl_unbiased: Annotated[bool, "KL times ρ: then its gradient is the KL's"] = False
    entropy_coef: Annotated[float, "of the entropy, which is added", "from 0"] = 0.0
    top_entropy_quantile: Annotated[
        float, "share of tokens that count, the most uncertain ones", "above 0 to 1"
    ] = 1.0
    certain_tail: Annotated[
        float, "leave out last tokens, if each was at least as probable", "above 0 to 1"
    ] = 1.0
    kl_in_reward: Annotated[
        bool | None, "take the KL off the reward, not the loss; else true but for grpo"
    ] = None
    rollout_importance_sampling_mode: Annotated[
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "off"] | None,
        "weights π_old / π_sampler: cut them, or leave out; else token_truncate with vLLM",
    ] = None
    rollout_importance_sampling_threshold: Annotated[float, "above this", "above 0"] = 2.0
    off_policy_sequence_mask_delta: Annotated[
        float | None, "leave out completions of A < 0 whose mean log ratio fell further", "from 0"
    ] = None
    overlong_filter: Annotated[bool, "completions cut at their largest length do not count"] = False


PAPER = Options()  # GRPO as the paper has it
SCALES = {"grpo": "group", "rloo": "none", "reinforce_plus_plus": "batch"}  # by estimator


@dataclass(frozen=True)
class Normalizers:
    """What a sum over tokens may be divided by, counted over all micro-batches and ranks of an
    optimizer step: so the parts that each computes add up, however the step is split."""

    completions: int  # N
    tokens: int  # of all N completions, without those that overlong_filter takes out
    longest: int  # tokens that a completion may have: max_completion_length


# The objective ----------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor, num_generations: int, options=PAPER, scores: Scores = (), weights=()
) -> tuple[Tensor, Tensor]:
    """Advantages of completions whose groups lie side by side (section 4.1.2, outcome supervision).

    rewards (N,) with N = groups × G → advantages (N,) and the groups' standard deviations
    (N / G,), both with G - 1 in the denominator. A group whose rewards are all equal teaches
    nothing: its advantages are exactly 0. With scale_rewards mean rewards are 0 or more. Only gdpo
    reads scores (N, functions), of which rewards are the weighted sums.
    """
    groups = rewards.view(-1, num_generations)  # (N / G, G)
    std = groups.std(dim=1, keepdim=True)
    # Of equal rewards rounding may leave a little, which the division would make large.
    equal = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    std = std.masked_fill(equal, 0.0)
    centred = groups - groups.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(std == 0, 0.0)

    estimator = options.advantage_estimator
    scale = options.scale_rewards or SCALES[estimator]
    if estimator == "rloo":  # r less the mean of the others
        centred = centred * num_generations / (num_generations - 1)
    if scale == "gdpo":
        centred = weighted_z_scores(scores, weights, num_generations)
        centred = centred.to(groups).view_as(groups)
    if scale == "group":
        centred = centred / (std + ADVANTAGE_EPS)
    elif scale == "mean":
        # For rewards of 0 and 1: a right answer counts the more, the fewer there are.
        centred = centred / (groups.mean(dim=1, keepdim=True) + ADVANTAGE_EPS)
    elif scale != "none":
        # Over all N: of the rewards, or for REINFORCE++ and GDPO of what it divides.
        of_rewards = scale == "batch" and estimator != "reinforce_plus_plus"
        whole = rewards.std() if of_rewards else centred.std()
        centred = centred / (whole + ADVANTAGE_EPS)
    return centred.flatten(), std.flatten()


def weighted_z_scores(scores: Scores, weights: Sequence[float], num_generations: int) -> Tensor:
    """Each reward function's z-scores in its groups, times its weight, summed, (N, functions) →
    (N,): no function outweighs another by its spread (GDPO). None, where one does not apply, adds
    nothing."""
    N, G = len(scores), num_generations
    sums = torch.zeros(N, dtype=torch.float64)
    for weight, column in zip(weights, zip(*scores)):
        for first in range(0, N, G):
            group = range(first, first + G)
            having = [i for i in group if column[i] is not None]
            if len(having) < 2:
                continue
            own = [column[i] for i in having]
            own = torch.tensor(own, dtype=torch.float64)
            z_scores, _ = group_advantages(own, len(own))
            sums[having] += weight * z_scores
    return sums


def has_gradient(advantages: Tensor, options, truncated: Tensor | None = None) -> Tensor:
    """Which completions the loss below needs, (N,) → bool (N,): all with a KL term, with an entropy
    bonus, or where entropies are compared over the step; else those whose advantage is not 0. None
    that overlong_filter takes out. truncated: which were cut, bool (N,)."""
    needed = advantages != 0
    kl = options.beta and not options.kl_in_reward
    if kl or options.entropy_coef or options.top_entropy_quantile < 1:
        needed = torch.ones_like(needed)
    if options.overlong_filter and truncated is not None:
        needed = needed & ~truncated
    return needed


def length_that_teaches(logps: Sequence[float], certain: float) -> int:
    """How many of a completion's tokens come before its certain tail, at least 1. logps: those that
    they were drawn with. The tail are the last tokens, as long as each had this probability or more.

    The gradient of log π(o_t) by the logits is e_{o_t} - π, and its entries sum up to 2 (1 - π(o_t)),
    without their signs. So a tail of closing tags teaches next to nothing, and nothing behind needs it.
    """
    length = len(logps)
    while length > 1 and logps[length - 1] >= math.log(certain):
        length -= 1
    return length


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate of KL(policy ‖ reference) for each token, any shape: unbiased, never negative
    (equation 4; Schulman, "Approximating KL divergence", 2020).

    A token that the reference finds more than e^10 times as likely counts as one of e^10, without a
    gradient: one absurd token would otherwise rule the step, or make it infinite. (verl bounds the
    logarithm by 20 and the estimate by 10.) Metrics count such tokens as kl_bounded.
    """
    difference = (ref_logps - logps).clamp(max=MAX_LOG_RATIO)
    return torch.exp(difference) - difference - 1


def importance_weights(old_logps: Tensor, sampler_logps: Tensor, mask: Tensor, options) -> Tensor:
    """π_old / π_sampler, (B, T): what corrects for a sampler whose kernels round differently, so that
    it drew from a policy that is not quite π_old. By the mode one weight a token, or one a
    completion, exp(mean of the logarithms); where it is above the threshold, that, or 0.

    The bound keeps one odd token from ruling the step (truncated importance sampling: Yao et al.,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025).
    """
    level, _, remedy = options.rollout_importance_sampling_mode.partition("_")
    log_weights = old_logps - sampler_logps
    if level == "sequence":
        log_weights = mean_over_tokens(log_weights, mask)[:, None].expand_as(log_weights)
    weights = torch.exp(log_weights)
    threshold = options.rollout_importance_sampling_threshold
    if remedy == "mask":
        return weights.masked_fill(weights > threshold, 0.0)
    return weights.clamp(max=threshold)


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy that the given share of tokens reaches, (tokens,) → a number: the 1 - share
    quantile, which takes the tokens of the whole step to tell. It lies halfway to the next lower
    one, so that no token's place hangs on rounding: the first tokens of a group have the same
    entropy, and count together or not at all."""
    rank = math.ceil((1 - share) * (len(entropies) - 1))
    least, _ = entropies.kthvalue(rank + 1)
    lower = entropies[entropies < least - ROUNDING]
    if not len(lower):
        return least.item() - ROUNDING
    return (least + lower.max()).item() / 2


def grpo_loss(
    logps: Tensor,
    entropies: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    importance: Tensor | None = None,
    least_entropy: float | None = None,
    *,
    options: Options,
    normalizers: Normalizers,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the loss of an optimizer step, and of its metrics by name.

    logps, entropies, old_logps, ref_logps, completion_mask (B, T); advantages (B,); importance
    (B, T) from `importance_weights`, or None where the sampler's policy is π_old exactly. Without
    ref_logps (β = 0) there is no KL term. least_entropy: the step's `entropy_threshold`, or None
    where all tokens count. options: anything with the fields of `Options`.

    The parts of all micro-batches and ranks add up. Metrics are means over a completion's tokens,
    then over completions, whatever `aggregate` does; of one named …/max the largest is taken.
    """
    tensors = (logps, entropies, old_logps, ref_logps, advantages, completion_mask, importance)
    per_token, metrics = objective(*tensors, least_entropy, options)
    loss = -aggregate(per_token, completion_mask, normalizers, options.loss_type)
    parts = {"loss": loss.detach()}
    for name, value in metrics.items():
        value = value.detach()
        means = mean_over_tokens(value, completion_mask)  # (B,)
        parts[name] = means.sum() / normalizers.completions
        if name.endswith("/max") and value.numel():
            parts[name] = (value * completion_mask).max()
    return loss, parts


def objective(
    logps, entropies, old_logps, ref_logps, advantages, mask, importance, least_entropy, options
) -> tuple[Tensor, dict[str, Tensor]]:
    """J_it of equation 3, to be made large, (B, T), and metrics of each token, by name, (B, T), which
    reach metrics.jsonl. Arguments as in `grpo_loss`."""
    advantages = advantages[:, None]  # (B, 1): one for all tokens of a completion
    log_ratio = logps - old_logps  # (B, T)
    if options.importance_sampling_level == "sequence":
        # One ratio for a whole completion: the geometric mean of its tokens' (GSPO, equation 7).
        log_ratio = mean_over_tokens(log_ratio, mask)[:, None].expand_as(logps)
    ratio = torch.exp(log_ratio)  # ρ = π_θ / π_old

    # The clip takes the gradient from a token that has moved far enough in its advantage's
    # direction. min: one that has moved the other way keeps it, however far.
    low, high = clip_range(options)
    ceiling = options.delta or math.inf
    clipped = ratio.clamp(low, high)
    bounded = ratio.clamp(max=ceiling)
    surrogate = torch.min(bounded * advantages, clipped * advantages)
    if options.loss_type == "cispo":
        # The ratio is a weight alone: each token keeps the gradient of its log-probability.
        surrogate = clipped.detach() * advantages * logps
    elif options.loss_type == "sapo":
        surrogate = soft_gate(ratio, advantages, options) * advantages
    metrics = clip_metrics(ratio, advantages, low, high, ceiling)

    # Which tokens count, and what is added to them.
    left_out = torch.zeros_like(logps, dtype=torch.bool)
    if importance is not None:
        surrogate = surrogate * importance
        left_out = importance == 0
    if options.off_policy_sequence_mask_delta is not None:
        # Bad completions that the policy has left behind: to push on would teach it nothing.
        drift = mean_over_tokens(-log_ratio.detach(), mask)[:, None]  # (B, 1)
        stale = (advantages < 0) & (drift > options.off_policy_sequence_mask_delta)
        surrogate = surrogate.masked_fill(stale, 0.0)
        left_out = left_out | stale
        metrics["off_policy_masked"] = stale.float().expand_as(logps)
    if options.entropy_coef:
        surrogate = surrogate + options.entropy_coef * entropies
    if least_entropy is not None:
        certain = entropies.detach() < least_entropy
        surrogate = surrogate.masked_fill(certain, 0.0)
        left_out = left_out | certain
    if ref_logps is not None:
        kl = k3(logps, ref_logps)
        if options.kl_unbiased:  # π_old drew the tokens; ρ weighs them as if π_θ had
            kl = ratio * kl
        surrogate = surrogate - options.beta * kl
        metrics["kl"] = kl
        metrics["kl_bounded"] = (ref_logps - logps > MAX_LOG_RATIO).float()
    return surrogate, metrics | {"left_out": left_out.float(), "entropy": entropies}


def clip_metrics(ratio, advantages, low, high, ceiling) -> dict[str, Tensor]:
    """Where a bound acts, (B, T): further than ε in the advantage's own direction, or beyond δ."""
    fell = (ratio < low) & (advantages < 0)
    rose = (ratio > high) & (advantages > 0)
    rose = rose | (ratio > ceiling) & (advantages < 0)
    return {
        "clip_ratio": (fell | rose).float(),
        "clip_ratio/low": fell.float(),
        "clip_ratio/high": rose.float(),
        "ratio/mean": ratio,
        "ratio/max": ratio,
        "ratio_deviation": (ratio - 1).abs(),
    }


def clip_range(options) -> tuple[float, float]:
    """Between which bounds the ratio is clipped."""
    if options.loss_type == "cispo":
        return 0.0, options.epsilon_high
    if options.loss_type == "sapo":  # its gate is in the clip's place
        return 0.0, math.inf
    high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    return 1 - options.epsilon, 1 + high


def soft_gate(ratio: Tensor, advantages: Tensor, options) -> Tensor:
    """SAPO's 4/τ σ(τ (ρ - 1)): its slope is 1 at ρ = 1, and fades on both sides."""
    tau = torch.full_like(ratio, options.tau_neg)
    tau = tau.masked_fill(advantages > 0, options.tau_pos)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1))


def aggregate(per_token: Tensor, mask: Tensor, normalizers: Normalizers, loss_type: str) -> Tensor:
    """This micro-batch's part of the mean over the step, (B, T) → a scalar: over the tokens of a
    completion, then over completions (equation 3), or of a sum over all tokens."""
    if loss_type in ("grpo", "sapo"):
        return mean_over_tokens(per_token, mask).sum() / normalizers.completions
    whole = (per_token * mask).sum()  # long completions weigh more, by their tokens
    if loss_type == "dr_grpo":
        return whole / (normalizers.completions * normalizers.longest)
    return whole / normalizers.tokens


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
    log_probabilities = logits.log_softmax(dim=-1)  # (B, T, V): what fast/head.py does without
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
