"""How a process is asked to end, and how it notices that whoever started it is gone.

A run that is asked to end by SIGTERM or Ctrl-C finishes the step under way and writes a checkpoint.
The ranks' wishes travel with what they gather in each step anyway (log.Log), so that all of them
stop at the same step, though the signal may have come to one alone. A second signal ends at once,
as does one that comes before the first step.

This module imports neither torch nor transformers: the judge needs it, too.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from run.display import screen, warn

PARENT = os.getppid()  # read early: it is another one when that has ended
# torchrun hands on a Ctrl-C that the terminal has sent to the ranks as well.
SAME = 1.0  # seconds in which signals count as one
PATIENCE = 4.0  # seconds until the first is answered
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Ended(BaseException):
    """A signal ends this process at once."""

    def __init__(self, number: int):
        super().__init__(f"ended by {name_of(number)}")
        self.status = 128 + number


class Wish:
    """Whether this run is asked to end. There is one for the process, as there is of signals."""

    def __init__(self):
        self.signal = 0  # the first that came to this process
        self.agreed = 0  # one that came to some rank, known to all since the same step
        self.training = False  # there is a step to finish
        self.since = 0.0

    def hear(self, number: int, _frame) -> None:
        """The handler of both signals."""
        now = time.monotonic()
        if not self.signal and self.training:
            self.signal, self.since = number, now
            note = threading.Timer(PATIENCE, tell_of, [number])
            note.daemon = True
            note.start()
        elif not self.training or now > self.since + SAME:
            raise Ended(number)


wish = Wish()


@contextmanager
def listening() -> Iterator[Wish]:
    """In this block both signals are heard by `wish`, and Ctrl-C unless it is ignored, as it is for
    a shell's background job."""
    wish.__init__()
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, wish.hear)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, wish.hear)
    try:
        yield wish
    except Ended as late:  # while this process was ending anyway
        sys.exit(late.status)
    finally:
        wish.training = False
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def end_quietly() -> None:
    """Let Ctrl-C end a program that has not begun yet without the traceback of an import."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def tell_of(number: int) -> None:
    """Say what a signal means, if the step takes long, once on a node. By then a run whose other
    rank is lost, for which torchrun sends a signal as well, has ended."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        line = f"{name_of(number)}: a checkpoint follows at the end of this step; once more ends "
        line += "at once"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            patience = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            line += f"; torchrun waits {patience} s for it (--shutdown_timeout)"
        if screen.live:
            warn(line)
            return
        with suppress(OSError):
            os.write(2, f"\n{line}\n".encode())


# Code of others ----------------------------------------------------------------------------------


def attempt(function, *args):
    """What it returns, or whatever it raises: a plugin that exits would end the run as a success."""
    try:
        return function(*args)
    except Ended:  # a signal, which came meanwhile
        raise
    except BaseException as error:
        return error


async def awaited(result):
    """The same of what an async reward returned."""
    try:
        return await result
    except Ended:
        raise
    except BaseException as error:
        return error


# A parent that ends ------------------------------------------------------------------------------


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends (Linux), or now if it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def watch_torchrun(on_end: Callable[[str], None], every: float = 0.5) -> None:
    """Call `on_end` from a thread when torchrun, which started this process, has ended. What has
    another parent, such as a shell, may outlive it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    # A process that was stopped would not notice: this wakes it.
    end_with_parent(PARENT, signal.SIGCONT)

    def watch():
        while os.getppid() == PARENT:
            time.sleep(every)
        on_end("torchrun has ended")

    threading.Thread(target=watch, daemon=True).start()
