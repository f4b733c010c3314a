"""Flags that have no meaning together, whatever model and data they name: one line that says what works."""

import argparse
import importlib.util
import math

import data
from data import UsageError


def check(args: argparse.Namespace, world_size: int) -> None:
    """UsageError for flags that do not go together, whatever model and data they name."""
    if args.device_memory_gb and not args.dry_run:
        raise UsageError(
            f"--device_memory_gb {args.device_memory_gb:g}: only a plan asks for it; "
            "--dry_run true works"
        )
    if not args.output_dir.strip():
        raise UsageError("--output_dir '': names no folder; output, or . for this one, works")
    check_objective(args)
    check_reference(args)
    check_mean(args)
    check_soft_overlong(args)
    check_vllm(args)
    check_split(args)
    if args.temperature_eval == 0 and args.num_generations_eval > 1:
        raise UsageError(
            f"--temperature_eval 0: all {args.num_generations_eval} completions of a question "
            "would be the same; --num_generations_eval 1 works"
        )
    for name in {"wandb", "trackio"} & set(args.report_to):
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"--report_to {name}: {name} is not installed; pip install {name}, "
                "or --report_to tensorboard"
            )
    check_rollout(args, world_size)
    if args.val_dataset or evaluates(args):
        check_groups(args, world_size, "per_device_eval_batch_size", "num_generations_eval")
    if not (args.reward_funcs or args.reward_model or args.dry_run):
        raise UsageError("--reward_funcs: no reward at all; name one, or a --reward_model")


def evaluates(args: argparse.Namespace) -> bool:
    return bool(args.eval_steps or args.eval_on_start)


def check_objective(args: argparse.Namespace) -> None:
    """UsageError in one line that names both."""
    loss, estimator = args.loss_type, args.advantage_estimator
    bound = args.epsilon_high
    if loss == "cispo" and bound is None:
        raise UsageError("--loss_type cispo: needs a bound for the ratio; --epsilon_high 5 works")
    if loss == "cispo" and bound < 1:
        raise UsageError(
            f"--epsilon_high {bound:g}: bounds the ratio itself with cispo, which begins at 1; 5 works"
        )
    if loss in ("cispo", "sapo") and args.importance_sampling_level == "sequence":
        raise UsageError(
            f"--importance_sampling_level sequence: {loss} is defined for each token's ratio; "
            "token, or --loss_type grpo, bnpo, dapo or dr_grpo, works"
        )
    if loss in ("cispo", "sapo") and args.delta is not None:
        raise UsageError(
            f"--delta {args.delta:g}: {loss} bounds the ratio in a way of its own; without it, "
            "or with --loss_type grpo, bnpo, dapo or dr_grpo, works"
        )
    if args.scale_rewards == "gdpo" and estimator != "grpo":
        raise UsageError(
            f"--scale_rewards gdpo: has advantages of its own, not those of {estimator}; "
            "--advantage_estimator grpo, or --scale_rewards group, batch or none, works"
        )
    if args.scale_rewards == "mean" and args.kl_in_reward and args.beta:
        raise UsageError(
            "--kl_in_reward true: leaves rewards below 0, and --scale_rewards mean divides by their "
            "mean; --kl_in_reward false, or another --scale_rewards, works"
        )
    if args.scale_rewards == "gdpo" and args.kl_in_reward:
        raise UsageError(
            "--kl_in_reward true: gdpo compares each reward function by itself, and the KL is none; "
            "false, or another --scale_rewards, works"
        )
    if args.kl_unbiased and args.kl_in_reward:
        raise UsageError(
            "--kl_unbiased true: is of the KL in the loss, which --kl_in_reward true moves to the "
            "reward; one of the two works"
        )
    for flag in ("beta", "entropy_coef"):
        if args.certain_tail < 1 and getattr(args, flag):
            raise UsageError(
                f"--certain_tail {args.certain_tail:g}: leaves tokens out whose advantage has no "
                f"gradient, and --{flag} {getattr(args, flag):g} has one at every token; "
                f"--{flag} 0, or --certain_tail 1, works"
            )


def check_reference(args: argparse.Namespace) -> None:
    if not args.sync_ref_model:
        return
    if args.train_type == "lora":
        raise UsageError(
            "--sync_ref_model true: the reference of --train_type lora is its base, which stays; "
            "--train_type full works"
        )
    if not args.beta:
        raise UsageError("--sync_ref_model true: --beta 0 has no reference; --beta 0.04 works")


def check_mean(args: argparse.Namespace) -> None:
    """Rewards that are divided by their mean are 0 or more, by their flags."""
    if args.scale_rewards != "mean":
        return
    works = "--scale_rewards group, batch or none works"
    weights = args.reward_weights or [1.0] * len(args.reward_funcs)
    for weight in weights:
        if weight < 0:
            raise UsageError(
                f"--reward_weights {weight:g}: makes rewards below 0, and --scale_rewards mean divides "
                f"by their mean; 0 or more, or {works}"
            )
    if args.reward_model:
        raise UsageError(
            "--reward_model: its values may be below 0, and --scale_rewards mean divides by their "
            f"mean; without it, or {works}"
        )
    ends = [args.cosine_min_len_value_wrong, args.cosine_max_len_value_wrong]
    ends += [args.cosine_min_len_value_correct, args.cosine_max_len_value_correct]
    lowest = {"cosine": min(ends), "repetition": args.repetition_max_penalty, "soft_overlong": -1}
    for name, weight in zip(args.reward_funcs, weights):
        if weight and lowest.get(name, 0) < 0:
            raise UsageError(
                f"--reward_funcs {name}: falls to {lowest[name]:g}, and --scale_rewards mean divides "
                f"by the mean of rewards; without it, or {works}"
            )


def check_soft_overlong(args: argparse.Namespace) -> None:
    if "soft_overlong" not in args.reward_funcs:
        return
    if args.soft_cache_length > args.soft_max_length:
        raise UsageError(
            f"--soft_cache_length {args.soft_cache_length}: is more than --soft_max_length "
            f"{args.soft_max_length}; that or less works"
        )


def check_split(args: argparse.Namespace) -> None:
    """A share to evaluate on that somebody has set, but that nothing would evaluate."""
    ratio = args.split_dataset_ratio
    by_split = evaluates(args) and not args.val_dataset
    if ratio == data.Options().split_dataset_ratio or (ratio == 0 and not by_split):
        return
    if args.val_dataset:
        raise UsageError(
            f"--split_dataset_ratio {ratio}: --val_dataset has the rows; one of the two works"
        )
    if not evaluates(args):
        works = "--eval_steps N or --eval_on_start true works"
        raise UsageError(f"--split_dataset_ratio {ratio}: nothing evaluates on that share; {works}")


def check_vllm(args: argparse.Namespace) -> None:
    if not args.use_vllm:
        return
    if args.deepspeed == "zero3" and not args.ds3_gather_for_generation:
        raise UsageError(
            "--ds3_gather_for_generation false: vLLM needs whole weights; true, "
            "or --use_vllm false, works"
        )
    if (
        not args.dry_run and importlib.util.find_spec("vllm") is None
    ):  # a plan may be another machine's
        raise UsageError(
            "--use_vllm true: vLLM is not installed; make vllm installs it, "
            "--use_vllm false samples without"
        )
    for flag in ("temperature", "temperature_eval"):
        value = getattr(args, flag)
        if 0 < value < 0.01:
            raise UsageError(f"--{flag} {value}: with vLLM, 0.01 or more works")


def check_rollout(args: argparse.Namespace, world_size: int) -> None:
    """Whether optimizer steps and groups of G fill what is sampled together."""
    accumulation, micro_batches = args.gradient_accumulation_steps, args.steps_per_generation
    size = args.generation_batch_size
    if size and micro_batches:
        raise UsageError(
            f"--generation_batch_size {size}: --steps_per_generation {micro_batches} says the same "
            "in micro-batches; one of the two works"
        )
    if micro_batches and micro_batches % accumulation:
        raise UsageError(
            f"--steps_per_generation {micro_batches}: ends within an optimizer step of "
            f"{accumulation} micro-batches; --steps_per_generation {accumulation}, or a multiple, works"
        )
    if size:
        step = world_size * args.per_device_train_batch_size * accumulation
        whole = math.lcm(step, args.num_generations)
        if size % whole:
            raise UsageError(
                f"--generation_batch_size {size}: is not filled by optimizer steps of {step} "
                f"completions and groups of {args.num_generations}; {whole}, or a multiple, works"
            )
        return
    kind = ("accumulation", accumulation)
    if micro_batches:
        kind = ("steps_per_generation", micro_batches)
    check_groups(args, world_size, "per_device_train_batch_size", "num_generations", *kind)


def check_groups(args, world_size: int, batch_flag: str, group_flag: str, kind="", accumulation=1):
    """Whether groups of G fill a batch of all ranks."""
    batch, group = getattr(args, batch_flag), getattr(args, group_flag)
    total = world_size * batch * accumulation
    if total % group == 0:
        return
    parts = f"{world_size} processes × {batch_flag} {batch}"
    if accumulation > 1:
        parts += f" × {kind} {accumulation}"
    would = "what would is "
    if divisors := [str(n) for n in range(2, total + 1) if total % n == 0]:
        would = f"--{group_flag} {', '.join(divisors)} would, and so would "
    ranks = world_size * accumulation
    raise UsageError(
        f"--{group_flag} {group}: does not divide the {total} completions of {parts}; "
        f"{would}--{batch_flag} {math.lcm(group, ranks) // ranks}"
    )
