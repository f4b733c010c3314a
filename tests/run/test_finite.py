"""Weights may be finite and what they compute not: every rank ends, rank 0 tells, and it is not saved."""

import pytest
import torch
from conftest import flags_for
from processes import in_processes, run_forked

import train
from data import UsageError
from run import finite, flags
from sampler import Completion

# LoRA's weights stay finite far beyond what their products do.
TOO_FAST = {"learning_rate": 1e5, "beta": 0.0, "save_steps": 1, "lr_scheduler_type": "constant"}
TOO_FAST |= {"max_steps": 5, "per_device_train_batch_size": 8, "deepspeed": "zero2"}


def test_a_policy_that_cannot_be_sampled_from_is_not_saved_and_ends_every_rank(
    model_folder, plugin, tmp_path
):
    out = tmp_path / "out"
    words = flags_for(model_folder, plugin, out, **TOO_FAST)
    said = run_forked(words, 2, tmp_path / "ranks", status=1)
    others = (tmp_path / "ranks" / "said-1").read_text()
    line = "train.py: update 3 made a policy whose log-probabilities are not finite; a smaller "
    line += "--learning_rate or --max_grad_norm helps; --resume_from_checkpoint true"
    assert "Traceback" not in said + others, said + others
    assert said.endswith(f"{line} goes on from {out / 'checkpoint-2'}\n"), said
    assert not (out / "checkpoint-3").exists()


@pytest.mark.parametrize("plain", ["false", "true"])
def test_what_is_drawn_ends_every_rank_where_no_trial_does(
    plain, model_folder, plugin, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    changes = TOO_FAST | {"train_type": "full", "learning_rate": 1e15, "plain": plain}
    monkeypatch.setattr(finite, "check_policy", lambda *_: None)
    said = run_forked(
        flags_for(model_folder, plugin, out, **changes), 2, tmp_path / "ranks", status=1
    )
    others = (tmp_path / "ranks" / "said-1").read_text()
    assert "train.py: update 1 made a policy whose log-pr" in said
    assert "Traceback" not in said + others, said + others


def trial(world) -> str:
    """What the ranks hear of log-probabilities that one of them alone finds infinite."""
    logps = torch.zeros(1, 3)
    if world.rank == 1:
        logps[0, 2] = float("-inf")
    try:
        finite.check_policy(world, logps, 7)
    except FloatingPointError as error:
        return str(error)
    return ""


def test_a_trial_that_fails_on_one_rank_is_every_ranks_error(tmp_path):
    said = in_processes(2, tmp_path / "ranks", trial)
    assert said == ["update 7 made a policy whose log-probabilities are not finite"] * 2


def test_a_model_that_cannot_be_sampled_from_is_told_with_what_divides_its_logits():
    args = flags.parse_args(["--dataset", "x", "--model", "m", "--temperature", "1e-42"])
    drawn = [Completion([5], [-1.0], True), Completion([5, 6], [-1.0, float("nan")], True)]
    finite.check_drawn(args, drawn[:1], 0)
    with pytest.raises(UsageError, match="^--model m: at --temperature 1e-42 it gives"):
        finite.check_drawn(args, drawn, 0)
    with pytest.raises(UsageError, match="at --temperature_eval 0.5 it gives"):
        finite.check_drawn(args, drawn, 0, 0.5)
    with pytest.raises(FloatingPointError, match="^update 3 made a policy"):
        finite.check_drawn(args, drawn, 3)


def test_a_temperature_that_no_logit_can_be_divided_by_is_one_line(
    model_folder, plugin, tmp_path, capsys
):
    words = flags_for(model_folder, plugin, tmp_path, temperature=1e-42)
    with pytest.raises(SystemExit) as end:
        train.main([str(word) for word in words])
    assert end.value.code == 2
    assert "at --temperature 1e-42 it gives log-pr" in capsys.readouterr().err
