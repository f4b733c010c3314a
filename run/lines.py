"""metrics.jsonl and completions.jsonl: lines that are whole, whatever happens to disk or process.

A line that cannot be written, because the disk is full, is kept and written with a later one:
training goes on, and says so once. A folder that is gone is made and taken anew, unless another run
has taken it: that ends this one (folder.Hold). A resumed run forgets the lines of steps that
its checkpoint does not know of.
"""

import json
import os
from pathlib import Path

from data import one_line
from run.folder import keep, write_whole
from run.values import from_json

MOST_KEPT = 100_000  # lines in memory, of which one takes about a kilobyte


class Lines:
    """A file of JSON objects, one a line, that is appended to."""

    def __init__(self, file: Path):
        self.file = file
        self.waiting: list[str] = []  # lines that could not be written yet
        self.said = False  # that there are such

    def write(self, objects: list[dict]) -> str | None:
        """Append objects. Returns a line to tell, the first time that it cannot."""
        self.waiting += [json.dumps(thing, default=str) + "\n" for thing in objects]
        del self.waiting[:-MOST_KEPT]
        try:
            keep(self.file.parent)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._append("".join(self.waiting).encode())
        except OSError as error:
            if self.said:
                return None
            self.said = True
            return (
                f"{self.file} could not be written ({one_line(error)}): training goes on, and its "
                "lines follow when there is room"
            )
        self.waiting, self.said = [], False
        return None

    def _append(self, text: bytes) -> None:
        """All of it or nothing."""
        with self.file.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(text)
                while written < len(text):  # of a full disk it says how much it took
                    written += file.write(text[written:])
            except OSError:
                file.truncate(end)
                raise


def cut_after(file: Path, step: int) -> str | None:
    """Forget what a run wrote that got further than the checkpoint at `step`. Returns a line to
    tell if there were others that cannot be read. OSError, with the file as it was, if it cannot
    be written to: on a full disk it can, for what is cut off its end takes no room."""
    if not file.exists():
        return None
    kept, unread, end, whole = [], 0, 0, 0
    lines = file.read_bytes().splitlines(keepends=True)
    for line in lines:
        end += len(line)
        try:
            is_known = from_json(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            unread += line is not lines[-1]  # a kill may have cut the last one
            continue
        if is_known and line.endswith(b"\n"):
            kept.append(line)
            whole = end  # bytes up to here
    if whole < end:
        os.truncate(file, whole)
    what = "are left out"
    if sum(map(len, kept)) < whole:
        try:
            write_whole(file, b"".join(kept))
        except OSError as error:
            what = f"stay, for it cannot be written anew ({one_line(error)})"
    if not unread:
        return None
    return f"{file}: {unread} of {len(lines)} lines cannot be read and {what}"
