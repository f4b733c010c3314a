"""A run that cannot learn says so: each cause in one line, once, with a flag that helps."""

from types import SimpleNamespace

import pytest
import torch
from conftest import flags_for, read_metrics, tiny_model, train_here

from run.health import PATIENCE, Health, before_the_first_step

WELL = {"reward": 0.4, "zero_std_groups": 0.2, "clipped_completions": 0.1, "entropy": 1.2}
WELL |= {"grad_norm": 0.3, "rewards/unscored": 0.0, "sampler/logp_diff": 0.001}
WELL |= {"rewards/accuracy/unparseable_references": 0.0, "rewards/accuracy/timeouts": 0.0}

ILL = {  # what a step tells → the flag that is named
    "equal groups": ({"zero_std_groups": 0.95}, "--num_generations"),
    "cut": ({"clipped_completions": 0.9}, "--max_completion_length"),
    "entropy": ({"entropy": 0.001}, "--temperature"),
    "gradient": ({"grad_norm": 0.0}, "--target_modules"),
    "references": ({"rewards/accuracy/unparseable_references": 3.0}, "--dataset"),
    "timeouts": ({"rewards/accuracy/timeouts": 1.0}, "--accuracy_timeout"),
    "crashes": ({"rewards/accuracy/crashes": 1.0}, "--max_completion_length"),
    "unscored": ({"rewards/unscored": 2.0}, "--reward_funcs"),
    "drift": ({"sampler/logp_diff": 0.2}, "float32"),
}


def health(**args) -> Health:
    return Health(SimpleNamespace(**{"top_p": 1.0, "top_k": 0} | args))


@pytest.mark.parametrize("case", ILL)
def test_a_cause_is_told_once_with_the_flag_that_helps(case):
    change, flag = ILL[case]
    watch = health()
    lines = [line for _ in range(3 * PATIENCE) for line in watch.lines(WELL | change)]
    assert len(lines) == 1 and flag in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("case", ["equal groups", "cut", "entropy", "gradient"])
def test_a_step_that_goes_well_begins_the_count_anew(case):
    change, _ = ILL[case]
    watch = health()
    for _ in range(4):
        for metrics in [WELL | change] * (PATIENCE - 1) + [WELL]:
            assert watch.lines(metrics) == []


def test_a_run_that_goes_well_says_nothing():
    watch = health()
    assert not any(watch.lines(WELL) for _ in range(50))


def test_a_truncated_distribution_is_no_drift():
    assert health(top_k=20).lines(WELL | {"sampler/logp_diff": 0.5}) == []


def test_groups_without_a_difference_are_not_a_gradient_that_is_gone():
    watch = health()
    lines = []
    for _ in range(2 * PATIENCE):
        lines += watch.lines(WELL | {"zero_std_groups": 1.0, "grad_norm": 0.0})
    assert len(lines) == 1 and "zero_std_groups is 100%" in lines[0]


def test_a_run_whose_groups_all_earn_the_same_says_so_in_its_output(model_folder, tmp_path):
    file = tmp_path / "same.py"
    file.write_text(
        'from rewards import orms\norms["same"] = lambda texts, **_: [0.0] * len(texts)\n'
    )
    flags = flags_for(model_folder, file, tmp_path / "out", reward_funcs="same", beta=0)
    said = train_here(*flags, "--max_steps", PATIENCE + 2)
    assert said.count("nearly all groups earn the same (0)") == 1
    assert all(line["zero_std_groups"] == 1 for line in read_metrics(tmp_path / "out"))


# Before the first step --------------------------------------------------------------------------


def told(policy, rate=1e-3, steps=100, rows=100, prompts=8) -> list[str]:
    args = SimpleNamespace(learning_rate=rate)
    lines, facts = before_the_first_step(args, policy, rows, prompts, steps)
    assert facts["prompts_per_row"] == prompts / rows
    assert (facts["weights_out_of_reach"] > 0.5) == any("--learning_rate" in line for line in lines)
    return lines


def test_more_prompts_a_step_than_rows_are_told():
    (line,) = told(tiny_model(), rows=5)
    assert line.startswith("--dataset: prompts_per_row is 1.6: ") and "more rows" in line
    assert told(tiny_model(), rows=8) == []


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_on_a_processor_that_cannot_multiply_it_is_told(monkeypatch, able):
    monkeypatch.setattr("dist.has_bfloat16", lambda device: able)
    lines = told(tiny_model(dtype=torch.bfloat16))
    assert [line.partition(":")[0] for line in lines] == (
        [] if able else ["--torch_dtype bfloat16"]
    )
    assert told(tiny_model()) == []


def test_a_learning_rate_that_bfloat16_cannot_show_is_told(monkeypatch):
    """Weights of about 0.1: neighbours in bfloat16 lie 5e-4 apart, and half of that is the least move."""
    monkeypatch.setattr("dist.has_bfloat16", lambda device: True)
    policy = tiny_model(dtype=torch.bfloat16)
    (line,) = told(policy, rate=1e-7, steps=100)
    assert line.startswith("--learning_rate: weights_out_of_reach is ")
    assert "--torch_dtype" in line
    assert told(policy, rate=1e-7, steps=1_000_000) == []
    assert told(tiny_model(), rate=1e-9) == []  # float32 can
