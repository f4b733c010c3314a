"""Train a language model by GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1).

    python train.py                                           the demo: a small model learns sums, on any machine
    torchrun --nproc_per_node 7 train.py --model … --dataset … --reward_funcs accuracy format

`train` below is the algorithm. One batch is

    sample     G completions for each prompt, from the current policy                   sampler.py, data.py
    score      each completion, and compare it with its group: the advantage            rewards.py, grpo.py
    update     num_iterations optimizer steps on the clipped objective                  grpo.py, dist.py, lora.py

Ranks share the work like this: the completions of a batch stand in one row, groups side by side; each rank samples and
scores an equal slice of it, and trains on a slice of as many tokens as every other's. A group may lie across slices.
Every random number belongs to a completion or to an epoch, so the number of ranks changes nothing but the time.
"""

import argparse
import atexit
import difflib
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import data
import dist
import grpo
import lora
import plan
from rewards import COUNTERS, RewardError, Rewards, load_plugins, total
from sampler import Fingerprint, ModelSampler, Sampler, SamplerError, VLLMSampler, vllm_device

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and --dataset_num_proc's forks do not mix
transformers_logging.disable_progress_bar()
EMBEDDED_MODEL = Path(__file__).parent / "models" / "SmolLM2-135M-Instruct"
PLUGIN = Path(__file__).parent / "examples" / "train" / "grpo" / "plugin" / "close.py"
DEMO = (
    "--dataset arithmetic --val_dataset arithmetic-test "
    f"--external_plugins {shlex.quote(str(PLUGIN))} --reward_funcs accuracy format close --reward_weights 1 0.2 1 "
    "--output_dir output/demo --train_type lora --lora_rank 16 --lora_alpha 32 --learning_rate 3e-4 "
    "--lr_scheduler_type linear --beta 0 --num_generations 4 --temperature 1.0 --max_completion_length 32 "
    "--max_steps 140 --log_completions true --num_generations_eval 1 --eval_on_start true --eval_steps 28"
)


def train(args: argparse.Namespace, world: dist.World) -> None:
    # What can be wrong, on any rank, is found here, before a model is loaded (but weights, which must be to be compared).
    world.agree({flag: value for flag, value in vars(args).items() if flag not in NODES_OWN})
    tokenizer, train_rows, val_rows, rewards = world.together(prepare, args, world)
    if world.size > 1:
        world.agree(contents(args, train_rows, val_rows))
    world.together(start_folder, args, world)
    completions_per_step = step_size(args, world)
    prompts_per_batch = completions_per_step // args.num_generations
    steps_per_epoch = args.num_iterations * len(train_rows) / prompts_per_batch
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * steps_per_epoch)

    model, reference = load_policy(args, world)
    sampler = make_sampler(args, world, model, tokenizer)
    optimizer = dist.ZeroAdamW(
        model.named_parameters(),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bucket_size=args.bucket_size,
        shard=args.deepspeed == "zero2",
    )
    step, num_tokens, unlogged = resume(args, world, optimizer) if args.resume_from_checkpoint else (0, 0, [])
    rewards.start()
    log = Log(args, world, max_steps, step, unlogged)

    def rollout(rows: list[dict], num_generations: int, stream: int, step: int) -> Rollout:
        return collect(args, world, sampler, tokenizer, rewards, rows, num_generations, stream, step)

    def evaluate() -> None:
        prompts_per_batch = world.size * args.per_device_eval_batch_size // args.num_generations_eval
        batches = range(0, len(val_rows), prompts_per_batch)
        parts = [
            rollout(val_rows[i : i + prompts_per_batch], args.num_generations_eval, EVALUATION + i, step)
            for i in batches
        ]
        log.evaluation(step, weighted_mean([(part.size, part.metrics) for part in parts]))

    if val_rows and args.eval_on_start and step == 0:
        evaluate()

    batch = math.ceil(step / args.num_iterations)
    while step < max_steps:
        started = time.perf_counter()
        order = data.step_rows(batch, prompts_per_batch, len(train_rows), args.seed)
        sample = rollout([train_rows[i] for i in order], args.num_generations, batch, step + 1)
        num_tokens += sample.num_tokens
        log.completions(step + 1, sample)

        micro_batches = sample.micro_batches(args)
        ref_logps = [reference_logps(args, reference, sample, micro) for micro in micro_batches]
        old_logps = [None] * len(micro_batches)  # of the policy that sampled: what the first iteration computes anyway

        for _ in range(min(args.num_iterations, max_steps - step)):
            training = time.perf_counter()
            # Dropout's random numbers, the same when a run is resumed.
            torch.manual_seed(completion_seed(args.seed, DROPOUT + step, world.rank))
            names = ["loss", "clip_ratio"] + ["entropy"] * (sample.num_trained > 0) + ["kl"] * (reference is not None)
            sums = dict.fromkeys(names, 0.0)
            for i, micro in enumerate(micro_batches):
                logps, entropies, mask = dist.forward(
                    grpo.completion_logps, model, *sample.tokens(micro), args.temperature
                )
                if not micro:
                    optimizer.backward(0.0 * logps.sum())
                    continue
                if old_logps[i] is None:
                    old_logps[i] = logps.detach()
                    sample.compare_with_sampler(micro, logps.detach())
                loss, metrics = grpo.grpo_loss(
                    logps,
                    old_logps[i],
                    ref_logps[i],
                    sample.advantages[micro],
                    mask,
                    sample.importance_weights(args, micro, old_logps[i]),
                    epsilon=args.epsilon,
                    beta=args.beta,
                    num_completions=completions_per_step,
                )
                optimizer.backward(loss)
                metrics["entropy"] = ((entropies * mask).sum(1) / mask.sum(1)).sum() / sample.num_trained
                for name, value in metrics.items():
                    sums[name] += value.item()
            learning_rate = args.learning_rate * schedule(args, step, max_steps)
            grad_norm = optimizer.step(learning_rate)
            sampler.take_weights(model)
            step += 1

            now = time.perf_counter()
            drift = sample.drift(world)
            log.warn_of_drift(drift)
            log.step(
                step,
                {"epoch": step / steps_per_epoch, "learning_rate": learning_rate, "num_tokens": num_tokens},
                {
                    **world.sum(sums),
                    **sample.metrics,
                    **drift,
                    "grad_norm": grad_norm,
                    "time/comm": optimizer.seconds_waited(),
                    "time/train": now - training,
                    "time/step": now - started,
                },
            )
            once = {"time/sync", "time/generate", "time/reward", *COUNTERS} & sample.metrics.keys()  # told once a batch
            sample.metrics.update(dict.fromkeys(once, 0.0))
            started = now

        if val_rows and crossed(args.eval_steps, step, args.num_iterations):
            evaluate()
        if crossed(args.save_steps, step, args.num_iterations) or step == max_steps:
            save(args, world, model, tokenizer, optimizer, step, num_tokens, log.unlogged)
        batch += 1
    log.close()


# Before the loop ---------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, world: dist.World):
    """Check flags, read data, make rewards → tokenizer, training rows, validation rows, rewards.

    ValueError, one line that begins with the flag at fault.
    """
    check(args, world.size)
    if world.is_main:
        check_folder(args)
    load_plugins(args.external_plugins)
    rewards = Rewards(args.reward_funcs, args.reward_weights, device=world.device, **vars(args))
    atexit.register(rewards.close)
    system = data.read_system(args.system)
    load = {"seed": args.seed, "num_proc": args.dataset_num_proc, "system": system}
    train_rows, val_rows = data.load_rows(args.dataset, **load), []
    if args.val_dataset:
        val_rows = data.load_rows(args.val_dataset, flag="--val_dataset", **load)
        if not (args.eval_steps or args.eval_on_start):
            say(world, "--val_dataset: never evaluated on without --eval_steps or --eval_on_start true")

    config = model_config(args, has_checkpoint=world.is_main)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model}: no tokenizer there ({first_line(error)})") from error
    needed, context = 0, config.get_text_config().max_position_embeddings
    for rows, flag in ((train_rows, "--dataset"), (val_rows, "--val_dataset")):
        if not rows:
            continue
        rewards.check_columns([column for column in rows[0] if column != "prompt"])
        if {"accuracy", "cosine"} & set(rewards.names):
            missing = data.check_solutions(rows)
            if missing:
                say(world, f"{flag}: {missing} of {len(rows)} rows have no reference; accuracy and cosine skip them")
        rows[:], dropped = data.encode(rows, tokenizer, args.max_length, args.dataset_num_proc)
        if dropped:
            say(world, f"{flag}: dropped {dropped} prompts of more than {args.max_length} tokens, {len(rows)} are left")
        longest = max(len(row["prompt_ids"]) for row in rows)
        if longest + args.max_completion_length > context:
            raise ValueError(
                f"--max_completion_length {args.max_completion_length}: with a prompt of {longest} tokens that is more "
                f"than the model's {context}; a shorter one, or --max_length {context - args.max_completion_length}, works"
            )
        needed = max(needed, longest + args.max_completion_length)
    if args.use_vllm:
        args.vllm_max_model_len = args.vllm_max_model_len or needed
        if not needed <= args.vllm_max_model_len <= context:
            raise ValueError(
                f"--vllm_max_model_len {args.vllm_max_model_len}: from {needed} (the longest prompt and "
                f"--max_completion_length {args.max_completion_length}) to the model's {context} works"
            )
    if args.eval_steps and not args.val_dataset:  # only now, so that --max_length leaves neither side empty
        train_rows, val_rows = data.split(train_rows, args.split_dataset_ratio, args.seed)
    for note in rewards.notes:
        say(world, note)
    return tokenizer, train_rows, val_rows, rewards


def dry_run(args: argparse.Namespace, world: dist.World) -> int:
    """Say what the run would be → exit status."""
    check(args, world.size if args.dry_run is True else args.dry_run)
    config = model_config(args)
    return plan.show(args, config, world) if world.is_main else 0


def check(args: argparse.Namespace, world_size: int) -> None:
    """What can be said of the flags alone."""
    if args.device_memory_gb and not args.dry_run:
        raise ValueError(f"--device_memory_gb {args.device_memory_gb:g}: only a plan asks for it; --dry_run true works")
    if args.use_vllm and args.deepspeed == "zero3" and not args.ds3_gather_for_generation:
        raise ValueError(
            "--ds3_gather_for_generation false: vLLM needs whole weights; true, or --use_vllm false, works"
        )
    if args.use_vllm and not args.dry_run and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--use_vllm true: vLLM is not installed; make vllm installs it, --use_vllm false samples without"
        )
    if args.use_vllm:
        if not args.dry_run:  # which may be of another machine
            device_of_vllm(args)
        if args.temperature < 0.01:
            raise ValueError(f"--temperature {args.temperature}: with vLLM, 0.01 or more works")
    if "wandb" in args.report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError("--report_to wandb: wandb is not installed; pip install wandb, or --report_to tensorboard")
    evaluating = bool(args.val_dataset or args.eval_steps)
    sizes = [("per_device_train_batch_size", "num_generations", args.gradient_accumulation_steps)]
    sizes += [("per_device_eval_batch_size", "num_generations_eval", 1)] if evaluating else []
    for batch_flag, group_flag, accumulation in sizes:
        batch, group = getattr(args, batch_flag), getattr(args, group_flag)
        total = world_size * batch * accumulation
        if total % group:
            works = [n for n in range(2, total + 1) if total % n == 0]
            parts = f"{world_size} processes × {batch_flag} {batch}" + f" × accumulation {accumulation}" * (
                accumulation > 1
            )
            raise ValueError(
                f"--{group_flag} {group}: does not divide the {total} completions of {parts}; "
                + (f"--{group_flag} {', '.join(map(str, works))} would, and so would " if works else "what would is ")
                + f"--{batch_flag} {math.lcm(group, world_size * accumulation) // (world_size * accumulation)}"
            )


def check_folder(args: argparse.Namespace) -> None:
    """What rank 0 writes to and resumes from; other nodes may have disks of their own."""
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir}: is a file; a folder, there or not, works")
    files = ("trainer_state.json", "optimizer.safetensors") if args.resume_from_checkpoint else ()
    if not all((checkpoint_to_resume(args) / file).exists() for file in files):
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: no checkpoint there; true, for the newest in "
            "--output_dir, or a checkpoint-N folder works"
        )


# Flags that may differ between ranks. Nodes may keep files under other names; `contents` compares what is in them.
NODES_OWN = {"output_dir", "model", "dataset", "val_dataset", "system", "external_plugins"}
NODES_OWN |= {"dataset_num_proc", "dataloader_num_workers"}


def contents(args: argparse.Namespace, train_rows: list[dict], val_rows: list[dict]) -> dict[str, str]:
    """What the files that flags name hold, in short."""

    def digest(parts: Iterable[bytes]) -> str:
        sums = hashlib.sha256()
        for part in parts:
            sums.update(part)
        return sums.hexdigest()[:12]

    def told(rows: list[dict]) -> str:
        return f"({len(rows)} rows, {digest(json.dumps(row, sort_keys=True, default=str).encode() for row in rows)})"

    return {
        "dataset": told(train_rows),
        "val_dataset": told(val_rows),
        "external_plugins": f"({digest(Path(file).read_bytes() for file in args.external_plugins)})",
    }


def model_config(args: argparse.Namespace, has_checkpoint: bool = False):
    """The model's configuration; a LoRA run's target modules are looked for in a model without weights."""
    if Path(args.model) == EMBEDDED_MODEL and not EMBEDDED_MODEL.exists():
        raise ValueError(f"--model {args.model}: the embedded model is not on disk yet; make model puts it there")
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model}: not a model folder or hub id ({first_line(error)})") from error
    folder = Path(args.model)
    if folder.is_dir() and not args.dry_run and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError(f"--model {args.model}: no weights in this folder; it needs model.safetensors")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"--model {args.model}: not a causal language model ({first_line(error)})") from error
    if args.train_type == "lora":
        lora.inject(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.target_modules)
    if args.resume_from_checkpoint and has_checkpoint:
        check_checkpoint(args, model)
    return config


def check_checkpoint(args: argparse.Namespace, model) -> None:
    """Whether the checkpoint to resume is of the parameters that this model (one without weights will do) trains."""
    folder = checkpoint_to_resume(args)
    try:
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith("master.")]  # noqa: SIM118
            there = {name.removeprefix("master."): file.get_slice(name).get_shape() for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--resume_from_checkpoint {folder}: not a whole checkpoint ({first_line(error)})") from error
    here = {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"--resume_from_checkpoint {folder}: {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} in this run; the --model, --train_type, --lora_rank and --target_modules "
                "of then work"
            )


def load_policy(args: argparse.Namespace, world: dist.World):
    """The model to train, and what the KL term compares it with.

    The reference is the same model with its adapters off for LoRA, a second one for full training, None when β is 0.
    """
    torch.manual_seed(args.seed)  # LoRA's A matrices, the same on every rank
    dtype = getattr(torch, args.torch_dtype)
    if dtype == torch.bfloat16 and not dist.has_bfloat16(world.device):
        say(world, "--torch_dtype bfloat16: this CPU has no instructions for it; float32 is several times as fast here")

    def load():
        # Weights of the file's own type are mapped, not read: the ranks of a node share that memory.
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        if world.spans_nodes:  # each may have other files under that name
            weights = Fingerprint()
            for name, parameter in model.named_parameters():
                weights.add(name, parameter.detach())
            world.agree({"model": f"(weights {weights.digest()[:12]})"})
        if args.train_type == "lora":
            lora.inject(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.target_modules)
        if args.deepspeed == "zero3" and world.size > 1:
            layers = model._no_split_modules or []  # the names of their classes
            dist.shard_parameters(model, [m for m in model.modules() if type(m).__name__ in layers])
        else:
            model.to(world.device)
        dist.forward(grpo.prepare, model)
        if not dist.forward(grpo.head_is_plain, model):
            raise ValueError(f"--model {args.model}: does more with its logits than log-probabilities here allow for")
        return model

    model, reference = load(), None
    if args.beta:
        reference = model if args.train_type == "lora" else load().requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), reference


def make_sampler(args: argparse.Namespace, world: dist.World, model, tokenizer) -> Sampler:
    ends = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        ends.update(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id])
    settings = {
        "eos_token_ids": sorted(ends - {None}),
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
    }
    if not args.use_vllm:
        return ModelSampler(model, **settings, gather=args.ds3_gather_for_generation)
    device = device_of_vllm(args)
    shared = device.type == "cuda" and device == world.device
    memory = args.vllm_gpu_memory_utilization or (0.3 if shared else 0.9)
    if shared:
        say(world, f"vLLM shares {device}, the only GPU, with training; --vllm_gpu_memory_utilization is {memory}")
    on_gpu = {"gpu_memory_utilization": memory, "async_scheduling": False}  # nothing in flight when weights change
    on_cpu = {
        "kv_cache_memory_bytes": 2 << 30,
        "enforce_eager": True,  # compiling takes minutes and brings a tenth
        "enable_chunked_prefill": False,  # with seeds, 0.32.0 fails on half a prompt: "CPU Generator does not use offset"
    }
    engine_args = {
        "model": args.model,
        "dtype": args.torch_dtype,
        "seed": args.seed % 2**32,
        "max_model_len": args.vllm_max_model_len,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
        "generation_config": "vllm",
        **(on_gpu if device.type == "cuda" else on_cpu),
    }
    log = Path(args.output_dir) / "vllm.log"
    return VLLMSampler(model, world, device, engine_args, **settings, timeout=args.vllm_timeout, log=log)


def device_of_vllm(args: argparse.Namespace) -> torch.device:
    """The engine's device, of rank 0's node; on other nodes there is none to find."""
    if int(os.environ.get("GROUP_RANK", 0)):
        return torch.device("cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return vllm_device(args.vllm_device, gpus, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def schedule(args: argparse.Namespace, step: int, max_steps: int) -> float:
    """The factor on the learning rate of step `step` (from 0): linear warm-up, whose first step already moves."""
    warmup = math.ceil(args.warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return decay[args.lr_scheduler_type]


def step_size(args: argparse.Namespace, world: dist.World) -> int:
    """Completions of one optimizer step, on all ranks."""
    return world.size * args.per_device_train_batch_size * args.gradient_accumulation_steps


def crossed(every: int | None, step: int, num_iterations: int) -> bool:
    """Whether the batch that ended with `step` reached a multiple of `every`; there is no stop inside a batch."""
    return bool(every) and step // every > (step - num_iterations) // every


# One batch ---------------------------------------------------------------------------------------------------

EVALUATION = 1 << 40  # random streams from here on belong to evaluations, those below to training batches
DROPOUT = 1 << 41  # and those from here on to optimizer steps
MAX_DRIFT = 0.1  # mean |sampler - trainer| of a log-probability; bfloat16's rounding makes some 0.01


@dataclass
class Rollout:
    """What this rank trains on of a batch of completions, B of them, and what is known of all."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    sampler_logps: list[list[float]]
    advantages: torch.Tensor  # (B,)
    size: int  # completions on all ranks
    num_tokens: int  # in all ranks' prompts and completions
    metrics: dict[str, float]  # means over all ranks' completions
    records: list[dict]  # what completions.jsonl tells of each, for all ranks; empty without --log_completions
    num_trained: int = 0  # completions that all ranks train on
    differences: list[float] = field(default_factory=list)

    def micro_batches(self, args: argparse.Namespace) -> list[list[int]]:
        """Indices of this rank's completions in as many micro-batches as every rank has; one may be empty."""
        lengths = [len(ids) for ids in self.completion_ids]
        return split_evenly(range(len(lengths)), lengths, args.gradient_accumulation_steps)

    def tokens(self, micro: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        """A micro-batch's prompts and completions; of an empty one a token each, since with ZeRO-3 a rank's passes are
        part of the others'."""
        return [self.prompt_ids[i] for i in micro] or [[0]], [self.completion_ids[i] for i in micro] or [[0]]

    def compare_with_sampler(self, micro: list[int], logps: torch.Tensor) -> None:
        """Remember how far the trainer's log-probabilities are from those the sampler drew with."""
        for i, row in zip(micro, logps.tolist()):
            self.differences += [abs(a - b) for a, b in zip(row, self.sampler_logps[i])]

    def importance_weights(self, args, micro: list[int], old_logps: torch.Tensor) -> torch.Tensor | None:
        """What corrects for a sampler that is not the trainer's own model, (B, T)."""
        if not (args.use_vllm and args.vllm_importance_sampling_correction):
            return None
        rows = [torch.tensor(self.sampler_logps[i], device=old_logps.device) for i in micro]
        sampler_logps = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return grpo.importance_weights(old_logps, sampler_logps, args.vllm_importance_sampling_clip_max)

    def drift(self, world: dist.World) -> dict[str, float]:
        """Mean and maximum of |sampler - trainer| over the batch's tokens: a stale or other policy shows here."""
        parts = world.gather([(sum(self.differences), len(self.differences), max(self.differences, default=0.0))])
        totals, counts, largest = zip(*parts)
        if not sum(counts):
            return {}
        return {"sampler/logp_diff": sum(totals) / sum(counts), "sampler/logp_diff_max": max(largest)}


def collect(args, world, sampler, tokenizer, rewards, rows, num_generations, stream, step) -> Rollout:
    """Sample `num_generations` completions for each row, score them, and compare each with its group."""
    everyone = [row for row in rows for _ in range(num_generations)]
    mine = slice(len(everyone) * world.rank // world.size, len(everyone) * (world.rank + 1) // world.size)
    batch = everyone[mine]
    prompt_ids = [row["prompt_ids"] for row in batch]

    started = time.perf_counter()
    seeds = [completion_seed(args.seed, stream, i) for i in range(len(everyone))][mine]
    completions = sampler.generate(prompt_ids, seeds)
    completion_ids = [completion.ids for completion in completions]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    generated = time.perf_counter()

    columns = {key: [row[key] for row in batch] for key in rows[0] if key not in ("prompt", "prompt_ids")}
    prompts = [row["prompt"] for row in batch]
    scores = texts and rewards(texts, prompts=prompts, completion_ids=completion_ids, step=step, **columns)
    all_scores = world.gather(scores)  # a group may lie across ranks
    all_rewards = total(all_scores, rewards.weights)
    rewarded = time.perf_counter()

    advantages = torch.zeros(len(everyone))
    group_metrics = {}
    if num_generations > 1:
        advantages, stds = grpo.group_advantages(torch.tensor(all_rewards), num_generations)
        group_metrics = {"reward_std": stds.mean().item(), "zero_std_groups": (stds == 0).float().mean().item()}
    # With β = 0 a completion whose advantage is 0 has no gradient. The others are shared out anew, whoever sampled them.
    samples = world.gather([(p, c.ids, c.logps) for p, c in zip(prompt_ids, completions)])
    trained = [i for i, advantage in enumerate(advantages.tolist()) if advantage or args.beta]
    share = split_evenly(trained, [len(samples[i][1]) for i in trained], world.size)[world.rank]
    by_function = zip(rewards.names, ([s for s in scores if s is not None] for scores in zip(*all_scores)))
    sums = {
        "completion_length": sum(map(len, completion_ids)),
        "clipped_completions": sum(not completion.finished for completion in completions),
        "prompt_length": sum(map(len, prompt_ids)),
    }
    means = {name: total / len(everyone) for name, total in world.sum(sums).items()}
    metrics = {
        "reward": sum(all_rewards) / len(all_rewards),
        **group_metrics,
        **{f"rewards/{name}": sum(values) / len(values) for name, values in by_function if values},
        "completion_length": means["completion_length"],
        "clipped_completions": means["clipped_completions"],
        **world.sum(rewards.metrics()),
        **sampler.metrics,
        "time/generate": generated - started - sampler.metrics.get("time/sync", 0.0),
        "time/reward": rewarded - generated,
    }
    records = []
    if args.log_completions:
        prompt_texts = tokenizer.batch_decode(prompt_ids)
        records = world.gather(
            [
                {"prompt": prompt, "completion": text, "rewards": dict(zip(rewards.names, row)), "advantage": advantage}
                for prompt, text, row, advantage in zip(prompt_texts, texts, scores, advantages[mine].tolist())
            ]
        )
    return Rollout(
        prompt_ids=[samples[i][0] for i in share],
        completion_ids=[samples[i][1] for i in share],
        sampler_logps=[samples[i][2] for i in share],
        advantages=advantages[share].to(world.device),
        size=len(everyone),
        num_trained=len(trained),
        num_tokens=round((means["prompt_length"] + means["completion_length"]) * len(everyone)),
        metrics=metrics,
        records=records,
    )


def split_evenly(items: Sequence[int], sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Cut a list of items of given sizes into consecutive parts, some perhaps empty, of about the same size."""
    middles = numpy.cumsum(sizes) - numpy.array(sizes) / 2
    places = (middles * parts / max(1, sum(sizes))).astype(int)
    return [[item for item, place in zip(items, places) if place == part] for part in range(parts)]


def reference_logps(args, reference, sample: Rollout, micro: list[int]) -> torch.Tensor | None:
    """The reference policy's log-probabilities of a micro-batch, (B, T); None without a reference."""
    if reference is None:
        return None
    training = reference.training
    with torch.no_grad(), lora.disabled(reference.eval()):
        logps, _, _ = dist.forward(grpo.completion_logps, reference, *sample.tokens(micro), args.temperature)
    reference.train(training)
    return logps


def completion_seed(seed: int, stream: int, index: int) -> int:
    """The seed of one completion's random numbers, whatever rank samples it."""
    return int(numpy.random.SeedSequence([seed, stream, index]).generate_state(1)[0])


def weighted_mean(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the parts that have it, by their sizes; the sum of each counter."""
    together = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        sizes, values = zip(*((size, metrics[name]) for size, metrics in parts if name in metrics))
        mean = sum(size * value for size, value in zip(sizes, values)) / sum(sizes)
        together[name] = sum(values) if name in COUNTERS else mean
    return together


# What a run leaves behind ------------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, completions.jsonl, TensorBoard, W&B and the progress bar; only rank 0's says anything.

    A logged step tells the means (of counters the sums) since the one before; `unlogged` holds those steps until then,
    and checkpoints keep it.
    """

    def __init__(self, args, world, max_steps: int, step: int, unlogged: list[dict]):
        self.main, self.folder, self.every = world.is_main, Path(args.output_dir), args.logging_steps
        self.max_steps, self.unlogged, self.started = max_steps, unlogged, time.time()
        self.tensorboard = self.wandb = None
        self.warned = False
        # top_p and top_k make a difference of their own.
        self.watches_drift = world.is_main and args.top_p == 1.0 and args.top_k == 0
        if not self.main:
            return
        if "tensorboard" in args.report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(self.folder / "runs"))
        if "wandb" in args.report_to:
            import wandb

            self.wandb = wandb.init(project="grpo", config=vars(args), dir=str(self.folder))
        for name in ("metrics.jsonl", "completions.jsonl"):  # of a run that got further than the checkpoint
            file = self.folder / name
            if file.exists():
                lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [x for x in lines if x.endswith("\n")]  # a kill may have cut the last one
                file.write_text("".join(x for x in whole if json.loads(x)["step"] <= step), encoding="utf-8")
        self.bar = tqdm(total=max_steps, initial=step, desc="GRPO", unit="step", dynamic_ncols=True)

    def step(self, step: int, state: dict[str, float], metrics: dict[str, float]) -> None:
        self.unlogged.append(metrics)
        if self.main:
            self.bar.set_postfix(
                {"reward": f"{metrics['reward']:.3f}", "loss": f"{metrics['loss']:.4f}"}, refresh=False
            )
            self.bar.update()
        if step % self.every == 0 or step == self.max_steps:
            self._write(step, {"step": step, **state, **weighted_mean([(1, m) for m in self.unlogged])})
            self.unlogged = []

    def warn_of_drift(self, drift: dict[str, float]) -> None:
        """Say once when the sampler's policy is not the trainer's."""
        if self.watches_drift and not self.warned and drift.get("sampler/logp_diff", 0.0) > MAX_DRIFT:
            self.warned = True
            self.bar.write(
                f"sampler/logp_diff is {drift['sampler/logp_diff']:.3f}, above {MAX_DRIFT}: what samples is not what is "
                "trained; float32 tells rounding from an error"
            )

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, {"step": step, **{f"eval/{name}": value for name, value in metrics.items()}})
        if self.main:
            shown = [n for n in metrics if n == "reward" or n.startswith("rewards/") or n == "completion_length"]
            self.bar.write(f"step {step}: " + ", ".join(f"eval/{n} {metrics[n]:.3f}" for n in shown))

    def completions(self, step: int, sample: Rollout) -> None:
        if not self.main or not sample.records:
            return
        if self.wandb:
            import wandb

            table = wandb.Table(columns=["prompt", "completion", "advantage", *sample.records[0]["rewards"]])
            for r in sample.records:
                table.add_data(r["prompt"], r["completion"], r["advantage"], *r["rewards"].values())
            self.wandb.log({"completions": table}, step=step)
            return
        with (self.folder / "completions.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **record}) + "\n" for record in sample.records)

    def _write(self, step: int, line: dict[str, float]) -> None:
        if not self.main:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if self.tensorboard and name != "step":
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(line, step=step)

    def close(self) -> None:
        for writer in (self.tensorboard, self.main and self.bar):
            if writer:
                writer.close()
        if self.wandb:
            self.wandb.finish()


def start_folder(args: argparse.Namespace, world: dist.World) -> None:
    """Make the output folder and write args.json; what an earlier run left there moves to a folder beside it."""
    if not world.is_main:
        return
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be made ({error.strerror})") from error
    earlier = [p for n in ("args.json", "*.jsonl", "vllm.log", "checkpoint-*", "runs") for p in folder.glob(n)]
    if args.resume_from_checkpoint:
        before = json.loads((folder / "args.json").read_text()) if (folder / "args.json").exists() else {}
        changed = {k: v for k, v in vars(args).items() if k in before and before[k] != v and k not in NOT_THE_RUN}
        if changed:
            told = (f"--{k} {v} (was {before[k]})" for k, v in changed.items())
            print("resumed with other flags: " + ", ".join(told).replace("True", "true").replace("False", "false"))
        state = json.loads((checkpoint_to_resume(args) / "trainer_state.json").read_text())
        step, before, now = state["step"], state.get("completions_per_step"), step_size(args, world)
        if before not in (None, now):
            kept, rest = divmod(before, world.size * args.gradient_accumulation_steps)
            print(
                f"resumed with {now} completions a step (was {before}): the order of prompts and the number of steps are "
                "others" + f"; --per_device_train_batch_size {kept} keeps them" * (rest == 0)
            )
        earlier = [p for p in checkpoints(args.output_dir) if checkpoint_step(p) > step]
    if earlier:
        number = 1
        while (folder / f"earlier-{number}").exists():
            number += 1
        (folder / f"earlier-{number}").mkdir()
        for path in earlier:
            path.rename(folder / f"earlier-{number}" / path.name)
        what = "checkpoints beyond the resumed one" if args.resume_from_checkpoint else "an earlier run"
        print(f"{folder} held {what}; now in {folder / f'earlier-{number}'}")
    (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")


NOT_THE_RUN = {
    "output_dir",
    "resume_from_checkpoint",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "dataset_num_proc",
}


def save(args, world, model, tokenizer, optimizer, step: int, num_tokens: int, unlogged: list[dict]) -> None:
    """Write checkpoint-<step>: the model or adapter, the optimizer's whole state, where the run stands. No pickle."""
    state = optimizer.state_dict()  # every rank gives its shard
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    if world.is_main:
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        weights = {n: t for n, t in model.state_dict().items() if n not in parameters}  # buffers
        weights |= {n: state[f"master.{n}"].to(p.dtype) for n, p in parameters.items() if f"master.{n}" in state}
        if args.train_type == "lora":
            lora.save(model, weights, unfinished, str(args.model), args.target_modules)
        else:
            model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        save_file(state, unfinished / "optimizer.safetensors")
        progress = {"step": step, "num_tokens": num_tokens, "unlogged": unlogged}
        progress["completions_per_step"] = step_size(args, world)
        (unfinished / "trainer_state.json").write_text(json.dumps(progress) + "\n")
        unfinished.rename(folder)  # a checkpoint that is there is whole
        if args.save_total_limit:
            for old in checkpoints(args.output_dir)[: -args.save_total_limit]:
                shutil.rmtree(old)
    world.barrier()


def checkpoints(output_dir: str) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    numbered = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(numbered, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def how_to_resume(args: argparse.Namespace) -> str:
    if int(os.environ.get("GROUP_RANK", 0)):  # another node than rank 0's, whose disk has the checkpoints
        return "--resume_from_checkpoint true, on every node, goes on from rank 0's newest checkpoint, if there is one"
    kept = checkpoints(args.output_dir)
    return f"--resume_from_checkpoint true goes on from {kept[-1]}" if kept else "there is no checkpoint yet"


def checkpoint_to_resume(args: argparse.Namespace) -> Path:
    if args.resume_from_checkpoint != "true":
        return Path(args.resume_from_checkpoint)
    return (checkpoints(args.output_dir) or [Path(args.output_dir)])[-1]


def resume(args: argparse.Namespace, world: dist.World, optimizer) -> tuple[int, int, list[dict]]:
    """Take a checkpoint's optimizer state, which holds the weights → step, tokens so far, steps not logged yet.

    Only rank 0 needs to have the checkpoint.
    """
    folder = checkpoint_to_resume(args) if world.is_main else None
    optimizer.load_state_dict(dist.FileOfMain(world, folder and folder / "optimizer.safetensors"))
    progress = world.from_main(world.is_main and json.loads((folder / "trainer_state.json").read_text()))
    return progress["step"], progress["num_tokens"], progress["unlogged"]


def say(world, line: str) -> None:
    if world.is_main:
        print(line, flush=True)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


# Flags -------------------------------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false works")
    return text.lower() == "true"


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False):
    """A number of a kind from low to high, or above low."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if above else low <= value <= high) or math.isinf(value):
            bounds = f" {'above' if above else 'from'} {low:g}" * (low > -math.inf) + f" to {high:g}" * (
                high < math.inf
            )
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: {what}{bounds} works")
        return value

    return parse


def planned(text: str) -> bool | int:
    """Whether to plan, and for how many GPUs if not for this machine."""
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return boolean(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}: true, false or a number of GPUs works") from None


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # where no default is set, the text says what holds
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line and exit status 2."""
        fail(message.removeprefix("argument "))


def fail(message: str, status: int = 2):
    """End with one line; what is wrong with the flags (status 2) is said once, or on each node before they have met."""
    if status != 2 or int(os.environ.get("RANK" if torch.distributed.is_initialized() else "LOCAL_RANK", 0)) == 0:
        tqdm.write(f"train.py: {message}", file=sys.stderr)  # on a line of its own, also below a progress bar
    sys.exit(status)


def end_for_loss(args: argparse.Namespace, lost: str) -> None:
    """End at once, whatever the main thread waits for; vLLM and the judge of answers end when this process does."""
    tqdm.write(f"train.py: {lost}; {how_to_resume(args)}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="train.py",
        usage="torchrun --nproc_per_node N train.py --dataset NAME --reward_funcs NAME [--flag value ...]",
        description="GRPO for language models. Without flags: the demo.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    whole, positive = number(int, 1), number(float, 0, above=True)
    not_negative, share, decay = number(float, 0), number(float, 0, 1), number(float, 0, 0.999999)

    group = parser.add_argument_group("model").add_argument
    group("--rlhf_type", choices=["grpo"], default="grpo", help="accepted for the guide's commands")
    group("--model", default=str(EMBEDDED_MODEL), help="hub id or local folder")
    group("--torch_dtype", choices=["bfloat16", "float32"], default="bfloat16", help="precision of the weights")
    group("--train_type", choices=["lora", "full"], default="lora", help="adapters, or all weights")
    group("--lora_rank", type=whole, default=8, help="r, the adapters' rank")
    group("--lora_alpha", type=positive, default=32, help="α; adapters are scaled by α / r")
    group("--lora_dropout", type=share, default=0.0, help="dropout in front of adapters")
    group(
        "--target_modules", nargs="+", default=["all-linear"], help="linear layers to adapt: all but the head, or names"
    )
    group("--gradient_checkpointing", type=boolean, default=False, help="recompute activations: less memory, more time")

    group = parser.add_argument_group("data").add_argument
    group("--dataset", nargs="+", required=True, help="hub ids (id:subset), files or built-in names; #N draws N rows")
    group("--val_dataset", nargs="+", default=[], help="the same, to evaluate on")
    group("--split_dataset_ratio", type=share, default=0.01, help="share to evaluate on without a val_dataset")
    group("--system", help="system prompt, or the text file that holds it")
    group("--max_length", type=whole, help="longest prompt in tokens; longer rows are dropped")
    group("--dataset_num_proc", type=whole, default=1, help="processes that tokenize")
    group("--dataloader_num_workers", type=number(int, 0), default=0, help="no effect: prompts are in memory")

    group = parser.add_argument_group("rewards").add_argument
    group("--reward_funcs", nargs="+", default=[], help="accuracy, format, cosine, repetition, or registered names")
    group("--reward_weights", nargs="+", type=number(float), help="one a reward; all 1 when absent")
    group("--reward_model", help="sequence-classification model: hub id or folder; the last reward")
    group("--external_plugins", nargs="+", default=[], help="Python files that register rewards")
    group("--accuracy_timeout", type=positive, default=5.0, help="seconds for comparing one answer")
    group("--cosine_min_len_value_wrong", type=number(float), default=0.0, help="value of the shortest wrong answer")
    group("--cosine_max_len_value_wrong", type=number(float), default=-0.5, help="value of the longest wrong answer")
    group("--cosine_min_len_value_correct", type=number(float), default=1.0, help="value of the shortest right answer")
    group("--cosine_max_len_value_correct", type=number(float), default=0.5, help="value of the longest right answer")
    group("--cosine_max_len", type=whole, help="longest in tokens; max_completion_length when absent")
    group("--repetition_n_grams", type=whole, default=3, help="n of the n-grams counted")
    group("--repetition_max_penalty", type=number(float), default=-1.0, help="value of nothing but repetition")

    group = parser.add_argument_group("GRPO").add_argument
    group("--num_generations", type=number(int, 2), default=8, help="G, completions a prompt")
    group("--num_generations_eval", type=whole, help="the same in evaluations; num_generations when absent")
    group("--max_completion_length", type=whole, default=512, help="longest completion in tokens")
    group("--temperature", type=positive, default=0.9, help="of the sampling distribution")
    group("--top_p", type=number(float, 0, 1, above=True), default=1.0, help="sample from this much mass; 1 is off")
    group("--top_k", type=number(int, 0), default=0, help="sample from this many tokens; 0 is off")
    group("--num_iterations", type=whole, default=1, help="optimizer steps on each batch")
    group("--epsilon", type=not_negative, default=0.2, help="ε of the clipped objective")
    group("--beta", type=not_negative, default=0.04, help="β of the KL term; 0 needs no reference model")
    group("--log_completions", type=boolean, default=False, help="write completions.jsonl, or a W&B table")

    group = parser.add_argument_group("vLLM").add_argument
    group("--use_vllm", type=boolean, default=False, help="sample with vLLM")
    group("--vllm_device", default="auto", help="auto, the first GPU no training process uses, or cuda:x")
    memory = "share of the GPU, passed to vLLM; 0.9, or 0.3 of one that trains, when absent"
    group("--vllm_gpu_memory_utilization", type=number(float, 0, 1, above=True), help=memory)
    group("--vllm_max_model_len", type=whole, help="passed to vLLM; the longest prompt and completion when absent")
    group(
        "--vllm_timeout", type=positive, default=300.0, help="seconds the engine may give no sign of life, once started"
    )
    group("--vllm_importance_sampling_correction", type=boolean, default=True, help="weight tokens by π_old / π_vLLM")
    group("--vllm_importance_sampling_clip_max", type=positive, default=3.0, help="and by this much at most")

    group = parser.add_argument_group("distributed").add_argument
    group("--deepspeed", choices=["none", "zero2", "zero3"], default="none", help="what the ranks share out")
    group("--bucket_size", type=whole, default=25_000_000, help="elements that one collective of gradients sends")
    group("--ds3_gather_for_generation", type=boolean, default=True, help="with zero3: whole weights for generation")
    group(
        "--node_timeout",
        type=number(float, 1),
        default=30.0,
        help="seconds another machine may be out of reach, once started",
    )

    group = parser.add_argument_group("training").add_argument
    group("--output_dir", default="output", help="folder for all that the run writes")
    group("--num_train_epochs", type=positive, default=1.0, help="passes over the dataset")
    group("--max_steps", type=whole, help="optimizer steps; num_train_epochs' when absent")
    group("--per_device_train_batch_size", type=whole, default=8, help="completions in a rank's micro-batch")
    group("--per_device_eval_batch_size", type=whole, default=8, help="completions a rank samples at once to evaluate")
    group("--gradient_accumulation_steps", type=whole, default=1, help="micro-batches a step")
    group("--learning_rate", type=not_negative, help="1e-4 for lora and 1e-6 for full when absent")
    group("--lr_scheduler_type", choices=["linear", "cosine", "constant"], default="cosine", help="after the warm-up")
    group("--warmup_ratio", type=share, default=0.0, help="share of the steps that warm up")
    group("--weight_decay", type=not_negative, default=0.0, help="AdamW's, on matrices")
    group("--adam_beta1", type=decay, default=0.9, help="decay of the first moment")
    group("--adam_beta2", type=decay, default=0.999, help="decay of the second moment")
    group("--max_grad_norm", type=not_negative, default=1.0, help="clip the gradient to this norm; 0 is off")
    group("--eval_steps", type=whole, help="evaluate every so many steps")
    group("--eval_on_start", type=boolean, default=False, help="evaluate before the first step, too")
    group("--save_steps", type=whole, default=500, help="write a checkpoint every so many steps, and at the end")
    group("--save_total_limit", type=whole, help="keep so many checkpoints, the newest")
    group("--logging_steps", type=whole, default=1, help="log the means of so many steps")
    group(
        "--report_to",
        nargs="+",
        choices=["none", "tensorboard", "wandb"],
        default=["none"],
        help="besides metrics.jsonl",
    )
    group("--resume_from_checkpoint", help="checkpoint folder, or true for the newest in output_dir")
    group("--seed", type=number(int, 0, 2**63), default=42, help="of everything that is random")
    group(
        "--dry_run",
        type=planned,
        default=False,
        metavar="true|false|N",
        help="print what a run takes here, or on N GPUs (vLLM's not among them)",
    )
    group("--device_memory_gb", type=positive, help="with --dry_run: whether it fits; 10^9 bytes a rank")

    for action in parser._actions:
        action.metavar = "true|false" if action.type is boolean else action.metavar
    known = [option for action in parser._actions for option in action.option_strings]
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            fail(f"{flag}: no such flag; " + (f"did you mean {close[0]}?" if close else "--help lists all"))
    args = parser.parse_args(argv)
    args.resume_from_checkpoint = None if args.resume_from_checkpoint == "false" else args.resume_from_checkpoint
    args.num_generations_eval = args.num_generations_eval or args.num_generations
    args.cosine_max_len = args.cosine_max_len or args.max_completion_length
    args.learning_rate = (
        {"lora": 1e-4, "full": 1e-6}[args.train_type] if args.learning_rate is None else args.learning_rate
    )
    return args


def demo(world: dist.World) -> list[str]:
    """The demo's flags, 128 completions a step for any number of processes that divides them; rank 0 prints them."""
    accumulation = 2 if world.size == 1 else 1  # no more than 64 at a time: less memory
    argv = [*shlex.split(DEMO), "--torch_dtype", "bfloat16" if dist.has_bfloat16(world.device) else "float32"]
    argv += ["--per_device_train_batch_size", str(128 // (world.size * accumulation))]
    argv += ["--gradient_accumulation_steps", str(accumulation)]
    argv += ["--per_device_eval_batch_size", str(256 // world.size)]
    program = "python" if world.size == 1 else f"torchrun --nproc_per_node {world.size}"
    say(world, f"{program} train.py {shlex.join(argv)}")
    return argv


def main(argv: list[str]) -> None:
    if not argv or argv[0] == "demo":
        argv = [*demo(dist.find_world()), *argv[1:]]
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is below is cleaned up
    world, watch = dist.find_world(), None
    try:
        if args.dry_run:
            sys.exit(dry_run(args, world))
        watch = dist.start(world, args.node_timeout, partial(end_for_loss, args))
        train(args, world)
        watch and watch.close(watch.DONE)
    except ValueError as error:
        if not str(error).startswith("--"):  # not the user's flags, so the traceback is worth reading
            raise
        fail(str(error))
    except (RewardError, SamplerError, FloatingPointError) as error:
        fail(f"{error}; {how_to_resume(args)}", status=1)
    except KeyboardInterrupt:
        fail(f"interrupted; {how_to_resume(args)}", status=130)
    except (RuntimeError, SystemExit):  # a collective that failed, a signal from torchrun: whoever was lost explains it
        watch and watch.defer()
        raise
    finally:
        dist.stop(watch)


if __name__ == "__main__":
    main(sys.argv[1:])
