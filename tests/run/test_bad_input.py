"""Bad input ends with one line that names flag, value and what works, before a model is loaded."""

import json
import logging
import re
import shlex
import shutil

import pytest
import torch
import transformers
from conftest import ROOT, flags_for, run_train
from fixtures.rewards.classifier import save_classifier
from processes import run_forked
from safetensors.torch import load_file, save_file

import lora
import rewards
import train
from run.checkpoints import save_adapters


@pytest.fixture
def no_model(monkeypatch):
    """Loading weights is an error of its own kind here."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


BAD_INPUT = {
    "G that divides nothing": (
        ["--num_generations", "5"],
        r"--num_generations 5: .*16 completions.* 2, 4, 8, 16",
    ),
    "G of evaluations": (
        ["--val_dataset", "arithmetic-test", "--per_device_eval_batch_size", "6"],
        r"--num_generations_eval 4: .*6 completions.* 2, 3, 6",
    ),
    "unknown reward": (
        ["--reward_funcs", "acuracy"],
        r"--reward_funcs acuracy: .*did you mean accuracy",
    ),
    "weights": (
        ["--reward_weights", "1", "2", "3"],
        r"--reward_weights .*1.*2.*3.*: .*2.* numbers",
    ),
    "no reward": (["--reward_funcs"], r"--reward_funcs: "),
    "missing file": (["--dataset", "nowhere.jsonl"], r"--dataset nowhere.jsonl: no such file"),
    "empty dataset": (["--dataset", "{tmp}/empty.jsonl"], r"--dataset .*empty.jsonl: .*empty"),
    "no question": (
        ["--dataset", "{tmp}/columns.jsonl"],
        r"--dataset .*columns.jsonl: .*text, label",
    ),
    "no reference": (
        ["--dataset", "{tmp}/ask.jsonl", "--reward_funcs", "accuracy"],
        r"--reward_funcs accuracy: ",
    ),
    "system path": (
        ["--system", "examples/nowhere.txt"],
        r"--system examples/nowhere.txt: no such file",
    ),
    "nobody to report to": (
        ["--report_to", "tensorboard", "trackio"],
        r"--report_to trackio: trackio is not installed; pip install trackio, or ",
    ),
    "beta of 1": (["--adam_beta2", "1"], r"--adam_beta2: '1': a number from 0 to "),
    "no weights": (["--model", "{tmp}/bare"], r"--model .*bare: no weights in this folder"),
    "output_dir below a file": (
        ["--output_dir", "{tmp}/ask.jsonl/out"],
        r"--output_dir .*out: cannot be made",
    ),
    "output_dir of no name": (["--output_dir", ""], r"--output_dir '': names no folder"),
    "broken tokenizer": (
        ["--model", "{tmp}/garbled"],
        r"--model .*garbled: its tokenizer cannot be read from tokenizer.json, .* \(",
    ),
    "dtype": (["--torch_dtype", "bfloat17"], r"--torch_dtype: .*bfloat17.*bfloat16"),
    "output_dir is a file": (
        ["--output_dir", "{tmp}/ask.jsonl"],
        r"--output_dir .*ask.jsonl: is a file",
    ),
    "model": (["--model", "models/nowhere"], r"--model models/nowhere: "),
    "target": (["--target_modules", "c_attn"], r"--target_modules c_attn: .*q_proj"),
    "unknown flag": (
        ["--learning_rat", "1"],
        r"--learning_rat: no such flag; did you mean --learning_rate",
    ),
    "not a number": (["--epsilon", "much"], r"--epsilon: 'much': a number from 0 works"),
    "not true": (["--log_completions", "yes"], r"--log_completions: 'yes': true or false works"),
    "temperature": (["--temperature", "0"], r"--temperature: '0': a number above 0 works"),
    "G of one": (
        ["--num_generations", "1"],
        r"--num_generations: '1': a whole number from 2 works",
    ),
    "resume": (
        ["--resume_from_checkpoint", "nowhere"],
        r"--resume_from_checkpoint nowhere: no checkpoint there",
    ),
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
    "plugin without .py": (
        ["--external_plugins", "{tmp}/bare_name"],
        r"--external_plugins .*bare_name: registers no reward",
    ),
    "plugin registers nothing": (
        ["--external_plugins", "{tmp}/idle.py"],
        r"--external_plugins .*: registers no reward",
    ),
    "plugin overwrites": (
        ["--external_plugins", "{tmp}/thief.py"],
        r"--external_plugins .*: overwrites .* format",
    ),
    "no __call__": (
        ["--reward_funcs", "cls", "--external_plugins", "{tmp}/mute.py"],
        r"--reward_funcs cls: .*__call__",
    ),
    "several outputs": (
        ["--reward_model", "{model}"],
        r"--reward_model .*: has 2 outputs; a model with one is needed",
    ),
    "no head": (
        ["--reward_model", "{tmp}/headless"],
        r"--reward_model .*: its weights lack score.weight",
    ),
    "no rows": (
        ["--dataset", "arithmetic#0"],
        r"--dataset arithmetic#0: #0 is not a number of rows",
    ),
    "fewer rows": (
        ["--dataset", "arithmetic#-3"],
        r"--dataset arithmetic#-3: #-3 is not a number of rows",
    ),
    "too many rows": (
        ["--dataset", "arithmetic#9999"],
        r"--dataset arithmetic#9999: .*more rows than there are",
    ),
    "mixed layouts": (
        ["--dataset", "{tmp}/mixed.jsonl"],
        r"--dataset .*: row 1: no query, which other rows have",
    ),
    "a column of ours": (
        ["--dataset", "{tmp}/ids.jsonl"],
        r"--dataset .*: rename its column prompt_ids",
    ),
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
    (tmp_path / "bare_name").write_text("x = 1\n")
    (tmp_path / "thief.py").write_text("from rewards import orms\norms['format'] = len\n")
    (tmp_path / "mute.py").write_text("from rewards import orms\nclass A: pass\norms['cls'] = A\n")
    if case == "no head":
        shutil.copytree(model_folder, tmp_path / "headless")
        config = json.loads((model_folder / "config.json").read_text())
        (tmp_path / "headless/config.json").write_text(
            json.dumps(config | {"num_labels": 1, "id2label": {"0": "a"}})
        )
    if case == "no weights":
        shutil.copytree(
            model_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
        )
    if case == "broken tokenizer":
        shutil.copytree(model_folder, tmp_path / "garbled")
        (tmp_path / "garbled/tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    monkeypatch.chdir(ROOT)
    flags, message = BAD_INPUT[case]
    words = [
        word.replace("{tmp}", str(tmp_path)).replace("{model}", str(model_folder)) for word in flags
    ]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_for(model_folder, plugin, tmp_path / "out"), *words])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and re.search(f"^train.py: {message}", captured.err), (
        captured.err
    )


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def wider(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))


def not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN_WEIGHTS = {
    "truncated": (truncated, r"model.safetensors cannot be read \("),
    "of other shapes": (wider, r".*mlp.* is \[32, 48\] in its files and \[32, 56\] by its config"),
    "not finite": (not_finite, "model.norm.weight holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_weights_that_cannot_be_trained_are_one_line(case, model_folder, plugin, tmp_path, capsys):
    damage, message = BROKEN_WEIGHTS[case]
    model = shutil.copytree(model_folder, tmp_path / "model")
    damage(model)
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_for(model, plugin, tmp_path / "out")])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1
    assert re.search(f"^train.py: --model .*model: {message}", captured.err), captured.err


def test_no_table_of_the_weights_stands_in_front_of_the_line(
    model_folder, plugin, tmp_path, capsys
):
    """transformers prints one where weights are of other shapes, by a handler of its own."""
    wider(shutil.copytree(model_folder, tmp_path / "model"))
    printed = []
    handler = logging.Handler()
    handler.emit = printed.append
    transformers.utils.logging.add_handler(handler)
    try:
        refusal(flags_for(tmp_path / "model", plugin, tmp_path / "out"), capsys)
    finally:
        transformers.utils.logging.remove_handler(handler)
    assert not printed


# Files of a folder that are damaged ---------------------------------------------------------------


def damages(whole: bytes, name: str) -> dict[str, bytes]:
    found = {"empty": b"", "half": whole[: len(whole) // 2], "garbled": b"\x00\xff\x13\xfe" * 50}
    if name.endswith(".json"):
        values = ("[1]", '"y"', "null", "3", '{"eos_token_id": "y"}', '{"eos_token_id": [0, "y"]}')
        found |= {text: text.encode() for text in values}
    return found


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """A model's folder, a reward model's and adapters', by their flag, and the first two pickled."""
    place = tmp_path_factory.mktemp("folders")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    lora.inject(model, 2, 4)
    weights = dict(model.named_parameters())
    save_adapters(model, weights, place / "adapters", str(model_folder), ["all-linear"])
    found = {"--model": model_folder, "--reward_model": place / "reward"}
    save_classifier(place / "reward")
    for flag, folder in list(found.items()):
        pickled = shutil.copytree(folder, place / f"pickled{flag}")
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
        found[f"{flag} pickled"] = pickled
    return found | {"--adapters": place / "adapters"}


IN_A_FOLDER = {
    "--model": ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"],
    "--reward_model": ["config.json", "model.safetensors", "tokenizer.json"],
    "--adapters": ["adapter_config.json", "adapter_model.safetensors"],
    "--model pickled": ["pytorch_model.bin"],
    "--reward_model pickled": ["pytorch_model.bin"],
}
for each in ("--model", "--reward_model"):
    IN_A_FOLDER[each] += ["tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("which, name", [(f, name) for f in IN_A_FOLDER for name in IN_A_FOLDER[f]])
def test_a_damaged_file_of_a_folder_is_one_line_that_names_flag_and_folder(
    which, name, folders, model_folder, plugin, tmp_path, capsys
):
    flag = which.split()[0]
    for damage, content in damages((folders[which] / name).read_bytes(), name).items():
        folder = tmp_path / damage.replace("/", "") / "folder"
        shutil.copytree(folders[which], folder)
        (folder / name).write_bytes(content)
        said = refusal(flags_for(model_folder, plugin, tmp_path / "out") + [flag, folder], capsys)
        assert said.startswith(f"train.py: {flag} {folder}: "), (damage, said)


@pytest.mark.parametrize("name", ["hidden_size", "rms_norm_eps", "num_attention_heads"])
def test_a_value_of_another_type_in_a_models_configuration_is_one_line(
    name, model_folder, capsys, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: "nine"}))
    words = ["--model", str(folder), "--dataset", "arithmetic", "--reward_funcs", "format"]
    with pytest.raises(SystemExit) as end:
        train.main([*words, "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert said.startswith(f"train.py: --model {folder}: its config.json cannot be used ("), said
    assert name in said and "nine" in said


@pytest.mark.parametrize("name", ["r", "lora_alpha", "lora_dropout", "base_model_name_or_path"])
def test_a_value_of_another_type_in_an_adapters_configuration_is_one_line(
    name, folders, plugin, tmp_path, capsys
):
    folder = shutil.copytree(folders["--adapters"], tmp_path / "folder")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {name: ["y"]}))
    said = refusal(flags_for(folder, plugin, tmp_path / "out"), capsys)
    assert said.startswith(f"train.py: --model {folder}: adapter_config.json says {name} "), said


def test_adapters_that_are_not_finite_are_not_taken_for_the_model(
    folders, model_folder, plugin, tmp_path, capsys
):
    folder = shutil.copytree(folders["--adapters"], tmp_path / "folder")
    weights = load_file(folder / "adapter_model.safetensors")
    min(weights.items())[1][0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    said = refusal(flags_for(folder, plugin, tmp_path / "out"), capsys)
    assert said.startswith(f"train.py: --adapters {folder}: model.") and "lora_A holds" in said


def refusal(words, capsys) -> str:
    """The one line with which train.py ends."""
    rewards.orms.pop("vowels", None)
    with pytest.raises(SystemExit) as stop:
        train.main([str(word) for word in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said


def test_bad_input_with_torchrun_is_said_once(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, num_generations=5)
    result = run_train(*flags, processes=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("--num_generations 5: does not divide the 32 completions") == 1


def test_a_failing_reward_ends_the_run_with_its_name(model_folder, tmp_path):
    (tmp_path / "bad.py").write_text(
        'from rewards import orms\norms["bad"] = lambda completions, **kw: 1 / 0\n'
    )
    flags = flags_for(model_folder, tmp_path / "bad.py", tmp_path / "out", reward_funcs="bad")
    said = run_forked(flags, 1, tmp_path / "run", status=1)
    assert re.search(r"^train.py: reward bad, step 1, row 0: .*ZeroDivision", said, re.M), said
    assert "Traceback" not in said
    assert list((tmp_path / "out").glob("failed-reward-*.json"))
