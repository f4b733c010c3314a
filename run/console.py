"""Standard output that is closed, that cannot show every letter, or whose reader leaves, ends no run."""

import os
import sys


class Unbroken:
    """A stream, or what is left of it: what cannot be written is lost, and nothing else."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, function, *args) -> None:
        try:
            function(*args)
        except BrokenPipeError:  # as behind `| head`: from now on nobody reads
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except OSError:  # a full disk, perhaps: the next line may find room
            pass


def settle() -> None:
    """Make the three standard streams safe, for this process and those that it starts."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Unbroken(stream))
