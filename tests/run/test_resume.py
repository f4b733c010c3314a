"""Stop and resume: a run that goes on is the run that never stopped."""

import json
import resource
import shutil

import pytest
import torch
from conftest import checkpoint_weights, flags_for, read_metrics, timeless, train_here
from processes import run_forked
from safetensors.torch import load_file


@pytest.mark.parametrize(
    "changes", [{"train_type": "full"}, {"num_iterations": 2, "lora_dropout": 0.1}]
)
def test_a_resumed_run_is_the_run_that_never_stopped(changes, model_folder, plugin, tmp_path):
    changes |= {
        "max_steps": 8,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.3,
        "logging_steps": 3,
        "save_steps": 4,
    }
    changes |= {"log_completions": "true", "log_tokens": 1, "log_tokens_steps": 5, "eval_steps": 4}
    changes |= {"eval_on_start": "true"}  # which a resumed run does not do again
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train_here(*flags_for(model_folder, plugin, straight, **changes))
    shutil.copytree(straight, stopped)
    # As if it had been killed after step 4's checkpoint, with more in its logs than the checkpoint knows.
    shutil.rmtree(stopped / "checkpoint-8")
    train_here(*flags_for(model_folder, plugin, stopped, **changes, resume_from_checkpoint="true"))

    for evaluations in (False, True):
        ours, theirs = (timeless(read_metrics(f, evaluations)) for f in (stopped, straight))
        for one, other in zip(ours, theirs, strict=True):
            # The sampler's products may lie in memory in another way, and round in another way.
            drifts = {name for name in one if name.startswith("sampler/")}
            for name in drifts:
                assert one.pop(name) == pytest.approx(other.pop(name), rel=1e-2, abs=1e-6)
            assert one == other
    assert [line["step"] for line in read_metrics(stopped)] == [1, 3, 6, 8]
    assert [line["step"] for line in read_metrics(stopped, evaluations=True)] == [0, 4, 8]
    told = [(folder / "completions.jsonl").read_text() for folder in (stopped, straight)]
    assert told[0] == told[1]
    assert token_records(stopped) == token_records(straight)
    assert {record["step"] for record in token_records(stopped)} == {1, 5}
    for name, value in checkpoint_weights(straight / "checkpoint-8").items():
        assert torch.equal(checkpoint_weights(stopped / "checkpoint-8")[name], value)


def token_records(folder) -> list[dict]:
    """Without what the sampler found, which may round in another way."""
    lines = (folder / "tokens.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for completion in record["completions"]:
            del completion["sampled"]
    return records


def test_a_run_resumed_earlier_on_leaves_no_stale_checkpoint_and_says_what_changed(
    model_folder, plugin, tmp_path
):
    flags = flags_for(model_folder, plugin, tmp_path, train_type="lora", save_steps=2, max_steps=4)
    train_here(*flags)
    stale = checkpoint_weights(tmp_path / "checkpoint-4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    changes = ["--resume_from_checkpoint", tmp_path / "checkpoint-2", "--learning_rate", "0.1"]
    changes += ["--gradient_accumulation_steps", 2]
    size = int(flags[flags.index("--per_device_train_batch_size") + 1])
    said = train_here(*flags, *changes)
    assert "--learning_rate 0.1 (was 0.001)" in said
    assert f"resumed with {2 * size} completions a step (was {size})" in said
    assert f"--per_device_train_batch_size {size // 2} keeps them" in said
    assert (tmp_path / "earlier-1" / "checkpoint-4").exists()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    new = checkpoint_weights(tmp_path / "checkpoint-4")
    assert any(not torch.equal(new[name], stale[name]) for name in stale)


def test_a_run_resumed_inside_a_batch_ends_at_its_last_step(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, num_iterations=2, max_steps=3)
    train_here(*flags)
    train_here(*flags, "--resume_from_checkpoint", "true", "--max_steps", "6")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "checkpoint-6").exists()


def test_only_the_newest_checkpoints_are_kept_and_none_holds_a_pickle(
    model_folder, plugin, tmp_path
):
    train_here(
        *flags_for(
            model_folder,
            plugin,
            tmp_path,
            save_steps=1,
            save_total_limit=2,
            train_type="full",
            beta=0,
        )
    )
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    suffixes = {p.suffix for p in tmp_path.rglob("checkpoint-*/*")}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    state = load_file(tmp_path / "checkpoint-3" / "optimizer.safetensors")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.float(), state[f"master.{name}"])


def test_a_lora_checkpoint_loads_with_peft(model_folder, plugin, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    train_here(*flags_for(model_folder, plugin, tmp_path, train_type="lora", max_steps=1))
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits.clone()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-1")
    assert not torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one_and_is_told(
    ranks, model_folder, plugin, tmp_path
):
    """No room, here by a limit on the size of files that lies between a checkpoint's and a log's."""
    out = tmp_path / "out"
    flags = flags_for(model_folder, plugin, out, train_type="full", save_steps=1, max_steps=1)
    train_here(*flags)
    before = checkpoint_weights(out / "checkpoint-1")
    kept, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit))  # which the ranks inherit
    more = ["--max_steps", 2, "--resume_from_checkpoint", "true"]
    more += ["--per_device_train_batch_size", 16 // ranks]
    try:
        said = run_forked([*flags, *more], ranks, tmp_path / "ranks", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kept, limit))
    line = f"train.py: --output_dir {out}: checkpoint-2 could not be written ("
    assert said.count(line) == 1 and "Traceback" not in said, said
    assert f"goes on from {out / 'checkpoint-1'}" in said
    assert not list(out.glob("checkpoint-2*"))
    for name, value in checkpoint_weights(out / "checkpoint-1").items():
        assert torch.equal(value, before[name])
