"""The objective against a slow version that follows the paper line by line, against TRL, and against closed forms."""

import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, tiny_model

import grpo
import lora

TEMPERATURE, EPSILON = 0.7, 0.2


def make_batch(groups=3, num_generations=4, longest=9, seed=0):
    """Prompts of different lengths that begin alike, ragged completions; some end with end-of-sequence, some are cut."""
    rng = random.Random(seed)
    beginning = [5, 6, 7, 8]
    prompts, completions = [], []
    for _ in range(groups):
        prompt = beginning + [rng.randrange(3, 97) for _ in range(rng.randrange(1, 7))]
        for _ in range(num_generations):
            prompts.append(prompt)
            length = rng.randrange(1, longest + 1)
            completions.append([rng.randrange(3, 97) for _ in range(length)])
            if rng.random() < 0.5:
                completions[-1][-1] = 2
    rewards = torch.tensor([rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in prompts], dtype=torch.float64)
    return prompts, completions, rewards


def slow_logps(model, prompt, completion):
    """One sequence, one forward pass, no padding, no cache."""
    logits = model(torch.tensor([prompt + completion])).logits[0] / TEMPERATURE
    return torch.stack([logits[len(prompt) - 1 + t].log_softmax(0)[token] for t, token in enumerate(completion)])


def slow_loss(model, prompts, completions, rewards, G, old, ref, beta):
    """Equations 3 and 4 of DeepSeekMath as two loops."""
    loss = 0.0
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        group = rewards[i // G * G : i // G * G + G]
        mean = sum(group) / G
        std = (sum((r - mean) ** 2 for r in group) / (G - 1)) ** 0.5
        advantage = (rewards[i] - mean) / (std + 1e-4)
        logps = slow_logps(model, prompt, completion)
        value = 0.0
        for t in range(len(completion)):
            ratio = torch.exp(logps[t] - (logps[t].detach() if old is None else old[i][t]))
            clipped = min(max(ratio, torch.tensor(1 - EPSILON)), torch.tensor(1 + EPSILON))
            term = min(ratio * advantage, clipped * advantage)
            if beta:
                term = term - beta * (torch.exp(ref[i][t] - logps[t]) - (ref[i][t] - logps[t]) - 1)
            value = value + term
        loss = loss - value / len(completion) / len(prompts)
    return loss


def fast_loss(model, prompts, completions, rewards, G, old, ref, beta, micro=5):
    """What train.py does, in micro-batches that cut through groups. Calls backward; returns the sum of the parts."""
    advantages, _ = grpo.group_advantages(rewards, G)
    total = 0.0
    for i in range(0, len(prompts), micro):
        part = slice(i, i + micro)
        logps, _, mask = grpo.completion_logps(model, prompts[part], completions[part], TEMPERATURE)

        def padded(rows, width=logps.shape[1]):
            return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

        loss, _ = grpo.grpo_loss(
            logps,
            logps.detach() if old is None else padded(old[part]),
            padded(ref[part]) if beta else None,
            advantages[part],
            mask,
            epsilon=EPSILON,
            beta=beta,
            num_completions=len(prompts),
        )
        loss.backward()
        total += loss.item()
    return total


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("iterations", [1, 3])
def test_loss_and_gradient_equal_the_paper_in_float64(beta, iterations):
    prompts, completions, rewards = make_batch()
    model, twin, reference = (tiny_model(dtype=torch.float64) for _ in range(3))
    grpo.prepare(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.mul_(1.05)  # so that there is a KL
        ref = [slow_logps(reference, p, c) for p, c in zip(prompts, completions)]
        old = [slow_logps(model, p, c) for p, c in zip(prompts, completions)]
    ratios_moved = False
    for iteration in range(iterations):
        model.zero_grad()
        twin.zero_grad()
        stale = None if iteration == 0 else old
        loss = fast_loss(model, prompts, completions, rewards, 4, stale, ref, beta)
        expected = slow_loss(twin, prompts, completions, rewards, 4, stale, ref, beta)
        expected.backward()
        assert loss == pytest.approx(expected.item(), abs=1e-6)
        for (name, a), b in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        assert max(p.grad.abs().max() for p in model.parameters()) > 1e-3
        with torch.no_grad():
            for a, b in zip(model.parameters(), twin.parameters()):
                a -= 0.1 * a.grad
                b -= 0.1 * b.grad
            new = [slow_logps(model, p, c) for p, c in zip(prompts, completions)]
        ratios_moved |= max((n - o).abs().max() for n, o in zip(new, old)) > 0.3
    assert ratios_moved  # far enough for the clip to matter


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("iteration", [1, 3])
def test_loss_and_gradient_equal_trl(beta, iteration, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    prompts, completions, rewards = make_batch(groups=2)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")  # TRL reads its reference model from where the policy came
    twin = type(model).from_pretrained(tmp_path / "model")
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path),
        loss_type="grpo",
        beta=beta,
        epsilon=EPSILON,
        temperature=TEMPERATURE,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=9,
        num_iterations=iteration,
        use_bias_correction_kl=False,  # DeepSeek-V3.2's, not the paper's
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = trl.GRPOTrainer(
        model=twin,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    advantages, _ = grpo.group_advantages(rewards.float(), 4)
    prompt_ids, prompt_mask = grpo.pad(prompts, "left", "cpu")
    completion_ids, completion_mask = grpo.pad(completions, "right", "cpu")
    with torch.no_grad():
        logps, entropies, _ = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    noise = torch.Generator().manual_seed(0)
    old = logps + 0.3 * torch.randn(logps.shape, generator=noise) if iteration > 1 else None
    ref = logps + 0.3 * torch.randn(logps.shape, generator=noise) if beta else None
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantages,
        "ref_per_token_logps": ref,
    }
    if old is not None:
        inputs["old_per_token_logps"] = old
    twin.train()
    expected = trainer._compute_loss(twin, inputs)
    expected.backward()

    rows = [logps.new_tensor(row) for row in logps.tolist()]
    old_rows = [o[: len(c)] for o, c in zip(old, completions)] if old is not None else None
    ref_rows = [r[: len(c)] for r, c in zip(ref, completions)] if beta else rows
    loss = fast_loss(model, prompts, completions, rewards.float(), 4, old_rows, ref_rows, beta, micro=8)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0)
    entropy = ((entropies * completion_mask).sum() / completion_mask.sum()).item()
    assert entropy == pytest.approx(trainer._metrics["train"]["entropy"][-1], abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_equal_a_plain_forward_pass_on_every_architecture(architecture):
    prompts, completions, _ = make_batch()
    model = tiny_model(architecture)
    expected = [slow_logps(model, p, c) for p, c in zip(prompts, completions)]
    grpo.prepare(model)
    logps, entropies, mask = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
    for row, blanks, e in zip(logps, mask, expected):
        torch.testing.assert_close(row[: len(e)], e, atol=1e-5, rtol=0)
        assert blanks.tolist() == [1] * len(e) + [0] * (len(row) - len(e))
        assert not row[len(e) :].any()
    assert (entropies[mask.bool()] > 0).all() and not entropies.requires_grad


def test_a_head_that_does_more_is_found():
    assert all(grpo.head_is_plain(tiny_model(architecture)) for architecture in ARCHITECTURES)
    model = tiny_model("llama")
    model.config.logit_scale = 0.5  # a Llama's forward pass knows nothing of it
    assert not grpo.head_is_plain(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_packed_pass_equals_the_plain_one(architecture, checkpointing):
    """Gradients, with tables and pieces so small that every path is taken."""
    prompts, completions, _ = make_batch(longest=30)
    gradients = []
    for packed in (False, True):
        model = tiny_model(architecture, dtype=torch.float64).train()
        if packed:
            grpo.prepare(model)
            assert model.config._attn_implementation == ("sdpa" if architecture == "deepseek3" else "grouped")
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo, "QUERIES_AT_ONCE", 8)
            patch.setattr(grpo, "MAX_SCORES", 2000)
            logps, _, mask = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
            (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps) * mask).sum().backward()
        gradients.append([logps.detach(), *(p.grad for p in model.parameters())])
    for plain, ours in zip(*gradients):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)  # norms are in float32 whatever the model


def test_a_pack_holds_every_token_once_and_no_padding():
    prompts, completions, _ = make_batch()
    pack = grpo.Pack(prompts, completions, tiny_model("llama").config, "cpu")
    rests = sum(len(prompt) - 4 for prompt in {tuple(prompt) for prompt in prompts})
    assert pack.shared == 4 and pack.ids.shape == (1, 4 + rests + sum(len(c) - 1 for c in completions))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_packed_pass_equals_the_plain_one_within_bfloat16_rounding(kind, embedded_model, monkeypatch):
    """Both differ from float32 by as much; the head is applied to one token at a time."""
    from transformers import AutoModelForCausalLM

    def plain_forward(self, x):
        low_rank = F.linear(x, self.lora_A.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(low_rank, self.lora_B.to(x.dtype))

    prompts, completions, _ = make_batch(groups=1, longest=10)
    prompts, completions = ([[i + 1000 for i in row] for row in rows] for rows in (prompts, completions))
    gradients = {}
    for name, dtype in (("exact", torch.float32), ("plain", torch.bfloat16), ("packed", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=dtype)
        if kind == "lora":
            torch.manual_seed(0)
            for _, layer in lora.layers(lora.inject(model, 16, 32)):
                torch.nn.init.normal_(layer.lora_B, std=0.01)
        with monkeypatch.context() as patch:
            if name == "packed":
                grpo.prepare(model)
                assert model.config._attn_implementation == "grouped"
                patch.setattr(grpo, "LOGITS_AT_ONCE", model.config.vocab_size)
            else:
                patch.setattr(lora.LoRALinear, "forward", plain_forward)
            logps, _, _ = grpo.completion_logps(model, prompts, completions, TEMPERATURE)
            (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        parts = {"all": "", "head": "embed_tokens"} if kind == "full" else {"A": "lora_A", "B": "lora_B"}
        gradients[name] = {
            part: torch.cat(
                [p.grad.float().flatten() for n, p in model.named_parameters() if p.requires_grad and key in n]
            )
            for part, key in parts.items()
        }
    for part, exact in gradients["exact"].items():
        plain, packed = ((gradients[name][part] - exact).norm() / exact.norm() for name in ("plain", "packed"))
        assert packed < 1.3 * plain < 0.3, part


def test_a_model_that_drops_attention_out_takes_the_plain_pass():
    model = tiny_model("llama", attention_dropout=0.5)
    grpo.prepare(model)
    prompts, completions, _ = make_batch()
    a, b = (grpo.completion_logps(model.train(), prompts, completions, TEMPERATURE)[0] for _ in range(2))
    assert not torch.equal(a, b)


def test_norms_and_gates_are_replaced_where_they_are_the_models_own():
    def replaced(model) -> list[str]:
        return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if "forward" in vars(m)})

    model = tiny_model("llama")
    grpo.prepare(model)
    assert replaced(model) == ["input_layernorm", "mlp", "norm", "post_attention_layernorm"]

    model = tiny_model("llama")
    kind = type(model.model.norm)
    doubled = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    for layer in model.model.layers:
        layer.input_layernorm.__class__ = doubled  # looks like any other
        layer.mlp.forward = partial(lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x))), layer.mlp)
    prompts, completions, _ = make_batch()
    expected = grpo.completion_logps(model, prompts, completions, TEMPERATURE)[0]
    grpo.prepare(model)
    torch.testing.assert_close(grpo.completion_logps(model, prompts, completions, TEMPERATURE)[0], expected)
    assert replaced(model) == ["mlp"]


def test_what_is_made_again_is_made_once_for_all_readers_and_has_the_same_gradients():
    x, *weights = (torch.randn(6, 6, 6, dtype=torch.float64).requires_grad_() for _ in range(4))
    made, gradients = [], []

    def square(x):
        made.append(x)
        return x * x

    for again in (False, True):
        with grpo.remaking():
            y = grpo.remade(square, x) if again else square(x)
            kept = [y @ weights[0], y.view(36, 6) @ weights[1][0], y.mT @ weights[2]]  # the last is no view as it lies
            z = (grpo.remade(torch.square, x.mT) if again else x.mT.square()).mT  # nor was this one when it was made
            kept.append(z * weights[0])
        del y, z
        made.clear()
        gradients.append(torch.autograd.grad(sum(part.sum() for part in kept), [x, *weights]))
    assert len(made) == 1 and not grpo.Remade.known
    for plain, own in zip(*gradients):
        torch.testing.assert_close(own, plain)


def test_what_is_changed_in_place_is_not_made_again_and_what_it_is_made_of_must_not_change():
    x, weight = (torch.randn(6, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    with grpo.remaking():
        y = grpo.remade(torch.mul, x, 2.0)
        y += 1.0
        (y @ weight).sum().backward()
        torch.testing.assert_close(weight.grad, y.detach().sum(0)[:, None].expand(6, 6))
        inner = x * 1.0
        out = grpo.remade(torch.mul, inner, 2.0) @ weight
    inner += 1.0
    with pytest.raises(RuntimeError, match="was changed in place"):
        out.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_the_heads_gradients_are_those_of_log_softmax(architecture, trained, monkeypatch):
    """With a head that is trained and a frozen one, whose gradient is made ahead; in chunks of two tokens."""
    monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", 2 * 97)
    noise = torch.Generator().manual_seed(0)
    hidden, upstream = (torch.randn(7, n, generator=noise, dtype=torch.float64) for n in (32, 1))
    targets = torch.randint(97, (7,), generator=noise)
    gradients = []
    for ours in (False, True):
        model, x = tiny_model(architecture, dtype=torch.float64), hidden.clone().requires_grad_()
        head = model.get_output_embeddings().weight.requires_grad_(trained)
        if ours:
            logps, _ = grpo.logps_from_hidden_states(model, x, targets, TEMPERATURE)
        else:
            logits = grpo.logits_from_hidden_states(model, x) / TEMPERATURE
            logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logps * upstream[:, 0]).sum().backward()
        gradients.append([logps.detach(), x.grad] + [head.grad] * trained)
    for plain, own in zip(*gradients):
        torch.testing.assert_close(own, plain)


def test_log_probabilities_need_no_table_of_tokens_by_vocabulary():
    """8,000 tokens × 50,000 words in float32 are 1.6 GB, and the plain way takes several such tables."""
    script = """
import resource, torch, grpo
from transformers import PretrainedConfig
class Model(torch.nn.Module):
    config = PretrainedConfig()
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(16, 50_000, bias=False)
    def get_output_embeddings(self):
        return self.head
model = Model()
hidden = torch.randn(8000, 16, requires_grad=True)
targets = torch.randint(50_000, (8000,))
def run(n):
    logps, _ = grpo.logps_from_hidden_states(model, hidden[:n], targets[:n], 0.9)
    logps.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = run(1400)
print(run(8000) - small)
"""
    root = Path(grpo.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert float(done.stdout) < 200  # MB


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


def test_the_ratio_is_exactly_one_on_a_fresh_batch():
    """So the loss is minus the mean advantage, which is 0, while its gradient is not."""
    logps = torch.randn(4, 5, requires_grad=True)
    advantages, _ = grpo.group_advantages(torch.tensor([0.0, 1.0, 1.0, 3.0]), 4)
    settings = {"epsilon": 0.2, "beta": 0.0, "num_completions": 4}
    loss, metrics = grpo.grpo_loss(logps, logps.detach(), None, advantages, torch.ones(4, 5), **settings)
    loss.backward()
    assert abs(loss.item()) < 1e-7 and metrics["clip_ratio"] == 0 and "kl" not in metrics
    torch.testing.assert_close(logps.grad, (-advantages[:, None] / 20).expand(4, 5))


def test_clip_ratio_counts_the_tokens_whose_gradient_the_clip_takes_away():
    logps = torch.tensor([[0.5, 0.5, -0.5, -0.5]]).repeat(2, 1).requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    settings = {"epsilon": 0.2, "beta": 0.0, "num_completions": 2}
    loss, metrics = grpo.grpo_loss(logps, torch.zeros(2, 4), None, advantages, torch.ones(2, 4), **settings)
    loss.backward()
    assert metrics["clip_ratio"].item() == (logps.grad == 0).float().mean().item() == 0.5


def test_a_head_that_is_trained_gets_the_gradient_of_one_product_however_many_chunks_it_is(monkeypatch):
    """In bfloat16, as far from the exact one as the plain product's: a sum in bfloat16 loses what late chunks add."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(2000, 32).bfloat16(), torch.randint(0, 97, (2000,))
    gradients = []
    for dtype, size in ((torch.float64, 10**9), (torch.bfloat16, 10**9), (torch.bfloat16, 97)):
        monkeypatch.setattr(grpo, "LOGITS_AT_ONCE", size)
        model = tiny_model(dtype=torch.bfloat16).to(dtype)
        grpo.logps_from_hidden_states(model, hidden.to(dtype), targets, 1.0)[0].sum().backward()
        gradients.append(model.lm_head.weight.grad.double())
    exact, whole, chunks = gradients
    assert (chunks - exact).norm() < 1.5 * (whole - exact).norm() < 0.02 * exact.norm()
