"""The objective against a slow version that follows the paper line by line, against TRL, and against
closed forms; log-probabilities against one sequence at a time. tests/test_family.py has the family."""

import itertools
import math
import types
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ARCHITECTURES, make_batch, tiny_model
from torch.nn.utils.rnn import pad_sequence

import grpo

TEMPERATURE, EPSILON, LONGEST, G = 0.7, 0.2, 9, 4


# Advantages, written down once more: of one group's rewards, (G,) → (G,).


def z_scores(r):
    return (r - r.mean()) / (r.std() + 1e-4)


def centred(r):
    return r - r.mean()


def leave_one_out(r):
    """Each reward less the mean of the others'."""
    return torch.stack([r[i] - torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(len(r))])


# name → the advantage, TRL's settings, our flags. Entropy bonus: TRL takes the mean over all tokens,
# whatever the loss divides by, so its row is compared with slow loops.
PEERS = {
    "grpo": (z_scores, {"loss_type": "grpo"}, {}),
    "dr_grpo": (
        centred,
        {"loss_type": "dr_grpo"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "rloo": (leave_one_out, {"loss_type": "grpo"}, {"advantage_estimator": "rloo"}),
    "gspo": (
        z_scores,
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence"},
    ),
    "cispo": (z_scores, {"loss_type": "cispo", "epsilon_high": 1.3}, None),
    "sapo": (z_scores, {"loss_type": "sapo"}, None),
    "bnpo": (z_scores, {"loss_type": "bnpo"}, None),
    "dapo": (z_scores, {"loss_type": "dapo", "epsilon_high": 0.28}, None),
    "two_sided": (z_scores, {"loss_type": "grpo", "delta": 1.3}, None),
    "unbiased_kl": (
        z_scores,
        {"loss_type": "grpo", "use_bias_correction_kl": True},
        {"kl_unbiased": True},
    ),
    "off_policy": (
        z_scores,
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.02},
        {"off_policy_sequence_mask_delta": 0.02},
    ),
    "entropy_bonus": (z_scores, None, {"entropy_coef": 0.1}),
}


def options_of(peer, beta):
    """What the loss reads: the defaults, and what the tests set. Flags that are None are TRL's."""
    _, settings, own = PEERS[peer]
    own = settings if own is None else own
    return SimpleNamespace(**vars(grpo.PAPER) | {"epsilon": EPSILON, "beta": beta} | own)


def slow_forward(model, prompt, completion):
    """One sequence, one forward pass, no padding, no cache → log-probabilities and entropies."""
    logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
    logps, entropies = [], []
    for t, token in enumerate(completion):
        p = logits[len(prompt) - 1 + t].softmax(0)
        logps.append(p[token].log())
        entropies.append(torch.distributions.Categorical(probs=p).entropy())
    return torch.stack(logps), torch.stack(entropies)


def slow_loss(model, prompts, completions, advantages, old, ref, beta, entropy_coef=0.0):
    """Equations 3 and 4 of DeepSeekMath as two loops."""
    loss = 0.0
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        logps, entropies = slow_forward(model, prompt, completion)
        value = 0.0
        for t in range(len(completion)):
            ratio = torch.exp(logps[t] - (logps[t].detach() if old is None else old[i][t]))
            clipped = min(max(ratio, torch.tensor(1 - EPSILON)), torch.tensor(1 + EPSILON))
            term = min(ratio * advantages[i], clipped * advantages[i])
            if beta:
                term = term - beta * (torch.exp(ref[i][t] - logps[t]) - (ref[i][t] - logps[t]) - 1)
            value = value + term + entropy_coef * entropies[t]
        loss = loss - value / len(completion) / len(prompts)
    return loss


def our_loss(model, prompts, completions, rewards, old, ref, options, micro=5):
    """What train.py does, in micro-batches that cut through groups: what has no gradient is left
    out. Calls backward; returns the sum of the parts."""
    advantages, _ = grpo.group_advantages(rewards, G, options)
    trained = grpo.has_gradient(advantages, options).nonzero()[:, 0].tolist()
    normalizers = grpo.Normalizers(len(prompts), sum(map(len, completions)), LONGEST)
    total = 0.0
    for start in range(0, len(trained), micro):
        part = trained[start : start + micro]
        rows = [prompts[i] for i in part], [completions[i] for i in part]
        logps, entropies, mask = grpo.completion_logps(model, *rows, TEMPERATURE)
        own_old = logps.detach()
        if old is not None:
            own_old = pad_sequence([old[i] for i in part], batch_first=True)
        own_ref = None
        if options.beta:
            own_ref = pad_sequence([ref[i] for i in part], batch_first=True)
        loss, _ = grpo.grpo_loss(
            logps,
            entropies,
            own_old,
            own_ref,
            advantages[part],
            mask,
            options=options,
            normalizers=normalizers,
        )
        loss.backward()
        total += loss.item()
    return total


def assert_gradients_equal(model, twin, tolerance):
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            a.grad, b.grad, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-3


# The loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loss_and_gradient_equal_the_paper_in_float64(beta, iterations):
    prompts, completions, rewards = make_batch()
    model, twin, reference = (tiny_model(dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)  # so that there is a KL
        ref = [slow_forward(reference, p, c)[0] for p, c in zip(prompts, completions)]
        old = [slow_forward(model, p, c)[0] for p, c in zip(prompts, completions)]
    advantages = torch.cat([z_scores(group) for group in rewards.split(G)])
    ratios_moved = False
    for iteration in range(iterations):
        model.zero_grad()
        twin.zero_grad()
        stale = None if iteration == 0 else old
        options = options_of("grpo", beta)
        loss = our_loss(model, prompts, completions, rewards, stale, ref, options)
        expected = slow_loss(twin, prompts, completions, advantages, stale, ref, beta)
        expected.backward()
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        assert_gradients_equal(model, twin, 1e-6)
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters()):
                a -= 0.1 * a.grad
                b -= 0.1 * b.grad
            new = [slow_forward(model, p, c)[0] for p, c in zip(prompts, completions)]
        ratios_moved |= max((n - o).abs().max() for n, o in zip(new, old)) > 0.3
    assert ratios_moved  # far enough for the clip to matter


@pytest.mark.parametrize("beta, iteration", [(0.0, 1), (0.0, 3), (0.04, 1), (0.04, 3)])
@pytest.mark.parametrize("peer", PEERS)
def test_advantages_loss_and_gradient_equal_the_peer(peer, beta, iteration, request, tmp_path):
    """TRL's loss, or slow loops, with advantages of their own, and with TRL's own pass."""
    advantage, settings, _ = PEERS[peer]
    options = options_of(peer, beta)
    prompts, completions, rewards = make_batch()
    rewards = rewards.float()
    rewards[-G:] = 0.5  # a group that teaches nothing
    expected_advantages = torch.cat([advantage(group) for group in rewards.split(G)])
    advantages, _ = grpo.group_advantages(rewards, G, options)
    torch.testing.assert_close(advantages, expected_advantages)

    model = tiny_model()
    model.save_pretrained(tmp_path / "model")  # TRL reads its reference from where the policy came
    twin = type(model).from_pretrained(tmp_path / "model").train()
    with torch.no_grad():
        logps, entropies, mask = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    noise = torch.Generator().manual_seed(0)
    noisy = [logps + 0.3 * torch.randn(logps.shape, generator=noise) for _ in range(2)]
    old, ref = ([row[: len(c)] for row, c in zip(rows, completions)] for rows in noisy)
    if iteration == 1:
        old = None

    if settings is None:
        arguments = (expected_advantages, old, ref, beta, options.entropy_coef)
        expected = slow_loss(twin, prompts, completions, *arguments)
    else:
        trainer = trl_trainer(twin, request.getfixturevalue("tokenizer"), tmp_path, beta, settings)
        inputs = {
            "advantages": expected_advantages,
            "num_items_in_batch": mask.sum(),
            "completion_mask": mask,
            "completion_ids": grpo.pad(completions, "right", "cpu")[0],
        }
        inputs["prompt_ids"], inputs["prompt_mask"] = grpo.pad(prompts, "left", "cpu")
        if old is not None:
            inputs["old_per_token_logps"] = pad_sequence(old, batch_first=True)
        if beta:
            inputs["ref_per_token_logps"] = pad_sequence(ref, batch_first=True)
        expected = trainer._compute_loss(twin, inputs)
        entropy = ((entropies * mask).sum() / mask.sum()).item()
        assert entropy == pytest.approx(trainer._metrics["train"]["entropy"][-1], abs=1e-4)
    expected.backward()

    loss = our_loss(model, prompts, completions, rewards, old, ref, options, micro=3)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_gradients_equal(model, twin, 1e-5)


def trl_trainer(model, tokenizer, folder, beta, settings):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    # Where vLLM is installed TRL would import it, which takes as long as all tests here.
    with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
        trainer_class = trl.GRPOTrainer

    arguments = {
        "beta": beta,
        "epsilon": EPSILON,
        "temperature": TEMPERATURE,
        "num_generations": G,
        "per_device_train_batch_size": 2 * G,
        "max_completion_length": LONGEST,
        "use_bias_correction_kl": False,  # DeepSeek-V3.2's, not the paper's
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
    }
    trainer = trainer_class(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(output_dir=str(folder), **arguments | settings),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def random_batch(N=6, T=5):
    """Arguments of `grpo_loss` in float64, with ratios that are clipped and two advantages of 0."""
    noise = torch.Generator().manual_seed(0)
    logps, old, ref = torch.randn(3, N, T, generator=noise, dtype=torch.float64)
    entropies, importance = torch.rand(2, N, T, generator=noise, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5, 0.0, -2.0], dtype=torch.float64)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=noise)).long()
    tensors = (logps, entropies, old, ref, advantages, mask, importance)
    return [x * mask if x.shape == mask.shape else x for x in tensors]


def loss_of(tensors, rows=None, *, beta=0.04, with_ref=True):
    """grpo_loss of some rows of a batch, as a part of the whole batch's."""
    *_, mask, _ = tensors
    normalizers = grpo.Normalizers(len(mask), int(mask.sum()), mask.shape[1])
    part = [x if rows is None else x[rows] for x in tensors]
    if not with_ref:
        part[3] = None
    return grpo.grpo_loss(*part, options=options_of("grpo", beta), normalizers=normalizers)


def test_the_parts_of_any_split_add_up_to_the_loss_and_the_metrics():
    tensors = random_batch()
    loss, metrics = loss_of(tensors)
    for split in ([[0], [1, 2, 3, 4, 5]], [[4, 2], [0, 5], [3, 1]], [[i] for i in range(6)]):
        parts = [loss_of(tensors, rows) for rows in split]
        torch.testing.assert_close(sum(part for part, _ in parts), loss)
        for name, value in metrics.items():
            together = max if name.endswith("/max") else sum
            torch.testing.assert_close(together(part[name] for _, part in parts), value)
    assert metrics["loss"] == loss and not metrics["loss"].requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_has_gradient_names_the_completions_that_move_the_policy(beta):
    tensors = random_batch()
    tensors[2] = tensors[0].clone()  # a fresh batch, so that no clip takes a gradient away
    for i in (0, 1):
        tensors[i].requires_grad_()
    loss, _ = loss_of(tensors, beta=beta, with_ref=beta > 0)
    inputs = [tensors[0], tensors[1]]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    moves = sum(g.abs().sum(1) for g in gradients) > 0
    advantages = tensors[4]
    assert grpo.has_gradient(advantages, options_of("grpo", beta)).tolist() == moves.tolist()


def test_any_metric_of_the_objective_is_returned_as_a_mean(monkeypatch):
    """Over a completion's tokens, then over completions, and without a gradient."""
    tensors = random_batch()
    tensors[0].requires_grad_()
    objective = grpo.objective

    def with_another(*arguments):
        surrogate, metrics = objective(*arguments)
        return surrogate, metrics | {"logp": arguments[0]}

    monkeypatch.setattr(grpo, "objective", with_another)
    _, metrics = loss_of(tensors)
    rows = [row[m.bool()] for row, m in zip(tensors[0], tensors[5])]
    expected = sum(row.mean() for row in rows) / len(rows)
    torch.testing.assert_close(metrics["logp"], expected.detach())
    assert not any(value.requires_grad for value in metrics.values())


def test_the_loss_weights_the_surrogate_and_not_the_kl():
    new, entropies, old, ref, advantages, mask, importance = random_batch()
    mask = torch.ones_like(mask)
    tensors = (new, entropies, old, ref, advantages, mask, importance)
    total = 0.0
    for i, t in itertools.product(range(6), range(5)):  # slow and obvious
        ratio = (new[i, t] - old[i, t]).exp()
        surrogate = min(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
        total -= (surrogate * importance[i, t] - 0.04 * grpo.k3(new[i, t], ref[i, t])) / 30
    assert loss_of(tensors)[0].item() == pytest.approx(total.item(), abs=1e-9)


def test_the_ratio_is_exactly_one_on_a_fresh_batch():
    """So the loss is minus the mean advantage, which is 0, while its gradient is not."""
    logps, mask = torch.randn(4, 5, requires_grad=True), torch.ones(4, 5)
    advantages, _ = grpo.group_advantages(torch.tensor([0.0, 1.0, 1.0, 3.0]), 4)
    tensors = (logps, torch.zeros(4, 5), logps.detach(), None, advantages, mask, None)
    settings = {"options": options_of("grpo", 0.0), "normalizers": grpo.Normalizers(4, 20, 5)}
    loss, metrics = grpo.grpo_loss(*tensors, **settings)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and metrics["clip_ratio"] == 0 and "kl" not in metrics
    torch.testing.assert_close(logps.grad, (-advantages[:, None] / 20).expand(4, 5))


def test_clip_ratio_counts_the_tokens_whose_gradient_the_clip_takes_away():
    logps = torch.tensor([[0.5, 0.5, -0.5, -0.5]]).repeat(2, 1).requires_grad_()
    nothing, mask = torch.zeros(2, 4), torch.ones(2, 4)
    tensors = (logps, nothing, nothing, None, torch.tensor([1.0, -1.0]), mask, None)
    settings = {"options": options_of("grpo", 0.0), "normalizers": grpo.Normalizers(2, 8, 4)}
    loss, metrics = grpo.grpo_loss(*tensors, **settings)
    loss.backward()
    assert metrics["clip_ratio"].item() == (logps.grad == 0).float().mean().item() == 0.5


def test_advantages_are_the_group_z_scores():
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 0.1, 0.1, 0.1, 0.1])
    advantages, std = grpo.group_advantages(rewards, 4)
    s = (2 / 3) ** 0.5
    torch.testing.assert_close(advantages, torch.tensor([-1, 0, 0, 1, 0, 0, 0, 0]) / (s + 1e-4))
    assert std.tolist() == pytest.approx([s, 0.0]) and std[1] == 0


def test_k3_is_zero_at_equality_positive_elsewhere_and_unbiased():
    p, q = torch.randn(2, 11, dtype=torch.float64).log_softmax(-1)
    assert grpo.k3(p, p).abs().max() == 0
    assert (grpo.k3(p, q) > 0).all()
    expected = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * grpo.k3(p, q)).sum(), expected)


@pytest.mark.parametrize("gap", [11.0, 100.0, 1e4])
def test_an_absurd_token_leaves_the_loss_finite_counts_once_and_pulls_no_more(gap):
    """The reference finds one of four tokens e^gap times as likely."""
    logps = torch.full((2, 2), -1.0)
    logps[0, 0] -= gap
    logps.requires_grad_()
    ref = torch.full((2, 2), -1.0)
    ref[1, 1] = -1.5
    batch = (logps, torch.zeros(2, 2), logps.detach(), ref, torch.zeros(2), torch.ones(2, 2))
    sizes = grpo.Normalizers(completions=2, tokens=4, longest=2)
    loss, metrics = grpo.grpo_loss(*batch, options=grpo.Options(beta=0.04), normalizers=sizes)
    loss.backward()
    assert metrics["kl_bounded"] == 0.25
    assert torch.isfinite(loss) and loss < 0.04 * math.exp(10)
    assert logps.grad[0, 0] == 0 and logps.grad[1, 1] != 0


def test_importance_weights_turn_samples_of_one_policy_into_means_under_another():
    torch.manual_seed(0)
    old, engine = torch.randn(2, 6).log_softmax(-1)
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True)[None]  # (1, tokens)
    mask = torch.ones_like(drawn)
    options = correction("token_truncate", 1e9)
    weights = grpo.importance_weights(old[drawn], engine[drawn], mask, options)
    value = torch.randn(6)
    expected = (old.exp() * value).sum().item()
    assert (weights * value[drawn]).mean() == pytest.approx(expected, abs=0.02)


def correction(mode, threshold):
    return types.SimpleNamespace(
        rollout_importance_sampling_mode=mode, rollout_importance_sampling_threshold=threshold
    )


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_importance_weights_equal_their_definition(mode):
    """One a token, or the geometric mean of a completion's; bounded, or 0, where they are above 1.1."""
    noise = torch.Generator().manual_seed(0)
    old, engine = torch.randn(2, 5, 7, generator=noise, dtype=torch.float64)
    lengths = [7, 1, 3, 5, 2]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    old, engine = old * mask, engine * mask
    weights = grpo.importance_weights(old, engine, mask, correction(mode, 1.1))
    bounded = 0
    for i, length in enumerate(lengths):
        ratios = [math.exp(old[i, t] - engine[i, t]) for t in range(length)]
        if mode.startswith("sequence"):
            ratios = [math.prod(ratios) ** (1 / length)] * length
        expected = [min(w, 1.1) if "truncate" in mode else w * (w <= 1.1) for w in ratios]
        assert weights[i, :length].tolist() == pytest.approx(expected, abs=1e-12)
        bounded += sum(w > 1.1 for w in ratios)
    assert bounded > 2
    same = grpo.importance_weights(old, old, mask, correction(mode, 1.1))
    assert torch.equal(same, torch.ones_like(same))


# Log-probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_and_entropies_equal_one_sequence_at_a_time_on_every_architecture(architecture):
    """Values, zeros behind them, and the gradient of both by all parameters."""
    prompts, completions, _ = make_batch(groups=2, num_generations=2, longest=12)
    model, twin = (tiny_model(architecture, dtype=torch.float64) for _ in range(2))
    results = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    rows = [slow_forward(twin, p, c) for p, c in zip(prompts, completions)]
    slopes = torch.randn(2, *results[0].shape, generator=torch.Generator().manual_seed(0))
    sums = [0.0, 0.0]
    for which, own in enumerate(zip(*rows)):
        expected = pad_sequence(own, batch_first=True)
        torch.testing.assert_close(results[which], expected, atol=1e-5, rtol=0)
        sums[0] += (results[which] * slopes[which]).sum()
        sums[1] += (expected * slopes[which]).sum()
    ones = [[1] * len(c) + [0] * (results[0].shape[1] - len(c)) for c in completions]
    assert results[2].tolist() == ones and not results[0][results[2] == 0].any()
    for total in sums:
        total.backward()
    for a, b in zip(model.parameters(), twin.parameters()):  # some norms are float32 whatever else
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_a_model_that_gives_every_logit_serves_as_well():
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            arguments = {"attention_mask": attention_mask, "position_ids": position_ids}
            return self.model(input_ids, **arguments, use_cache=use_cache)

    prompts, completions, _ = make_batch()
    model = tiny_model()
    expected = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    results = grpo.completion_logps(Wrapped(model), prompts, completions, TEMPERATURE)
    for own, other in zip(results, expected):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name, out", [("bfloat16", "float32"), ("float64", "float64")])
def test_logps_are_in_float32_or_in_the_models_own_if_that_is_more(name, out):
    model = tiny_model(dtype=getattr(torch, name), num_hidden_layers=1)
    logps, entropies, _ = grpo.completion_logps(model, [[5, 6]], [[7, 8]], 1.0)
    assert logps.dtype == entropies.dtype == getattr(torch, out)
