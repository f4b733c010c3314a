"""What a run costs, before it is paid for: bytes a rank, term by term, from the flags and a model's config.json alone.

    python train.py … --dry_run true                              this machine's processes (under torchrun, all of them)
    python train.py … --dry_run 32 --device_memory_gb 80          32 GPUs that need not be there

Not everything lives at once. A step has three moments, and a checkpoint is a fourth; each term says in which it lives,
and the peak is the moment of the largest sum:

    generate   the keys and values of all completions of the step                              sampler.py
    backward   a micro-batch has run forward; what autograd kept of every layer waits          fast/
    update     the gradients are complete, the activations gone                                dist.py
    save       rank 0 collects the optimizer's whole state in its host's memory                run/checkpoints.py

A formula is printed as it is computed: `terms` evaluates these very strings. They were read off the code of a decoder
of Llama's shape (Qwen 2 and 3, Mistral, SmolLM 2): tests/run/test_plan.py counts what autograd keeps of three, and
bench/memory.py measures whole runs. For other shapes they are an estimate. What a GPU's driver, NCCL and gaps between
tensors take is not in them.
"""

import argparse
import math
import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import lora
from data import UsageError
from dist import World, has_bfloat16
from run import checkpoints, combinations, models, readers

try:
    from fast import LOGITS_AT_ONCE, MAX_SCORES, QUERIES_AT_ONCE
except ImportError:  # without them there is nothing to plan
    LOGITS_AT_ONCE = MAX_SCORES = QUERIES_AT_ONCE = None

MOMENTS = ("generate", "backward", "update", "save")
PROCESS = 0.62e9  # Python, its libraries and what they set up, on a CPU: bench/memory.py, a model of nearly no size
LLAMA = {
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
}  # its linear layers


@dataclass(frozen=True)
class Options:
    """plan"""

    dry_run: Annotated[bool | int, "print what a run takes here, or on N GPUs for training"] = False
    device_memory_gb: Annotated[
        float | None, "whether a plan fits; 10^9 bytes a rank", "above 0"
    ] = None


@dataclass(frozen=True)
class Term:
    """What one thing comes to in bytes, the moments in which they live, and the formula that gave them.

    No moments: not memory, but what a step sends and reads (bytes) and computes (FLOPs).
    """

    name: str
    value: float
    moments: tuple[str, ...]
    formula: str


def symbols(
    args: argparse.Namespace, config, ranks: int, longest: int, shared: int
) -> dict[str, float]:
    """The quantities that formulas are made of, by the letters of MEANING; "llama": whether the model is of its shape.

    longest: tokens of the longest prompt, the first `shared` of which all prompts begin with.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    sizes = [p.numel() for p in model.parameters()]  # tied ones once
    kinds = (
        model._no_split_modules or []
    )  # class names of the parts that ZeRO-3 gathers by themselves
    layers = [
        sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in kinds
    ] or [0]
    names = dict(model.named_modules())
    linears = {name: m for name, m in names.items() if isinstance(m, torch.nn.Linear)}
    trained, is_lora = sizes, args.train_type == "lora"
    if is_lora:
        adapted = [linears[name] for name in lora.find_targets(model, args.target_modules)]
        trained = [
            args.lora_rank * width for m in adapted for width in (m.in_features, m.out_features)
        ]
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = [
        getattr(config, name, None) or 0
        for name in ("moe_intermediate_size", "num_experts_per_tok")
    ]
    inner = (
        math.prod(experts) or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    )

    b, length, group = (
        args.per_device_train_batch_size,
        args.max_completion_length,
        args.num_generations,
    )
    own = longest - shared
    batch = 0 if args.use_vllm else checkpoints.rollout_size(args, ranks) // ranks
    if batch and (args.eval_steps or args.eval_on_start):
        batch = max(batch, args.per_device_eval_batch_size)
    queries = min(QUERIES_AT_ONCE, max(length, own, shared))
    tokens = shared + prompts_of(b, group) * own + b * length
    bucket = args.bucket_size
    path, width = longest + length, 4 if args.torch_dtype == "float32" else 2
    return {
        "P": sum(sizes), "T": sum(trained), "N": ranks, "w": width, "t": 4 if is_lora else width,
        "A": args.gradient_accumulation_steps, "b": b, "n": tokens,
        "B": batch, "c": shared + prompts_of(batch, group) * own, "o": own, "C": length, "L": config.num_hidden_layers,
        "H": config.hidden_size, "q": heads * dim, "k": (getattr(config, "num_key_value_heads", None) or heads) * dim,
        "I": inner, "V": config.vocab_size, "K": max(*trained, min(bucket, sum(trained))), "D": layers[0],
        "E": sum(sizes) - sum(layers), "S": heads * min(max(MAX_SCORES // heads, queries * path), tokens * path),
        "R": min(LOGITS_AT_ONCE, b * length * config.vocab_size), "W": sum(m.weight.numel() for m in linears.values()),
        "Q": int(any(name.endswith(".q_norm") for name in names)),
        "llama": {name.rpartition(".")[2] for name in linears} <= LLAMA | {"lm_head"}
        and getattr(config, "hidden_act", None) == "silu" and any(hasattr(m, "variance_epsilon") for m in names.values()),
    }  # fmt: skip


MEANING = {
    "P": "parameters", "T": "trained", "N": "ranks", "w": "bytes a weight", "t": "bytes a trained one",
    "A": "micro-batches a step", "b": "completions in one", "n": "tokens in one", "B": "completions a rank samples at once",
    "c": "tokens of their prompts", "o": "of a prompt's own", "C": "of the longest completion", "L": "layers", "H": "hidden",
    "q": "queries", "k": "keys", "Q": "norm of each", "I": "inner", "V": "vocabulary",
    "K": "gradients in the largest bucket", "D": "parameters of a layer", "E": "outside of layers",
    "S": "attention scores at once", "R": "logits at once", "W": "weights of linear layers",
}  # fmt: skip


def prompts_of(rows: int, group: int) -> int:
    """Prompts of `rows` completions side by side, of groups of `group`, at most."""
    return math.ceil((rows - math.gcd(rows, group)) / group) + 1 if rows else 0


def terms(args: argparse.Namespace, s: dict[str, float]) -> list[Term]:
    """The memory of a rank (rank 0, which saves), then under no moment what it sends and computes in a step."""
    found = []

    def add(name: str, formula: str, *moments: str) -> None:
        found.append(Term(name, eval(formula, {"max": max}, s), moments, formula))

    on_gpu, lora_run, sharded = (
        s["on_gpu"],
        args.train_type == "lora",
        args.deepspeed != "none" and s["N"] > 1,
    )
    zero3, gather = args.deepspeed == "zero3" and sharded, args.ds3_gather_for_generation
    by_n = "/N" if sharded else ""
    weights = "(w*P + 4*T)" if lora_run else "w*P"
    if not on_gpu:
        add("process", f"{PROCESS:.0f}", *MOMENTS)
    add("weights", weights + "/N" * zero3, *MOMENTS)
    if zero3:
        add(
            "gathered weights",
            "w*(E + 2*D)",
            "backward",
            *["generate"] * (not gather and s["B"] > 0),
        )
        if gather and s["B"]:  # vLLM gets one tensor at a time
            add("gathered weights", weights, "generate")
    if args.beta and not lora_run:
        add("reference", "w*P" + "/N" * zero3, *MOMENTS)
    # float32 moments, and float32 weights unless they are that; gradients in float32, kept between micro-batches.
    add("optimizer", ("12*T" if s["t"] == 2 else "8*T") + by_n, *MOMENTS)
    add("gradients", "4*T" + by_n, "update", *["backward"] * (s["A"] > 1))
    head = "(4 + t)*V*H"  # the backward pass begins with the head: its gradient, summed in float32, and a chunk's
    if zero3:
        add("gradients", "t*T/N", "backward")
        add("gradients in flight", "2*t*K" if lora_run else f"max(t*(E + 2*D), {head})", "backward")
    else:
        # One bucket fills, one is sent; where it is shared out, its parts of the other ranks arrive in a third.
        buckets = "3*t*K" if sharded else "2*t*K"
        add("gradients in flight", buckets if lora_run else f"max({buckets}, {head})", "backward")
    # Of a layer: what its two norms read (Qwen 3 has two more, Q = 1), the queries, keys and values, what o_proj reads,
    # and two of the inner size. Of the last norm what it reads.
    if (
        args.gradient_checkpointing
    ):  # each layer's input; one at work, which keeps what norms and gate give, too
        add("activations", "n*(L*w*H + w*(4*H + (2 + Q)*(q + k) + 5*I))", "backward")
        add(
            "attention", "5*w*S + w*b*C*(o + C/2)", "backward"
        )  # scores at work; masks of all blocks
    else:
        add("activations", "n*(L*w*(2*H + (2 + Q)*(q + k) + 2*I) + w*H)", "backward")
        add(
            "attention or gate", "max(5*w*S, 4*w*n*I) + w*b*C*(o + C/2)", "backward"
        )  # whichever is at work
    add("logits", "(8 + 2*w)*R", "backward")
    if s["B"]:
        add(
            "cache", "2*w*L*k*(B*(o + C) + c)", "generate"
        )  # keys and values of every row, and as they were prefilled
        add("prefill", "c*(8*H + 3*w*I)", "generate")
        add("logits", f"B*V*(w + {12 + 24 * (args.top_p < 1 or args.top_k > 0)})", "generate")
        fast = s["w"] == 4 or has_bfloat16(torch.device("cpu"))
        if not on_gpu and fast and s["llama"] and (gather or not zero3):
            kept = lora_run and not zero3  # from one call of generate to the next
            add("packed weights", "w*W", *(MOMENTS if kept else ["generate"]))  # in oneDNN's layout
    # The optimizer's, with the weights made of it for the model's file; on a GPU a bucket's at a time.
    add("whole state", f"{bytes_to_save(s)}*T" if not on_gpu else "4*K", "save")

    if s["N"] > 1:
        passes = (
            "(3*A + 1)" if args.beta else "(2*A + 1)"
        )  # forward, backward, reference; generation
        passes = passes if gather else passes.replace("1)", "C)")
        moved = (
            f"({passes}*{weights} + A*t*T)" if zero3 else "(A + 1)*t*T" if sharded else "2*A*t*T"
        )
        add("bytes sent", f"{moved}*(N - 1)/N")
    passes = (4 if lora_run else 6) + 2 * (args.beta > 0) + 2 * args.gradient_checkpointing
    add("FLOPs to train", f"{passes}*P*n*A")
    if s["B"]:
        add("FLOPs to generate", "2*P*(B*C + c)")
        add("bytes read to generate", "C*(w*P + 2*w*L*k*(B*(o + C/2)))")
    return found


def bytes_to_save(s: dict[str, float]) -> int:
    """Of a trained parameter: float32 weights and moments, and the weights in the model's type if that is another."""
    return 12 if s["t"] == 4 else 12 + s["t"]


def sums(found: list[Term]) -> dict[str, float]:
    """Bytes that live in each moment; the largest is the peak."""
    return {
        moment: sum(term.value for term in found if moment in term.moments) for moment in MOMENTS
    }


def find_prompts(args: argparse.Namespace, config) -> tuple[int | None, int, int]:
    """Rows to train on (None: unknown), tokens of the longest prompt, and those that all begin with.

    Files and built-in datasets are read, as in a run. Of others, `#N` tells the rows and --max_length bounds the prompts.
    ValueError if nothing does, or if they leave no room for completions.
    """
    rows, longest, shared, at_least = None, args.max_length, 0, 1
    split = combinations.evaluates(args) and not args.val_dataset
    sources = [
        name if os.path.isfile(name) else name.rpartition("#")[0] or name for name in args.dataset
    ]
    if all(
        name in data.BUILTINS or Path(name).suffix.lower() in readers.READERS for name in sources
    ):
        table = data.load_rows(
            args.dataset, seed=args.seed, system=readers.read_system(args.system), read=readers.read
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                args.model, trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError):  # there is none
            tokenizer = None
        if tokenizer and tokenizer.chat_template:  # or transformers made up one, without
            mapping = readers.map_in_processes(args.dataset_num_proc)
            more = {"prefix": args.response_prefix, "template": models.template_of(args)}
            table, _ = data.encode(table, tokenizer, args.max_length, mapping, **more)
            prompts = [row["prompt_ids"] for row in table]
            longest = at_least = max(map(len, prompts))
            if not getattr(config, "sliding_window", None):
                shared = len(os.path.commonprefix([ids[:-1] for ids in prompts]))
        rows = len(readers.split(table, args.split_dataset_ratio, args.seed)[0] if split else table)
    elif all("#" in name for name in args.dataset):
        for name in args.dataset:
            if not re.fullmatch("0*[1-9][0-9]*", name.rpartition("#")[2]):
                raise UsageError(f"--dataset {name}: no number of rows behind #; #1 or more works")
        rows = sum(int(name.rpartition("#")[2]) for name in args.dataset)
        rows -= max(1, round(args.split_dataset_ratio * rows)) if split else 0
    if longest is None:
        raise UsageError(
            f"--dataset {' '.join(args.dataset)}: a plan does not know its prompts; --max_length N bounds them"
        )
    context = models.context_of(config)
    room = context - args.max_completion_length
    if room < at_least:
        raise UsageError(
            f"--max_completion_length {args.max_completion_length}: with a prompt of {at_least} token{'s' * (at_least > 1)} "
            f"or more that is beyond the model's {context}; a shorter one works"
        )
    return rows, min(longest, room), shared


def dry_run(args: argparse.Namespace, world: World) -> int:
    """Say what the run would be → exit status."""
    combinations.check(args, world.size if args.dry_run is True else args.dry_run)
    if args.plain or LOGITS_AT_ONCE is None:
        raise UsageError(
            "--dry_run: plans the quick parts alone; --plain false, with the folder fast/, works"
        )
    config = models.model_config(args)
    return show(args, config, world) if world.is_main else 0


def make(args: argparse.Namespace, config, world: World) -> tuple[dict[str, float], list[Term]]:
    """A run's quantities by their letters (and "rows", "prompt", "on_gpu"), and what they come to."""
    here = args.dry_run is True
    ranks, on_gpu = (world.size, world.device.type == "cuda") if here else (args.dry_run, True)
    rows, longest, shared = find_prompts(args, config.get_text_config())
    s = symbols(args, config, ranks, longest, shared) | {
        "rows": rows,
        "prompt": longest,
        "on_gpu": on_gpu,
    }
    return s, terms(args, s)


def show(args: argparse.Namespace, config, world: World) -> int:
    """Print what the run would be → exit status: 1 if it does not fit --device_memory_gb."""
    s, found = make(args, config, world)
    group, limit = args.num_generations, args.device_memory_gb
    groups = s["N"] * s["b"] * s["A"] // group
    steps = s["rows"] and math.ceil(
        args.num_train_epochs * args.num_iterations * s["rows"] / groups
    )
    used = {letter for term in found for letter in re.findall(r"[A-Za-z]\b", term.formula)}
    told = ", ".join(
        f"{letter} = {s[letter]:,} {meaning}"
        for letter, meaning in MEANING.items()
        if letter in used
    )
    print(f"{s['N']} × {'a GPU' if s['on_gpu'] else 'a process on CPUs'}, --deepspeed {args.deepspeed}; {config.model_type}, "
          f"--train_type {args.train_type}; prompts of {s['prompt']} tokens, completions of {s['C']}, at the longest")  # fmt: skip
    print(f"a step: {groups * group} completions, {groups} groups of {group}; steps: "
          f"{args.max_steps or steps or 'unknown, since the dataset is not read; #N behind its name, or --max_steps, tells'}")  # fmt: skip
    print("\n" + textwrap.fill(told, 118, break_on_hyphens=False) + "\n")

    def line(name: str, values: Iterable[float | None], formula: str = "") -> None:
        cells = "".join(f"{'–' if v is None else f'{v / 1e9:.2f}':>9}" for v in values)
        print(f"{name:20}{cells}   {formula.replace('*', '·')}".rstrip())

    print(f"{'GB a rank':20}" + "".join(f"{moment:>9}" for moment in MOMENTS) + "   bytes")
    for term in found:
        if term.moments:
            line(
                term.name,
                (term.value if moment in term.moments else None for moment in MOMENTS),
                term.formula,
            )
    total = sums(found)
    line("sum", total.values())
    print()
    for term in found:
        if not term.moments:
            print(f"{term.name + ' a step':26}{term.value:10.2e} {term.formula.replace('*', '·')}")
    if s["on_gpu"]:
        each = bytes_to_save(s)
        print(f"host memory of rank 0 while it saves: {each * s['T'] / 1e9:.2f} GB, {each}·T")
    if args.use_vllm:
        print(f"vLLM's engine, on a GPU of its own that is not counted here: {s['w'] * s['P'] / 1e9:.2f} GB of weights, "
              f"w·P, and {2 * s['w'] * s['L'] * s['k']:,} bytes a token, 2·w·L·k; on the only GPU, both come on top")  # fmt: skip
    if not s["llama"]:
        print(
            "not of Llama's shape: attention, cache and FLOPs are estimates, and activations up to 2.5 times as much"
        )
    moment, most = max(total.items(), key=lambda item: item[1])
    fits = limit is None or most <= limit * 1e9
    verdict = (
        "" if limit is None else f": {'fits' if fits else 'more than'} --device_memory_gb {limit:g}"
    )
    print(f"peak {most / 1e9:.2f} GB, {moment}{verdict}")
    if not fits:
        recompute, would = {"gradient_checkpointing": True}, []
        zero2, zero3 = {"deepspeed": "zero2"}, {"deepspeed": "zero3"}
        for change in (zero2, zero3, recompute, zero2 | recompute, zero3 | recompute):
            if all(getattr(args, name) != value for name, value in change.items()):
                other = max(sums(terms(argparse.Namespace(**vars(args) | change), s)).values())
                would.append(
                    (other, " ".join(f"--{n} {str(v).lower()}" for n, v in change.items()))
                )
        for other, flags in [w for w in would if w[0] <= limit * 1e9] or sorted(would)[:1]:
            print(
                f"{flags} would take {other / 1e9:.2f} GB" + ", still more" * (other > limit * 1e9)
            )
    return 0 if fits else 1
