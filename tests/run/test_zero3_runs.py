"""Whole runs of train.py with ZeRO-3: from stage to stage, and checkpoints of sharded models."""

import re
import shutil

import pytest
import torch
import transformers
from conftest import checkpoint_weights, flags_for, read_metrics, timeless, tiny_model
from processes import in_processes, run_forked
from safetensors.torch import load_file, save_file
from test_zero3 import SAMPLED, sampled

import dist
import fast
import lora
import train
from run import setup
from run.checkpoints import optimizer_state
from run.folder import KEPT

# From stage to stage ------------------------------------------------------------------------------

LEGS = {
    "full": [(4, {"deepspeed": "zero2"}), (2, {"deepspeed": "zero3"}), (1, {"deepspeed": "none"})],
    "lora": [
        (
            2,
            {
                "deepspeed": "zero3",
                "ds3_gather_for_generation": "false",
                "gradient_checkpointing": "true",
            },
        ),
        (4, {"deepspeed": "zero2"}),
        (1, {"deepspeed": "zero3"}),
    ],
}


@pytest.mark.parametrize("train_type", LEGS)
def test_a_run_goes_on_in_other_processes_and_another_stage(
    train_type, model_folder, plugin, tmp_path
):
    """Two steps in each leg, 16 completions a step, against all of them in one process; and
    checkpoints load."""
    changes = {"train_type": train_type, "lr_scheduler_type": "constant", "learning_rate": 5e-4}
    changes |= {"save_steps": 2, "num_generations": 8, "gradient_accumulation_steps": 2}
    steps = 2 * len(LEGS[train_type])
    one = {"per_device_train_batch_size": 8, "max_steps": steps}
    flags = flags_for(model_folder, plugin, tmp_path / "one", **changes | one)
    run_forked(flags, 1, tmp_path / "said-one")
    for leg, (processes, own) in enumerate(LEGS[train_type]):
        more = {"per_device_train_batch_size": 8 // processes, "max_steps": 2 * leg + 2} | own
        if leg:
            more["resume_from_checkpoint"] = "true"
        flags = flags_for(model_folder, plugin, tmp_path / "legs", **changes | more)
        run_forked(flags, processes, tmp_path / f"said-{leg}")
    lines, expected = (read_metrics(tmp_path / name) for name in ("legs", "one"))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line, other in zip(timeless(lines), timeless(expected)):
        line.pop("epoch"), other.pop("epoch")
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    for step in range(2, steps + 1, 2):
        here, there = (
            checkpoint_weights(tmp_path / name / f"checkpoint-{step}") for name in ("legs", "one")
        )
        assert here.keys() == there.keys()
        for name, value in there.items():
            torch.testing.assert_close(
                here[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert max(line["kl"] for line in lines) > 1e-4


def test_ranks_without_completions_take_part(model_folder, plugin, tmp_path):
    """Three ranks and groups of two, some of which earn the same and are not trained on; one prompt
    in an evaluation."""
    changes = {"num_generations": 2, "max_completion_length": 1, "beta": 0, "train_type": "full"}
    # AdamW makes a full step of what is but rounding, too.
    changes |= {"max_steps": 2, "learning_rate": 1e-5, "dataset": "arithmetic"}
    changes |= {"val_dataset": "arithmetic-test#4", "eval_steps": 1, "num_generations_eval": 1}
    one = {"per_device_train_batch_size": 12, "per_device_eval_batch_size": 3}
    flags = flags_for(model_folder, plugin, tmp_path / "one", **changes | one)
    run_forked(flags, 1, tmp_path / "said-one")
    changes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    changes |= {"per_device_eval_batch_size": 1, "deepspeed": "zero3"}
    for gather in ("true", "false"):
        changes["ds3_gather_for_generation"] = gather
        flags = flags_for(model_folder, plugin, tmp_path / gather, **changes)
        run_forked(flags, 3, tmp_path / f"said-{gather}")
        for evaluations in (False, True):
            pairs = (
                timeless(read_metrics(tmp_path / name, evaluations)) for name in ("one", gather)
            )
            for expected, line in zip(*pairs, strict=True):
                assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert 0 < read_metrics(tmp_path / "one")[0]["zero_std_groups"] < 1


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_sharded_checkpoint_loads_in_its_own_type(train_type, model_folder, plugin, tmp_path):
    from transformers import AutoModelForCausalLM

    changes = {"torch_dtype": "bfloat16", "deepspeed": "zero3", "train_type": train_type}
    changes |= {"max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 4}
    run_forked(flags_for(model_folder, plugin, tmp_path, **changes), 2, tmp_path / "said")
    folder = tmp_path / "checkpoint-1"
    state = load_file(folder / "optimizer.safetensors")
    masters = {n.removeprefix("master."): v for n, v in state.items() if n.startswith("master.")}
    if train_type == "full":
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(loaded).__name__ == "LlamaForCausalLM" and loaded.dtype == torch.bfloat16
        assert not any(info.values())
        parameters = dict(loaded.named_parameters())
    else:
        peft = pytest.importorskip("peft")
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        loaded = peft.PeftModel.from_pretrained(base, folder)
        named = [(n, p) for n, p in loaded.named_parameters() if "lora_" in n]
        parameters = {
            n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in named
        }
    assert parameters.keys() == masters.keys()
    assert all(torch.equal(p, masters[name].to(p.dtype)) for name, p in parameters.items())


@pytest.fixture
def checkpoint(model_folder, tmp_path):
    """A checkpoint of adapters of rank 8, as a run would leave it after no step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    lora.inject(model, 8, 32)
    folder = tmp_path / "checkpoint-0"
    folder.mkdir()
    state = optimizer_state(dist.ZeroAdamW(model.named_parameters()))
    save_file(state, folder / "optimizer.safetensors")
    save_file({"nothing": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "trainer_state.json").write_text('{"step": 0, "num_tokens": 0, "unlogged": []}')
    return folder


OTHERS = {
    "rank": (
        "--lora_rank 4",
        r"lora_A is \[8, \d+\] there and \[4, \d+\] in this run; .*--lora_rank",
    ),
    "layers": (
        "--target_modules q_proj",
        r"down_proj.lora_A is \[8, 48\] there and absent in this run",
    ),
    "all weights": (
        "--train_type full",
        r"embed_tokens.weight is absent there and \[\d+, 32\] in this run",
    ),
    "model": (
        "--model {model}",
        r"lora_A is \[8, 48\] there and \[8, 96\] in this run; the --model",
    ),
    "damage": ("", r"not a whole checkpoint \("),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_runs_checkpoint_is_refused_before_a_model_is_loaded(
    case, checkpoint, model_folder, plugin, tmp_path, monkeypatch, capsys
):
    flags, message = OTHERS[case]
    if case == "model":
        shutil.copytree(model_folder, tmp_path / "model")
        tiny_model(vocab_size=49152, intermediate_size=96).save_pretrained(tmp_path / "model")
    if case == "damage":
        (checkpoint / "optimizer.safetensors").write_bytes(b"cut short")
    monkeypatch.setattr(setup, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    changes = {"resume_from_checkpoint": checkpoint, "train_type": "lora"}
    words = flags_for(model_folder, plugin, tmp_path / "out", **changes)
    with pytest.raises(SystemExit) as stop:
        train.main([*words, *flags.replace("{model}", str(tmp_path / "model")).split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"train.py: --resume_from_checkpoint {checkpoint}: ")
    assert re.search(message, said), said


# What an optimizer's state and a reference may be that belong together and not to this run.
UNFIT = {
    "a parameter less": (lambda tensors, name: tensors.pop(name), "absent there and [48, 32]"),
    "another shape": (
        lambda tensors, name: tensors.update({name: torch.ones(1)}),
        "[1] there and [48, 32]",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("file", ["optimizer.safetensors", "reference.safetensors"])
@pytest.mark.parametrize(("ranks", "stage"), [(1, "none"), (2, "zero2"), (2, "zero3")])
def test_state_of_other_parameters_is_refused_on_any_number_of_ranks(
    ranks, stage, file, case, model_folder, plugin, tmp_path
):
    spoil, message = UNFIT[case]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    folder, name = tmp_path / "checkpoint-0", "model.layers.0.mlp.up_proj.weight"
    model.save_pretrained(folder)
    tensors = {
        "optimizer.safetensors": optimizer_state(dist.ZeroAdamW(model.named_parameters())),
        "reference.safetensors": {n: p.detach().clone() for n, p in model.named_parameters()},
    }
    prefixes = [f"{kind}." for kind in KEPT] if file == "optimizer.safetensors" else [""]
    for prefix in prefixes:
        spoil(tensors[file], prefix + name)
    for each, state in tensors.items():
        save_file(state, folder / each)
    (folder / "trainer_state.json").write_text('{"step": 0}')
    flags = flags_for(model_folder, plugin, tmp_path / "out", train_type="full", deepspeed=stage)
    flags += ["--resume_from_checkpoint", folder, "--sync_ref_model", "true"]
    said = run_forked(flags, ranks, tmp_path / "ranks", status=2)
    assert f"in {file} {name} is {message} in this run" in said and "Traceback" not in said, said
    assert said.count("train.py: ") == 1


# The parts of fast/ -------------------------------------------------------------------------------


def sample_all(world):
    return {"sampled": {case: sampled(world, *case, quick=fast) for case in SAMPLED}}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    tiny_model()  # transformers imports what it needs once, before the ranks fork
    return in_processes(2, tmp_path_factory.mktemp("two"), sample_all)


@pytest.mark.parametrize("gather, decoder", [(True, "TreeLlamaDecoder"), (False, "PackedDecoder")])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_sharded_model_with_quick_parts_samples_what_it_samples_whole(
    two_ranks, adapted, gather, decoder
):
    """The quickest decoder wants all of a model; layer by layer another one takes its place."""
    for rank in two_ranks:
        expected, _ = rank["sampled"][adapted, None]
        assert rank["sampled"][adapted, gather] == (expected, decoder)
