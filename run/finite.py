"""Numbers that are not finite: nothing is saved of them, and every rank tells of them in one line.

    what                                          when                  told by
    a model's weights                             when they are read    run/models.py
    a checkpoint's state                          when it is read       run/checkpoints.py
    the gradient                                  before each update    dist.py
    the weights                                   behind each update    dist.py
    log-probabilities of one completion a rank    before each save      here
    the optimizer's state                         at each save          run/checkpoints.py
    log-probabilities of all that is drawn        at each draw          here

Finite weights may be so large that what the policy computes is not finite: no update could tell,
only a pass can. One that is finite for these completions need not be for all: then the next draw
tells, with the last checkpoint behind it.
"""

import math

from torch import Tensor

from data import UsageError
from sampler import Completion


def check_drawn(
    args, completions: list[Completion], step: int, temperature: float | None = None
) -> None:
    """FloatingPointError if a token was drawn of no known probability. step: of the last update, and
    before the first one a UsageError. temperature: of an evaluation, if it has its own.

    Every rank gives the completions of all, so every rank raises it or none does.
    """
    if all(math.isfinite(logp) for completion in completions for logp in completion.logps):
        return
    if step:
        raise FloatingPointError(told(step))
    flag, value = "--temperature", args.temperature
    if temperature is not None:
        flag, value = "--temperature_eval", temperature
    raise UsageError(
        f"--model {args.model}: at {flag} {value:g} it gives log-probabilities that are not "
        f"finite; a larger {flag} or a model that is not damaged works"
    )


def check_policy(world, logps: Tensor, step: int) -> None:
    """The same of a pass of the policy that update `step` made, of which each rank has a part."""
    if not all(world.gather([bool(logps.isfinite().all())])):
        raise FloatingPointError(told(step))


def told(step: int) -> str:
    return f"update {step} made a policy whose log-probabilities are not finite"
