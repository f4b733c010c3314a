"""How fast is it on this device, and in how much memory? Each function is a part of bench/gpu/kit.py."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from part import Part, finish, read_metrics, save_with_tokenizer, train_flags
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

import dist
import fast
import grpo
import lora
import sampler
from fast.decoder import LlamaDecoder
from run import flags, log, models, plan

# Qwen 2.5's: hidden size, inner size, layers, heads, key heads
SHAPES = {
    "tiny": (64, 128, 2, 4, 2),
    "0.5B": (896, 4864, 24, 14, 2),
    "1.5B": (1536, 8960, 28, 12, 2),
    "7B": (3584, 18944, 28, 28, 4),
}
BANDWIDTH = 3.35e12  # bytes a second that an H100's memory is said to give
TEMPERATURE = 0.9


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if dist.has_bfloat16(device) else torch.float32


def build(size: str, kind: str, device: torch.device):
    """A model of this size with random weights, in bfloat16 where the device multiplies it."""
    hidden, inner, layers, heads, key_heads = SHAPES[size]
    config = Qwen2Config(
        vocab_size=50_000 if size == "tiny" else 151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=size != "7B",
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=precision(device))
    if kind == "lora":
        lora.inject(model, 8, 32)
    return model.train()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable, device: torch.device, turns: int) -> float:
    """The median of so many turns."""
    times = []
    for _ in range(turns):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def profiled(work: Callable, device: torch.device, seconds: float) -> dict:
    """What the device does while `work` runs, which takes so many seconds unwatched."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watch:
        work()
        synchronize(device)
    events = watch.key_averages()
    own = [e for e in events if (e.device_type == DeviceType.CUDA) == on_gpu]

    def busy(event) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3

    longest = sorted(own, key=busy, reverse=True)[:6]
    waits = ("Synchronize", "aten::_local_scalar_dense", "aten::nonzero")
    return {
        "kernels": sum(event.count for event in own),
        "busy ms": round(sum(map(busy, own)), 2),
        "busy share": round(sum(map(busy, own)) / 1e3 / seconds, 2),
        "waits": {e.key: e.count for e in events if any(word in e.key for word in waits)},
        "longest, ms": {event.key[:60]: round(busy(event), 2) for event in longest},
    }


def free_memory(device: torch.device) -> None:
    """Give back what lies idle, and measure the peak anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float:
    return round(log.peak_memory(device) / 1e9, 2)


# Training ---------------------------------------------------------------------------------------


@dataclass
class Work:
    """P prompts with G completions each, all prompts and all completions of one length in tokens."""

    size: str
    kind: str
    P: int
    G: int
    prompt: int
    completion: int

    def __str__(self) -> str:
        tokens = f"{self.prompt} + {self.completion} tokens"
        return f"{self.size} {self.kind}, {self.P} × {self.G}, {tokens}"

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [[100 + i] * self.prompt for i in range(self.P) for _ in range(self.G)]

    @property
    def rows(self) -> int:
        return self.P * self.G


PASSES = [
    Work("1.5B", "lora", 4, 8, 300, 512),
    Work("1.5B", "full", 1, 8, 300, 512),
    Work("7B", "lora", 1, 8, 300, 1024),
    Work("0.5B", "full", 1, 8, 300, 512),
    Work("7B", "lora", 1, 4, 2048, 1024),
    Work("7B", "lora", 1, 1, 4096, 2048),
]
TINY_PASSES = [Work("tiny", "lora", 2, 4, 20, 30), Work("tiny", "full", 1, 4, 20, 30)]


def train_speed(part: Part) -> None:
    """Passes forward and backward, without an update."""
    for work in TINY_PASSES if part.tiny else PASSES:
        row = {}
        part.tell(str(work), row)
        pass_speeds(part, work, row)
        free_memory(part.device)


def pass_speeds(part: Part, work: Work, row: dict) -> None:
    model = build(work.size, work.kind, part.device)
    completions = [torch.randint(5, 900, (work.completion,)).tolist() for _ in range(work.rows)]
    batch = model, work.prompt_ids, completions
    useful = useful_operations(model, work)

    def measure(way: str, one_pass: Callable, profiling: bool = False) -> None:
        def turn() -> None:
            one_pass()
            for parameter in model.parameters():
                parameter.grad = None

        try:
            turn()
            free_memory(part.device)
            seconds = seconds_of(turn, part.device, turns=2)
        except torch.OutOfMemoryError:
            row[way] = "out of memory"
            return
        row[way] = {"s": round(seconds, 4), "peak GB": peak_gb(part.device)}
        row[way]["completions/s"] = round(work.rows / seconds, 2)
        row[way]["useful TFLOP/s"] = round(useful / seconds / 1e12, 1)
        if profiling:
            row[way] |= profiled(turn, part.device, seconds)

    at_once = max(1, work.rows // 2) if work.size == "7B" else min(8, work.rows)
    measure(f"ordinary, {at_once} at once", lambda: ordinary_pass(*batch, at_once))
    fast.prepare(model)
    measure("ours", lambda: quick_pass(*batch), profiling=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    measure("ours, recomputing", lambda: quick_pass(*batch))


def useful_operations(model, work: Work) -> float:
    """Of products with weights: each prompt once, nothing recomputed, attention left out."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    completions = work.rows * work.completion  # tokens
    forward = 2 * (layers * (work.P * work.prompt + completions) + head * completions)
    return forward * (3 if work.kind == "full" else 2)


def ordinary_pass(model, prompts: list, completions: list, at_once: int) -> None:
    """As an ordinary trainer has it: so many padded rows at once, attention by SDPA, and a log
    softmax a row over all logits of its completion."""
    device = next(model.parameters()).device
    for first in range(0, len(prompts), at_once):
        rows = list(zip(prompts, completions))[first : first + at_once]
        ids, mask = grpo.pad([p + c for p, c in rows], "left", device)  # (B, P + T)
        targets, _ = grpo.pad([c for _, c in rows], "left", device)  # (B, T)
        keep = targets.shape[1] + 1
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep)
        logits = out.logits[:, :-1] / TEMPERATURE  # (B, T, V)
        logps = []
        for own, tokens in zip(logits, targets):
            logps.append(own.log_softmax(-1).gather(1, tokens[:, None]))
        torch.stack(logps).float().sum().backward()


def quick_pass(model, prompts: list, completions: list) -> None:
    logps, _, _ = fast.completion_logps(model, prompts, completions, TEMPERATURE)
    logps.sum().backward()


# Sampling ---------------------------------------------------------------------------------------

DECODINGS = [
    Work("1.5B", "lora", 8, 8, 300, 128),
    Work("1.5B", "full", 1, 8, 300, 128),
    Work("7B", "lora", 1, 8, 300, 64),
    Work("1.5B", "full", 8, 8, 300, 64),
    Work("1.5B", "lora", 1, 8, 300, 64),
]
FEW, MORE = 4, 32  # steps that are taken apart
TINY_DECODINGS = [Work("tiny", "lora", 2, 4, 20, 16), Work("tiny", "full", 1, 4, 20, 16)]


def decode_speed(part: Part) -> None:
    for work in TINY_DECODINGS if part.tiny else DECODINGS:
        row = {}
        part.tell(str(work), row)
        decode_speeds(part, work, row)
        free_memory(part.device)


def decode_speeds(part: Part, work: Work, row: dict) -> None:
    """Seconds with the prefill; a step alone is what MORE of them take beyond FEW."""
    model = build(work.size, work.kind, part.device).eval()
    ids = torch.tensor(work.prompt_ids, device=part.device)  # (B, prompt)

    def generate(tokens: int) -> None:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True}
        settings |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids), "top_k": 0}
        with torch.inference_mode():
            model.generate(input_ids=ids, **settings)

    def sample(decoder: type, tokens: int) -> None:
        quick = {"decoder": decoder, "draw": fast.draw_for(), "max_new_tokens": tokens}
        sampler.ModelSampler(model, eos_token_ids=[], **quick).generate(
            work.prompt_ids, range(work.rows)
        )

    def measure(way: str, sample: Callable) -> None:
        sample(FEW)  # loads the kernels
        seconds = seconds_of(lambda: sample(work.completion), part.device, turns=1)
        row[way] = {"ms a token": round(seconds / work.completion * 1e3, 2)}
        row[way]["tokens/s"] = round(work.rows * work.completion / seconds)

    fast.prepare(model)
    chosen = fast.decoder_for(model)
    row["decoder"] = chosen.__name__
    row["floor, ms a token"] = round(bytes_of_step(model, work) / BANDWIDTH * 1e3, 2)
    measure("ours", partial(sample, chosen))
    measure("ours, kernel by kernel", partial(sample, LlamaDecoder))
    turns = [partial(sample, chosen, tokens) for tokens in (FEW, FEW + MORE)]
    short, long = (seconds_of(turn, part.device, turns=2) for turn in turns)
    row["a step alone, ms"] = round((long - short) / MORE * 1e3, 2)
    before, after = (profiled(turn, part.device, long) for turn in turns)
    more = {name: after[name] - before[name] for name in ("kernels", "busy ms")}
    more |= {name: n - before["waits"].get(name, 0) for name, n in after["waits"].items()}
    row["in a step"] = {name: round(value / MORE, 2) for name, value in more.items()}
    row["longest, ms"] = after["longest, ms"]
    measure("generate", generate)


def bytes_of_step(model, work: Work) -> float:
    """What a step has to read: each weight once, the keys and values of each prompt once, and those
    of the completions, which are half there on average."""
    config = model.config
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    if not config.tie_word_embeddings:  # a row of them is read, not all
        weights -= 2 * model.get_input_embeddings().weight.numel()
    dim = config.hidden_size // config.num_attention_heads
    of_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * dim
    tokens = work.P * work.prompt + work.rows * work.completion / 2
    return weights + of_token * tokens


# train.py as a user starts it -------------------------------------------------------------------


def model_on_disk(part: Part):
    size = "tiny" if part.tiny else "1.5B"
    folder = part.folder / size
    if not (folder / "tokenizer.json").exists():
        save_with_tokenizer(build(size, "full", part.device), folder)
        free_memory(part.device)
    return folder


def memory(part: Part) -> None:
    """The largest moment of a step that the plan tells, and what the run held by the end of its
    first. A temperature of 5 makes every completion as long as it may be; nothing is saved."""
    model, dtype = model_on_disk(part), precision(part.device)
    length, rows = (16, 8) if part.tiny else (256, 16)
    for recomputing in ("true", "false"):
        runs = {}
        for kind in ("lora", "full"):
            words = {"train_type": kind, "temperature": 5.0, "gradient_checkpointing": recomputing}
            words |= {"max_completion_length": length, "per_device_train_batch_size": rows}
            words |= {"torch_dtype": str(dtype).removeprefix("torch.")}
            runs[kind] = train_flags(part, model, f"memory-{kind}-{recomputing}", **words)
        started = {k: part.start(["train.py", *own], f"memory-{k}.log") for k, own in runs.items()}
        for kind, process in started.items():
            args = flags.parse_args([*runs[kind], "--dry_run", "true"])
            lines = []
            while not lines:
                time.sleep(0.1)
                lines = read_metrics(Path(args.output_dir))
                if process.poll() is not None:
                    finish(process)
            measured = lines[0]["memory/peak_gib"] * 2**30 / 1e9
            _, terms = plan.make(args, models.model_config(args), dist.find_world(args.device))
            moments = plan.sums(terms)
            del moments["save"]
            planned = {moment: round(value / 1e9, 2) for moment, value in moments.items()}
            name = f"{kind}, recomputing {recomputing}"
            part.tell(f"{name}: planned, measured GB", [planned, round(measured, 2)])
            if part.on_gpu:
                off = abs(max(planned.values()) / measured - 1)
                part.check(f"{name}: the plan is off by", off, 0.25)
        part.close()


def whole_run(part: Part) -> None:
    model, dtype = model_on_disk(part), precision(part.device)
    length, rows = (16, 4) if part.tiny else (256, 16)
    words = {"max_steps": 3, "max_completion_length": length, "gradient_accumulation_steps": 4}
    words |= {"per_device_train_batch_size": rows, "temperature": 1.0}
    words |= {"torch_dtype": str(dtype).removeprefix("torch.")}
    run = train_flags(part, model, "whole", **words)
    started = time.perf_counter()
    finish(part.start(["train.py", *run], "whole.log"))
    part.tell("seconds, all in all", round(time.perf_counter() - started, 1))
    said = (part.folder / "whole.log").read_text().splitlines()
    part.tell("said", [line for line in said if line.startswith("fast parts")])
    for line in read_metrics(part.folder / "whole"):
        times = {n: round(v, 3) for n, v in line.items() if n.startswith("time/")}
        times |= {n: line[n] for n in ("completion_length", "sampler/logp_diff", "grad_norm")}
        part.tell(f"step {line['step']}", times | {"peak GiB": round(line["memory/peak_gib"], 2)})
        part.wants(f"finite in step {line['step']}", line["grad_norm"] > 0)
