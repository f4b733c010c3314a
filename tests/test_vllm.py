"""vLLM as the sampler: the real engine, real processes and real kills. `make vllm` installs it; else these are skipped."""

import importlib.util
import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED_MODEL, ROOT, read_metrics, start_train, tiny_model
from test_train import flags_for, guide_flags, numina, swapped  # noqa: F401

import data
import dist
import grpo
import lora
import sampler
import train
from sampler import VLLMSampler, vllm_device

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not there; make vllm adds it")
ON_CPU = {"kv_cache_memory_bytes": 512 << 20, "enforce_eager": True, "logprobs_mode": "processed_logprobs"}
ON_CPU["enable_chunked_prefill"] = False


# Without an engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, gpus, trainers, device",
    [
        ("auto", 8, 7, "cuda:7"),
        ("auto", 8, 1, "cuda:1"),
        ("cuda:5", 8, 4, "cuda:5"),
        ("auto", 1, 1, "cuda:0"),  # shared
        ("cuda:0", 1, 1, "cuda:0"),
        ("auto", 0, 2, "cpu"),
        ("auto", 8, 8, "--vllm_device auto: 8 processes train on 8 GPUs; 7 processes would leave one free"),
        ("auto", 1, 2, "--vllm_device auto: 2 processes train on 1 GPUs; one process would share it"),
        (
            "cuda:2",
            8,
            4,
            "--vllm_device cuda:2: a process trains on it; auto or cuda:4 or cuda:5 or cuda:6 or cuda:7 works",
        ),
        ("cuda:9", 8, 7, "--vllm_device cuda:9: there is no such GPU among 8; auto or cuda:7 works"),
        ("cuda:0", 0, 1, "--vllm_device cuda:0: there is no GPU; auto, the CPU, works"),
        ("gpu7", 8, 7, "--vllm_device gpu7: there is no such GPU among 8; auto or cuda:7 works"),
    ],
)
def test_the_engine_gets_a_device_that_no_training_process_uses(wanted, gpus, trainers, device):
    if device.startswith("--"):
        with pytest.raises(ValueError) as refused:
            vllm_device(wanted, gpus, trainers)
        assert str(refused.value) == device
    else:
        assert vllm_device(wanted, gpus, trainers) == torch.device(device)


@pytest.mark.parametrize(
    "visible, index, seen", [(None, 7, "7"), ("3,1,2,0", 2, "2"), ("GPU-a,GPU-b", 1, "GPU-b"), ("5", 0, "5")]
)
def test_the_engine_sees_the_gpu_that_the_trainer_calls_by_that_number(visible, index, seen, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    environment = sampler.engine_environment(torch.device("cuda", index))
    assert environment["CUDA_VISIBLE_DEVICES"] == seen
    assert not {"RANK", "TORCHELASTIC_USE_AGENT_STORE", "OMP_NUM_THREADS"} & environment.keys()


def test_weights_are_merged_without_touching_the_model():
    model = tiny_model(dtype=torch.bfloat16, tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    lora.inject(model, 4, 8)
    for _, layer in lora.layers(model):
        torch.nn.init.normal_(layer.lora_B)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    merged = {name: tensor.clone() for name, tensor in lora.merged_parameters(model)}
    assert list(merged) == names == [name for name, _ in lora.plain_parameters(model)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    plain = dict(lora.merge(model).named_parameters())
    assert all(torch.equal(merged[name], plain[name]) for name in names)
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("dtype, size", [(torch.float32, 64), (torch.bfloat16, 7), (torch.float32, 3)])
def test_a_fingerprint_tells_a_single_bit(dtype, size):
    def digest(name, tensor):
        fingerprint = sampler.Fingerprint()
        fingerprint.add("first", torch.ones(5))
        fingerprint.add(name, tensor)
        return fingerprint.digest()

    tensor = torch.randn(size, 3).to(dtype)
    other = tensor.clone()
    other.view(torch.int16)[size - 1, 1] ^= 1
    same = digest("w", tensor)
    assert digest("w", tensor.clone()) == same
    assert same not in {digest("w", other), digest("v", tensor), digest("w", tensor.T)}


def test_importance_weights_turn_samples_of_one_policy_into_means_under_another():
    torch.manual_seed(0)
    old, engine = torch.randn(2, 6).log_softmax(-1)
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True)
    weights = grpo.importance_weights(old[drawn], engine[drawn], clip_max=1e9)
    value = torch.randn(6)
    assert (weights * value[drawn]).mean() == pytest.approx((old.exp() * value).sum().item(), abs=0.02)
    assert grpo.importance_weights(old[drawn], engine[drawn], clip_max=1.5).max() == 1.5
    assert torch.equal(grpo.importance_weights(old, old, 3.0), torch.ones(6))


def test_the_loss_weights_the_surrogate_and_not_the_kl():
    torch.manual_seed(0)
    new, old, ref, weights = torch.randn(4, 3, 5).double()
    advantages, mask = torch.tensor([1.0, -1.0, 0.5]).double(), torch.ones(3, 5)
    settings = {"epsilon": 0.2, "beta": 0.04, "num_completions": 3}
    loss, _ = grpo.grpo_loss(new, old, ref, advantages, mask, weights.exp(), **settings)
    total = 0.0
    for i, t in itertools.product(range(3), range(5)):  # slow and obvious
        ratio = (new[i, t] - old[i, t]).exp()
        surrogate = min(ratio * advantages[i], ratio.clamp(0.8, 1.2) * advantages[i])
        total -= (surrogate * weights[i, t].exp() - 0.04 * grpo.k3(new[i, t], ref[i, t])) / 15
    assert loss.item() == pytest.approx(total.item(), abs=1e-9)


BAD = {
    "device": (["--vllm_device", "cuda:1"], "--vllm_device cuda:1: there is no GPU; auto, the CPU, works"),
    "too long": (["--vllm_max_model_len", "100"], "--vllm_max_model_len 100: from "),
    "longer than the model": (["--vllm_max_model_len", "9000"], "--vllm_max_model_len 9000: from "),
    "temperature": (["--temperature", "0.001"], "--temperature 0.001: with vLLM, 0.01 or more works"),
    "timeout": (["--vllm_timeout", "0"], "--vllm_timeout: '0': a number above 0 works"),
    "cap": (["--vllm_importance_sampling_clip_max", "-1"], "--vllm_importance_sampling_clip_max: '-1': "),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages are those of a machine without GPUs")
def test_bad_vllm_flags_are_one_line(case, model_folder, plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    flags, message = BAD[case]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_for(model_folder, plugin, tmp_path / "out"), "--use_vllm", "true", *flags])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"train.py: {message}")


def test_vllm_that_is_not_installed_is_said(model_folder, plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main([*flags_for(model_folder, plugin, tmp_path / "out"), "--use_vllm", "true"])
    assert "--use_vllm true: vLLM is not installed; make vllm installs it" in capsys.readouterr().err


# On the real engine -------------------------------------------------------------------------------------------------


def prompts(tokenizer, count: int, copies: int = 1) -> list[list[int]]:
    rows, _ = data.encode(data.load_rows(["arithmetic"])[:count], tokenizer)
    return [row["prompt_ids"] for row in rows for _ in range(copies)]


def make_engine(model, folder, tmp_path, temperature=1.0, dtype="float32", length=16) -> VLLMSampler:
    arguments = {"model": str(folder), "dtype": dtype, **ON_CPU}
    return VLLMSampler(
        model, dist.World(0, 1, torch.device("cpu")), torch.device("cpu"), arguments, eos_token_ids=[2],
        max_new_tokens=length, temperature=temperature, log=tmp_path / "vllm.log",
    )  # fmt: skip


def difference(model, ids, completions, temperature=1.0) -> float:
    """Mean |engine - trainer| of the log-probabilities."""
    with torch.no_grad():
        logps, _, _ = grpo.completion_logps(model, ids, [c.ids for c in completions], temperature)
    pairs = [pair for row, c in zip(logps.tolist(), completions) for pair in zip(row, c.logps)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "max_position_embeddings": 8192}


@pytest.fixture(scope="session")
def small_folder(tokenizer, tmp_path_factory) -> Path:
    """A small Llama of sizes that vLLM's kernels take."""
    folder = tmp_path_factory.mktemp("small")
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@needs_vllm
@pytest.mark.parametrize("architecture, tied", [("llama", True), ("qwen2", False), ("qwen3", True), ("gemma", True)])
def test_new_weights_reach_the_engine_whatever_the_architecture_calls_them(architecture, tied, tokenizer, tmp_path):
    model = tiny_model(architecture, vocab_size=len(tokenizer), tie_word_embeddings=tied, **SIZES)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids, seeds = prompts(tokenizer, 3, copies=2), range(6)
    engine = make_engine(model, tmp_path / "model", tmp_path, temperature=0.7)
    try:
        first = engine.generate(ids, seeds)
        assert difference(model, ids, first, 0.7) < 1e-4
        assert first == engine.generate(ids, seeds)  # seeds make it repeatable, and nothing was sent again
        assert engine.metrics["time/sync"] < 0.05
        assert len({tuple(c.ids) for c in first}) > 3 and all(len(c.ids) == len(c.logps) <= 16 for c in first)
        with torch.no_grad():
            for parameter in model.parameters():  # every one, vectors too
                parameter.add_(0.3 * parameter.std(unbiased=False) * torch.randn_like(parameter))
        stale = engine.generate(ids, seeds)
        assert difference(model, ids, stale, 0.7) > 0.1
        engine.take_weights(model)
        assert difference(model, ids, engine.generate(ids, seeds), 0.7) < 1e-4
        many = prompts(tokenizer, 100)  # more tokens than vLLM takes at once
        assert len(engine.generate(many, range(100))) == 100
    finally:
        engine.close()
    assert engine.engine.process.returncode == 0


@needs_vllm
def test_after_a_sync_the_engine_says_what_a_fresh_one_says_on_the_checkpoint(tokenizer, tmp_path):
    """The embedded model, full and LoRA, greedily: token for token in float32."""
    from transformers import AutoModelForCausalLM

    def policy():
        return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)

    ids, seeds, greedy = prompts(tokenizer, 8), range(8), {"temperature": 0.0, "length": 24}
    torch.manual_seed(0)
    full = policy()
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    adapted = lora.inject(policy(), 16, 32)
    for _, layer in lora.layers(adapted):
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    engine = make_engine(full, EMBEDDED_MODEL, tmp_path, **greedy)
    try:
        synced = {"full": engine.generate(ids, seeds)}
        engine.take_weights(adapted)
        synced["lora"] = engine.generate(ids, seeds)
    finally:
        engine.close()
    assert [c.ids for c in synced["full"]] != [c.ids for c in synced["lora"]]
    for name, model in {"full": full, "lora": lora.merge(adapted)}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        fresh = make_engine(model, tmp_path / name, tmp_path, **greedy)
        fresh.stale = False  # it has these weights from disk
        try:
            assert [c.ids for c in fresh.generate(ids, seeds)] == [c.ids for c in synced[name]], name
        finally:
            fresh.close()


@needs_vllm
def test_weights_that_arrive_changed_end_the_run(small_folder, tokenizer, tmp_path, monkeypatch):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    engine = make_engine(model, small_folder, tmp_path)
    send = sampler.WeightGroup.send
    monkeypatch.setattr(sampler.WeightGroup, "send", lambda group, tensor, *rest: send(group, tensor + 1, *rest))
    with pytest.raises(sampler.SamplerError, match="received other weights than were sent; its log is"):
        engine.generate(prompts(tokenizer, 1), [0])
    assert engine.engine.process.returncode is not None


@needs_vllm
def test_an_error_is_told_by_whoever_made_it(small_folder, tokenizer, tmp_path, monkeypatch):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES)
    parameters = lora.plain_parameters

    def renamed(model):
        return ((name.replace("up_proj", "higher_proj"), tensor) for name, tensor in parameters(model))

    def incomplete(model):
        return ((name, tensor) for name, tensor in parameters(model) if "norm" not in name)

    def out_of_memory(model):
        raise torch.OutOfMemoryError("this one is the trainer's")

    faults = {
        "plain_parameters": [
            (renamed, sampler.SamplerError, "the engine failed .*higher_proj"),
            (
                incomplete,
                sampler.SamplerError,
                r"the engine failed \(7 of its weights were not sent, model.layers.0.input_",
            ),
        ],
        "merged_parameters": [(out_of_memory, torch.OutOfMemoryError, "this one is the trainer's")],
    }
    for place, cases in faults.items():
        for fault, kind, message in cases:
            engine = make_engine(model, small_folder, tmp_path)
            with monkeypatch.context() as patch, pytest.raises(kind, match=message):
                patch.setattr(lora, place, fault)
                engine.generate(prompts(tokenizer, 1), [0])
            engine.close()


@needs_vllm
@pytest.mark.parametrize("sync", [True, False])
def test_logp_diff_stays_small_with_sync_and_grows_without(sync, tmp_path):
    """`torchrun --nproc_per_node 2 train.py --use_vllm true`, the embedded model, 10 steps that move it.

    With ZeRO-3, whose weights are gathered from both processes on their way.
    """
    if not EMBEDDED_MODEL.exists():
        pytest.skip("no embedded model; make model puts it there")
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import sampler\nfrom rewards import orms\n"
        "orms['brief'] = lambda completions, **columns: [-len(text) / 50 for text in completions]\n"
        + ("" if sync else "sampler.VLLMSampler.take_weights = lambda self, model: None\n")
    )
    flags = flags_for(EMBEDDED_MODEL, plugin, tmp_path / "out", reward_funcs=["brief", "format"], temperature=1.0)
    more = "--use_vllm true --learning_rate 1e-3 --lr_scheduler_type constant --per_device_train_batch_size 4 "
    more += f"--max_completion_length 24 --deepspeed {'zero3' if sync else 'zero2'} --max_steps {10 if sync else 6}"
    run = start_train(*flags, *more.split(), processes=2)
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, err[-3000:]
    drift = [line["sampler/logp_diff"] for line in read_metrics(tmp_path / "out") if "sampler/logp_diff" in line]
    assert len(drift) == (10 if sync else 6)
    if sync:
        assert max(drift) < 0.02
        assert all(line["time/sync"] > 0 for line in read_metrics(tmp_path / "out"))
    else:
        assert drift[0] < 0.02 and max(drift) > 0.1
        assert "above 0.1: what samples is not what is trained" in out + err


def engines() -> list[int]:
    """Processes that run an engine of this checkout's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) > 2 and words[1] == bytes(ROOT / "sampler.py"):
            found.append(int(path.parent.name))
    return found


def steps(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0


SILENT = "the engine gave no sign of life for 10 s (--vllm_timeout) and was killed; its log is"
ENDS = {  # what → signal, whom it is sent to, processes, exit status, what is said
    "engine killed": (signal.SIGKILL, "engine", 2, 1, "the engine was killed by signal 9; its log is"),
    "engine stopped": (signal.SIGSTOP, "engine", 2, 1, SILENT),
    "SIGTERM to torchrun": (signal.SIGTERM, "run", 2, 1, "SIGTERM"),
    "Ctrl-C": (signal.SIGINT, "run", 1, 130, "train.py: interrupted"),
    "SIGKILL": (signal.SIGKILL, "run", 1, -9, ""),
}


@needs_vllm
@pytest.mark.parametrize("case", ENDS)
def test_however_it_ends_every_process_is_gone_in_time(case, small_folder, plugin, tmp_path):
    before, memory = engines(), set(os.listdir("/dev/shm"))
    kind, whom, processes, status, message = ENDS[case]
    flags = flags_for(small_folder, plugin, tmp_path / "out", max_steps=10_000, max_completion_length=64)
    run = start_train(*flags, "--use_vllm", "true", "--vllm_timeout", "10", processes=processes)
    try:
        deadline = time.monotonic() + 240
        while steps(tmp_path / "out") < 3:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1][-3000:]
            time.sleep(0.2)
        (engine,) = set(engines()) - set(before)
        os.kill(engine if whom == "engine" else run.pid, kind)
        ended = time.monotonic()
        out, err = run.communicate(timeout=60)
        assert time.monotonic() - ended < 30 + 10 * (kind == signal.SIGSTOP)
        assert run.returncode == status
        assert err.count(message) >= (processes if whom == "engine" else 1), err[-3000:]
    finally:
        run.kill()
    deadline = time.monotonic() + 10
    while set(engines()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert set(engines()) == set(before)
    assert set(os.listdir("/dev/shm")) <= memory


@needs_vllm
def test_the_guides_multi_gpu_command_runs_with_vllm_and_draws_what_one_process_draws(
    numina,  # noqa: F811
    small_folder,
    tmp_path,
):
    sizes = {"model": small_folder, "dataset": f"{numina}#8", "max_completion_length": 8, "num_generations": 4}
    before, drawn = engines(), []
    for processes in (2, 1):  # with two, a group of 4 lies across both
        folder = tmp_path / str(processes)
        flags = swapped(guide_flags("multi_gpu_vllm.sh"), **sizes, output_dir=folder, eval_steps=3)
        if processes == 1:
            flags = swapped(flags, per_device_train_batch_size=2, per_device_eval_batch_size=2)
        flags += ["--num_generations_eval", "2"]
        run = start_train(*flags, processes=processes)
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-3000:]
        lines = read_metrics(folder)
        assert lines[-1]["step"] == 7 and {"time/sync", "rewards/accuracy"} <= set(lines[-1])
        assert read_metrics(folder, evaluations=True) and (folder / "vllm.log").exists()
        assert (folder / "checkpoint-7" / "model.safetensors").exists() and engines() == before
        records = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
        assert len(records) == 7 * 4 and len({r["completion"] for r in records[:4]}) > 1
        drawn.append([r["completion"] for r in records])
    assert drawn[0] == drawn[1]
