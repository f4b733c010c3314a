"""A program on a terminal of its own: what it wrote, and what one would have seen."""

import os
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass

import pytest
from conftest import ROOT

WIDTH, HEIGHT = 90, 30


@dataclass
class Seen:
    status: int
    parts: list[tuple[float, bytes]]  # seconds since the start, what was written then
    frames: list[tuple[float, str]]  # each other screen
    cursor: tuple[bool, int]  # whether it is hidden, and its column, at the end

    @property
    def written(self) -> bytes:
        return b"".join(part for _, part in self.parts)

    @property
    def last_line(self) -> str:
        return self.frames[-1][1].splitlines()[-1]


def on_a_terminal(*words, when: str = "", number: int = 0, **environment) -> Seen:
    """python with these words. number: a signal to send as soon as `when` stands on the screen."""
    pyte = pytest.importorskip("pyte", reason="pip install pyte")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (HEIGHT, WIDTH))
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream, seen = pyte.ByteStream(screen), Seen(0, [], [], (False, 0))
    try:
        while True:
            if not select.select([ours], [], [], 120)[0]:
                raise AssertionError(f"silent: {seen.frames[-1:]}")
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux says that the other side is closed
                break
            now = time.monotonic() - started
            seen.parts.append((now, part))
            stream.feed(part)
            frame = "\n".join(line.rstrip() for line in screen.display).rstrip()
            if not seen.frames or frame != seen.frames[-1][1]:
                seen.frames.append((now, frame))
            if number and when in frame:
                process.send_signal(number)
                number = 0
        seen.status = process.wait(30)
    finally:
        process.kill()
        os.close(ours)
    seen.cursor = screen.cursor.hidden, screen.cursor.x
    return seen
