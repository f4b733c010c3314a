"""The guide's two commands with their flags word for word, and every reward from end to end."""

import json
import math
import re
import shlex
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, flags_for, read_metrics, train_here
from processes import run_forked

import sampler


@pytest.fixture(autouse=True)
def own_words(monkeypatch):
    """A plugin below has the sampler say other words; the next test hears its own again."""
    monkeypatch.setattr(sampler.ModelSampler, "generate", sampler.ModelSampler.generate)


def guide_flags(script: str) -> list[str]:
    text = "\n".join(
        line
        for line in (ROOT / "examples" / script).read_text().splitlines()
        if not line.startswith("#")
    )
    words = shlex.split(text.replace("\\\n", " "))
    return words[words.index("train.py") + 1 :]


def swapped(flags: list[str], **changes) -> list[str]:
    flags = list(flags)
    for name, value in changes.items():
        flags[flags.index(f"--{name}") + 1] = str(value)
    return flags


def test_the_scripts_hold_the_guides_flags_word_for_word():
    guide = ROOT.parent / "shared" / "guide.zh.txt"
    if not guide.exists():
        pytest.skip("the guide is not beside the repository")
    commands = re.findall(r"swift rlhf \\\n((?:--.*\n?)+)", guide.read_text())
    for command, script in zip(commands, ("multi_gpu_vllm.sh", "single_gpu.sh"), strict=True):
        assert guide_flags(script) == shlex.split(command.replace("\\\n", " "))


@pytest.fixture(scope="session")
def numina(tmp_path_factory):
    """Rows of NuminaMath-TIR's layout."""
    file = tmp_path_factory.mktemp("numina") / "rows.jsonl"
    rows = []
    for i in range(60):
        problem, solution = (
            f"What is {i} plus {i}?",
            f"Twice {i}. The answer is $\\boxed{{{2 * i}}}$.",
        )
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
        rows.append({"problem": problem, "solution": solution, "messages": turns})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_guides_single_gpu_command_runs(numina, model_folder, tmp_path):
    sizes = {
        "model": model_folder,
        "dataset": f"{numina}#12",
        "max_completion_length": 8,
        "eval_steps": 5,
    }
    out = train_here(*swapped(guide_flags("single_gpu.sh"), **sizes, output_dir=tmp_path))
    lines = read_metrics(tmp_path)
    # 12 rows, one to evaluate on; the first step is logged, too.
    assert [line["step"] for line in lines] == [1, 5, 10, 11]
    assert (
        read_metrics(tmp_path, evaluations=True)
        and (tmp_path / "checkpoint-11" / "adapter_config.json").exists()
    )
    assert (tmp_path / "completions.jsonl").exists(), out


def test_the_guides_multi_gpu_command_runs_without_vllm(numina, model_folder, tmp_path):
    sizes = {
        "model": model_folder,
        "dataset": f"{numina}#8",
        "max_completion_length": 8,
        "num_generations": 2,
    }
    flags = swapped(guide_flags("multi_gpu_vllm.sh"), **sizes, output_dir=tmp_path, eval_steps=3)
    run_forked(swapped(flags, use_vllm="false"), 2, tmp_path / "ranks")
    lines = read_metrics(tmp_path)
    assert lines[-1]["step"] == 4  # 7 rows, 2 a step
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    assert {"rewards/accuracy", "rewards/format", "kl"} <= set(lines[-1])


FAMILY = sorted((ROOT / "examples" / "family").glob("*.sh"))


@pytest.mark.parametrize("script", FAMILY, ids=lambda script: script.stem)
def test_each_recipe_runs(script, model_folder, tmp_path):
    words = guide_flags(f"family/{script.name}")[:-1]  # without "$@"
    words = swapped(words, config=ROOT / "examples" / "family" / "common.yaml")
    sizes = {"dataset": "arithmetic#64", "val_dataset": "arithmetic-test#8", "max_steps": 2}
    sizes |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8}
    sizes |= {"max_completion_length": 8, "model": model_folder, "output_dir": tmp_path}
    for name, value in sizes.items():  # what comes last wins
        words += [f"--{name}", str(value)]
    train_here(*words)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_first_steps_on_gsm8k_run(model_folder, tmp_path):
    """The rows as they come, worked examples in front of each, and the script's flags."""
    question = "A robe takes 2 bolts of blue fiber and half that much white. How many in total?"
    answer = "It takes 2/2=<<2/2=1>>1 bolt of white. 2+1=<<2+1=3>>3\n#### 3"
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"question": question, "answer": answer}) + "\n")
    program, prepared = ROOT / "examples" / "gsm8k.py", tmp_path / "prepared.jsonl"
    subprocess.run([sys.executable, program, rows, prepared], check=True)
    (row,) = map(json.loads, prepared.read_text().splitlines())
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert row["messages"][4]["content"] == question and row["solution"] == "3"

    words = guide_flags("gsm8k.sh")[:-1]  # without "$@"
    sizes = {"dataset": prepared, "model": model_folder, "output_dir": tmp_path / "out"}
    words = swapped(words, **sizes, max_steps=2, max_completion_length=8)
    train_here(*words)
    lines = read_metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["rewards/accuracy/unparseable_references"] == 0
    missing = subprocess.run([sys.executable, program, "no.jsonl", prepared], capture_output=True)
    (line,) = missing.stderr.decode().splitlines()
    assert missing.returncode == 1 and line.startswith("--dataset no.jsonl: no such file")


@pytest.fixture(scope="session")
def reward_model(model_folder, tmp_path_factory):
    """A small random classifier with one output and the real tokenizer."""

    folder = tmp_path_factory.mktemp("models") / "scorer"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    config = transformers.AutoConfig.from_pretrained(
        model_folder, num_labels=1, pad_token_id=tokenizer.eos_token_id
    )
    torch.manual_seed(1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


GUIDE_PLUGIN = ROOT / "examples" / "train" / "grpo" / "plugin" / "plugin.py"
EVERY_REWARD = ["accuracy", "format", "cosine", "repetition", "dummy"]
SCRIPT = ["<think>a b</think><answer>18</answer>", "It is 17.", "no no no no no 18", "=" * 1100]


@pytest.fixture(scope="session")
def script(model_folder, tmp_path_factory):
    """A plugin that puts SCRIPT into the model's mouth, for random text earns nothing; its own reward never applies."""
    file = tmp_path_factory.mktemp("plugin") / "script.py"
    file.write_text(
        "import sampler\n"
        "from rewards import orms\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(model_folder)!r})\n"
        "generate = getattr(sampler.ModelSampler.generate, 'real', sampler.ModelSampler.generate)\n"
        "def scripted(*args):\n"
        "    completions = generate(*args)\n"
        "    for i, completion in enumerate(completions):\n"
        f"        completion.ids = tokenizer.encode({SCRIPT}[i % 4])\n"
        "        completion.logps = [0.0] * len(completion.ids)\n"
        "    return completions\n"
        "scripted.real = generate\n"
        "sampler.ModelSampler.generate = scripted\n"
        "orms['never'] = lambda completions: [None] * len(completions)\n"
    )
    return file


@pytest.fixture(scope="session")
def eighteens(tmp_path_factory):
    """Rows of NuminaMath-TIR's layout that all have the answer 18."""
    file = tmp_path_factory.mktemp("data") / "eighteens.jsonl"
    turns = [[{"role": "user", "content": f"What is {i} + {18 - i}?"}] for i in range(12)]
    rows = [
        {"problem": t[0]["content"], "solution": "It is $\\boxed{18}$.", "messages": t}
        for t in turns
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    "name, processes", [*((name, 1) for name in [*EVERY_REWARD, "scorer", "all"]), ("all", 2)]
)
def test_each_reward_alone_and_all_with_checkpoint_weights(
    name, processes, eighteens, model_folder, tiny_tokenizer, reward_model, script, tmp_path
):
    functions = EVERY_REWARD if name == "all" else [n for n in EVERY_REWARD if n == name]
    names = functions + ["scorer"] * (name in ("scorer", "all"))
    weights = [0.5, 2, -1, 3, 0.25, 1.5][: len(names)]
    changes = {
        "dataset": eighteens,
        "reward_weights": weights,
        "max_steps": 1,
        "log_completions": "true",
    }
    changes |= {"reward_funcs": functions} | (
        {"reward_model": reward_model} if "scorer" in names else {}
    )
    changes |= {"max_completion_length": 32, "external_plugins": [script, GUIDE_PLUGIN]}
    flags = flags_for(model_folder, script, tmp_path, **changes)
    flags = [flag for flag in flags if functions or flag != "--reward_funcs"]
    if processes == 1:
        train_here(*flags)
    else:
        run_forked(flags, processes, tmp_path / "ranks")

    lengths = [len(tiny_tokenizer.encode(text)) for text in SCRIPT]
    half = [(1 + math.cos(math.pi * min(1, length / 32))) / 2 for length in lengths]
    cosine = [0.5 + 0.5 * half[0], -0.5 + 0.5 * half[1], 0.5 + 0.5 * half[2], -0.5 + 0.5 * half[3]]
    expected = {
        "accuracy": 0.5,
        "format": 0.25,
        "cosine": sum(cosine) / 4,
        "repetition": -0.5 / 4,
        "dummy": 0.25,
    }
    for line in read_metrics(tmp_path):
        assert line["rewards/unscored"] == 0
        values = [line[f"rewards/{n}"] for n in names]
        assert all(values)
        assert values[: len(functions)] == pytest.approx([expected[n] for n in functions])
        assert line["reward"] == pytest.approx(
            sum(w * v for w, v in zip(weights, values)), abs=1e-6
        )
    for record in map(json.loads, (tmp_path / "completions.jsonl").read_text().splitlines()):
        assert list(record["rewards"]) == names


def test_a_reward_that_never_applies_has_no_mean_and_is_counted_once(
    model_folder, script, tmp_path
):
    changes = {
        "reward_funcs": "never",
        "num_iterations": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "eval_steps": 4,
    }
    changes |= {
        "dataset": "arithmetic#32",
        "val_dataset": "arithmetic-test#6",
        "per_device_eval_batch_size": 8,
    }
    train_here(
        *flags_for(model_folder, script, tmp_path, **changes | {"max_completion_length": 32})
    )
    lines, (evaluation,) = read_metrics(tmp_path), read_metrics(tmp_path, evaluations=True)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert sum(line["rewards/unscored"] for line in lines) == 32  # in two batches
    assert evaluation["eval/rewards/unscored"] == 6 * 4
    assert not {"rewards/never", "eval/rewards/never"} & {*lines[0], *evaluation}
