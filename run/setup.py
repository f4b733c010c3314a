"""What a run is made of, as its flags say: the policy and its reference, the optimizer, the sampler.

`fast` is the folder of that name where its parts are to be taken, else None.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from transformers import AutoModelForCausalLM

import dist
from run import adapters, checks, display, download, log, machine, models, placement
from sampler import ModelSampler, Sampler, VLLMSampler


@dataclass(frozen=True)
class ModelOptions:
    """model"""

    rlhf_type: Annotated[Literal["grpo"], "accepted for the guide's commands"] = "grpo"
    model: Annotated[str | None, "hub id or local folder; else the embedded model"] = None
    adapters: Annotated[str | None, "LoRA folder to go on from; a --model may be one, too"] = None
    torch_dtype: Annotated[Literal["bfloat16", "float32"], "of the weights"] = "bfloat16"
    train_type: Annotated[Literal["lora", "full"], "adapters, or all weights"] = "lora"
    gradient_checkpointing: Annotated[bool, "recompute activations: less memory"] = True
    trust_remote_code: Annotated[bool, "run the Python that a model's folder brings"] = False
    plain: Annotated[bool, "train without the parts in fast/: slower, same results"] = False


@display.phase("load the model")
def load_policy(args: argparse.Namespace, world: dist.World, fast):
    """The policy, and the reference that the KL term compares it with: None when β is 0, the policy
    itself for LoRA, since without its adapters it is the base, a second model for full training."""
    for name in filter(None, (args.model, args.reward_model)):
        download.fetch(world, name)
    torch.manual_seed(args.seed)  # LoRA's A matrices, the same on every rank
    policy, parts = load_model(args, world, fast)
    log.say(world, f"fast parts: {', '.join(parts)}")
    reference = None
    if args.beta and args.train_type == "lora":
        reference = policy
    elif args.beta:
        reference = load_model(args, world, fast)[0].requires_grad_(False)
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train(), reference


def load_model(
    args: argparse.Namespace, world: dist.World, fast
) -> tuple[torch.nn.Module, list[str]]:
    """A model, and in words which of its parts are the quick ones."""
    # Weights of the file's own type are mapped, not read: the ranks of a node share that memory.
    dtype = getattr(torch, args.torch_dtype)
    from_pretrained = AutoModelForCausalLM.from_pretrained
    model = models.load(from_pretrained, "--model", args.model, dtype, args.trust_remote_code)
    checks.agree_on_weights(world, model)
    if args.train_type == "lora":
        adapters.inject(args, model)
        models.tell_frozen(world, model)
    if args.deepspeed == "zero3" and world.size > 1:
        names = model._no_split_modules or []  # of the layers' classes
        layers = [module for module in model.modules() if type(module).__name__ in names]
        dist.shard_parameters(model, layers)
    else:
        model.to(world.device)
    checks.together(world, models.refuse_not_finite, args, model)
    if fast:
        return model, fast.prepare(model)
    return model, ["none"]


def make_optimizer(args: argparse.Namespace, policy, waiting) -> dist.ZeroAdamW:
    return dist.ZeroAdamW(
        policy.named_parameters(),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bucket_size=args.bucket_size,
        shard=args.deepspeed == "zero2",
        waiting=waiting,
    )


def make_sampler(args: argparse.Namespace, world: dist.World, policy, tokenizer, fast) -> Sampler:
    settings = {
        "eos_token_ids": models.end_tokens(policy, tokenizer),
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
    }
    if args.use_vllm:
        return VLLMSampler(policy, world, placement.engine_for(args, world), **settings)
    settings["gather"] = args.ds3_gather_for_generation
    settings["rows_at_once"] = machine.rows_at_once
    settings["report"] = display.report
    if fast:
        layerwise = dist.is_sharded(policy) and not settings["gather"]
        settings["decoder"] = fast.decoder_for(policy, layerwise)
        settings["draw"] = fast.draw_for()
    return ModelSampler(policy, **settings)


def schedule(args: argparse.Namespace, step: int, max_steps: int) -> float:
    """The factor on the learning rate of step `step` (from 0): a linear warm-up whose first step
    already moves, then the decay of --lr_scheduler_type."""
    warmup = math.ceil(args.warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    if args.lr_scheduler_type == "linear":
        return 1 - progress
    if args.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def reached(every: int | None, step: int, steps_per_rollout: int) -> bool:
    """Whether the rollout that ended with `step` went over a multiple of `every`."""
    return bool(every) and step // every > (step - steps_per_rollout) // every
