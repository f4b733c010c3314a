"""Standard streams that are closed, that cannot hold every letter, or whose reader leaves, end no run;
and no terminal obeys what a model, a dataset or another machine has written."""

import codecs
import os
import sys
import unicodedata

PICTURES = 0x2400  # Unicode's signs for control characters: ESC is ␛, 0x241B


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


def as_latin(error: UnicodeDecodeError) -> tuple[str, int]:
    """Bytes that are no UTF-8, as what they are in Latin-1, which has a letter for each."""
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("as_latin", as_latin)


def settle() -> None:
    """Make the three standard streams safe, for this process and those that it starts."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    # Whatever the locale is: texts are UTF-8, and of another one no byte is an error.
    reconfigure(sys.stdin, encoding="utf-8", errors="as_latin")
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(number, "w", closefd=False)  # noqa: SIM115
        reconfigure(stream, errors="backslashreplace")
        setattr(sys, name, Unbroken(stream))


def reconfigure(stream, **settings) -> None:
    """Where that can be done: the streams of a notebook or an editor are of their own kinds."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(**settings)


def harmless(text: str, keep: str = "\n\t") -> str:
    """Control characters, but those to keep, and what turns text around, as signs."""
    return "".join(c if c in keep else harmless_character(c) for c in text)


def harmless_character(character: str) -> str:
    code = ord(character)
    if code < 32 or code == 127:
        return chr(PICTURES + (code if code < 32 else 33))
    turns_around = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    if unicodedata.category(character) == "Cc" or turns_around:
        return "\N{REPLACEMENT CHARACTER}"
    return character
