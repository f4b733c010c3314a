"""Models from the wild: what can be trained is, and what cannot be is told in one line."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    EMBEDDED_MODEL,
    checkpoint_weights,
    flags_for,
    read_metrics,
    tiny_model,
    train_here,
)
from safetensors.torch import load_file, save_file

import lora
import train
from data import UsageError
from run import models, trained

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
STATE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

RECURRENT = {
    "Mamba": {"state_size": 4},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "Qwen3Next": HEADS | {"layer_types": ["linear_attention", "full_attention"]},
    "Lfm2": HEADS | {"layer_types": ["conv", "full_attention"]},
    "FalconH1": HEADS | STATE | {"mamba_n_groups": 1},
    "RecurrentGemma": HEADS | {"lru_width": 32},
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_model_with_a_state_from_token_to_token_is_refused(kind):
    config = getattr(transformers, f"{kind}Config")(**SIZES | RECURRENT[kind])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match="^--model it: a .* layers, which keep a state"):
        models.refuse_recurrent(SimpleNamespace(model="it"), model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_attends_is_not(architecture):
    models.refuse_recurrent(SimpleNamespace(model="it"), tiny_model(architecture))


CONTEXTS = [
    (transformers.LlamaConfig(max_position_embeddings=77), 77),
    (transformers.GPT2Config(n_positions=78), 78),
    (transformers.MptConfig(max_seq_len=79), 79),
    (transformers.BloomConfig(), math.inf),
]


@pytest.mark.parametrize(("config", "tokens"), CONTEXTS, ids=lambda x: type(x).__name__)
def test_the_context_is_what_the_configuration_says_or_endless(config, tokens):
    assert models.context_of(config) == tokens


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("train.py: ") == 1 and "Traceback" not in said
    return said


def copy_of(model_folder, folder):
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_weights_that_lack_a_part_are_refused(model_folder, plugin, tmp_path, capsys):
    folder = copy_of(model_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, *flags_for(folder, plugin, tmp_path / "out"))
    assert f"--model {folder}: its weights lack model.layers.1.mlp.up_proj.weight; a whole" in said


def test_a_token_beyond_the_embeddings_is_refused(model_folder, plugin, tmp_path, capsys):
    folder = copy_of(model_folder, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    train_here(*flags_for(folder, plugin, tmp_path / "without", max_steps=1))  # no row has it
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Call <tool>"}\n' * 8)
    said = refused(capsys, *flags_for(folder, plugin, tmp_path / "out", dataset=rows))
    assert f"has <tool> as token {size}, but the model embeds {size} tokens" in said


@pytest.mark.parametrize("length", [400, 600])
def test_what_works_is_told_where_completions_are_too_long(
    length, model_folder, plugin, tmp_path, capsys
):
    """The context has 512 tokens, the rows some 150; nothing of 600 tokens fits beside them."""
    flags = flags_for(model_folder, plugin, tmp_path / "out", max_completion_length=length)
    said = refused(capsys, *flags)
    assert f"--max_completion_length {length}: with a prompt of " in said
    works = said.rpartition("; ")[2]
    numbers = [int(word) for word in works.replace("--max_length", "").split() if word.isdigit()]
    assert numbers and all(0 < number < 512 for number in numbers)


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"top_p": 0.9, "top_k": 20}, {}])
def test_a_generation_config_that_transformers_would_not_write_is_saved(
    settings, model_folder, plugin, tmp_path
):
    folder = copy_of(model_folder, tmp_path)
    said = {"eos_token_id": [2, 0], "do_sample": False, **settings}
    (folder / "generation_config.json").write_text(json.dumps(said))
    out = tmp_path / "out"
    train_here(*flags_for(folder, plugin, out, train_type="full", max_steps=1))
    kept = json.loads((out / "checkpoint-1" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [2, 0]
    assert {name: kept[name] for name in settings} == settings
    assert checkpoint_weights(out / "checkpoint-1")


def test_lora_says_which_experts_stay_frozen(capsys):
    config = transformers.MixtralConfig(**SIZES | HEADS, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lora.inject(model, 2, 4)
    world = SimpleNamespace(is_main=True)
    models.tell_frozen(world, model)
    said = capsys.readouterr().out
    assert said.startswith("--train_type lora: 4 weights that are no linear layers stay frozen (")
    dense = lora.inject(tiny_model(), 2, 4)
    models.tell_frozen(world, dense)
    assert not capsys.readouterr().out


def test_a_composite_configuration_ends_where_its_text_model_does(tokenizer):
    text = SimpleNamespace(eos_token_id=5)
    config = SimpleNamespace(get_text_config=lambda: text)
    policy = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[6, 7]))
    assert models.end_tokens(policy, SimpleNamespace(eos_token_id=8)) == [5, 6, 7, 8]


# Evaluation -------------------------------------------------------------------------------------


def test_a_share_that_nothing_evaluates_is_refused(model_folder, plugin, tmp_path, capsys):
    flags = flags_for(model_folder, plugin, tmp_path / "out", split_dataset_ratio=0.2)
    assert "--split_dataset_ratio 0.2: nothing evaluates on that share" in refused(capsys, *flags)
    both = [*flags, "--val_dataset", "arithmetic-test", "--eval_steps", "2"]
    assert "--split_dataset_ratio 0.2: --val_dataset has the rows" in refused(capsys, *both)


def test_an_evaluation_on_start_has_rows_and_the_run_ends_with_one(model_folder, plugin, tmp_path):

    changes = {"eval_on_start": "true", "dataset": "arithmetic#40", "split_dataset_ratio": 0.1}
    changes |= {"num_generations_eval": 1, "max_steps": 2}
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    assert [line["step"] for line in read_metrics(tmp_path, evaluations=True)] == [0, 2]


# Code that a model brings -----------------------------------------------------------------------

BRINGS = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

pathlib.Path({marker!r}).touch()

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

class OddForSequenceClassification(LlamaForSequenceClassification):
    config_class = OddConfig
"""


@pytest.fixture
def odd(model_folder, tmp_path, monkeypatch):
    """A model that transformers does not know, and a file that is there once its code has run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on standard input"))
    folder, marker = tmp_path / "odd", tmp_path / "ran"
    shutil.copytree(model_folder, folder)
    (folder / "odd.py").write_text(BRINGS.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "odd"}
    config["num_labels"] = 1
    config["auto_map"] = {
        "AutoConfig": "odd.OddConfig",
        "AutoModelForCausalLM": "odd.OddForCausalLM",
        "AutoModelForSequenceClassification": "odd.OddForSequenceClassification",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


def test_a_models_own_code_runs_where_it_is_allowed_alone(odd, plugin, tmp_path, capsys):
    folder, marker = odd
    words = [str(word) for word in flags_for(folder, plugin, tmp_path / "run", max_steps=1)]
    for command, at_fault in (
        (words, "--model"),
        ([*words, "--dry_run", "true"], "--model"),
        ([*words[:1], EMBEDDED_MODEL, *words[2:], "--reward_model", folder], "--reward_model"),
    ):
        assert words[0] == "--model"
        with pytest.raises(SystemExit) as ended:
            train_here(*command)
        said = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and not marker.exists()
        assert f"{at_fault} {folder}: brings Python of its own" in said
        assert "--trust_remote_code true" in said
    train_here(*words, "--trust_remote_code", "true")
    assert marker.exists() and len(read_metrics(tmp_path / "run")) == 1


def test_a_strangers_checkpoint_cannot_say_that_its_code_is_trusted(odd):
    folder, marker = odd
    words = {"trust_remote_code": True, "temperature": 0.5, "dataset": ["arithmetic"]}
    (folder / "args.json").write_text(json.dumps(words))
    checkpoint = trained.find(str(folder))
    args = trained.flags_of(checkpoint, (*trained.ASKING, "dataset"), {})
    assert args.temperature == 0.5 and not args.trust_remote_code
    with pytest.raises(UsageError, match="brings Python of its own"):
        models.model_config(args)
    assert not marker.exists()
    args = trained.flags_of(checkpoint, (*trained.ASKING, "dataset"), {"trust_remote_code": True})
    models.model_config(args)
    assert marker.exists()
