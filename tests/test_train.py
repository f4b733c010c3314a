"""train.py as its users run it: real processes, a tiny model, the real tokenizer."""

import json
import math
import random
import re
import shlex
import shutil

import pytest
import torch
from conftest import ROOT, read_metrics, run_train
from safetensors.torch import load_file

import dist
import grpo
import rewards
import train


def flags_for(model_folder, plugin, output_dir, **changes):
    """A short float32 run on the built-in task with a reward that tells random completions apart."""
    flags = {
        "model": model_folder,
        "torch_dtype": "float32",
        "dataset": "arithmetic",
        "external_plugins": plugin,
        "reward_funcs": ["vowels", "format"],
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "beta": 0.04,
        "output_dir": output_dir,
    } | changes
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def weights(checkpoint):
    file = "adapter_model.safetensors" if (checkpoint / "adapter_config.json").exists() else "model.safetensors"
    return load_file(checkpoint / file)


TIMELESS = re.compile(r"^(?!(eval/)?time/)")


def timeless(lines):
    return [{name: value for name, value in line.items() if TIMELESS.match(name)} for line in lines]


# The number of ranks changes nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_two_processes_train_as_one_does(train_type, model_folder, plugin, tmp_path):
    """Same global batch, groups that lie across ranks and micro-batches (8 a micro-batch, G = 16), ZeRO-2 on two."""
    # AdamW makes a full step of any gradient above its ε of 1e-8, so those that are rounding are kept small.
    common = {"train_type": train_type, "num_generations": 16, "num_iterations": 1, "learning_rate": 5e-4}
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    run_train(*flags_for(model_folder, plugin, one, **common, per_device_train_batch_size=32))
    run_train(*flags_for(model_folder, plugin, two, **common, deepspeed="zero2", bucket_size=1000), processes=2)
    assert all(0 < line["time/comm"] < line["time/step"] for line in read_metrics(two))
    split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    run_train(*flags_for(model_folder, plugin, three, **common | split))
    start = weights(one / "checkpoint-3") if train_type == "lora" else load_file(model_folder / "model.safetensors")
    for other in (two, three):
        for name, value in weights(one / "checkpoint-3").items():
            there = weights(other / "checkpoint-3")[name]
            torch.testing.assert_close(there, value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        for a, b in zip(timeless(read_metrics(one)), timeless(read_metrics(other))):
            assert a.keys() == b.keys()
            assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
    assert all(line["grad_norm"] > 1e-4 for line in read_metrics(one))
    moved = max((weights(one / "checkpoint-3")[n] - start[n]).abs().max() for n in start) if train_type == "full" else 1
    assert moved > 1e-3


# Stop and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"train_type": "full"}, {"num_iterations": 2, "lora_dropout": 0.1}])
def test_a_resumed_run_is_the_run_that_never_stopped(changes, model_folder, plugin, tmp_path):
    changes |= {"max_steps": 8, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "logging_steps": 3, "save_steps": 4}
    changes |= {"log_completions": "true", "eval_steps": 4}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_train(*flags_for(model_folder, plugin, straight, **changes))
    run_train(*flags_for(model_folder, plugin, stopped, **changes))
    # As if it had been killed after step 4's checkpoint, with more in its logs than the checkpoint knows.
    for file in (stopped / "checkpoint-8").iterdir():
        file.unlink()
    (stopped / "checkpoint-8").rmdir()
    run_train(*flags_for(model_folder, plugin, stopped, **changes, resume_from_checkpoint="true"))

    for evaluations in (False, True):
        assert timeless(read_metrics(stopped, evaluations)) == timeless(read_metrics(straight, evaluations))
    assert [line["step"] for line in read_metrics(stopped)] == [3, 6, 8]
    assert (stopped / "completions.jsonl").read_text() == (straight / "completions.jsonl").read_text()
    for name, value in weights(straight / "checkpoint-8").items():
        assert torch.equal(weights(stopped / "checkpoint-8")[name], value)


def test_a_run_resumed_earlier_on_leaves_no_stale_checkpoint_and_says_what_changed(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, train_type="lora", save_steps=2, max_steps=4)
    run_train(*flags)
    stale = weights(tmp_path / "checkpoint-4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    changes = ["--resume_from_checkpoint", tmp_path / "checkpoint-2", "--learning_rate", "0.1"]
    changes += ["--gradient_accumulation_steps", 2]
    size = int(flags[flags.index("--per_device_train_batch_size") + 1])
    said = run_train(*flags, *changes).stdout
    assert "--learning_rate 0.1 (was 0.001)" in said
    assert f"resumed with {2 * size} completions a step (was {size})" in said
    assert f"--per_device_train_batch_size {size // 2} keeps them" in said
    assert (tmp_path / "earlier-1" / "checkpoint-4").exists()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    new = weights(tmp_path / "checkpoint-4")
    assert any(not torch.equal(new[name], stale[name]) for name in stale)


def test_a_run_resumed_inside_a_batch_ends_at_its_last_step(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, num_iterations=2, max_steps=3)
    run_train(*flags)
    run_train(*flags, "--resume_from_checkpoint", "true", "--max_steps", "6")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "checkpoint-6").exists()


def test_only_the_newest_checkpoints_are_kept_and_none_holds_a_pickle(model_folder, plugin, tmp_path):
    run_train(*flags_for(model_folder, plugin, tmp_path, save_steps=1, save_total_limit=2, train_type="full", beta=0))
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

    run_train(*flags_for(model_folder, plugin, tmp_path, train_type="lora", max_steps=1))
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits.clone()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-1")
    assert not torch.equal(adapted(ids).logits, before)


# What a run writes ----------------------------------------------------------------------------------------------


def test_metrics_and_completions_are_those_of_the_spec(model_folder, plugin, tmp_path):
    changes = {"reward_funcs": ["vowels", "format"], "reward_weights": [2, 0.5], "log_completions": "true"}
    changes |= {"eval_steps": 2, "num_iterations": 2, "report_to": "tensorboard", "max_steps": 4}
    run_train(*flags_for(model_folder, plugin, tmp_path, **changes))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = "step epoch loss reward reward_std rewards/vowels rewards/format kl clip_ratio entropy completion_length "
    names += "clipped_completions zero_std_groups grad_norm learning_rate num_tokens time/generate time/reward "
    names += "time/train time/step time/comm sampler/logp_diff"
    for line in lines:
        assert set(names.split()) <= set(line)
        assert line["reward"] == pytest.approx(2 * line["rewards/vowels"] + 0.5 * line["rewards/format"])
        assert line["sampler/logp_diff"] < 1e-4
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[3]["kl"] > 1e-6
    assert lines[0]["reward"] == lines[1]["reward"] != lines[2]["reward"]  # two iterations on a batch
    assert lines[0]["clip_ratio"] == 0 and abs(lines[0]["loss"]) < 1e-6
    evaluations = read_metrics(tmp_path, evaluations=True)
    assert [line["step"] for line in evaluations] == [2, 4]
    assert {"eval/reward", "eval/rewards/vowels", "eval/completion_length"} <= set(evaluations[0])

    records = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 16 and {r["step"] for r in records} == {1, 3}
    assert set(records[0]) == {"step", "prompt", "completion", "rewards", "advantage"}
    first = records[:4]
    assert len({r["prompt"] for r in first}) == 1 and abs(sum(r["advantage"] for r in first)) < 1e-4
    vowels = [r["rewards"]["vowels"] for r in records[:16]]
    assert sum(vowels) / 16 == pytest.approx(lines[0]["rewards/vowels"])
    assert json.loads((tmp_path / "args.json").read_text())["num_generations"] == 4
    assert list((tmp_path / "runs").iterdir())


def test_an_earlier_run_in_the_output_folder_is_moved_aside(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, max_steps=1)
    run_train(*flags)
    first = (tmp_path / "metrics.jsonl").read_text()
    assert "earlier-1" in run_train(*flags).stdout
    assert (tmp_path / "earlier-1" / "metrics.jsonl").read_text() == first
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_wandb_gets_metrics_and_completions(model_folder, plugin, tmp_path):
    """A stand-in for the wandb package, since a real run needs its server."""
    stub = tmp_path / "stub"
    (stub / "wandb").mkdir(parents=True)
    (stub / "wandb" / "__init__.py").write_text(
        "import json, os\n"
        "class Table:\n"
        "    def __init__(self, columns): self.columns, self.rows = columns, []\n"
        "    def add_data(self, *row): self.rows.append(row)\n"
        "class Run:\n"
        "    def log(self, values, step):\n"
        "        values = {k: v.rows if isinstance(v, Table) else v for k, v in values.items()}\n"
        "        print(json.dumps({'wandb': values, 'step': step}))\n"
        "    def finish(self): print('wandb finished')\n"
        "def init(**kw): return Run()\n"
    )
    flags = flags_for(model_folder, plugin, tmp_path / "o", report_to="wandb", log_completions="true", max_steps=1)
    out = run_train(*flags, PYTHONPATH=str(stub)).stdout
    logged = [json.loads(line) for line in out.splitlines() if line.startswith('{"wandb"')]
    assert any("reward" in line["wandb"] for line in logged) and "wandb finished" in out
    table = next(line["wandb"]["completions"] for line in logged if "completions" in line["wandb"])
    assert len(table) == 16 and not (tmp_path / "o" / "completions.jsonl").exists()


# Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_training_raises_the_reward(train_type, model_folder, plugin, tmp_path):
    changes = {
        "max_steps": 20,
        "learning_rate": 1e-2,
        "top_k": 20,
        "beta": 0,
        "train_type": train_type,
        "reward_funcs": "vowels",
    }
    changes |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 32, "num_generations": 8}
    run_train(*flags_for(model_folder, plugin, tmp_path, **changes))
    rewards = [line["reward"] for line in read_metrics(tmp_path)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05, rewards


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_nothing_is_computed_that_teaches_nothing(beta, model_folder, plugin, tmp_path, monkeypatch):
    """One of two groups has equal rewards. Two iterations: no pass of the old policy, and no reference, unless β > 0."""
    passes, completion_logps = [], grpo.completion_logps

    def counted(model, prompt_ids, completion_ids, temperature):
        passes.append(("trained" if torch.is_grad_enabled() else "read", len(completion_ids)))
        return completion_logps(model, prompt_ids, completion_ids, temperature)

    monkeypatch.setattr(grpo, "completion_logps", counted)
    monkeypatch.setitem(rewards.orms, "half", lambda texts, **_: [max(0, i - 3) for i in range(len(texts))])
    changes = {"reward_funcs": "half", "beta": beta, "num_iterations": 2, "max_steps": 2, "train_type": "full"}
    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    train.main(flags_for(model_folder, plugin, tmp_path, **changes))
    both_groups, one_group = [("read", 4)] * 2 + [("trained", 4)] * 2 * 2, [("trained", 2)] * 2 * 2
    assert passes == (both_groups if beta else one_group)  # in two micro-batches


# The guide's commands -------------------------------------------------------------------------------------------


def guide_flags(script: str) -> list[str]:
    text = "\n".join(line for line in (ROOT / "examples" / script).read_text().splitlines() if not line.startswith("#"))
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
        problem, solution = f"What is {i} plus {i}?", f"Twice {i}. The answer is $\\boxed{{{2 * i}}}$."
        turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
        rows.append({"problem": problem, "solution": solution, "messages": turns})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_guides_single_gpu_command_runs(numina, model_folder, tmp_path):
    sizes = {"model": model_folder, "dataset": f"{numina}#12", "max_completion_length": 8, "eval_steps": 5}
    out = run_train(*swapped(guide_flags("single_gpu.sh"), **sizes, output_dir=tmp_path)).stdout
    lines = read_metrics(tmp_path)
    assert lines[-1]["step"] == 11 and [line["step"] for line in lines] == [5, 10, 11]  # 12 rows, one to evaluate on
    assert read_metrics(tmp_path, evaluations=True) and (tmp_path / "checkpoint-11" / "adapter_config.json").exists()
    assert (tmp_path / "completions.jsonl").exists(), out


def test_the_guides_multi_gpu_command_runs_without_vllm(numina, model_folder, tmp_path):
    sizes = {"model": model_folder, "dataset": f"{numina}#8", "max_completion_length": 8, "num_generations": 2}
    flags = swapped(guide_flags("multi_gpu_vllm.sh"), **sizes, output_dir=tmp_path, eval_steps=3)
    run_train(*swapped(flags, use_vllm="false"), processes=2)
    lines = read_metrics(tmp_path)
    assert lines[-1]["step"] == 4  # 7 rows, 2 a step
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    assert {"rewards/accuracy", "rewards/format", "kl"} <= set(lines[-1])


# Every reward, end to end ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reward_model(model_folder, tmp_path_factory):
    """A small random classifier with one output and the real tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / "scorer"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    config = transformers.AutoConfig.from_pretrained(model_folder, num_labels=1, pad_token_id=tokenizer.eos_token_id)
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
        "import __main__\n"
        "from rewards import orms\n"
        "from transformers import AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(model_folder)!r})\n"
        "generate = __main__.ModelSampler.generate\n"
        "def scripted(*args):\n"
        "    completions = generate(*args)\n"
        "    for i, completion in enumerate(completions):\n"
        f"        completion.ids = tokenizer.encode({SCRIPT}[i % 4])\n"
        "        completion.logps = [0.0] * len(completion.ids)\n"
        "    return completions\n"
        "__main__.ModelSampler.generate = scripted\n"
        "orms['never'] = lambda completions: [None] * len(completions)\n"
    )
    return file


@pytest.fixture(scope="session")
def eighteens(tmp_path_factory):
    """Rows of NuminaMath-TIR's layout that all have the answer 18."""
    file = tmp_path_factory.mktemp("data") / "eighteens.jsonl"
    turns = [[{"role": "user", "content": f"What is {i} + {18 - i}?"}] for i in range(12)]
    rows = [{"problem": t[0]["content"], "solution": "It is $\\boxed{18}$.", "messages": t} for t in turns]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name, processes", [*((name, 1) for name in [*EVERY_REWARD, "scorer", "all"]), ("all", 2)])
def test_each_reward_alone_and_all_with_weights(
    name, processes, eighteens, model_folder, tokenizer, reward_model, script, tmp_path
):
    functions = EVERY_REWARD if name == "all" else [n for n in EVERY_REWARD if n == name]
    names = functions + ["scorer"] * (name in ("scorer", "all"))
    weights = [0.5, 2, -1, 3, 0.25, 1.5][: len(names)]
    changes = {"dataset": eighteens, "reward_weights": weights, "max_steps": 2, "log_completions": "true"}
    changes |= {"reward_funcs": functions} | ({"reward_model": reward_model} if "scorer" in names else {})
    changes |= {"max_completion_length": 32, "external_plugins": [script, GUIDE_PLUGIN]}
    flags = flags_for(model_folder, script, tmp_path, **changes)
    run_train(*(flag for flag in flags if functions or flag != "--reward_funcs"), processes=processes)

    half = [(1 + math.cos(math.pi * min(1, len(tokenizer.encode(text)) / 32))) / 2 for text in SCRIPT]
    cosine = [0.5 + 0.5 * half[0], -0.5 + 0.5 * half[1], 0.5 + 0.5 * half[2], -0.5 + 0.5 * half[3]]
    expected = {"accuracy": 0.5, "format": 0.25, "cosine": sum(cosine) / 4, "repetition": -0.5 / 4, "dummy": 0.25}
    for line in read_metrics(tmp_path):
        assert line["rewards/unscored"] == 0
        values = [line[f"rewards/{n}"] for n in names]
        assert all(values)
        assert values[: len(functions)] == pytest.approx([expected[n] for n in functions])
        assert line["reward"] == pytest.approx(sum(w * v for w, v in zip(weights, values)), abs=1e-6)
    for record in map(json.loads, (tmp_path / "completions.jsonl").read_text().splitlines()):
        assert list(record["rewards"]) == names


def test_a_reward_that_never_applies_has_no_mean_and_is_counted_once(model_folder, script, tmp_path):
    changes = {"reward_funcs": "never", "num_iterations": 2, "max_steps": 4, "logging_steps": 2, "eval_steps": 4}
    changes |= {"dataset": "arithmetic#32", "val_dataset": "arithmetic-test#6", "per_device_eval_batch_size": 8}
    run_train(*flags_for(model_folder, script, tmp_path, **changes | {"max_completion_length": 32}))
    lines, (evaluation,) = read_metrics(tmp_path), read_metrics(tmp_path, evaluations=True)
    assert [line["rewards/unscored"] for line in lines] == [16, 16]
    assert evaluation["eval/rewards/unscored"] == 6 * 4
    assert not {"rewards/never", "eval/rewards/never"} & {*lines[0], *evaluation}


def test_metrics_are_meant_over_the_parts_that_have_them():
    parts = [(3, {"a": 1.0, "rewards/unscored": 2.0}), (1, {"a": 5.0, "b": 7.0, "rewards/unscored": 1.0})]
    assert train.weighted_mean(parts) == {"a": 2.0, "b": 7.0, "rewards/unscored": 3.0}


def test_rows_too_long_are_dropped_before_the_split(model_folder, plugin, tmp_path, capsys):
    rows = [{"question": "word " * 200 + str(i)} for i in range(8)] + [
        {"question": "a"},
        {"question": "b", "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"dataset": tmp_path / "rows.jsonl", "max_length": 100, "eval_steps": 1, "reward_funcs": "accuracy"}
    args = train.parse_args(flags_for(model_folder, plugin, tmp_path / "out", **changes))
    _, train_rows, val_rows, rewards = train.prepare(args, train.dist.find_world())
    rewards.close()
    assert sorted(row["question"] for row in train_rows + val_rows) == ["a", "b"] and len(val_rows) == 1
    said = capsys.readouterr().out
    assert "--dataset: 9 of 10 rows have no reference; accuracy and cosine skip them" in said
    assert "--dataset: dropped 8 prompts of more than 100 tokens, 2 are left" in said


def test_a_validation_set_that_is_never_used_is_told(model_folder, plugin, tmp_path, capsys):
    for eval_flag, told in (([], True), (["--eval_steps", "2"], False), (["--eval_on_start", "true"], False)):
        flags = flags_for(model_folder, plugin, tmp_path, val_dataset="arithmetic-test#8", per_device_eval_batch_size=4)
        train.prepare(train.parse_args([*flags, *eval_flag]), train.dist.find_world())
        assert ("--val_dataset: never evaluated on" in capsys.readouterr().out) == told


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """Loading weights is an error of its own kind here."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train.AutoModelForCausalLM, "from_pretrained", load)


BAD_INPUT = {
    "G that divides nothing": (["--num_generations", "5"], r"--num_generations 5: .*16 completions.* 2, 4, 8, 16"),
    "G of evaluations": (
        ["--val_dataset", "arithmetic-test", "--per_device_eval_batch_size", "6"],
        r"--num_generations_eval 4: .*6 completions.* 2, 3, 6",
    ),
    "unknown reward": (["--reward_funcs", "acuracy"], r"--reward_funcs acuracy: .*did you mean accuracy"),
    "weights": (["--reward_weights", "1", "2", "3"], r"--reward_weights .*1.*2.*3.*: .*2.* numbers"),
    "no reward": (["--reward_funcs"], r"--reward_funcs: "),
    "missing file": (["--dataset", "nowhere.jsonl"], r"--dataset nowhere.jsonl: no such file"),
    "empty dataset": (["--dataset", "{tmp}/empty.jsonl"], r"--dataset .*empty.jsonl: .*empty"),
    "no question": (["--dataset", "{tmp}/columns.jsonl"], r"--dataset .*columns.jsonl: .*text, label"),
    "no reference": (["--dataset", "{tmp}/ask.jsonl", "--reward_funcs", "accuracy"], r"--reward_funcs accuracy: "),
    "system path": (["--system", "examples/nowhere.txt"], r"--system examples/nowhere.txt: no such file"),
    "beta of 1": (["--adam_beta2", "1"], r"--adam_beta2: '1': a number from 0 to "),
    "no weights": (["--model", "{tmp}/bare"], r"--model .*bare: no weights in this folder"),
    "output_dir below a file": (["--output_dir", "{tmp}/ask.jsonl/out"], r"--output_dir .*out: cannot be made"),
    "dtype": (["--torch_dtype", "bfloat17"], r"--torch_dtype: .*bfloat17.*bfloat16"),
    "output_dir is a file": (["--output_dir", "{tmp}/ask.jsonl"], r"--output_dir .*ask.jsonl: is a file"),
    "model": (["--model", "models/nowhere"], r"--model models/nowhere: "),
    "target": (["--target_modules", "c_attn"], r"--target_modules c_attn: .*q_proj"),
    "unknown flag": (["--learning_rat", "1"], r"--learning_rat: no such flag; did you mean --learning_rate"),
    "not a number": (["--epsilon", "much"], r"--epsilon: 'much': a number from 0 works"),
    "not true": (["--log_completions", "yes"], r"--log_completions: 'yes': true or false works"),
    "temperature": (["--temperature", "0"], r"--temperature: '0': a number above 0 works"),
    "G of one": (["--num_generations", "1"], r"--num_generations: '1': a whole number from 2 works"),
    "resume": (["--resume_from_checkpoint", "nowhere"], r"--resume_from_checkpoint nowhere: no checkpoint there"),
    "too long": (["--max_completion_length", "9000"], r"--max_completion_length 9000: .*512"),
    "max_length": (["--max_length", "3"], r"--max_length 3: every prompt is longer"),
    "bucket": (["--bucket_size", "0"], r"--bucket_size: '0': a whole number from 1 works"),
    "zero3 in layers with vLLM": (
        shlex.split("--deepspeed zero3 --ds3_gather_for_generation false --use_vllm true"),
        r"--ds3_gather_for_generation false: vLLM needs whole weights; true, or --use_vllm false, works",
    ),
    "plugin fails": (
        ["--external_plugins", "{tmp}/fails.py"],
        r"--external_plugins .*: failed to import: .*fails.py:2",
    ),
    "plugin registers nothing": (
        ["--external_plugins", "{tmp}/idle.py"],
        r"--external_plugins .*: registers no reward",
    ),
    "plugin overwrites": (["--external_plugins", "{tmp}/thief.py"], r"--external_plugins .*: overwrites .* format"),
    "no __call__": (
        ["--reward_funcs", "cls", "--external_plugins", "{tmp}/mute.py"],
        r"--reward_funcs cls: .*__call__",
    ),
    "several outputs": (["--reward_model", "{model}"], r"--reward_model .*: has 2 outputs; a model with one is needed"),
    "no head": (["--reward_model", "{tmp}/headless"], r"--reward_model .*: its weights lack score.weight"),
    "no rows": (["--dataset", "arithmetic#0"], r"--dataset arithmetic#0: #0 is not a number of rows"),
    "fewer rows": (["--dataset", "arithmetic#-3"], r"--dataset arithmetic#-3: #-3 is not a number of rows"),
    "too many rows": (["--dataset", "arithmetic#9999"], r"--dataset arithmetic#9999: .*more rows than there are"),
    "mixed layouts": (["--dataset", "{tmp}/mixed.jsonl"], r"--dataset .*: row 1: no query, which other rows have"),
    "a column of ours": (["--dataset", "{tmp}/ids.jsonl"], r"--dataset: rename its column prompt_ids"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    case, model_folder, plugin, tmp_path, no_model, monkeypatch, capsys
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.jsonl").write_text('{"text": "a", "label": 1}\n')
    (tmp_path / "ask.jsonl").write_text('{"question": "Why?"}\n')
    (tmp_path / "mixed.jsonl").write_text('{"question": "Why?"}\n{"query": "Who?"}\n')
    (tmp_path / "ids.jsonl").write_text('{"question": "Why?", "prompt_ids": [1]}\n')
    (tmp_path / "fails.py").write_text("import math\nmath.nothing\n")
    (tmp_path / "idle.py").write_text("x = 1\n")
    (tmp_path / "thief.py").write_text("from rewards import orms\norms['format'] = len\n")
    (tmp_path / "mute.py").write_text("from rewards import orms\nclass A: pass\norms['cls'] = A\n")
    if case == "no head":
        shutil.copytree(model_folder, tmp_path / "headless")
        config = json.loads((model_folder / "config.json").read_text())
        (tmp_path / "headless/config.json").write_text(json.dumps(config | {"num_labels": 1, "id2label": {"0": "a"}}))
    if case == "no weights":
        shutil.copytree(model_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(ROOT)
    flags, message = BAD_INPUT[case]
    words = [word.replace("{tmp}", str(tmp_path)).replace("{model}", str(model_folder)) for word in flags]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_for(model_folder, plugin, tmp_path / "out"), *words])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and re.search(f"^train.py: {message}", captured.err), captured.err


def test_bad_input_with_torchrun_is_said_once(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, num_generations=5)
    result = run_train(*flags, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("--num_generations 5: does not divide the 32 completions") == 1


def test_a_failing_reward_ends_the_run_with_its_name(model_folder, tmp_path):
    (tmp_path / "bad.py").write_text('from rewards import orms\norms["bad"] = lambda completions, **kw: 1 / 0\n')
    flags = flags_for(model_folder, tmp_path / "bad.py", tmp_path / "out", reward_funcs="bad")
    result = run_train(*flags, check=False)
    assert result.returncode == 1 and re.search(
        r"^train.py: reward bad, step 1, row 0: .*ZeroDivision", result.stderr, re.M
    ), result.stderr
    assert "Traceback" not in result.stderr and list((tmp_path / "out").glob("failed-reward-*.json"))


# Small parts ----------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_decays():
    def rates(kind, ratio=0.2, steps=10):
        args = train.parse_args(["--dataset", "x", "--lr_scheduler_type", kind, "--warmup_ratio", str(ratio)])
        return [train.schedule(args, step, steps) for step in range(steps)]

    assert rates("constant") == [0.5] + [1.0] * 9
    assert rates("linear") == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = rates("cosine", 0.0)
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.5) and cosine == sorted(cosine, reverse=True)


def test_without_flags_the_demo_runs_and_prints_its_command(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(train, "train", lambda args, world: seen.update(vars(args)))
    train.main([])
    assert capsys.readouterr().out.startswith(f"python train.py {train.DEMO} --torch_dtype ")
    assert seen["dataset"] == ["arithmetic"] and seen["val_dataset"] == ["arithmetic-test"]
    train.main(["demo", "--use_vllm", "true", "--max_steps", "7"])
    assert seen["use_vllm"] and seen["max_steps"] == 7 and seen["dataset"] == ["arithmetic"]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_demo_has_the_same_batch_in_any_number_of_processes(size):
    args = train.parse_args(train.demo(dist.World(0, size, torch.device("cpu"))))
    train.check(args, size)
    assert size * args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert size * args.per_device_eval_batch_size == 256


def test_help_names_every_flag_of_the_spec(capsys):
    spec = ROOT.parent / "shared" / "SPEC.md"
    if not spec.exists():
        pytest.skip("the spec is not beside the repository")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    text = spec.read_text().split("## Flags")[1].split("## Semantics")[0]
    names = set(re.findall(r"--[a-z][a-z0-9_]+", text.replace("adam_beta1/2", "adam_beta1")))
    assert names and not [name for name in names if name not in shown]


def test_the_demo_model_answers_in_the_format_of_its_example(tokenizer):
    """The real model, one group: what it samples is text, and its log-probabilities are those of the trainer."""
    import data
    import grpo
    from sampler import ModelSampler

    model = train.AutoModelForCausalLM.from_pretrained(train.EMBEDDED_MODEL, dtype=torch.float32).eval()
    grpo.prepare(model)
    rows, _ = data.encode(data.load_rows(["arithmetic#2"]), tokenizer)
    prompts = [row["prompt_ids"] for row in rows for _ in range(4)]
    sampler = ModelSampler(model, eos_token_ids=[2], max_new_tokens=32, temperature=0.9)
    completions = sampler.generate(prompts, range(8))
    with torch.no_grad():
        logps, _, _ = grpo.completion_logps(model, prompts, [c.ids for c in completions], 0.9)
    for row, completion in zip(logps, completions):
        torch.testing.assert_close(row[: len(completion.ids)], torch.tensor(completion.logps), atol=1e-3, rtol=0)
    assert sum("<think>" in tokenizer.decode(c.ids) for c in completions) >= 4


def test_what_is_trained_on_is_shared_out_by_tokens():
    rng = random.Random(0)
    for count in (0, 1, 2, 7, 64):
        sizes = [rng.randrange(1, 50) for _ in range(count)]
        for parts in (1, 2, 3, 8):
            shares = train.split_evenly(range(count), sizes, parts)
            assert len(shares) == parts and sum(shares, []) == list(range(count))
            totals = [sum(sizes[i] for i in share) for share in shares]
            assert all(abs(t - sum(sizes) / parts) <= max(sizes) for t in totals if sizes)
