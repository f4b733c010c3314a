"""vLLM as the sampler: its flags, its process, and the real engine.

Processes and their ends are tested with a stand-in for vLLM (fixtures/stub), which starts quickly. What
only the real engine can show is tested with it: `make vllm` installs it, else those are skipped.
"""

import contextlib
import copy
import importlib.util
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    flags_for,
    read_metrics,
    start_train,
    tiny_model,
)
from processes import forked, places, run_forked
from test_commands import guide_flags, numina, swapped  # noqa: F401

import data
import grpo
import lora
import train
from data import UsageError
from dist import World
from run import setup
from run.engine import Engine, OnRank0, engine_environment
from run.placement import vllm_device
from sampler import SamplerError, VLLMSampler

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not there; make vllm adds it"
)
CPU = torch.device("cpu")
STUB = ROOT / "tests" / "fixtures" / "stub"
# Sizes that vLLM's kernels take.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
SIZES["max_position_embeddings"] = 8192
FALL_SILENT, EXIT = [1001], [1002]  # prompts that the stub misbehaves on


# What flags mean --------------------------------------------------------------------------------

TAKEN = "a process trains on it; auto or cuda:4 or cuda:5 or cuda:6 or cuda:7 works"
DEVICES = [
    ("auto", 8, 7, "cuda:7"),
    ("auto", 8, 1, "cuda:1"),
    ("cuda:5", 8, 4, "cuda:5"),
    ("auto", 1, 1, "cuda:0"),  # shared
    ("cuda:0", 1, 1, "cuda:0"),
    ("auto", 0, 2, "cpu"),
    ("auto", 8, 8, "auto: 8 processes train on 8 GPUs; 7 processes would leave one free"),
    ("auto", 1, 2, "auto: 2 processes train on 1 GPUs; one process would share it"),
    ("cuda:2", 8, 4, f"cuda:2: {TAKEN}"),
    ("cuda:9", 8, 7, "cuda:9: there is no such GPU among 8; auto or cuda:7 works"),
    ("cuda:0", 0, 1, "cuda:0: there is no GPU; auto, the CPU, works"),
    ("gpu7", 8, 7, "gpu7: there is no such GPU among 8; auto or cuda:7 works"),
]


@pytest.mark.parametrize("wanted, gpus, trainers, device", DEVICES)
def test_the_engine_gets_a_device_that_no_training_process_uses(wanted, gpus, trainers, device):
    if device.startswith(f"{wanted}: "):
        with pytest.raises(UsageError) as refused:
            vllm_device(wanted, gpus, trainers)
        assert str(refused.value) == f"--vllm_device {device}"
    else:
        assert vllm_device(wanted, gpus, trainers) == torch.device(device)


SEEN = [(None, 7, "7"), ("3,1,2,0", 2, "2"), ("GPU-a,GPU-b", 1, "GPU-b"), ("5", 0, "5")]


@pytest.mark.parametrize("visible, index, seen", SEEN)
def test_the_engine_sees_the_gpu_that_the_trainer_calls_by_that_number(
    visible, index, seen, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    environment = engine_environment(torch.device("cuda", index))
    assert environment["CUDA_VISIBLE_DEVICES"] == seen
    assert not {"RANK", "TORCHELASTIC_USE_AGENT_STORE", "OMP_NUM_THREADS"} & environment.keys()


BAD = {  # flag, value, what is said
    "device": ("--vllm_device", "cuda:1", " cuda:1: there is no GPU; auto, the CPU, works"),
    "too long": ("--vllm_max_model_len", "100", " 100: from "),
    "longer than the model": ("--vllm_max_model_len", "9000", " 9000: from "),
    "temperature": ("--temperature", "0.001", " 0.001: with vLLM, 0.01 or more works"),
    "timeout": ("--vllm_timeout", "0", ": '0': a number above 0 works"),
    "cap": ("--rollout_importance_sampling_threshold", "-1", ": '-1': a number above 0 works"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these are of a machine without GPUs")
def test_bad_vllm_flags_are_one_line(case, model_folder, plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(STUB)
    monkeypatch.setattr(setup, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    flag, value, message = BAD[case]
    flags = flags_for(model_folder, plugin, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--use_vllm", "true", flag, value])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"train.py: {flag}{message}")


def test_vllm_that_is_not_installed_is_said(model_folder, plugin, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec

    def find(name, *rest):
        return None if name == "vllm" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(SystemExit):
        train.main([*flags_for(model_folder, plugin, tmp_path / "out"), "--use_vllm", "true"])
    said = capsys.readouterr().err
    assert "--use_vllm true: vLLM is not installed; make vllm installs it" in said


# Its process and how it ends, with the stand-in -------------------------------------------------


def stub_engine(tmp_path, monkeypatch, model="stub", timeout=60.0) -> Engine:
    monkeypatch.setenv("PYTHONPATH", str(STUB))
    log = tmp_path / "vllm.log"
    return Engine({"model": model}, CPU, trainer=CPU, timeout=timeout, log=log)


def test_an_engine_that_cannot_start_says_why_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it is found from anywhere
    with pytest.raises(SamplerError) as error:
        stub_engine(tmp_path, monkeypatch, model="broken")
    what = "the engine failed (no such model)"
    assert str(error.value) == f"--use_vllm true: {what}; its log is {tmp_path / 'vllm.log'}"
    assert "and a second line" in (tmp_path / "vllm.log").read_text()


MISBEHAVES = {
    "exits": (EXIT, 60.0, "ended with status 3"),
    "falls silent": (FALL_SILENT, 2.0, r"gave no sign of life for 2 s \(--vllm_timeout\) and was"),
}


@pytest.mark.parametrize("case", MISBEHAVES)
def test_an_engine_that_ends_or_falls_silent_is_told_and_gone(case, tmp_path, monkeypatch):
    prompt, timeout, message = MISBEHAVES[case]
    engine = stub_engine(tmp_path, monkeypatch)
    (completion,) = engine.complete([([5], 1, 7)], {"max_tokens": 3})
    engine.timeout = timeout
    assert len(completion.ids) == len(completion.logps) == 3 and not completion.finished
    with pytest.raises(SamplerError, match=message):
        engine.complete([(prompt, 1, 7)], {"max_tokens": 3})
    assert engine.process.returncode is not None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_never_joins_the_first_transfer_is_told_in_time(
    number, tmp_path, monkeypatch
):
    """gloo by itself would wait for 20 s, NCCL for ever."""
    engine = stub_engine(tmp_path, monkeypatch, timeout=3.0)
    os.kill(engine.process.pid, number)
    started = time.monotonic()
    with pytest.raises(SamplerError, match="the engine (was killed by signal 9|gave no sign of)"):
        engine.announce([("w", torch.Size([2]), torch.float32)])
    assert time.monotonic() - started < 10 and engine.process.returncode is not None


def test_an_error_of_the_trainers_own_is_not_the_engines(tmp_path, monkeypatch):
    def out_of_memory(model):
        raise torch.OutOfMemoryError("this one is the trainer's")

    model, world = tiny_model(), World(0, 1, CPU)
    engine = OnRank0(world, partial(stub_engine, tmp_path, monkeypatch))
    vllm = VLLMSampler(model, world, engine, eos_token_ids=[2], max_new_tokens=3)
    monkeypatch.setattr(lora, "merged_parameters", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="this one is the trainer's"):
        vllm.generate([[5]], [0])
    engine.engine.kill()


@pytest.fixture(scope="module")
def small_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def engines() -> list[int]:
    """Processes that run an engine of this checkout's, started by this of pytest's workers."""
    mine = b"PYTEST_XDIST_WORKER=%b" % os.environ.get("PYTEST_XDIST_WORKER", "").encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        paths = [entry for entry in environment if entry.startswith(b"PYTHONPATH=%b" % bytes(ROOT))]
        workers = [entry for entry in environment if entry.startswith(b"PYTEST_XDIST_WORKER=")]
        if b"run.engine" in words and paths and workers in ([], [mine]):
            found.append(int(folder.name))
    return found


def unused_memory() -> set[str]:
    """Shared memory that no process has, so that nobody will remove it."""
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used += maps.read_text()
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in used}


def steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for_steps(is_alive, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 600
    while steps(folder) < count:
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.2)


def assert_no_engine_but(before: list[int]) -> None:
    deadline = time.monotonic() + 30
    while set(engines()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(engines()) == set(before)


SILENT = "the engine gave no sign of life for 5 s (--vllm_timeout) and was killed; its log is"
ENDS = {  # what → signal, whom it is sent to, ranks, exit status, what is said
    "engine stopped": (signal.SIGSTOP, "engine", 2, 1, SILENT),
    "SIGTERM to torchrun": (signal.SIGTERM, "torchrun", 2, 1, "SIGTERM"),
    "Ctrl-C": (signal.SIGINT, "rank", 1, 130, "train.py: stopped by Ctrl-C; "),
    "SIGKILL": (signal.SIGKILL, "rank", 1, -9, ""),
}


def become_torchrun(words: list[str]) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    os.execv(sys.executable, [sys.executable, *command, str(ROOT / "train.py"), *words])


@pytest.mark.parametrize("case", ENDS)
def test_however_it_ends_every_process_is_gone_in_time(
    case, model_folder, plugin, tmp_path, monkeypatch
):
    before = engines()
    kind, whom, ranks, status, message = ENDS[case]
    flags = flags_for(model_folder, plugin, tmp_path / "out", max_steps=10_000)
    # Where nothing falls silent a busy machine may take its time.
    timeout = 5 if kind == signal.SIGSTOP else 120
    flags += ["--use_vllm", "true", "--vllm_timeout", str(timeout)]
    monkeypatch.syspath_prepend(STUB)
    if whom == "torchrun":
        jobs = [(become_torchrun, (flags,), {"PYTHONPATH": STUB, "OMP_NUM_THREADS": 1})]
    else:
        here = places(ranks, LOCAL_WORLD_SIZE=ranks, PYTHONPATH=STUB)
        jobs = [(train.main, (flags,), place | {"LOCAL_RANK": place["RANK"]}) for place in here]
    with forked(tmp_path / "said", *jobs) as processes:
        first = processes[0].process
        wait_for_steps(first.is_alive, tmp_path / "out", 3)
        (engine,) = set(engines()) - set(before)
        os.kill(engine if whom == "engine" else first.pid, kind)
        ended = time.monotonic()
        ends = [process.end(timeout=60) for process in processes]
        assert time.monotonic() - ended < 30 + 5 * (kind == signal.SIGSTOP)
    # Of what ranks share, rank 0 alone tells.
    assert all(found == status for found, _ in ends) and message in ends[0][1], ends
    assert_no_engine_but(before)


def guide_run(folder: Path, numina, model: Path, processes: int, run) -> list[str]:  # noqa: F811
    """The guide's multi-GPU command, small → the completions that it drew. run: what runs flags."""
    before = engines()
    sizes = {"model": model, "dataset": f"{numina}#8"}
    sizes |= {"max_completion_length": 8, "num_generations": 4}
    flags = swapped(guide_flags("multi_gpu_vllm.sh"), **sizes, output_dir=folder, eval_steps=3)
    if processes == 1:
        flags = swapped(flags, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    flags += ["--num_generations_eval", "2"]
    run(flags, processes)
    assert_no_engine_but(before)
    lines = read_metrics(folder)
    assert lines[-1]["step"] == 7 and {"time/sync", "rewards/accuracy"} <= set(lines[-1])
    assert read_metrics(folder, evaluations=True) and (folder / "vllm.log").exists()
    assert (folder / "checkpoint-7" / "model.safetensors").exists()
    text = (folder / "completions.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    drawn = [record["completion"] for record in records if record["phase"] == "train"]
    assert len(drawn) == 7 * 4 and len(set(drawn[:4])) > 1
    return drawn


def test_two_processes_ask_the_engine_for_what_one_asks(
    numina,  # noqa: F811
    tokenizer,
    tmp_path,
    monkeypatch,
):
    """With two, a group of 4 lies across both. The stub's words tell prompt and seed apart."""
    # As small as can be, for where bfloat16 is emulated; the command asks for 8,192 positions.
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(STUB)  # where the flags look whether vLLM is installed

    def run(flags, processes):
        run_forked(flags, processes, tmp_path / f"ranks-{processes}", PYTHONPATH=STUB)

    drawn = [
        guide_run(tmp_path / str(processes), numina, tmp_path / "model", processes, run)
        for processes in (1, 2)
    ]
    assert drawn[0] == drawn[1]


# On the real engine -----------------------------------------------------------------------------

ON_CPU = {"kv_cache_memory_bytes": 128 << 20, "enforce_eager": True, "max_model_len": 512}
ON_CPU |= {"enable_chunked_prefill": False, "logprobs_mode": "processed_logprobs"}


def prompts(tokenizer, count: int, copies: int = 1) -> list[list[int]]:
    rows, _ = data.encode(data.load_rows(["arithmetic"])[:count], tokenizer)
    return [row["prompt_ids"] for row in rows for _ in range(copies)]


def make_sampler(model, folder, log, temperature=1.0, length=16) -> VLLMSampler:
    arguments = {"model": str(folder), "dtype": "float32", **ON_CPU}
    world = World(0, 1, CPU)
    engine = OnRank0(world, partial(Engine, arguments, CPU, trainer=CPU, log=log))
    settings = {"eos_token_ids": [2], "max_new_tokens": length, "temperature": temperature}
    return VLLMSampler(model, world, engine, **settings)


def difference(model, ids, completions, temperature=1.0) -> float:
    """Mean |engine - trainer| of the log-probabilities."""
    with torch.no_grad():
        logps, _, _ = grpo.completion_logps(model, ids, [c.ids for c in completions], temperature)
    pairs = [pair for row, c in zip(logps.tolist(), completions) for pair in zip(row, c.logps)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def adapted(tokenizer):
    """A model with adapters that change it."""
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    lora.inject(model, 16, 32)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.fixture(scope="module", params=["llama-tied", "qwen2", "qwen3-tied", "gemma-tied"])
def running(request, tokenizer, tmp_path_factory):
    """A model of an architecture and an engine that runs it, for the tests below in their order."""
    architecture, _, tied = request.param.partition("-")
    changes = {"vocab_size": len(tokenizer), "tie_word_embeddings": bool(tied), **SIZES}
    model = tiny_model(architecture, **changes)
    if architecture == "llama":  # the checkpoint is what adapters leave when they are merged
        model.load_state_dict(dict(lora.merged_parameters(adapted(tokenizer))), strict=False)
    folder = tmp_path_factory.mktemp(architecture)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sampler = make_sampler(model, folder, folder / "vllm.log", temperature=0.7)
    yield architecture, model, sampler
    sampler.engine.close()


def disturb(model) -> None:
    """Change every parameter, vectors too."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * parameter.std(unbiased=False) * torch.randn_like(parameter)
            parameter.add_(noise)


@needs_vllm
def test_after_a_sync_the_engine_says_what_a_fresh_one_says_on_the_checkpoint(running, tokenizer):
    """Full and LoRA (the first), token for token in float32: a fresh engine, and the same when it has
    been sent other weights, and then those of its checkpoint."""
    architecture, model, shared = running
    ids, seeds = prompts(tokenizer, 8), range(8)
    settings = {"eos_token_ids": [2], "max_new_tokens": 24, "temperature": 0.7}
    other = copy.deepcopy(model)
    disturb(other)
    vllm = VLLMSampler(other, World(0, 1, CPU), shared.engine, **settings)
    vllm.stale = False  # it has its weights from disk
    fresh = [c.ids for c in vllm.generate(ids, seeds)]
    vllm.take_weights(other)
    assert [c.ids for c in vllm.generate(ids, seeds)] != fresh
    vllm.take_weights(adapted(tokenizer) if architecture == "llama" else model)
    assert [c.ids for c in vllm.generate(ids, seeds)] == fresh


@needs_vllm
def test_new_weights_reach_the_engine_whatever_the_architecture_calls_them(running, tokenizer):
    _, model, engine = running
    ids, seeds = prompts(tokenizer, 3, copies=2), range(6)
    first = engine.generate(ids, seeds)
    assert difference(model, ids, first, 0.7) < 1e-4
    assert first == engine.generate(ids, seeds)  # seeds make it repeatable
    assert engine.metrics["time/sync"] == 0.0  # and nothing was sent again
    assert len({tuple(c.ids) for c in first}) > 3
    assert all(len(c.ids) == len(c.logps) <= 16 for c in first)
    disturb(model)
    stale = engine.generate(ids, seeds)
    assert difference(model, ids, stale, 0.7) > 0.1
    engine.take_weights(model)
    assert difference(model, ids, engine.generate(ids, seeds), 0.7) < 1e-4


@needs_vllm
def test_what_is_wrong_with_weights_ends_the_engine_and_is_told(running, tokenizer, monkeypatch):
    """A fault for each architecture's engine, and none for the last, which ends by itself."""
    architecture, model, vllm = running
    engine = vllm.engine.engine
    parameters, send = lora.plain_parameters, engine.group.send

    def renamed(model):
        return ((name.replace("up_proj", "higher"), tensor) for name, tensor in parameters(model))

    def incomplete(model):
        return ((name, tensor) for name, tensor in parameters(model) if "norm" not in name)

    if architecture == "gemma":
        many = prompts(tokenizer, 100)  # more tokens than vLLM takes at once
        assert len(vllm.generate(many, range(100))) == 100
        vllm.engine.close()
        assert engine.process.returncode == 0
        return
    if architecture == "llama":
        monkeypatch.setattr(engine.group, "send", lambda tensor, *rest: send(tensor + 1, *rest))
        message = "received other weights than were sent; its log is"
    elif architecture == "qwen2":
        monkeypatch.setattr(lora, "plain_parameters", renamed)
        message = "the engine failed .*higher"
    else:
        monkeypatch.setattr(lora, "plain_parameters", incomplete)
        message = r"the engine failed \(.* of its weights were not sent, model.layers.0.input_"
    vllm.take_weights(model)
    with pytest.raises(SamplerError, match=message):
        vllm.generate(prompts(tokenizer, 1), [0])
    assert engine.process.returncode is not None


@pytest.fixture(scope="module")
def stale_from_step_4(small_folder, tmp_path_factory) -> SimpleNamespace:
    """`torchrun --nproc_per_node 2 train.py --use_vllm true` with ZeRO-3, whose weights are gathered
    from both processes. From step 4 on nothing is sent; then the engine is killed.
    """
    folder = tmp_path_factory.mktemp("stale")
    plugin = folder / "plugin.py"
    plugin.write_text(
        "import sampler\nfrom rewards import orms\n"
        "orms['brief'] = lambda completions, **columns: [-len(text) / 50 for text in completions]\n"
        "taken, take_weights = [], sampler.VLLMSampler.take_weights\n"
        "def first_two(self, model):\n"
        "    taken.append(model)\n"
        "    if len(taken) <= 2:\n"
        "        take_weights(self, model)\n"
        "sampler.VLLMSampler.take_weights = first_two\n"
    )
    rewards, out = ["brief", "format"], folder / "out"
    flags = flags_for(small_folder, plugin, out, reward_funcs=rewards, temperature=1.0)
    more = "--use_vllm true --learning_rate 1e-2 --lr_scheduler_type constant --max_steps 10000 "
    more += "--per_device_train_batch_size 4 --max_completion_length 12 --deepspeed zero3"
    before, memory = engines(), unused_memory()
    run = start_train(*flags, *more.split(), processes=2)
    try:
        wait_for_steps(lambda: run.poll() is None, out, 6)
        (engine,) = set(engines()) - set(before)
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        output, error = run.communicate(timeout=120)
    finally:
        run.kill()
    return SimpleNamespace(
        metrics=read_metrics(out),
        output=output,
        error=error,
        status=run.returncode,
        seconds=time.monotonic() - killed,
        before=before,
        memory=memory,
    )


@needs_vllm
def test_logp_diff_stays_small_with_sync_and_grows_without(stale_from_step_4):
    metrics = stale_from_step_4.metrics
    drift = [line["sampler/logp_diff"] for line in metrics]
    assert len(drift) >= 6 and max(drift[:3]) < 0.02
    assert all(line["time/sync"] > 0 for line in metrics[:3])
    assert max(drift[3:]) > 0.1
    said = stale_from_step_4.output + stale_from_step_4.error
    assert "above 0.1: what samples is not what is trained" in said


@needs_vllm
def test_when_the_engine_is_killed_it_is_said_once_and_nothing_is_left(stale_from_step_4):
    run = stale_from_step_4
    assert run.status == 1 and run.seconds < 60
    message = "the engine was killed by signal 9; its log is"
    assert run.error.count(message) == 1, run.error[-3000:]
    assert_no_engine_but(run.before)
    assert not unused_memory() - run.memory


@needs_vllm
def test_the_guides_multi_gpu_command_runs_with_vllm(numina, small_folder, tmp_path):  # noqa: F811

    def run(flags, processes):
        run_forked(flags, processes, tmp_path / "ranks")

    guide_run(tmp_path / "out", numina, small_folder, 2, run)
