"""The family of objectives: every row, and combinations drawn at random, against formulas written as
slow loops in float64, and against TRL's own loss with the same log-probabilities."""

import argparse
import itertools
import math
import random
import statistics

import pytest
import torch
from conftest import flags_for, make_batch, read_metrics, tiny_model, train_here
from processes import run_forked
from test_grpo import trl_trainer

import grpo
import train
from data import UsageError
from rewards import RewardError
from run import flags
from run.checks import check_rewards
from run.combinations import check_objective
from sampler import Completion

N, G, T = 12, 4, 6  # completions, of a group, tokens that one may have
TEMPERATURE = 0.7

ROWS = {
    "grpo": {},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce_plus_plus": {"advantage_estimator": "reinforce_plus_plus"},
    "maxrl": {"scale_rewards": "mean"},
    "gdpo": {"scale_rewards": "gdpo"},
    "batch": {"scale_rewards": "batch"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "overlong_filter": True},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.01},
    "intellect_2": {"delta": 1.4},
    "deepseek_v3_2": {"kl_unbiased": True, "off_policy_sequence_mask_delta": 0.05},
    "high_entropy": {"top_entropy_quantile": 0.2},
    "entropy_bonus": {"entropy_coef": 0.1},
    "overlong_filter": {"overlong_filter": True},
}
CHOICES = {
    "advantage_estimator": ["grpo", "rloo", "reinforce_plus_plus"],
    "scale_rewards": [None, "group", "batch", "none", "mean", "gdpo"],
    "loss_type": ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"],
    "importance_sampling_level": ["token", "sequence"],
    "epsilon": [0.05, 0.2],
    "epsilon_high": [None, 0.28, 1.5],
    "delta": [None, 1.2, 2.0],
    "tau_pos": [1.0, 2.0],
    "tau_neg": [1.05, 0.5],
    "beta": [0.0, 0.04],
    "kl_unbiased": [False, True],
    "entropy_coef": [0.0, 0.1],
    "top_entropy_quantile": [1.0, 0.6, 0.2],
    "off_policy_sequence_mask_delta": [None, 0.0, 0.1],
    "overlong_filter": [False, True],
}


def make(changes):
    return argparse.Namespace(**vars(grpo.PAPER) | changes)


def combinations(count):
    """As many draws of a value for every flag, without those that are refused."""
    rng = random.Random(0)
    drawn = []
    while len(drawn) < count:
        changes = {name: rng.choice(values) for name, values in CHOICES.items()}
        try:
            check_objective(make(changes))
        except UsageError:
            continue
        drawn.append(changes)
    return drawn


CASES = {f"{name}-{beta}": ROWS[name] | {"beta": beta} for name in ROWS for beta in (0.0, 0.04)}
CASES |= {f"drawn-{i}": changes for i, changes in enumerate(combinations(48))}
each = pytest.mark.parametrize("case", CASES)


class Step:
    """A step of N completions of 1 to T tokens: log-probabilities that make every bound act, scores
    of two functions of which one does not always apply, and a group that teaches nothing."""

    def __init__(self):
        noise = torch.Generator().manual_seed(1)
        rng = random.Random(1)
        self.lengths = [rng.randint(1, T) for _ in range(N)]
        self.truncated = [length == T for length in self.lengths]
        self.mask = (torch.arange(T) < torch.tensor(self.lengths)[:, None]).long()
        logps = -3 * torch.rand(N, T, generator=noise, dtype=torch.float64)
        moves = 0.3 * torch.randn(2, N, T, generator=noise, dtype=torch.float64)
        # In float32's numbers, in which TRL finds the threshold.
        entropies = torch.rand(N, T, generator=noise).double()
        importance = 2 * torch.rand(N, T, generator=noise, dtype=torch.float64)
        self.logps = (logps * self.mask).requires_grad_()
        self.entropies = (entropies * self.mask).requires_grad_()
        self.old, self.ref = (logps + moves) * self.mask
        self.importance = importance * self.mask
        self.weights = [1.0, 0.5]
        self.scores = [[rng.choice([0.0, 1.0]), rng.choice([None, 0.3, 2.0])] for _ in range(N)]
        self.scores[-G:] = [[1.0, 0.3]] * G

    @property
    def rewards(self):
        rows = [[w * s for w, s in zip(self.weights, row) if s is not None] for row in self.scores]
        return [sum(row, 0.0) for row in rows]

    def gradients(self, loss):
        """By log-probabilities and by entropies."""
        inputs = [self.logps, self.entropies]
        settings = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        return torch.autograd.grad(loss, inputs, **settings)


# The formulas, written down once more ------------------------------------------------------------


def groups_of(values):
    return [values[i : i + G] for i in range(0, N, G)]


def z_score(value, values):
    return (value - statistics.mean(values)) / (statistics.stdev(values) + 1e-4)


def slow_advantages(step, options):
    estimator, scale = options.advantage_estimator, options.scale_rewards
    if scale is None:
        scale = {"grpo": "group", "rloo": "none"}.get(estimator, "batch")
    rewards, advantages = step.rewards, []
    if scale == "gdpo":
        sums = [0.0] * N
        for k, weight in enumerate(step.weights):
            for i in range(N):
                first = i // G * G
                group = [step.scores[j][k] for j in range(first, first + G)]
                known = [score for score in group if score is not None]
                if step.scores[i][k] is not None and len(known) > 1:
                    sums[i] += weight * z_score(step.scores[i][k], known)
        return [z_score(value, sums) for value in sums]
    for group in groups_of(rewards):
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            baseline = statistics.mean(others if estimator == "rloo" else group)
            advantages.append(reward - baseline)
    if scale == "none":
        return advantages
    if scale == "mean":
        means = [statistics.mean(group) for group in groups_of(rewards)]
        return [a / (means[i // G] + 1e-4) for i, a in enumerate(advantages)]
    whole = statistics.stdev(advantages if estimator == "reinforce_plus_plus" else rewards)
    spreads = [
        statistics.stdev(group) if scale == "group" else whole for group in groups_of(rewards)
    ]
    return [a / (spreads[i // G] + 1e-4) for i, a in enumerate(advantages)]


def slow_surrogate(ratio, A, logp, options):
    high = options.epsilon_high
    if options.loss_type == "cispo":
        return min(ratio.item(), high) * A * logp
    if options.loss_type == "sapo":
        tau = options.tau_pos if A > 0 else options.tau_neg
        return A * 4 / tau / (1 + torch.exp(-tau * (ratio - 1)))
    low = 1 - options.epsilon
    high = 1 + (options.epsilon if high is None else high)
    low, high, delta = torch.tensor([low, high, options.delta or math.inf], dtype=torch.float64)
    clipped, bounded = min(max(ratio, low), high), min(ratio, delta)
    return min(bounded * A, clipped * A)


def slow_loss(step, advantages, options, importance):
    rows = [i for i in range(N) if not (options.overlong_filter and step.truncated[i])]
    tokens = [(i, t) for i in rows for t in range(step.lengths[i])]
    ranked = sorted((step.entropies[i, t].item() for i, t in tokens), reverse=True)
    kept = len(tokens) - math.ceil((1 - options.top_entropy_quantile) * (len(tokens) - 1))
    total = 0.0
    for i, t in tokens:
        A, m = advantages[i], step.lengths[i]
        logp, entropy = step.logps[i, t], step.entropies[i, t]
        logs = [step.logps[i, s] - step.old[i, s] for s in range(m)]
        mean_log = sum(logs) / m
        whole = options.importance_sampling_level == "sequence"
        ratio = torch.exp(mean_log if whole else logs[t])
        value = slow_surrogate(ratio, A, logp, options)
        if importance:
            value = value * step.importance[i, t]
        delta = options.off_policy_sequence_mask_delta
        if delta is not None and A < 0 and -mean_log > delta:
            value = 0.0
        value = value + options.entropy_coef * entropy
        if entropy < ranked[kept - 1]:
            value = 0.0
        if options.beta:
            difference = step.ref[i, t] - logp
            k3 = torch.exp(difference) - difference - 1
            value = value - options.beta * k3 * (ratio if options.kl_unbiased else 1)
        divisor = {"grpo": N * m, "sapo": N * m, "dr_grpo": N * T}
        total = total - value / divisor.get(options.loss_type, len(tokens))
    return total


# Ours, in parts ----------------------------------------------------------------------------------


def our_advantages(step, options):
    rewards = torch.tensor(step.rewards, dtype=torch.float64)
    return grpo.group_advantages(rewards, G, options, step.scores, step.weights)[0]


def our_loss(step, options, split=N, importance=False):
    """What train.py does, in parts of so many completions, and one of none → loss and metrics."""
    advantages, truncated = our_advantages(step, options), torch.tensor(step.truncated)
    trained = grpo.has_gradient(advantages, options, truncated).nonzero().flatten()
    counted = ~truncated if options.overlong_filter else torch.ones(N, dtype=torch.bool)
    tokens = int(step.mask[counted].sum())
    normalizers = grpo.Normalizers(completions=N, tokens=tokens, longest=T)
    least = None
    if options.top_entropy_quantile < 1:
        entropies = step.entropies[trained][step.mask[trained].bool()].detach()
        least = grpo.entropy_threshold(entropies, options.top_entropy_quantile)
    loss, metrics = 0.0, {}
    for rows in [*trained.split(split), trained[:0]]:
        width = max([step.lengths[i] for i in rows], default=1)
        part, parts = grpo.grpo_loss(
            step.logps[rows, :width],
            step.entropies[rows, :width],
            step.old[rows, :width],
            step.ref[rows, :width] if options.beta else None,
            advantages[rows],
            step.mask[rows, :width],
            step.importance[rows, :width] if importance else None,
            least,
            options=options,
            normalizers=normalizers,
        )
        loss = loss + part
        metrics = together(metrics, parts)
    return loss, metrics


def together(metrics, parts):
    """What the parts of a step add up to, but for a maximum."""
    sums = dict(metrics)
    for name, value in parts.items():
        before = metrics.get(name, 0.0)
        if name.endswith("/max"):
            sums[name] = max(before, value.item())
        else:
            sums[name] = before + value.item()
    return sums


def assert_equal(step, ours, expected, tolerance):
    assert ours.item() == pytest.approx(expected.item(), abs=tolerance)
    for a, b in zip(step.gradients(ours), step.gradients(expected)):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# The tests ---------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("importance", [False, True])
def test_advantages_loss_and_gradient_equal_the_formulas(case, importance):
    step, options = Step(), make(CASES[case])
    expected = slow_advantages(step, options)
    assert our_advantages(step, options).tolist() == pytest.approx(expected, abs=1e-9)
    loss, _ = our_loss(step, options, importance=importance)
    assert_equal(step, loss, slow_loss(step, expected, options, importance), 1e-9)


@pytest.mark.parametrize("row", [name for name in ROWS if name != "grpo"])
def test_every_row_is_another_loss_than_plain_grpos(row):
    """So that no flag of it does nothing, and that every bound acts on this step."""
    step = Step()
    plain, _ = our_loss(step, make({}))
    whole, _ = our_loss(step, make(ROWS[row]))
    assert abs(whole - plain) > 1e-5
    for name in ROWS[row]:
        without = ROWS[row] | {name: getattr(grpo.PAPER, name)}
        if row != "cispo":  # which needs its bound
            assert abs(whole - our_loss(step, make(without))[0]) > 1e-5, name


def test_maxrl_climbs_the_sum_of_pass_at_k_over_k():
    """Its gradient, in the mean over all draws of G answers, is that of Σ pass@k / k, k from 1 to
    G - 1 (arXiv 2602.02710, theorem 2, with all answers' mean as the control variate). p, the chance
    of a right answer, has pass@k = 1 - (1 - p)^k."""
    logits = torch.tensor([0.3, -1.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    logps, is_right = logits.log_softmax(0), torch.tensor([0.0, 1.0, 0.0, 1.0]).double()
    expected = own = 0.0
    p = logps.exp() @ is_right
    for k in range(1, G):
        expected = expected + (1 - (1 - p) ** k) / k
    for draw in itertools.product(range(4), repeat=G):
        answers = torch.tensor(draw)
        advantages, _ = grpo.group_advantages(is_right[answers], G, make({"scale_rewards": "mean"}))
        chance = logps[answers].sum().exp().detach()
        own = own + chance * (advantages * logps[answers]).mean()
    own, expected = (torch.autograd.grad(f, logits, retain_graph=True)[0] for f in (own, expected))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=0)  # of the 1e-4 beside the mean


def test_what_is_divided_by_its_mean_is_not_below_0():
    options = make({"scale_rewards": "mean"})
    check_rewards(options, [0.0, 0.5])
    check_rewards(make({}), [-0.5, 0.5])
    with pytest.raises(RewardError, match="--scale_rewards mean: a completion earned -0.5, "):
        check_rewards(options, [0.0, 0.5, -0.5])
    nothing, _ = grpo.group_advantages(torch.zeros(4), 4, options)
    assert nothing.tolist() == [0.0] * 4


@each
def test_loss_gradient_and_metrics_are_the_same_for_every_split(case):
    """Into parts that cut through groups and that have other longest completions."""
    step, options = Step(), make(CASES[case])
    whole, metrics = our_loss(step, options, importance=True)
    for split in (1, 3, 5):
        loss, parts = our_loss(step, options, split, importance=True)
        assert_equal(step, loss, whole, 1e-12)
        assert parts == pytest.approx(metrics, abs=1e-7)  # shares are in float32


@pytest.fixture(scope="module")
def trainer(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    model = tiny_model()
    model.save_pretrained(folder / "model")
    model = type(model).from_pretrained(folder / "model").train()
    return trl_trainer(model, tokenizer, folder, 0.04, {"max_completion_length": T})


def trl_loss(trainer, step, advantages, options):
    """Of TRL's trainer with these settings, had its model these log-probabilities."""
    high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    trainer.loss_type, trainer.beta = options.loss_type, options.beta
    trainer.epsilon_low, trainer.epsilon_high = options.epsilon, high
    trainer.importance_sampling_level = options.importance_sampling_level
    trainer.top_entropy_quantile = options.top_entropy_quantile
    trainer.off_policy_mask_threshold = options.off_policy_sequence_mask_delta
    trainer.entropy_coef = options.entropy_coef
    trainer._entropy_bonus_enabled = options.entropy_coef > 0
    trainer.args.delta = options.delta
    trainer.args.use_bias_correction_kl = options.kl_unbiased
    trainer.args.sapo_temperature_pos = options.tau_pos
    trainer.args.sapo_temperature_neg = options.tau_neg
    fixed = (step.logps, step.entropies, None)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: fixed
    counted = [not (options.overlong_filter and cut) for cut in step.truncated]
    mask = step.mask * torch.tensor(counted)[:, None]
    ones = torch.ones(N, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones(N, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": step.old,
        "ref_per_token_logps": step.ref,
        "num_items_in_batch": mask.sum(),
    }
    return trainer._compute_loss(trainer.model, inputs)


@each
def test_loss_and_gradient_equal_trl(case, trainer):
    step, options = Step(), make(CASES[case])
    per_token = options.loss_type in ("bnpo", "dapo", "cispo")
    if options.entropy_coef and not (per_token and options.top_entropy_quantile == 1):
        pytest.skip(
            "TRL's bonus is the mean over the tokens that count, whatever the loss divides by"
        )
    expected = trl_loss(trainer, step, slow_advantages(step, options), options)
    assert_equal(step, our_loss(step, options)[0], expected, 1e-6)


@each
def test_what_is_not_trained_on_has_no_gradient_and_what_is_has_one(case):
    """On a fresh batch, where no bound acts, and for --top_entropy_quantile but of tokens that count."""
    step, options = Step(), make(CASES[case])
    advantages, truncated = our_advantages(step, options), torch.tensor(step.truncated)
    needed = grpo.has_gradient(advantages, options, truncated)
    for fresh in (False, True):
        if fresh:
            step.old = step.logps.detach()
        loss = slow_loss(step, advantages.tolist(), options, importance=False)
        moves = sum(g.abs().sum(1) for g in step.gradients(loss)) > 0
        assert not (moves & ~needed).any()
    if options.top_entropy_quantile == 1:
        assert moves.tolist() == needed.tolist()


def test_leaving_out_cut_completions_leaves_their_rewards_in_the_group():
    step, options = Step(), make({"overlong_filter": True})
    advantages = our_advantages(step, options)
    assert torch.equal(advantages, our_advantages(step, make({})))
    loss, _ = our_loss(step, options)
    moved = step.gradients(loss)[0].abs().sum(1) > 0
    assert any(step.truncated) and not moved[torch.tensor(step.truncated)].any()


def test_the_off_policy_mask_leaves_out_bad_completions_alone():
    """A group that earns all the same is neither good nor bad: the reference still holds it."""
    step = Step()
    options = make({"off_policy_sequence_mask_delta": -10.0, "beta": 0.04})  # all have moved enough
    advantages = our_advantages(step, options)
    assert advantages[-G:].tolist() == [0] * G
    _, metrics = our_loss(step, options)
    assert metrics["off_policy_masked"] == pytest.approx((advantages < 0).sum().item() / N)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_the_threshold_leaves_as_many_tokens_as_trls_quantile(share):
    entropies = torch.rand(101, generator=torch.Generator().manual_seed(0))
    kept = entropies >= grpo.entropy_threshold(entropies, share)
    assert torch.equal(kept, entropies >= torch.quantile(entropies, 1 - share))
    assert kept.sum() == 101 - math.ceil((1 - share) * 100)


def test_clip_ratios_count_what_each_bound_acts_on():
    logps = torch.tensor([[0.5, 0.1, -0.5, 2.0]]).repeat(2, 1).requires_grad_()
    nothing, mask = torch.zeros(2, 4), torch.ones(2, 4)
    tensors = (logps, nothing, nothing, None, torch.tensor([1.0, -1.0]), mask)
    expected = {
        "grpo": ({}, 1 / 8, 2 / 8),
        "high": ({"epsilon_high": 1.0}, 1 / 8, 1 / 8),
        "delta": ({"delta": 4.0}, 1 / 8, 3 / 8),
        "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, 0, 1 / 8),
        "sapo": ({"loss_type": "sapo"}, 0, 0),
    }
    for changes, low, high in expected.values():
        settings = {"options": make(changes), "normalizers": grpo.Normalizers(2, 8, 4)}
        loss, metrics = grpo.grpo_loss(*tensors, **settings)
        assert metrics["clip_ratio/low"] == low and metrics["clip_ratio/high"] == high
        assert metrics["clip_ratio"] == low + high
        deviation = (logps.detach().exp() - 1).abs().mean()
        torch.testing.assert_close(metrics["ratio_deviation"], deviation)
        (gradient,) = torch.autograd.grad(loss, logps)
        if "loss_type" not in changes:  # there the gradient of what is counted is gone
            assert metrics["clip_ratio"] == (gradient == 0).float().mean()


def test_the_entropy_bonus_has_autograds_gradient_on_the_quick_path():
    """By all parameters, beside the plain path, which keeps every logit."""
    fast = pytest.importorskip("fast")
    prompts, completions, _ = make_batch()
    plain, quick = (tiny_model(dtype=torch.float64) for _ in range(2))
    fast.prepare(quick)
    lengths = list(map(len, completions))
    normalizers = grpo.Normalizers(len(lengths), sum(lengths), max(lengths))
    settings = {"options": make({"entropy_coef": 1.0, "beta": 0.0}), "normalizers": normalizers}
    for model, function in ((plain, grpo.completion_logps), (quick, fast.completion_logps)):
        logps, entropies, mask = function(model, prompts, completions, TEMPERATURE)
        nothing = torch.zeros(len(prompts), dtype=torch.float64)
        tensors = (logps, entropies, logps.detach(), None, nothing, mask)
        loss, _ = grpo.grpo_loss(*tensors, **settings)
        loss.backward()
    for a, b in zip(plain.parameters(), quick.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0)
    assert max(p.grad.abs().max() for p in plain.parameters()) > 1e-3


@pytest.mark.parametrize("plain", [True, False])
def test_a_certain_tail_has_no_gradient_and_the_rest_has_its_own(plain):
    """Beside a pass over all tokens, of which those of the tails, found one by one, are taken off."""
    prompts, completions, _ = make_batch()
    rng = random.Random(1)
    # Certain tokens at the end, in the middle, everywhere, and nowhere.
    drawn = [[rng.choice([-0.01, -0.2, -3.0]) for _ in ids] for ids in completions]
    drawn[0], drawn[1] = [-0.01] * len(drawn[0]), [-3.0] * len(drawn[1])
    done = [Completion(ids, logps, True) for ids, logps in zip(completions, drawn)]
    micro = train.Batch([{"prompt_ids": ids} for ids in prompts], done, [], None, None, {})
    whole, cut = (tiny_model(dtype=torch.float64) for _ in range(2))
    args = {"temperature": TEMPERATURE, "plain": plain}
    if not plain:
        fast = pytest.importorskip("fast")
        fast.prepare(whole)
        fast.prepare(cut)
    args = argparse.Namespace(**args, certain_tail=1.0)
    logps, entropies, mask = train.logps_of(args, whole, micro)
    args.certain_tail = 0.95
    found, uncertainties, found_mask = train.logps_of(args, cut, micro)

    teaches, told = torch.zeros_like(mask), torch.zeros_like(logps)
    for i, row in enumerate(drawn):
        told[i, : len(row)] = torch.tensor(row)
        for t in range(len(row)):
            teaches[i, t] = t == 0 or any(math.exp(logp) < 0.95 for logp in row[t:])
    assert 0.2 < teaches.sum() / mask.sum() < 0.9
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, torch.where(teaches.bool(), logps, told), atol=1e-6, rtol=0)
    torch.testing.assert_close(uncertainties, entropies * teaches, atol=1e-6, rtol=0)
    weights = torch.rand_like(logps)
    (weights * teaches * logps).sum().backward()
    (weights * found).sum().backward()
    for a, b in zip(whole.parameters(), cut.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0)
    assert max(p.grad.abs().max() for p in whole.parameters()) > 1e-3


REFUSED = {
    "--loss_type cispo": "--epsilon_high 5 works",
    "--loss_type cispo --epsilon_high 0.28": "--epsilon_high 0.28: ",
    "--loss_type sapo --delta 4": "--delta 4: ",
    "--loss_type sapo --importance_sampling_level sequence": "--importance_sampling_level sequence: ",
    "--scale_rewards gdpo --advantage_estimator rloo": "--advantage_estimator grpo, or ",
    "--scale_rewards mean --reward_funcs repetition": "--reward_funcs repetition: falls to -1",
    "--scale_rewards mean --reward_funcs cosine": "--reward_funcs cosine: falls to -0.5",
    "--scale_rewards mean --reward_weights -1": "--reward_weights -1: ",
    "--scale_rewards mean --reward_model x": "--reward_model: ",
    "--scale_rewards mean --kl_in_reward true": "--kl_in_reward true: ",
    "--scale_rewards mean --advantage_estimator rloo": "--kl_in_reward true: ",
    "--certain_tail 0.99": "--beta 0, or --certain_tail 1, works",
    "--certain_tail 0.99 --beta 0 --entropy_coef 0.1": "--entropy_coef 0, or --certain_tail 1, works",
    "--certain_tail 0": "--certain_tail: '0': a number above 0 to 1 works",
    "--seed 1": "--reward_funcs: no reward at all",
    "--delta 1": "--delta: '1': a number above 1 works",
    "--top_entropy_quantile 0": "--top_entropy_quantile: '0': a number above 0 to 1 works",
}


@pytest.mark.parametrize("words", REFUSED)
def test_flags_without_a_meaning_together_are_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit):
        flags.answer_early(["--dataset", "x", *words.split()])
    said = capsys.readouterr().err
    assert REFUSED[words] in said and said.count("\n") == 1


def test_a_run_is_the_same_in_two_micro_batches_and_in_two_processes(
    model_folder, plugin, tmp_path
):
    """With a threshold that takes the entropies of the whole step."""
    changes = {"scale_rewards": "gdpo", "top_entropy_quantile": 0.3, "entropy_coef": 0.01}
    changes |= {"loss_type": "dapo", "num_iterations": 2, "max_steps": 4, "top_k": 20}
    changes["temperature"] = 0.2  # else entropies hardly differ
    changes |= {"kl_unbiased": "true", "delta": 4, "off_policy_sequence_mask_delta": 0.1}
    splits = {"whole": (16, 1), "micro": (8, 2), "ranks": (8, 1)}
    lines = {}
    for name, (size, accumulation) in splits.items():
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        words = flags_for(model_folder, plugin, tmp_path / name, **changes, **split)
        if name == "ranks":
            run_forked(words, 2, tmp_path / "logs")
        else:
            train_here(*words)
        lines[name] = read_metrics(tmp_path / name)
    names = ["loss", "grad_norm", "reward", "kl", "clip_ratio/low", "clip_ratio/high"]
    for name in ("micro", "ranks"):
        for one, two in zip(lines["whole"], lines[name], strict=True):
            for metric in [*names, "ratio_deviation", "off_policy_masked"]:
                expected = pytest.approx(one[metric], rel=1e-3, abs=1e-5)
                assert two[metric] == expected, (name, metric)
    first, second, *_ = lines["whole"]
    assert second["ratio_deviation"] > first["ratio_deviation"] == 0


def test_a_run_whose_completions_are_all_cut_trains_on_none(model_folder, plugin, tmp_path):
    changes = {"overlong_filter": "true", "loss_type": "dapo", "top_entropy_quantile": 0.5}
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes, max_steps=1))
    (line,) = read_metrics(tmp_path)
    assert line["clipped_completions"] == 1 and line["loss"] == line["grad_norm"] == 0
