"""train.py as its users run it, with a tiny model and the real tokenizer."""

import importlib.machinery
import json
import math
import random
import re
import sys
import types

import pytest
import torch
import transformers
from conftest import (
    checkpoint_weights,
    flags_for,
    read_metrics,
    timeless,
    train_here,
)
from processes import run_forked
from safetensors.torch import load_file

import data
import dist
import fast
import rewards
import train
from run import checks, flags, log, reports, setup
from sampler import ModelSampler


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_two_processes_train_as_one_does(train_type, model_folder, plugin, tmp_path):
    """Same global batch, groups that lie across ranks and micro-batches (8 a micro-batch, G = 16), ZeRO-2 on two."""
    # AdamW makes a full step of any gradient above its ε of 1e-8, so those that are rounding are kept small.
    common = {
        "train_type": train_type,
        "num_generations": 16,
        "num_iterations": 1,
        "learning_rate": 5e-4,
    }
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train_here(*flags_for(model_folder, plugin, one, **common, per_device_train_batch_size=32))
    zero2 = {"deepspeed": "zero2", "bucket_size": 1000}
    run_forked(flags_for(model_folder, plugin, two, **common | zero2), 2, tmp_path / "ranks")
    assert all(0 < line["time/comm"] < line["time/step"] for line in read_metrics(two))
    split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    train_here(*flags_for(model_folder, plugin, three, **common | split))
    start = (
        checkpoint_weights(one / "checkpoint-3")
        if train_type == "lora"
        else load_file(model_folder / "model.safetensors")
    )
    for other in (two, three):
        for name, value in checkpoint_weights(one / "checkpoint-3").items():
            there = checkpoint_weights(other / "checkpoint-3")[name]
            torch.testing.assert_close(
                there, value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
        for a, b in zip(timeless(read_metrics(one)), timeless(read_metrics(other))):
            assert a.keys() == b.keys()
            assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    assert all(line["grad_norm"] > 1e-4 for line in read_metrics(one))
    moved = (
        max((checkpoint_weights(one / "checkpoint-3")[n] - start[n]).abs().max() for n in start)
        if train_type == "full"
        else 1
    )
    assert moved > 1e-3


def test_metrics_and_completions_are_those_of_the_spec(model_folder, plugin, tmp_path):
    changes = {
        "reward_funcs": ["vowels", "format"],
        "reward_weights": [2, 0.5],
        "log_completions": "true",
    }
    changes |= {"eval_steps": 2, "num_iterations": 2, "report_to": "tensorboard", "max_steps": 4}
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = "step epoch loss reward reward_std rewards/vowels rewards/format kl clip_ratio entropy completion_length "
    names += "clipped_completions zero_std_groups grad_norm learning_rate num_tokens time/generate time/reward "
    names += "time/train time/step time/comm sampler/logp_diff"
    for line in lines:
        assert set(names.split()) <= set(line)
        assert line["reward"] == pytest.approx(
            2 * line["rewards/vowels"] + 0.5 * line["rewards/format"]
        )
        assert line["sampler/logp_diff"] < 1e-4
        parts = [line[f"time/{part}"] for part in ("generate", "reward", "train")]
        assert min(parts) >= 0 and sum(parts) <= line["time/step"]
        decay = (1 + math.cos(math.pi * (line["step"] - 1) / 4)) / 2  # the default, of four steps
        assert line["learning_rate"] == pytest.approx(1e-3 * decay)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[3]["kl"] > 1e-6
    assert (
        lines[0]["reward"] == lines[1]["reward"] != lines[2]["reward"]
    )  # two iterations on a batch
    assert lines[0]["clip_ratio"] == 0 and abs(lines[0]["loss"]) < 1e-6
    evaluations = read_metrics(tmp_path, evaluations=True)
    assert [line["step"] for line in evaluations] == [2, 4]
    assert {"eval/reward", "eval/rewards/vowels", "eval/completion_length"} <= set(evaluations[0])

    records = [
        json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()
    ]
    held_out = [r for r in records if r["phase"] == "eval"]
    assert {r["step"] for r in held_out} == {2, 4}
    for name in ("vowels", "format"):
        last = [r["rewards"][name] for r in held_out if r["step"] == 4]
        assert sum(last) / len(last) == pytest.approx(evaluations[1][f"eval/rewards/{name}"])
    records = [r for r in records if r["phase"] == "train"]
    assert len(records) == 2 * 16 and {r["step"] for r in records} == {1, 3}
    told = "step phase prompt completion rewards advantage solution length finished"
    assert all(set(r) == set(told.split()) for r in [*records, *held_out])
    lengths = [r["length"] for r in records[:16]]
    assert sum(lengths) / 16 == pytest.approx(lines[0]["completion_length"])
    cut = [not r["finished"] for r in records[:16]]
    assert sum(cut) / 16 == pytest.approx(lines[0]["clipped_completions"])
    terms = re.findall(r"What is (\d+) \+ (\d+)\?<", records[0]["prompt"])[-1]
    assert records[0]["solution"] == str(sum(map(int, terms)))
    first = records[:4]
    assert len({r["prompt"] for r in first}) == 1 and abs(sum(r["advantage"] for r in first)) < 1e-4
    vowels = [r["rewards"]["vowels"] for r in records[:16]]
    assert sum(vowels) / 16 == pytest.approx(lines[0]["rewards/vowels"])
    assert json.loads((tmp_path / "args.json").read_text())["num_generations"] == 4
    assert list((tmp_path / "runs").iterdir())


def test_an_earlier_run_in_the_output_folder_is_moved_aside(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, max_steps=1)
    train_here(*flags)
    first = (tmp_path / "metrics.jsonl").read_text()
    assert "earlier-1" in train_here(*flags)
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == first
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


WANDB = """
import json


class Table:
    def __init__(self, columns):
        self.columns, self.rows = columns, []

    def add_data(self, *row):
        self.rows.append(row)


class Run:
    def __init__(self, settings):
        print(json.dumps({"init": [settings["project"], settings["name"]]}))

    def log(self, values, step):
        values = {k: v.rows if isinstance(v, Table) else v for k, v in values.items()}
        print(json.dumps({"wandb": values, "step": step}))

    def finish(self):
        print("wandb finished")


def init(**settings):
    return Run(settings)
"""


def test_wandb_gets_metrics_and_completions(model_folder, plugin, tmp_path, monkeypatch):
    """A stand-in for the wandb package, since a real run needs its server."""
    wandb = types.ModuleType("wandb")
    exec(WANDB, vars(wandb))
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    changes = {"report_to": "wandb", "log_completions": "true", "max_steps": 1}
    changes |= {"run_name": "first", "project": "sums"}
    out = train_here(*flags_for(model_folder, plugin, tmp_path / "o", **changes))
    assert '{"init": ["sums", "first"]}' in out
    logged = [json.loads(line) for line in out.splitlines() if line.startswith('{"wandb"')]
    assert any("reward" in line["wandb"] for line in logged) and "wandb finished" in out
    table = next(line["wandb"]["completions"] for line in logged if "completions" in line["wandb"])
    assert len(table) == 16
    assert len((tmp_path / "o" / "completions.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize("most", [1000, 10])
def test_wandb_gets_one_table_of_a_whole_evaluation(most, monkeypatch, capsys):
    """However it was batched, and of each evaluation its own; of very many completions the first."""
    wandb = types.ModuleType("wandb")
    exec(WANDB, vars(wandb))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(reports, "ROWS", most)
    args = types.SimpleNamespace(project="p", run_name=None, output_dir="o")
    report = reports.WandB(args)

    def records(first, count):
        common = {"prompt": "p", "advantage": None, "rewards": {"a": 1.0}}
        return [common | {"completion": str(i)} for i in range(first, first + count)]

    for step in (0, 2):
        for batch in range(3):
            report.completions(records(100 * step + 4 * batch, 4), "eval/", step)
        report.completions(records(50, 4), "", step)
        report.metrics({"step": step, "reward": 1.0}, step)  # a line of training keeps none back
        report.metrics({"step": step, "eval/reward": 1.0}, step)
    logged = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    tables = {}
    for line in logged:
        if rows := line["wandb"].get("eval/completions"):
            assert line["step"] not in tables
            tables[line["step"]] = [int(row[1]) for row in rows]
    assert tables == {step: list(range(100 * step, 100 * step + 12))[:most] for step in (0, 2)}
    assert sum("completions" in line["wandb"] for line in logged) == 2


TRACKIO = """
import json

told = []


def init(project, name, config):
    json.dumps(config)
    told.append([project, name])


def log(line, step):
    told.append((step, line))


def finish():
    told.append("finished")
"""


def test_trackio_gets_metrics(model_folder, plugin, tmp_path, monkeypatch):
    """A stand-in that takes what the package takes."""
    trackio = types.ModuleType("trackio")
    exec(TRACKIO, vars(trackio))
    trackio.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    changes = {"report_to": "trackio", "log_completions": "true", "max_steps": 2}
    out = train_here(*flags_for(model_folder, plugin, tmp_path / "o", **changes))
    assert "trackio show --project grpo opens" in out
    lines = [(line.pop("step"), line) for line in read_metrics(tmp_path / "o")]
    assert trackio.told == [["grpo", None], *lines, "finished"] and lines[1][0] == 2


def test_tensorboard_gets_completions_as_text_and_histograms(model_folder, plugin, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"report_to": "tensorboard", "log_completions": "true", "max_steps": 2}
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    events = EventAccumulator(str(tmp_path / "runs"), {"histograms": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"advantages", "completion_lengths"} <= set(tags["histograms"])
    spread = [told.histogram_value for told in events.Histograms("completion_lengths")]
    lines = read_metrics(tmp_path)
    for histogram, line in zip(spread, lines, strict=True):
        assert histogram.num == 16
        assert histogram.sum / 16 == pytest.approx(line["completion_length"])
    first, second = events.Tensors("completions/text_summary")
    records = (tmp_path / "completions.jsonl").read_text().splitlines()
    (text,) = first.tensor_proto.string_val
    solution = json.loads(records[0])["solution"]
    assert f"    reference: {solution}" in text.decode() and (first.step, second.step) == (1, 2)


def test_what_a_completion_says_is_no_markdown_in_tensorboard():
    record = {"prompt": "p", "solution": None, "rewards": {"a": 1.0}, "advantage": None}
    record["completion"] = "```\n# big\n<script>\n![x](http://x)\x1b"
    *_, completion = reports.as_markdown(record).split("\n\n")
    assert all(line.startswith("    ") for line in completion.split("\n"))
    assert "\x1b" not in completion


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_training_raises_the_reward(train_type, model_folder, plugin, tmp_path):
    changes = {
        "max_steps": 40,
        "learning_rate": 2e-2,
        "top_k": 20,
        "beta": 0,
        "train_type": train_type,
        "reward_funcs": "vowels",
    }
    changes |= {
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 16,
        "num_generations": 8,
    }
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    rewards = [line["reward"] for line in read_metrics(tmp_path)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.03, rewards


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_nothing_is_computed_that_teaches_nothing(
    beta, model_folder, plugin, tmp_path, monkeypatch
):
    """One of two groups has equal rewards. Two iterations: no pass of the old policy, and no reference, unless β > 0."""
    passes, completion_logps = [], fast.completion_logps

    def counted(model, prompt_ids, completion_ids, temperature):
        kind = "trained" if torch.is_grad_enabled() else "read"
        passes.append((kind, len(completion_ids)))
        return completion_logps(model, prompt_ids, completion_ids, temperature)

    monkeypatch.setattr(fast, "completion_logps", counted)
    monkeypatch.setitem(
        rewards.orms, "half", lambda texts, **_: [max(0, i - 3) for i in range(len(texts))]
    )
    changes = {
        "reward_funcs": "half",
        "beta": beta,
        "num_iterations": 2,
        "max_steps": 2,
        "train_type": "full",
    }
    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train.main(flags_for(model_folder, plugin, tmp_path, **changes))
    both_groups, one_group = [("read", 4)] * 2 + [("trained", 4)] * 2 * 2, [("trained", 2)] * 2 * 2
    saved = [("read", 1)]  # a completion tells whether what is saved can be sampled from
    assert passes == (both_groups if beta else one_group) + saved  # in two micro-batches


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_each_row_is_evaluated_once_however_few_the_last_batch_has(rows, model_folder, tmp_path):
    """Two processes that evaluate one completion each at once; the last batch may have but one."""
    reward = tmp_path / "level.py"
    reward.write_text(
        "from rewards import orms\n"
        "orms['level'] = lambda texts, level, **_: [l + i / 1000 for i, l in enumerate(level)]\n"
    )
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"{i}?", "level": 10**i}) for i in range(rows)]
    file.write_text("\n".join(lines))
    changes = {"reward_funcs": "level", "val_dataset": file, "dataset": file, "max_steps": 1}
    changes |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 1}
    changes |= {"num_generations_eval": 1, "eval_on_start": "true", "beta": 0}
    flags = flags_for(model_folder, reward, tmp_path / "out", **changes)
    run_forked(flags, 2, tmp_path / "ranks")
    for line in read_metrics(tmp_path / "out", evaluations=True):
        assert line["eval/reward"] == pytest.approx(sum(10**i for i in range(rows)) / rows)


def test_metrics_are_meant_over_the_parts_that_have_them():
    parts = [
        (3, {"a": 1.0, "rewards/unscored": 2.0}),
        (1, {"a": 5.0, "b": 7.0, "rewards/unscored": 1.0}),
    ]
    assert log.weighted_mean(parts) == {"a": 2.0, "b": 7.0, "rewards/unscored": 3.0}


def test_rows_too_long_are_dropped_before_the_split(model_folder, plugin, tmp_path, capsys):
    rows = [{"question": "word " * 200 + str(i)} for i in range(8)] + [
        {"question": "a"},
        {"question": "b", "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "dataset": tmp_path / "rows.jsonl",
        "max_length": 100,
        "eval_steps": 1,
        "reward_funcs": "accuracy",
    }
    args = flags.parse_args(flags_for(model_folder, plugin, tmp_path / "out", **changes))
    inputs = checks.prepare(args, dist.find_world())
    train_rows, val_rows = inputs.train_rows, inputs.val_rows
    assert (
        sorted(row["question"] for row in train_rows + val_rows) == ["a", "b"]
        and len(val_rows) == 1
    )
    said = capsys.readouterr().out
    assert "--dataset: 9 of 10 rows have no reference; accuracy and cosine skip them" in said
    assert "--dataset: dropped 8 prompts of more than 100 tokens, 2 are left" in said


def test_a_validation_set_that_is_never_used_is_told(model_folder, plugin, tmp_path, capsys):
    for eval_flag, told in (
        ([], True),
        (["--eval_steps", "2"], False),
        (["--eval_on_start", "true"], False),
    ):
        words = flags_for(
            model_folder,
            plugin,
            tmp_path,
            val_dataset="arithmetic-test#8",
            per_device_eval_batch_size=4,
        )
        checks.prepare(flags.parse_args([*words, *eval_flag]), dist.find_world())
        assert ("--val_dataset: never evaluated on" in capsys.readouterr().out) == told


def test_the_schedule_warms_up_and_decays():
    def rates(kind, ratio=0.2, steps=10):
        args = flags.parse_args(
            ["--dataset", "x", "--lr_scheduler_type", kind, "--warmup_ratio", str(ratio)]
        )
        return [setup.schedule(args, step, steps) for step in range(steps)]

    assert rates("constant") == [0.5] + [1.0] * 9
    assert rates("linear") == pytest.approx(
        [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    )
    cosine = rates("cosine", 0.0)
    assert (
        cosine[0] == 1
        and cosine[5] == pytest.approx(0.5)
        and cosine == sorted(cosine, reverse=True)
    )


def test_the_demo_model_answers_in_the_format_of_its_example(tokenizer):
    """The real model, one group: what it samples is text, and its log-probabilities are those of the trainer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        flags.EMBEDDED_MODEL, dtype=torch.float32
    )
    fast.prepare(model.eval())
    rows, _ = data.encode(data.load_rows(["arithmetic#2"]), tokenizer)
    prompts = [row["prompt_ids"] for row in rows for _ in range(4)]
    settings = {"eos_token_ids": [2], "max_new_tokens": 32, "temperature": 0.9}
    sampler = ModelSampler(model, **settings, decoder=fast.decoder_for(model))
    completions = sampler.generate(prompts, range(8))
    with torch.no_grad():
        ids = [completion.ids for completion in completions]
        logps, _, _ = fast.completion_logps(model, prompts, ids, 0.9)
    for row, completion in zip(logps, completions):
        torch.testing.assert_close(
            row[: len(completion.ids)], torch.tensor(completion.logps), atol=1e-3, rtol=0
        )
    assert sum("<think>" in tokenizer.decode(c.ids) for c in completions) >= 4


def test_what_is_trained_on_is_shared_out_by_tokens():
    rng = random.Random(0)
    for count in (0, 1, 2, 7, 64):
        sizes = [rng.randrange(1, 50) for _ in range(count)]
        for parts in (1, 2, 3, 8):
            shares = train.split_evenly(list(range(count)), sizes, parts)
            assert len(shares) == parts and sum(shares, []) == list(range(count))
            totals = [sum(sizes[i] for i in share) for share in shares]
            assert all(abs(t - sum(sizes) / parts) <= max(sizes) for t in totals if sizes)
