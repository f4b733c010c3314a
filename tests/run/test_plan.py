"""The planner against what autograd keeps, what the optimizer holds, closed forms, and train.py as a user starts it."""

import json
import re
import socket

import pytest
import torch
import transformers
from conftest import ROOT, tiny_model

import data
import dist
import fast
import lora
import train
from fast import adapters, packed, remade
from fast.decoder import ROOM, PackedDecoder
from run import models, plan
from run.flags import parse_args

QWEN = ROOT / "tests" / "fixtures" / "Qwen2.5-7B"


def planned(*flags, dry_run=8):
    """(quantities, terms by name) of the plan of these flags, for the 7 B model where they name no other."""
    words = [
        "--model",
        QWEN,
        "--dataset",
        "someone/something#1000",
        "--max_length",
        1024,
        "--dry_run",
        dry_run,
        *flags,
    ]
    args = parse_args([str(word) for word in words])
    world = dist.World(0, 1, torch.device("cpu"))
    s, found = plan.make(args, models.model_config(args), world)
    return s, {
        (term.name, moment): term.value for term in found for moment in term.moments or [None]
    }


def guide(script: str) -> list[str]:
    """The flags of one of the guide's two commands, for the 7 B model of the fixture."""
    import shlex

    text = (ROOT / "examples" / script).read_text().replace("\\\n", " ")
    return [*shlex.split(text.split("train.py")[1]), "--model", str(QWEN)]


# Formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_type", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_activations_are_what_autograd_keeps(
    architecture, checkpointing, train_type, dtype, tmp_path, monkeypatch
):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "num_hidden_layers": 4}
    model = tiny_model(architecture, dtype=getattr(torch, dtype), **sizes)
    model.config.save_pretrained(tmp_path)
    flags = [
        "--model",
        tmp_path,
        "--torch_dtype",
        dtype,
        "--train_type",
        train_type,
        "--lora_rank",
        1,
        "--max_length",
        10,
    ]
    flags += [
        "--gradient_checkpointing",
        checkpointing,
        "--max_completion_length",
        200,
        "--num_generations",
        8,
    ]
    s, found = planned(*flags)
    fast.prepare(model)
    if train_type == "lora":
        adapters.prepare(lora.inject(model, 1, 8))
    if checkpointing == "true":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own, kept, pack = (
        {p.untyped_storage().data_ptr() for p in model.parameters()},
        {},
        remade.Remade.pack,
    )
    monkeypatch.setattr(remade.Remade, "pack", staticmethod(lambda tensor: keep(tensor)))

    def keep(tensor):
        packed = pack(tensor)
        for part in packed[0].inputs:
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in own:
                kept[part.untyped_storage().data_ptr()] = (
                    part  # held, so that no other takes its place
                )
        return packed

    prompts, completions = (
        [list(range(10, 20))] * 8,
        [[(7 * i + j) % 90 + 3 for j in range(200)] for i in range(8)],
    )
    packed.completion_hidden_states(model.train(), prompts, completions)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    expected = found["activations", "backward"]
    if (
        checkpointing == "true"
    ):  # no layer is recomputed yet: their inputs, and what the last norm keeps
        expected = s["n"] * (s["L"] + 1) * s["w"] * s["H"]
    assert counted == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_weights_and_optimizer_are_what_the_optimizer_holds(train_type, dtype, tmp_path):
    model = tiny_model("llama", dtype=getattr(torch, dtype))
    model.config.save_pretrained(tmp_path)
    flags = ["--model", tmp_path, "--torch_dtype", dtype, "--train_type", train_type]
    s, found = planned(*flags, "--max_length", 64, "--max_completion_length", 64, dry_run=1)
    if train_type == "lora":
        lora.inject(model, 8, 32)
    optimizer = dist.ZeroAdamW(model.named_parameters())
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()
    }
    state = {}
    for bucket in optimizer.buckets:
        for tensor in (bucket.master, bucket.exp_avg, bucket.exp_avg_sq):
            state[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(storages.values()) == found["weights", "generate"]
    assert sum(n for p, n in state.items() if p not in storages) == found["optimizer", "generate"]
    assert s["T"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_cache_is_what_the_sampler_allocates(tmp_path, monkeypatch):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    flags = [
        "--model",
        tmp_path,
        "--torch_dtype",
        "float32",
        "--max_length",
        10,
        "--max_completion_length",
        30,
    ]
    s, found = planned(
        *flags, "--num_generations", 4, "--per_device_train_batch_size", 8, dry_run=1
    )
    fast.prepare(model)
    prompts, rows = [[i, *range(20, 29)] for i in (1, 2)], torch.arange(8) // 4
    decoder = PackedDecoder(model, prompts, rows)
    for _ in range(29):  # the last token is drawn and not read
        decoder.step(torch.full((8,), 5))
    held = sum(x.nbytes for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    prefilled, room = (2 * s["w"] * s["L"] * s["k"] * n for n in (s["c"], 8 * ROOM))
    assert abs(held + prefilled - found["cache", "generate"]) < room


def test_state_is_shared_out_over_the_ranks():
    for stage, shared in (("none", 1), ("zero2", 8), ("zero3", 8)):
        s, found = planned("--train_type", "full", "--deepspeed", stage)
        assert s["P"] == s["T"] == 7_615_616_512  # Qwen2.5's own count
        assert found["optimizer", "update"] == pytest.approx(12 * s["P"] / shared)
        assert found["gradients", "update"] == pytest.approx(4 * s["P"] / shared)
        assert found["weights", "update"] == pytest.approx(
            2 * s["P"] / (8 if stage == "zero3" else 1)
        )
        assert found["reference", "update"] == found["weights", "update"]


# The command -----------------------------------------------------------------------------------------------------


def test_a_plan_needs_a_config_json_and_nothing_else(tmp_path, monkeypatch, capsys):
    """No weights, no tokenizer, no dataset, no network, no folder left behind."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    flags = [*guide("multi_gpu_vllm.sh"), "--dry_run", 7, "--output_dir", tmp_path / "run"]
    assert run_here(*flags) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert (
        "14 completions, 2 groups of 7; steps: 2475" in out
    )  # 4,950 of 5,000 rows, two prompts a step
    assert "7,615,616,512 parameters" in out


@pytest.mark.parametrize("train_type", ["full", "lora"])
@pytest.mark.parametrize(
    "kind", ["Llama", "Mixtral", "Qwen3Moe", "DeepseekV3", "GPT2", "Gemma3Text"]
)
def test_models_of_any_kind_and_size_are_planned(kind, train_type, tmp_path):
    """As large as transformers makes them when nothing is said: 671 billion parameters for DeepSeek V3."""
    import transformers

    config = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    flags = ["--model", tmp_path, "--train_type", train_type, "--max_completion_length", 64]
    if kind == "GPT2":  # its layers are not torch.nn.Linear
        flags += ["--train_type", "full"]
    s, found = planned(*flags, "--deepspeed", "zero3")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert s["P"] == sum(p.numel() for p in model.parameters())
    assert found["weights", "generate"] == pytest.approx(
        s["P"] * 2 / 8 + (s["T"] * 4 / 8 if s["t"] == 4 else 0)
    )
    assert all(value >= 0 for value in found.values())


def run_here(*flags) -> int:
    """train.py's exit status, in this process."""
    with pytest.raises(SystemExit) as end:
        train.main([str(flag) for flag in flags])
    return end.value.code


def test_prompts_are_read_where_they_can_be(tmp_path, model_folder):
    """The built-in task's own longest prompt with a tokenizer; what --max_length says without one."""
    transformers.AutoConfig.from_pretrained(model_folder).save_pretrained(tmp_path)
    flags = ["--dataset", "arithmetic#64", "--max_completion_length", 64]
    args = parse_args(
        [str(x) for x in [*flags, "--model", model_folder, "--dry_run", 1, "--max_length", 300]]
    )
    rows, longest, shared = plan.find_prompts(args, models.model_config(args))
    ids, _ = data.encode(
        data.load_rows(["arithmetic#64"]), transformers.AutoTokenizer.from_pretrained(model_folder)
    )
    assert (rows, longest) == (len(ids), max(len(row["prompt_ids"]) for row in ids))
    assert (
        len({tuple(row["prompt_ids"][:shared]) for row in ids})
        == 1
        < len({tuple(row["prompt_ids"][: shared + 1]) for row in ids})
    )
    args.model = tmp_path
    assert plan.find_prompts(args, models.model_config(args)) == (rows, 300, 0)


def test_a_plan_says_whether_it_fits_and_what_would(capsys):
    flags = [*guide("multi_gpu_vllm.sh"), "--gradient_checkpointing", "false"]
    flags += ["--dry_run", 7, "--device_memory_gb", 70]
    assert run_here(*flags) == 1
    out = capsys.readouterr().out
    would = re.search(r"^--gradient_checkpointing true would take ([\d.]+) GB$", out, re.MULTILINE)
    assert "more than --device_memory_gb 70" in out
    assert run_here(*flags[:-1], 10) == 1
    least = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"--deepspeed zero3 --gradient_checkpointing true would take [\d.]+ GB, still more", least
    )
    assert run_here(*flags, "--gradient_checkpointing", "true") == 0
    out = capsys.readouterr().out
    assert f"peak {would[1]} GB" in out and "fits --device_memory_gb 70" in out


def test_a_printed_formula_gives_the_printed_figure(capsys):
    """Worked out once more, from the letters' values as they are printed."""
    run_here(*guide("single_gpu.sh"), "--dry_run", 1)
    out = capsys.readouterr().out
    letters = {
        name: int(value.replace(",", ""))
        for name, value in re.findall(r"\b([A-Za-z]) =\s([\d,]+)\s", out)
    }
    rows = re.findall(r"^\w[\w ]*?((?: +(?:[\d.]+|–)){4})   (\S.*)$", out, re.MULTILINE)
    assert len(rows) == 11
    for cells, formula in rows:
        assert float(re.search(r"[\d.]+", cells)[0]) == pytest.approx(
            eval(formula.replace("·", "*"), letters) / 1e9, abs=0.005
        )


def test_bad_plans_are_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    common = [
        "--dataset",
        "someone/something#10",
        "--max_length",
        100,
        "--model",
        QWEN,
        "--dry_run",
        8,
    ]
    for flags, said in (
        (["--model", tmp_path], f"--model {tmp_path}: not a causal language model"),
        (["--device_memory_gb", 0], "--device_memory_gb: '0': a number above 0 works"),
        (["--dry_run", 0], "--dry_run: '0': true, false or a number of GPUs works"),
        (
            ["--dry_run", "false", "--device_memory_gb", 80],
            "--device_memory_gb 80: only a plan asks for it",
        ),
        (["--num_generations", 7], "--num_generations 7: does not divide the 64 completions"),
        (
            ["--max_completion_length", 131072],
            "--max_completion_length 131072: with a prompt of 1 token or more",
        ),
        (["--dataset", "arithmetics.jsonl"], "--dataset arithmetics.jsonl: no such file"),
    ):
        assert run_here(*common, *flags) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"train.py: {said}") and err.count("\n") == 1
    assert run_here("--dataset", "someone/something", "--model", QWEN, "--dry_run", 8) == 2
    assert (
        "--dataset someone/something: a plan does not know its prompts; --max_length N"
        in capsys.readouterr().err
    )


def test_the_page_on_scale_tells_what_the_guides_commands_take():
    page = (ROOT / "docs" / "scale.md").read_text()
    for script, ranks in (("multi_gpu_vllm.sh", 7), ("single_gpu.sh", 1)):
        for changes in ([], ["--gradient_checkpointing", "false"]):
            _, found = plan.make(*of([*guide(script), *changes, "--dry_run", str(ranks)]))
            assert f"{max(plan.sums(found).values()) / 1e9:.1f} GB" in page


def test_the_page_on_scale_tells_what_the_planner_does():
    page = (ROOT / "docs" / "scale.md").read_text()
    command = (
        page.split("```")[1]
        .replace("\\\n", " ")
        .replace("tests/fixtures", str(QWEN.parent))
        .split()[2:]
    )
    peaks = re.findall(
        r"^\| (none|zero2|zero3) \| (\S+) (\w+) \| (\S+) (\w+) \| (\S+) (\w+) \| (\S+) (\w+) \|$",
        page,
        re.MULTILINE,
    )
    sent = re.findall(
        r"^\| (none|zero2|zero3) \| \S.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        page,
        re.MULTILINE,
    )
    assert len(peaks) == len(sent) == 3
    for (stage, *told), (_, *told_sent) in zip(peaks, sent):
        for i, ranks in enumerate((1, 8, 64, 1024)):
            _, found = plan.make(*of([*command, "--deepspeed", stage, "--dry_run", str(ranks)]))
            moment, most = max(plan.sums(found).items(), key=lambda item: item[1])
            assert told[2 * i : 2 * i + 2] == [f"{most / 1e9:.1f}", moment]
            moved = [term.value for term in found if term.name == "bytes sent"]
            assert [f"{value / 1e9:.1f}" for value in moved] == told_sent[i - 1 : i] * (ranks > 1)


def of(flags):
    args = parse_args(flags)
    return args, models.model_config(args), dist.World(0, 1, torch.device("cpu"))
