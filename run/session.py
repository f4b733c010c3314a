"""From the command line to a run whose ranks have met, and from any end of it to one last line.

told what is wrong     status   who
a flag, a file, data   2        said once, or once on each node before the ranks have met
a reward, a sampler, a checkpoint, numbers that are not finite (run/finite.py)
                       1        with how to go on from the last checkpoint; by rank 0 alone, if it
                                fails, too
no memory is left      1        the rank that asked for it
another rank is lost   1        every rank, by the watch (run/watch.py)
torchrun is lost       1        every rank that it started (run/stop.py)
Ctrl-C                 130      rank 0, behind the step under way and its checkpoint;
SIGTERM                143      a second time, or before the first step, at once
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers.utils import logging

import dist
from data import UsageError
from rewards import RewardError
from run import display, flags, placement, stop, watch
from run.checkpoints import SaveError, how_to_resume
from run.log import say
from sampler import SamplerError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not mix with forks
logging.disable_progress_bar()  # a bar for each file that transformers reads or writes
MEMORY = (RuntimeError, MemoryError)  # what torch raises when there is none to be had, and else


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, dist.World]:
    """The options of a command line, and this process's place on the device that they name. Without
    any they are those of the demo, whose command is printed."""
    wanted = flags.parse_args(flags.expand(argv)).device
    try:
        placement.check_device(wanted)
    except UsageError as error:
        flags.fail(str(error))
    world = dist.find_world(wanted)
    words = flags.expand(argv, dist.has_bfloat16(world.device))
    if words is not argv:
        program = "python"
        if world.size > 1:
            program = f"torchrun --nproc_per_node {world.size}"
        shown = words[: len(words) - len(argv[1:])]  # the preset, without what was typed behind it
        say(world, f"{program} train.py {shlex.join(shown)}")
    return flags.parse_args(words), world


@contextmanager
def session(args: argparse.Namespace, world: dist.World, advice=how_to_resume) -> Iterator[None]:
    """In this block the ranks have met and watch each other; an error in it ends the program with
    one line, and so does a signal. A plan (--dry_run) needs no other rank. advice: of args, how to
    go on after an error."""
    watcher, word = None, watch.Watch.FAILED
    on_loss = partial(end_for_loss, args, advice)
    stop.watch_torchrun(on_loss)
    with stop.listening() as wish:
        try:
            if not args.dry_run:
                place = world.rank, world.size, world.place
                store, watcher = watch.meet(*place, args.node_timeout, on_loss)
                dist.start(world, store)
            yield
            word = watch.Watch.DONE
            if watcher:
                watcher.close(word)
            if wish.agreed:
                end_as_asked(args, world, wish.agreed, advice)
        except UsageError as error:
            end(watcher, world, str(error), status=2)
        except FloatingPointError as error:
            helps = ""
            if advice is how_to_resume:  # an evaluation changes no weights
                helps = "a smaller --learning_rate or --max_grad_norm helps; "
            end(watcher, world, f"{error}; {helps}{advice(args)}", status=1)
        except (RewardError, SamplerError, SaveError) as error:
            end(watcher, world, f"{error}; {advice(args)}", status=1)
        except stop.Ended as signal:
            word = watch.Watch.ASKED
            flags.fail(f"{signal}; {advice(args)}", signal.status)
        except MEMORY as error:
            if not is_lack_of_memory(error):
                if watcher:  # a collective that failed: whoever was lost explains it
                    watcher.defer()
                raise
            what = f"out of memory ({first_sentence(error)})"
            helps = "a smaller --per_device_train_batch_size, more --gradient_accumulation_steps or"
            helps += " --gradient_checkpointing true takes less"
            flags.fail(f"{what}; {helps}; {advice(args)}", status=1)
        finally:
            display.screen.close()
            if watcher:
                watcher.close(word)
            dist.stop()


def end(watcher: watch.Watch | None, world: dist.World, line: str, status: int) -> None:
    """End with a line, which rank 0 alone has to say of what it shares with others."""
    if watcher is None or world.is_main:
        flags.fail(line, status)
    if not watcher.others_tell():
        flags.write_line(f"{flags.program}: {line} (says {world.place})")
    sys.exit(status)


def end_as_asked(args: argparse.Namespace, world: dist.World, number: int, advice) -> None:
    """All ranks have stopped at the same step, with a checkpoint: rank 0 has the last line."""
    if world.is_main:
        flags.write_line(f"train.py: stopped by {stop.name_of(number)}; {advice(args)}")
    sys.exit(128 + number)


def is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # of torch's allocator for CPUs, of cuBLAS
    return "can't allocate memory" in text or "ALLOC_FAILED" in text


def first_sentence(error: BaseException) -> str:
    """An allocator goes on with advice of its own."""
    return flags.first_line(error).split(". ")[0]


def end_for_loss(args: argparse.Namespace, advice, lost: str) -> None:
    """End at once, whatever the main thread waits for. vLLM and the judge of answers end when this
    process does."""
    flags.write_line(f"{flags.program}: {lost}; {advice(args)}")
    os._exit(1)
