"""Flags: where they are declared, what a file and the command line say, how soon a wrong one is told."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing

import pytest
from conftest import ROOT, flags_for, train_here

import grpo
import train
from run import combinations, flags

# Flags of the spec that are not there yet.
LATER = {"--chat_template_kwargs", "--response_prefix"}


def refused(*words, capsys) -> str:
    """The one line that these flags end with."""
    with pytest.raises(SystemExit) as end:
        flags.parse_args([str(word) for word in words])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("train.py: ")


def test_a_flag_is_a_field_of_the_module_that_acts_on_it():
    args = flags.parse_args(["--dataset", "x"])
    for field in dataclasses.fields(grpo.Options):
        _, text, *_ = typing.get_args(field.type)
        assert text and (getattr(args, field.name) == field.default or field.default is None)
    assert args.epsilon == 0.2 and args.reward_funcs == [] and args.target_modules == ["all-linear"]
    assert args.num_generations_eval == args.num_generations == 8
    assert flags.parse_args(["--dataset", "x", "--train_type", "full"]).learning_rate == 1e-6


def test_flags_types_and_defaults_are_those_of_the_version_before():
    """Every flag that train.py had when its parser was written by hand, and its default then, but
    for two whose defaults are the guide's system's (gradient_checkpointing, weight_decay)."""
    before = json.loads((ROOT / "tests" / "fixtures" / "defaults.json").read_text())
    now = vars(flags.parse_args(["--dataset", "x"]))
    assert {name: now[name] for name in before} == before


# What ms-swift 4.6 has, and its sources the papers.
FAMILY = {"advantage_estimator": "grpo", "loss_type": "grpo", "importance_sampling_level": "token"}
FAMILY |= {"scale_rewards": None, "epsilon_high": None, "delta": None, "tau_pos": 1.0}
FAMILY |= {"tau_neg": 1.05, "kl_in_reward": False, "kl_unbiased": False, "entropy_coef": 0.0}
FAMILY |= {"top_entropy_quantile": 1.0, "certain_tail": 1.0, "off_policy_sequence_mask_delta": None}
FAMILY |= {"overlong_filter": False, "dynamic_sample": False, "max_resample_times": 3}
FAMILY |= {"steps_per_generation": None, "generation_batch_size": None}
FAMILY |= {"rollout_importance_sampling_mode": "off", "rollout_importance_sampling_threshold": 2.0}
FAMILY |= {"sync_ref_model": False, "ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6}
FAMILY |= {"soft_max_length": 512, "soft_cache_length": 102, "response_prefix": ""}
FAMILY |= {"trust_remote_code": False, "plain": False, "log_tokens": 0, "log_tokens_steps": None}


def test_without_flags_the_objective_is_the_papers():
    now = vars(flags.parse_args(["--dataset", "x"]))
    assert {name: now[name] for name in FAMILY} == FAMILY
    estimators = {"rloo": True, "reinforce_plus_plus": True}
    for name, in_reward in estimators.items():
        args = flags.parse_args(["--dataset", "x", "--advantage_estimator", name])
        assert args.kl_in_reward is in_reward


def test_what_is_typed_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset: [a, b]\nlearning_rate: 3e-4\nbeta: 0\nuse_vllm: true\nmax_steps:\n")
    args = flags.parse_args(["--config", str(file), "--beta", "0.1", "--dataset", "c"])
    assert (args.dataset, args.learning_rate, args.beta) == (["c"], 3e-4, 0.1)
    assert args.use_vllm is True and args.max_steps is None and args.epsilon == 0.2
    assert not hasattr(args, "config")


def test_args_json_of_a_run_is_such_a_file(model_folder, plugin, tmp_path):
    words = flags_for(model_folder, plugin, tmp_path / "a", max_steps=1, reward_weights=[1, -0.5])
    train_here(*words)
    again = flags.parse_args(["--config", str(tmp_path / "a" / "args.json")])
    assert vars(again) == vars(flags.parse_args(words))
    train_here("--config", tmp_path / "a" / "args.json", "--output_dir", tmp_path / "b")
    told = json.loads((tmp_path / "b" / "args.json").read_text())
    assert told | {"output_dir": str(tmp_path / "a")} == vars(again)


WRONG_FILES = {
    "unknown": (
        "dataset: x\nlearning_rat: 1",
        "--learning_rat: no such flag; did you mean --learning_rate?",
    ),
    "type": ("dataset: x\nepsilon: much", "--epsilon: 'much': a number from 0 works"),
    "list": ("dataset: x\nseed: [1, 2]", "--seed: takes one value, not the list [1, 2]"),
    "not true": ("dataset: x\nuse_vllm: 3", "--use_vllm: '3': true or false works"),
    "no flags": ("- a\n- b", "holds no flags; a line 'flag: value' for each works"),
    "no yaml": ("a: [1, 2", "is not YAML "),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_one_line(case, tmp_path, capsys):
    text, said = WRONG_FILES[case]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert refused("--config", file, capsys=capsys).startswith(f"--config {file}: {said}")


def test_a_file_that_is_not_there_is_one_line(capsys):
    line = refused("--config", "nowhere.yaml", capsys=capsys)
    assert line == "--config nowhere.yaml: no such file or directory; a YAML or JSON file works"


def test_a_run_without_a_dataset_is_one_line(capsys):
    assert refused("--reward_funcs", "format", capsys=capsys).startswith("--dataset: ")


WRONG = [
    ["--learning_rat", "1"],
    ["--epsilon", "much"],
    ["demo", "--x"],
    ["--dataset", "x", "--num_generations", "5"],
    ["--config", "nowhere.yaml"],
]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_flag_is_told_before_anything_heavy_is_imported(words):
    program = f"import sys, runpy; sys.argv = {['train.py', *words]!r}\ntry:\n"
    program += "    runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit as end:\n"
    program += "    heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
    program += "    print(end.code, *sorted(heavy))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2\n" and done.stderr.count("\n") == 1, done.stderr


def test_a_wrong_flag_is_told_at_once():
    """In processor time, which a busy machine does not lengthen, and without what imports slowly."""
    times = []
    for _ in range(3):
        before = os.times()
        command = [sys.executable, "train.py", "--learning_rat", "1"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        after = os.times()
        used = after.children_user + after.children_system
        times.append(used - before.children_user - before.children_system)
        assert done.returncode == 2 and "did you mean --learning_rate?" in done.stderr
    assert min(times) < 1.0, times
    heavy = "import sys, run.flags; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT).returncode == 0


def test_without_flags_the_demo_runs_and_prints_its_command(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(train, "train", lambda args, world: seen.update(vars(args)))
    train.main([])
    assert capsys.readouterr().out.startswith(f"python train.py {flags.DEMO} --torch_dtype ")
    assert seen["dataset"] == ["arithmetic"] and seen["val_dataset"] == ["arithmetic-test"]
    train.main(["demo", "--use_vllm", "true", "--max_steps", "7"])
    assert seen["use_vllm"] and seen["max_steps"] == 7 and seen["dataset"] == ["arithmetic"]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_demo_has_the_same_batch_in_any_number_of_processes(size):
    args = flags.parse_args(flags.demo(size, bfloat16=False))
    combinations.check(args, size)
    assert size * args.per_device_train_batch_size * args.gradient_accumulation_steps == 256
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
    assert names and not [name for name in names - LATER if name not in shown]
