"""How far the policy that samples is from the one that is trained, in metrics.

A sampler that lags behind, draws from another distribution or rounds otherwise shows here.
"""

import argparse

import torch
from torch import Tensor

import grpo


def metrics(args: argparse.Namespace, world, micro_batches: list) -> dict[str, float]:
    """Over all ranks' tokens of an optimizer step; {} where there are none.

    sampler/logp_diff, …_max   |log π_old - log π_sampler|, its mean and maximum
    sampler/kl, …/k3           estimates of KL(π_sampler ‖ π_old) by the mean of the logarithm, of k3
    importance/…               of the weights that correct for it: mean, max, the share that was
                               bounded, and their effective sample size, (Σw)² / Σw² by the tokens
    """
    sums, maxima = torch.zeros(7, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for micro in micro_batches:
        if micro.completions:
            more, most = of_tokens(args, *log_probabilities(micro))
            sums, maxima = sums + more, torch.maximum(maxima, most)
    parts = world.gather([(sums, maxima)])
    count, *totals = torch.stack([part for part, _ in parts]).sum(0).tolist()
    if not count:
        return {}
    difference, kl, k3, weights, squares, bounded = totals
    largest, heaviest = torch.stack([part for _, part in parts]).amax(0).tolist()
    told = {"sampler/logp_diff": difference / count, "sampler/logp_diff_max": largest}
    told |= {"sampler/kl": kl / count, "sampler/k3": k3 / count}
    if args.rollout_importance_sampling_mode != "off":
        told |= {"importance/mean": weights / count, "importance/max": heaviest}
        told |= {"importance/bounded": bounded / count}
        told["importance/ess"] = weights**2 / squares / count if squares else 0.0
    return told


def log_probabilities(micro) -> tuple[Tensor, Tensor, Tensor]:
    """Of the trainer, of the sampler, and the mask, (B, T) each."""
    ours = micro.old_logps.double().cpu()
    theirs, mask = torch.zeros_like(ours), torch.zeros_like(ours)
    for row, completion in enumerate(micro.completions):
        length = len(completion.ids)
        theirs[row, :length] = torch.tensor(completion.logps)
        mask[row, :length] = 1
    return ours, theirs, mask


def of_tokens(args, ours: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sums, the count of tokens first, and the maxima of a micro-batch."""
    own = mask.bool()
    log_ratio = (ours - theirs)[own]  # (tokens,)
    k3 = grpo.k3(theirs, ours)[own]
    weights, bounded = torch.ones_like(log_ratio), torch.zeros_like(log_ratio)
    if args.rollout_importance_sampling_mode != "off":
        weights = grpo.importance_weights(ours, theirs, mask, args)[own]
        limit = args.rollout_importance_sampling_threshold
        bounded = ((weights == 0) | (weights >= limit)).double()
    columns = (torch.ones_like(weights), log_ratio.abs(), -log_ratio, k3)
    columns += (weights, weights**2, bounded)
    sums = torch.stack([column.sum() for column in columns])
    return sums, torch.stack([log_ratio.abs().max(), weights.max()])
