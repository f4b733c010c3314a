"""Is it right on this device? Each function is a part of bench/gpu/kit.py."""

import importlib.util
import os
import re
import signal
import statistics
import time

import torch
import torch.distributed as torch_dist
import transformers
from conftest import ARCHITECTURES, make_batch, tiny_model
from part import (
    ROOT,
    Part,
    finish,
    read_metrics,
    save_with_tokenizer,
    tokenizer_folder,
    train_flags,
)
from torch import Tensor

import dist
import fast
import grpo
import lora
import sampler
from fast.head import logps_from_hidden_states
from run import checkpoints
from run.fingerprint import Fingerprint

KINDS = ("full", "lora")
TEMPERATURE = 0.8
CHI_SQUARE_19 = 43.8  # which 19 degrees of freedom exceed once in a thousand times


def env(part: Part) -> None:
    part.tell("torch", torch.__version__)
    part.tell("transformers", transformers.__version__)
    part.tell("cores", len(os.sched_getaffinity(0)))
    known = ("math_verify", "datasets", "filelock", "rich", "yaml", "pyarrow", "peft", "trl")
    part.tell("missing", [name for name in known if importlib.util.find_spec(name) is None])
    if part.on_gpu:
        part.tell("gpu", torch.cuda.get_device_name())
        part.tell("cuda", torch.version.cuda)
        part.tell("nccl", ".".join(map(str, torch.cuda.nccl.version())))
        free, total = torch.cuda.mem_get_info()
        part.tell("GB free, total", [round(free / 1e9, 1), round(total / 1e9, 1)])


def a_model(architecture: str, kind: str, device, dtype=torch.float32, **shape):
    """A small random model, the same on every device; its adapters do something."""
    model = tiny_model(architecture, dtype=torch.float32, **shape)
    with torch.no_grad():
        for parameter in model.parameters():  # the same numbers in every precision
            parameter.copy_(parameter.bfloat16() if dtype != torch.float32 else parameter)
    model.to(dtype)
    if kind == "lora":
        torch.manual_seed(1)
        for _, layer in lora.layers(lora.inject(model, 4, 8)):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.to(device)


def gradients(model, completion_logps, prompts, completions) -> dict[str, Tensor]:
    """Log-probabilities, entropies, the loss, and its gradient by every trained parameter."""
    logps, entropies, mask = completion_logps(model, prompts, completions, TEMPERATURE)
    B = len(logps)
    advantages = torch.linspace(-1, 1, B, device=logps.device)
    old, reference = logps.detach() - 0.01, logps.detach() + 0.02
    loss, _ = grpo.grpo_loss(
        logps,
        entropies,
        old,
        reference,
        advantages,
        mask,
        options=grpo.Options(entropy_coef=0.01),
        normalizers=grpo.Normalizers(B, int(mask.sum()), mask.shape[1]),
    )
    loss.backward()
    results = {"logps": logps.detach(), "entropies": entropies.detach(), "loss": loss.detach()}
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.double().cpu() for name, value in (results | trained).items()}


def distance(own: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any tensor. A gradient that is all but zero is compared
    with the others' size: what is left of it is rounding."""
    assert own.keys() == expected.keys()
    grads = [value for name, value in expected.items() if "." in name]
    least = 1e-3 * torch.cat([grad.flatten() for grad in grads]).norm()
    errors = [(own[n] - value).norm() / max(value.norm(), least) for n, value in expected.items()]
    return max(map(float, errors))


def parity(part: Part) -> None:
    prompts, completions, _ = make_batch(longest=30)
    for architecture in ("llama", "qwen2", "gemma2") if part.tiny else ARCHITECTURES:
        for kind in KINDS:
            on_cpu = a_model(architecture, kind, "cpu").train()
            expected = gradients(on_cpu, grpo.completion_logps, prompts, completions)
            errors = {}
            for way in (grpo, fast):
                for recomputing in (True, False):
                    model = a_model(architecture, kind, part.device)
                    if way is fast:
                        fast.prepare(model)
                    if recomputing:
                        model.gradient_checkpointing_enable({"use_reentrant": False})
                    own = gradients(model.train(), way.completion_logps, prompts, completions)
                    errors[f"{way.__name__} {recomputing}"] = distance(own, expected)
            way = max(errors, key=errors.get)
            part.check(f"{architecture} {kind}", errors[way], 5e-4)


def long_rows(tiny: bool) -> tuple[list, list]:
    """Prompts and completions of very different lengths, three groups of four."""
    generator = torch.Generator().manual_seed(0)
    lengths = (900, 1, 40, 800, 5, 2, 620, 300, 1, 257, 256, 77)
    lengths = [max(1, n // 12) for n in lengths] if tiny else lengths
    prompts = [list(range(3, 40)) + [50 + i] * (3 + 190 * i) for i in range(3) for _ in range(4)]
    if tiny:
        prompts = [prompt[:60] for prompt in prompts]
    completions = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]
    return prompts, completions


def packed(part: Part) -> None:
    """Beside float64: how far the plain pass is from it by rounding alone says how far the quick one
    may be."""
    prompts, completions = long_rows(part.tiny)
    shape = {"max_position_embeddings": 2048, "num_hidden_layers": 4}
    if not part.tiny:
        shape |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
        shape |= {"head_dim": 32}
    for architecture in ("qwen2", "gemma2"):
        errors, exact = {}, None
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for way in (grpo, fast):
                exact_weights = torch.float64 if dtype == torch.float32 else dtype
                model = a_model(architecture, "full", part.device, exact_weights, **shape).to(dtype)
                if way is fast:
                    parts = fast.prepare(model)
                    part.wants(f"{architecture} packs in {dtype}", "packed rows" in parts)
                own = gradients(model.train(), way.completion_logps, prompts, completions)
                own = torch.cat([value.flatten() for name, value in own.items() if "." in name])
                exact = own if exact is None else exact
                errors[dtype, way] = float((own - exact).norm() / exact.norm())
        part.check(f"{architecture} float64", errors[torch.float64, fast], 1e-5)
        for dtype, factor in ((torch.float32, 3.0), (torch.bfloat16, 1.5)):
            plain = errors[dtype, grpo]
            part.tell(f"{architecture} {dtype}, plain", float(f"{plain:.3g}"))
            part.check(f"{architecture} {dtype}", errors[dtype, fast], factor * plain)


def head(part: Part) -> None:
    torch.manual_seed(0)
    N, V, D = 700, 5000, 32
    for architecture, trained in (("llama", True), ("llama", False), ("gemma2", True)):
        model = tiny_model(architecture, vocab_size=V).to(part.device).requires_grad_(trained)
        weight = model.get_output_embeddings().weight
        hidden = torch.randn(N, D).to(part.device).requires_grad_()
        targets = torch.randint(0, V, (N,)).to(part.device)
        logps, entropies = logps_from_hidden_states(model, hidden, targets, TEMPERATURE)
        wanted = [hidden, weight] if trained else [hidden]
        own = torch.autograd.grad((logps + 0.1 * entropies).sum(), wanted)

        doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        logits = doubles[0] @ doubles[1].T
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = torch.tanh(logits / cap) * cap if cap else logits
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        expected = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        slopes = torch.autograd.grad(
            (expected[0] + 0.1 * expected[1]).sum(), doubles[: len(wanted)]
        )
        pairs = zip((logps, entropies, *own), (*expected, *slopes))
        worst = max(float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs)
        part.check(f"{architecture}, {'trained' if trained else 'frozen'}", worst, 1e-4)


def optimizer(part: Part) -> None:
    """A loss Σ w·g has the gradient g, so both optimizers get the same numbers."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        shapes = {"a": (33, 65), "b": (65,), "c": (129, 7), "d": (7,)}
        start = {
            name: torch.randn(shape).to(dtype).to(part.device) for name, shape in shapes.items()
        }
        ours = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        theirs = {name: torch.nn.Parameter(value.float()) for name, value in start.items()}
        settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "bucket_size": 1000}
        own = dist.ZeroAdamW(ours.items(), **settings)
        groups = [
            {"params": [p for p in theirs.values() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=0.01)
        for _ in range(20):
            slopes = {n: torch.randn(s).to(dtype).to(part.device) for n, s in shapes.items()}
            own.backward(sum((p * slopes[name]).float().sum() for name, p in ours.items()))
            own.step(0.01)
            for name, p in theirs.items():
                p.grad = slopes[name].float()
            torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
            adamw.step()
        state = checkpoints.optimizer_state(own)
        errors = []
        for name, p in theirs.items():
            master = state[f"master.{name}"]
            errors.append(float((master - p.detach().cpu()).norm() / master.norm()))
            same = torch.equal(ours[name].detach().cpu(), master.to(dtype))
            part.wants(f"{name} is its master weight in {dtype}", same)
        part.check(str(dtype), max(errors), 1e-5)
        checkpoints.load_optimizer_state(own, state)
        again = checkpoints.optimizer_state(own)
        part.wants("a state comes back", all(torch.equal(again[n], state[n]) for n in state))


def collectives(part: Part) -> None:
    """A world of one: ZeRO sends to itself, and the numbers are those of one process."""
    backend = "nccl" if part.on_gpu else "gloo"
    store = torch_dist.HashStore()
    torch_dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        gather_and_sum(part)
        prompts, completions, _ = make_batch()
        expected = None
        for stage in ("none", "zero2", "zero3"):
            model = a_model("llama", "full", part.device).train()
            fast.prepare(model)
            if stage == "zero3":
                dist.shard_parameters(model, model.model.layers)
            own = dist.ZeroAdamW(model.named_parameters(), max_grad_norm=1.0, bucket_size=3000)
            own.is_zero2 = stage == "zero2"  # else one rank has nobody to send to
            function = fast.completion_logps
            arguments = (prompts, completions, TEMPERATURE)
            for _ in range(3):
                logps, entropies, _ = dist.forward(function, model, *arguments)
                own.backward((logps + 0.1 * entropies).mean())
                own.step(1e-3)
            state = checkpoints.optimizer_state(own)
            with dist.gathered(model):
                finite = all(dist.full(p).isfinite().all() for p in model.parameters())
            part.wants(f"{stage}'s weights are finite", finite)
            weights = torch.cat([state[n].flatten() for n in sorted(state) if "master" in n])
            expected = weights if expected is None else expected
            part.check(stage, float((weights - expected).norm() / expected.norm()), 1e-5)
        if part.on_gpu:  # what sends weights to vLLM
            raw = torch_dist.ProcessGroupNCCL(torch_dist.PrefixStore("raw", store), 0, 1)
            raw.allreduce([torch.ones(3, device=part.device)]).wait()
            raw.abort()
    finally:
        torch_dist.destroy_process_group()


def gather_and_sum(part: Part) -> None:
    """The collectives of World and ModelSampler, as a rank of several calls them."""
    lists = [None]
    torch_dist.all_gather_object(lists, [{"a": torch.ones(2, dtype=torch.float64)}])
    items = [{"state": 1}]
    torch_dist.broadcast_object_list(items, src=0, device=part.device)
    torch_dist.barrier()
    for dtype in (torch.float64, torch.float32, torch.int32, torch.bfloat16):
        x = torch.arange(8, device=part.device).to(dtype)
        y, z = torch.empty_like(x), torch.empty_like(x)
        torch_dist.all_reduce(x)
        torch_dist.all_to_all_single(y, x, async_op=True).wait()
        dist.all_gather(z, y)
        part.wants(f"{dtype} is sent as it is", torch.equal(x, z))


def sampling(part: Part) -> None:
    prompts = [[3, 4, 5, 6]] * 6 + [[3, 4, 8, 9, 10]] * 6
    architectures = ("llama", "gemma2") if part.tiny else ("llama", "qwen2", "qwen3", "gemma2")
    for architecture in architectures:
        for kind in KINDS:
            drawn = {}
            for device in ("cpu", part.device):
                model = a_model(architecture, kind, device)
                settings = {"eos_token_ids": [2], "max_new_tokens": 40, "temperature": TEMPERATURE}
                plain = sampler.ModelSampler(model, **settings).generate(prompts, range(12))
                fast.prepare(model)
                quick = {"decoder": fast.decoder_for(model), "draw": fast.draw_for()}
                quick = sampler.ModelSampler(model, **settings, **quick)
                completions = quick.generate(prompts, range(12))
                ids = [completion.ids for completion in completions]
                logps, _, _ = fast.completion_logps(model, prompts, ids, TEMPERATURE)
                rows = zip(logps.tolist(), completions)
                drift = max(abs(a - b) for row, done in rows for a, b in zip(row, done.logps))
                part.check(f"{architecture} {kind}, {device}: logp difference", drift, 2e-3)
                drawn[str(device)], drawn["plain"] = ids, [done.ids for done in plain]
            for other in ("cpu", "plain"):
                same = sum(a == b for a, b in zip(drawn[other], drawn[str(part.device)]))
                part.check(f"{architecture} {kind}, {other}: others drawn of 12", 12 - same, 2)
    torch.manual_seed(0)
    count, size = 20_000, 20
    logits = torch.randn(1, size).to(part.device)
    p = (logits[0] / TEMPERATURE).softmax(-1).double()
    for draw in (sampler.sample_tokens, fast.sample_tokens):
        uniforms = torch.rand(count).to(part.device)
        tokens, _ = draw(logits.repeat(count, 1), uniforms, TEMPERATURE)
        observed = torch.bincount(tokens, minlength=size)
        chi_square = ((observed - count * p) ** 2 / (count * p)).sum().item()
        part.check(f"chi-square, {draw.__module__}", chi_square, CHI_SQUARE_19)
    weights = torch.randn(3000, 7).bfloat16()
    digests = set()
    for device in ("cpu", part.device):
        fingerprint = Fingerprint()
        fingerprint.add("w", weights.to(device))
        digests.add(fingerprint.digest())
    part.wants("a fingerprint is the same on both devices", len(digests) == 1)


# train.py as a user starts it -------------------------------------------------------------------


def learn(part: Part) -> None:
    """For both kinds a run without a stop, and one that SIGTERM stops and that then goes on. All
    are at work at once. The temperature makes a few tokens likely, so that there is something to
    learn in thirty steps; it also lets what rounds otherwise (a GPU adds in any order) grow, so
    that the two runs need only end alike.
    """
    size = transformers.AutoTokenizer.from_pretrained(tokenizer_folder()).vocab_size
    small = tiny_model("llama", vocab_size=size, tie_word_embeddings=True)
    model = save_with_tokenizer(small, part.folder / "tiny")
    steps, rows = (6, 16) if part.tiny else (30, 64)
    flags, stopped, runs = {}, {}, {}
    for kind, learning_rate in (("lora", 1e-2), ("full", 1e-3)):
        common = {"train_type": kind, "torch_dtype": "float32", "learning_rate": learning_rate}
        common |= {"max_steps": steps, "lr_scheduler_type": "constant", "beta": 0.001}
        common |= {"max_completion_length": 8, "temperature": 0.1}
        common |= {"per_device_train_batch_size": rows}
        flags[kind] = train_flags(part, model, f"{kind}-stopped", **common)
        stopped[kind] = part.start(["train.py", *flags[kind]], f"{kind}-stopped.log")
        whole = train_flags(part, model, f"{kind}-whole", **common)
        runs[kind] = part.start(["train.py", *whole], f"{kind}-whole.log")
    waiting = dict(stopped)
    while waiting:
        time.sleep(0.02)
        for kind, process in list(waiting.items()):
            has_begun = len(read_metrics(part.folder / f"{kind}-stopped")) >= steps // 3
            if has_begun or process.poll() is not None:
                process.send_signal(signal.SIGTERM)
                del waiting[kind]
    finish(*stopped.values(), status=143)
    again = {}
    for kind, words in flags.items():
        resumed = ["train.py", *words, "--resume_from_checkpoint", "true"]
        again[kind] = part.start(resumed, f"{kind}-again.log")
    finish(*runs.values(), *again.values())
    for kind in runs:
        whole = read_metrics(part.folder / f"{kind}-whole")
        resumed = read_metrics(part.folder / f"{kind}-stopped")
        for name, lines in (("whole", whole), ("stopped", resumed)):
            rewards = [line["reward"] for line in lines]
            first, last = statistics.mean(rewards[:3]), statistics.mean(rewards[-3:])
            part.tell(f"{kind}, {name}: first and last rewards", [round(first, 3), round(last, 3)])
            part.wants(f"{kind}, {name}: the reward rises", part.tiny or last > first + 0.1)
            in_order = [line["step"] for line in lines] == [*range(1, steps + 1)]
            part.wants(f"{kind}, {name}: a line a step", in_order)
        apart = [abs(a["reward"] - b["reward"]) for a, b in zip(whole, resumed)]
        others = [line["step"] for line, differs in zip(whole, apart) if differs]
        part.tell(f"{kind}: first step of another reward", others[:1])
        part.tell(f"{kind}: resumed behind step", resumed_at(part, kind))
        drift = max(line["sampler/logp_diff"] for line in whole)
        part.check(f"{kind}: sampler/logp_diff", drift, 1e-3)
        part.tell(f"{kind}: s a step", statistics.median(line["time/step"] for line in whole))


def resumed_at(part: Part, kind: str) -> int:
    said = (part.folder / f"{kind}-again.log").read_text()
    return int(re.search(r"resumes from \S*checkpoint-(\d+)", said)[1])


def start_tests(part: Part) -> None:
    """Both runs of pytest work beside the parts in front of own_tests, which times nothing."""
    every = [
        "tests/fast",
        *sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*")),
    ]
    names = ("test_grpo", "test_family", "test_sampler", "test_lora")
    some = ["tests/fast", *(f"tests/{name}.py" for name in names)]
    if part.tiny:
        every = some = ["tests/fast/test_head.py", "tests/fast/test_draw.py"]
    cores = len(os.sched_getaffinity(0))
    common = ["-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    gpu = {"TESTS_DEVICE": part.device.type, "PYTHONPATH": f"{ROOT}/bench/gpu:{inherited_path()}"}
    several = ["-n", min(4, cores // 2), *some]
    part.start([*common, "-p", "on_device", *several], "tests-device.log", **gpu)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    whole = ["-n", min(12, cores), "--dist", "loadfile", *every]
    part.start([*common, *whole], "tests-cpu.log", **hidden)


def inherited_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def own_tests(part: Part) -> None:
    for process, name in zip(part.processes, ("on the device", "on the CPU")):
        process.wait()
        text = process.log.read_text()
        (part.out / process.log.name).write_text(text)
        summary = re.findall(r"^.*\b\d+ (?:passed|failed|error).*$", text, re.MULTILINE)
        part.tell(name, summary[-1].strip("= ") if summary else text[-300:])
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", text, re.MULTILINE)
        lacking = [test for test, why in failed if "ModuleNotFoundError" in why]
        part.tell(f"{name}: lack a package", lacking)
        left = [f"{test}: {why[:120]}" for test, why in failed if test not in lacking]
        part.tell(f"{name}: failed", left)
        part.wants(f"{name} all tests pass", bool(summary) and not left)
