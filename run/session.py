"""From the command line to a run whose ranks have met, and from any end of it to one last line.

told what is wrong     status   who
a flag, a file, data   2        said once, or once on each node before the ranks have met
a reward, a sampler, a checkpoint, a gradient that is not finite
                       1        with how to go on from the last checkpoint
another rank is lost   1        every rank, by the watch (run/watch.py)
Ctrl-C                 130
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from transformers.utils import logging

import dist
from data import UsageError
from rewards import RewardError
from run import flags, watch
from run.checkpoints import SaveError, how_to_resume
from run.log import say
from sampler import SamplerError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not mix with forks
logging.disable_progress_bar()  # a bar for each file that transformers reads or writes


def read_flags(argv: list[str], world: dist.World) -> argparse.Namespace:
    """The options of a command line; without any, those of the demo, whose command is printed."""
    words = flags.expand(argv, dist.has_bfloat16(world.device))
    if words is not argv:
        program = "python"
        if world.size > 1:
            program = f"torchrun --nproc_per_node {world.size}"
        shown = words[: len(words) - len(argv[1:])]  # the preset, without what was typed behind it
        say(world, f"{program} train.py {shlex.join(shown)}")
    return flags.parse_args(words)


@contextmanager
def session(args: argparse.Namespace, world: dist.World, advice=how_to_resume) -> Iterator[None]:
    """In this block the ranks have met and watch each other; an error in it ends the program with
    one line. A plan (--dry_run) needs no other rank. advice: of args, how to go on after an error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is below is cleaned up
    watcher = None
    try:
        if not args.dry_run:
            on_loss = partial(end_for_loss, args, advice)
            place = world.rank, world.size, world.place
            store, watcher = watch.meet(*place, args.node_timeout, on_loss)
            dist.start(world, store)
        yield
        if watcher:
            watcher.close(watcher.DONE)
    except UsageError as error:
        flags.fail(str(error))
    except (RewardError, SamplerError, SaveError, FloatingPointError) as error:
        flags.fail(f"{error}; {advice(args)}", status=1)
    except KeyboardInterrupt:
        flags.fail(f"interrupted; {advice(args)}", status=130)
    except (RuntimeError, SystemExit):
        # A collective that failed, a signal from torchrun: whoever was lost explains it.
        if watcher:
            watcher.defer()
        raise
    finally:
        if watcher:
            watcher.close()
        dist.stop()


def end_for_loss(args: argparse.Namespace, advice, lost: str) -> None:
    """End at once, whatever the main thread waits for. vLLM and the judge of answers end when this
    process does."""
    flags.write_line(f"{flags.program}: {lost}; {advice(args)}")
    os._exit(1)
