"""ZeRO-3 in real processes: against torch.optim.AdamW, against unsharded models, and from stage to stage."""

import gc
import os
import re
import shutil
import socket
import time

import pytest
import test_dist
import torch
import torch.multiprocessing as multiprocessing
from conftest import read_metrics, tiny_model
from safetensors.torch import load_file, save_file
from test_dist import BATCH, MAX_NORM, MICRO, STEPS, batch_of, learning_rate, loss_of, run_torch
from test_sampler import ENDS, prompts_of
from test_train import flags_for, timeless, weights
from torch.distributed.tensor import DTensor

import dist
import grpo
import lora
import train
from sampler import ModelSampler


def in_processes(ranks, folder, function, *args):
    """What function(rank, *args) returns in each of `ranks` processes that have met."""
    folder.mkdir(exist_ok=True)
    arguments = (ranks, str(folder), function, *args)
    multiprocessing.start_processes(meet, arguments, nprocs=ranks, start_method="fork")  # nothing to import anew
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def meet(rank, ranks, folder, function, *args):
    torch.set_num_threads(1)
    gc.freeze()  # live_bytes is of what comes now
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
    dist.stop()


def run_forked(flags, processes):
    """train.py in processes forked from this one, which need not import anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = (processes, port, [str(flag) for flag in flags])
    multiprocessing.start_processes(run_rank, arguments, nprocs=processes, start_method="fork")


def run_rank(rank, ranks, port, flags):
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    train.main(flags)


def whole_parameters(model):
    return {name: dist.whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


# Training -------------------------------------------------------------------------------------------------------


def twenty_steps(rank, dtype, sharded, state=None):
    """This rank's slice of each batch, in micro-batches → parameters, gradient norms, the optimizer's state."""
    model, ranks = test_dist.Model(dtype), torch.distributed.get_world_size()
    if sharded:
        dist.shard_parameters(model, [model.frozen, model.up, model.down])
        assert all(isinstance(p, DTensor) for p in model.parameters())
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": MAX_NORM}
    optimizer, norms = dist.ZeroAdamW(model.named_parameters(), **settings), []
    if state:
        optimizer.load_state_dict(load_file(state))
    for step in range(optimizer.steps, STEPS):
        ids, targets = batch_of(step)
        mine = torch.arange(BATCH * rank // ranks, BATCH * (rank + 1) // ranks)
        for part in mine.chunk(MICRO):
            optimizer.backward(dist.forward(loss_of, model, ids[part], targets[part]))
        assert all(p.grad is None for p in model.parameters())
        norms.append(optimizer.step(learning_rate(step)))
    return whole_parameters(model), norms, optimizer.state_dict()


@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_sharded_steps_equal_torch_adamw_in_one_process(ranks, tmp_path):
    """Tied weights, a frozen layer, and dimensions of 5, 7 and 13 that no number of ranks divides."""
    expected, expected_norms = run_torch()
    for parameters, norms, _ in in_processes(ranks, tmp_path, twenty_steps, torch.float32, True):
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        for name, value in parameters.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_in_bfloat16_the_stages_differ_by_the_rounding_of_sums(tmp_path):
    """ZeRO-2 sums the ranks' gradients in float32, ZeRO-3 in bfloat16: norms, weights and moments are close."""
    two, three = (
        in_processes(2, tmp_path / f"{sharded}", twenty_steps, torch.bfloat16, sharded) for sharded in (False, True)
    )
    for of_two, of_three in zip(two, three):
        assert of_two[1] == pytest.approx(of_three[1], rel=5e-3)
        for a, b in zip((of_two[0], of_two[2]), (of_three[0], of_three[2])):
            assert a.keys() == b.keys()
            for name in a:
                assert (a[name].float() - b[name].float()).norm() <= 0.02 * b[name].float().norm(), name


# Memory ---------------------------------------------------------------------------------------------------------


def live_bytes():
    """Of all tensors that this process has made, each memory once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bytes_a_parameter(rank, stage):
    """Held by this rank between two steps, and inside the forward pass's middle layer."""
    model = tiny_model(hidden_size=64, intermediate_size=192, num_hidden_layers=8, dtype=torch.bfloat16)
    if stage == "zero3":
        dist.shard_parameters(model, model.model.layers)
    optimizer = dist.ZeroAdamW(model.named_parameters(), shard=stage == "zero2")
    seen, size = [], sum(p.numel() for p in model.parameters())
    model.model.layers[4].self_attn.register_forward_pre_hook(lambda *_: seen.append(live_bytes()))
    for _ in range(2):
        logps, *_ = dist.forward(grpo.completion_logps, model, [[5, 6]], [[7, 8 + rank]], 1.0)
        optimizer.backward(logps.sum())
        optimizer.step(1e-3)
    del logps
    time.sleep(0.2)  # gloo's threads keep a tensor of the last collective for a moment
    return live_bytes() / size, seen[-1] / size


def test_each_rank_holds_its_share_of_everything(tmp_path):
    """Weights 2, master weights 4 and moments 8 bytes a parameter, of which with two ranks a half each is left."""
    for stage, expected in {"none": 14, "zero2": 2 + 12 / 2, "zero3": 14 / 2}.items():
        for between, within in in_processes(2, tmp_path / stage, bytes_a_parameter, stage):
            print(f"{stage}: {between:.2f} bytes a parameter between steps, {within:.2f} within the forward pass")
            assert between == pytest.approx(expected, rel=0.01)
            # Whole are one of eight layers, with the buffer that it was gathered in, and the embedding; activations.
            assert within < expected + 0.25 + (3 * 0.25 if stage == "zero3" else 0)


# Sampling -------------------------------------------------------------------------------------------------------


def sampled(rank, gather, adapted):
    model, prompts = tiny_model(), prompts_of(counts=(3, 5, 4))
    if adapted:
        torch.manual_seed(1)
        lora.inject(model, 3, 6)
        for _, layer in lora.layers(model):
            torch.nn.init.normal_(layer.lora_B)
    grpo.prepare(model)
    if gather is not None:
        dist.shard_parameters(model, model.model.layers)
    sampler = ModelSampler(model, eos_token_ids=ENDS, max_new_tokens=12, gather=gather is not False)
    optimizer, rounds = dist.ZeroAdamW(model.named_parameters()), []
    for mine in (slice(6 * rank, 6 * rank + 6), slice(0, 2 - 2 * rank)):  # the second rank gets none of the second
        completions = sampler.generate(prompts[mine], range(100)[mine])
        rounds.append([(c.ids, c.finished) for c in completions])
        assert gather is None or all(isinstance(p, DTensor) for p in model.parameters())
        # Training in between moves what is sampled from, and needs what was gathered to be no inference tensors.
        logps, *_ = dist.forward(grpo.completion_logps, model, prompts[:1], [[7, 8]], 1.0)
        optimizer.backward(logps.sum() / 2)
        optimizer.step(0.1)
    return rounds, sampler.decoder.__name__


@pytest.mark.parametrize("adapted", [False, True])
def test_a_sharded_model_samples_what_it_samples_whole(adapted, tmp_path):
    expected = in_processes(2, tmp_path / "whole", sampled, None, adapted)
    assert len({len(ids) for rounds, *_ in expected for ids, _ in rounds[0]}) > 3
    assert expected[1][0][1] == [] and expected[0][0][1] != expected[0][0][0][:2]
    for gather, decoder in ((True, "LlamaDecoder"), (False, "Decoder")):
        for there, here in zip(in_processes(2, tmp_path / f"{gather}", sampled, gather, adapted), expected):
            assert there == (here[0], decoder)


# Whole runs -----------------------------------------------------------------------------------------------------

LEGS = {
    "full": [(4, {"deepspeed": "zero2"}), (2, {"deepspeed": "zero3"}), (1, {"deepspeed": "none"})],
    "lora": [
        (2, {"deepspeed": "zero3", "ds3_gather_for_generation": "false", "gradient_checkpointing": "true"}),
        (4, {"deepspeed": "zero2"}),
        (1, {"deepspeed": "zero3"}),
    ],
}


@pytest.mark.parametrize("train_type", LEGS)
def test_a_run_goes_on_in_other_processes_and_another_stage(train_type, model_folder, plugin, tmp_path):
    """Two steps in each leg, 16 completions a step, against all of them in one process; and checkpoints load."""
    changes = {"train_type": train_type, "lr_scheduler_type": "constant", "learning_rate": 5e-4, "save_steps": 2}
    changes |= {"num_generations": 8, "gradient_accumulation_steps": 2}
    steps = 2 * len(LEGS[train_type])
    whole = flags_for(model_folder, plugin, tmp_path / "whole", **changes, max_steps=steps)
    run_forked([*whole, "--per_device_train_batch_size", 8], 1)
    for leg, (processes, flags) in enumerate(LEGS[train_type]):
        more = {"per_device_train_batch_size": 8 // processes, "max_steps": 2 * leg + 2, **flags}
        more |= {"resume_from_checkpoint": "true"} if leg else {}
        run_forked(flags_for(model_folder, plugin, tmp_path / "legs", **changes | more), processes)
    lines, expected = (read_metrics(tmp_path / name) for name in ("legs", "whole"))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    for line, other in zip(timeless(lines), timeless(expected)):
        line.pop("epoch"), other.pop("epoch")
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    for step in range(2, steps + 1, 2):
        here, there = (weights(tmp_path / name / f"checkpoint-{step}") for name in ("legs", "whole"))
        assert here.keys() == there.keys()
        for name, value in there.items():
            torch.testing.assert_close(here[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert max(line["kl"] for line in lines) > 1e-4


def test_ranks_without_completions_take_part(model_folder, plugin, tmp_path):
    """Three ranks and groups of two, some of which earn the same and are not trained on; one prompt in an evaluation."""
    changes = {"num_generations": 2, "max_completion_length": 1, "beta": 0, "train_type": "full", "max_steps": 2}
    changes |= {"learning_rate": 1e-5}  # AdamW makes a full step of what is but rounding, too
    changes |= {"val_dataset": "arithmetic-test#4", "eval_steps": 1, "num_generations_eval": 1}
    one = {"per_device_train_batch_size": 12, "per_device_eval_batch_size": 3}
    run_forked(flags_for(model_folder, plugin, tmp_path / "one", **changes | one), 1)
    flags = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1}
    for gather in ("true", "false"):
        flags |= {"deepspeed": "zero3", "ds3_gather_for_generation": gather}
        run_forked(flags_for(model_folder, plugin, tmp_path / gather, **changes | flags), 3)
        for evaluations in (False, True):
            pairs = (timeless(read_metrics(tmp_path / name, evaluations)) for name in ("one", gather))
            for expected, line in zip(*pairs, strict=True):
                assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert 0 < read_metrics(tmp_path / "one")[0]["zero_std_groups"] < 1


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_sharded_checkpoint_loads_in_its_own_type(train_type, model_folder, plugin, tmp_path):
    from transformers import AutoModelForCausalLM

    changes = {"torch_dtype": "bfloat16", "deepspeed": "zero3", "train_type": train_type, "max_steps": 1}
    run_forked(flags_for(model_folder, plugin, tmp_path, **changes | {"per_device_train_batch_size": 8}), 2)
    folder, state = tmp_path / "checkpoint-1", load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors")
    masters = {name.removeprefix("master."): value for name, value in state.items() if name.startswith("master.")}
    if train_type == "full":
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(loaded).__name__ == "LlamaForCausalLM" and loaded.dtype == torch.bfloat16
        assert not any(info.values())
        parameters = dict(loaded.named_parameters())
    else:
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
        named = [(n.removeprefix("base_model.model."), p) for n, p in loaded.named_parameters() if "lora_" in n]
        parameters = {name.replace(".default.weight", ""): p for name, p in named}
    assert parameters.keys() == masters.keys()
    assert all(torch.equal(p, masters[name].to(p.dtype)) for name, p in parameters.items())


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(model_folder, tmp_path):
    """A checkpoint of adapters of rank 8, as a run would leave it after no step."""
    model = lora.inject(train.AutoModelForCausalLM.from_pretrained(model_folder), 8, 32)
    folder = tmp_path / "checkpoint-0"
    folder.mkdir()
    save_file(dist.ZeroAdamW(model.named_parameters()).state_dict(), folder / "optimizer.safetensors")
    (folder / "trainer_state.json").write_text('{"step": 0, "num_tokens": 0, "unlogged": []}')
    return folder


OTHERS = {
    "rank": ("--lora_rank 4", r"lora_A is \[8, \d+\] there and \[4, \d+\] in this run; .*--lora_rank"),
    "layers": ("--target_modules q_proj", r"down_proj.lora_A is \[8, 48\] there and absent in this run"),
    "all weights": ("--train_type full", r"embed_tokens.weight is absent there and \[\d+, 32\] in this run"),
    "model": ("--model {model}", r"lora_A is \[8, 48\] there and \[8, 96\] in this run; the --model"),
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
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    words = flags_for(model_folder, plugin, tmp_path / "out", resume_from_checkpoint=checkpoint, train_type="lora")
    with pytest.raises(SystemExit) as stop:
        train.main([*words, *flags.replace("{model}", str(tmp_path / "model")).split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"train.py: --resume_from_checkpoint {checkpoint}: ")
    assert re.search(message, said), said
