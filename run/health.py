"""A run that cannot learn says so: one line a cause, with the flag that helps.

Each cause is a fact that metrics.jsonl tells, too. It is told when it holds for PATIENCE steps in a
row (a counter: when it has risen), and once. To watch for another, add a function to `CAUSES`.
"""

from collections import deque
from collections.abc import Callable
from functools import partial

import torch

import dist
from run.judge import RESTARTS

PATIENCE = 5  # steps
MAX_DRIFT = 0.1  # mean |sampler - trainer| of a log-probability; bfloat16's rounding makes 0.01

Steps = list[dict[str, float]]  # the metrics of the last PATIENCE steps, the newest last


def always(steps: Steps, name: str, holds: Callable[[float], bool]) -> bool:
    """Whether a metric is there in each of the steps and holds."""
    return len(steps) == PATIENCE and all(name in m and holds(m[name]) for m in steps)


def mean(steps: Steps, name: str) -> float:
    return sum(m[name] for m in steps) / len(steps)


def equal_groups(steps: Steps) -> str | None:
    if not always(steps, "zero_std_groups", lambda share: share >= 0.9):
        return None
    share = mean(steps, "zero_std_groups")
    rewards = {m.get("reward") for m in steps}
    earned = "the same within each"
    if len(rewards) == 1 and None not in rewards:
        earned = f"the same ({rewards.pop():g})"
    return (
        f"zero_std_groups is {share:.0%}: nearly all groups earn {earned}, which teaches nothing; "
        "a reward with degrees beside the strict one (--reward_funcs accuracy format), easier or "
        "harder rows (--dataset), a larger --num_generations or --temperature helps"
    )


def cut_short(steps: Steps) -> str | None:
    if not always(steps, "clipped_completions", lambda share: share >= 0.8):
        return None
    share = mean(steps, "clipped_completions")
    return (
        f"clipped_completions is {share:.0%}: most completions are cut before they end; a larger "
        "--max_completion_length, or a --system that asks for short answers, helps"
    )


def without_entropy(steps: Steps) -> str | None:
    if not always(steps, "entropy", lambda nats: nats < 0.01):
        return None
    entropy = mean(steps, "entropy")
    return (
        f"entropy is {entropy:.4f}: the policy says the same whatever it draws, and a group has "
        "nothing to compare; a larger --temperature or --beta, or a smaller --learning_rate, helps"
    )


def without_gradient(steps: Steps) -> str | None:
    teaches = always(steps, "zero_std_groups", lambda share: share < 1)
    if not (teaches and always(steps, "grad_norm", lambda norm: norm < 1e-8)):
        return None
    return (
        "grad_norm is 0 though groups differ: nothing that is trained moves the loss; other "
        "--target_modules, or --train_type full, helps"
    )


RISEN = {  # a counter → what it means
    "rewards/accuracy/unparseable_references": "accuracy cannot read these references and gives 0.0; "
    "a column solution that holds the answer alone helps (--dataset)",
    "rewards/accuracy/timeouts": "comparing these answers took too long and gave 0.0; "
    "a larger --accuracy_timeout helps if they are right ones",
    "rewards/accuracy/crashes": "comparing these answers ended a process and gave 0.0; "
    "shorter ones (--max_completion_length) help",
    RESTARTS: "the process that checks answers had ended or fallen silent and was replaced; more "
    "memory, or a smaller --accuracy_timeout, helps",
    "rewards/unscored": "no reward applied to these completions, which earned 0.0; "
    "rows with references (--dataset), or another of --reward_funcs, helps",
}


def risen(name: str, steps: Steps) -> str | None:
    count = steps[-1].get(name, 0)
    return f"{name} is {count:g}: {RISEN[name]}" if count else None


def drifting(steps: Steps) -> str | None:
    drift = steps[-1].get("sampler/logp_diff", 0.0)
    if drift <= MAX_DRIFT:
        return None
    return (
        f"sampler/logp_diff is {drift:.3f}, above {MAX_DRIFT}: what samples is not what is "
        "trained; float32 tells rounding from an error"
    )


CAUSES = [equal_groups, cut_short, without_entropy, without_gradient]
CAUSES += [partial(risen, name) for name in RISEN]


class Health:
    """`lines(metrics)` of each step: what is worth saying, each cause once."""

    def __init__(self, args):
        self.steps = deque(maxlen=PATIENCE)
        self.untold = list(CAUSES)
        if args.top_p == 1.0 and args.top_k == 0:  # which make a difference of their own
            self.untold.append(drifting)

    def lines(self, metrics: dict[str, float]) -> list[str]:
        self.steps.append(metrics)
        told = {cause: cause(list(self.steps)) for cause in self.untold}
        self.untold = [cause for cause in self.untold if told[cause] is None]
        return [line for line in told.values() if line is not None]


# Known as the run starts ------------------------------------------------------------------------


def before_the_first_step(
    args, policy, num_rows: int, num_prompts: int, max_steps: int
) -> tuple[list[str], dict[str, float]]:
    """What is worth saying, and the facts that say it, as metrics. num_prompts: of a step."""
    share = out_of_reach(policy, args.learning_rate * max_steps)
    facts = {"prompts_per_row": num_prompts / num_rows, "weights_out_of_reach": share}
    lines = at_start(facts)
    parameter = next(policy.parameters())
    if parameter.dtype == torch.bfloat16 and not dist.has_bfloat16(parameter.device):
        lines.append(
            "--torch_dtype bfloat16: this processor has no instructions for it; --torch_dtype "
            "float32 is several times as fast, in twice the memory"
        )
    return lines, facts


def at_start(facts: dict[str, float]) -> list[str]:
    """What is worth saying of these, which every line of metrics.jsonl repeats."""
    lines = []
    prompts, share = facts.get("prompts_per_row", 0), facts.get("weights_out_of_reach", 0)
    if prompts > 1:
        lines.append(
            f"--dataset: prompts_per_row is {prompts:.3g}: a step has more prompts than there are "
            "rows, and asks some more than once; more rows, or a smaller "
            "--per_device_train_batch_size, helps"
        )
    if share > 0.5:
        lines.append(
            f"--learning_rate: weights_out_of_reach is {share:.0%}: in all steps together these "
            "weights cannot move as far as bfloat16 can tell; a larger one, more steps, "
            "--train_type lora or --torch_dtype float32 helps"
        )
    return lines


def out_of_reach(policy: torch.nn.Module, distance: float) -> float:
    """The share of trained weights that stay the same in their own precision if each moves by at
    most `distance`, as AdamW's do by at most a learning rate a step. Of a sample of them."""
    stuck = []
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            own = dist.local(parameter.detach()).flatten()
            sample = own[:: max(1, len(own) // 1000)]
            moved = (sample.float().abs() + distance).to(sample.dtype)
            stuck.append((moved == sample.abs()).float().mean())
    return torch.stack(stuck).mean().item() if stuck else 0.0
