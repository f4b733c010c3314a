"""Standard output that is closed, narrow or left ends no run; a Ctrl-C before the start is quiet."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from run import console, flags

SAY = (
    "import os, sys; from run import console; console.settle()\n"
    "for _ in range(3000): print('8 completions of 2 processes × 4')\n"
    "print('π', file=sys.stderr, flush=True)\n"
    "file = open(sys.argv[1], 'w'); assert file.fileno() > 2, file.fileno()\n"
    "file.write('done')\n"
)


def test_streams_of_another_kind_are_taken_as_they_are(monkeypatch):
    """As a notebook has them, which cannot be given another encoding."""

    class Stream:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    streams = {name: Stream() for name in ("stdin", "stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    console.settle()
    print("written")
    assert streams["stdout"].text == "written\n"


def test_the_last_line_is_without_what_a_terminal_would_obey(capsys):
    flags.write_line("train.py: --reward_funcs mine: \x1b[2J\x07")
    assert capsys.readouterr().err == "train.py: --reward_funcs mine: ␛[2J␇\n"


READ = (
    "import sys; from run import console; console.settle()\n"
    "try: print(ascii(input()))\n"
    "except (EOFError, OSError): print('end')\n"
)
INPUTS = {  # what stands on standard input, or why it cannot be read → what is read
    "UTF-8": ("café π\n".encode(), "'caf\\xe9 \\u03c0'"),
    "Latin-1": ("café\n".encode("latin-1"), "'caf\\xe9'"),
    "a lone surrogate": (b"\xed\xa0\x80\n", "'\\xed\\xa0\\x80'"),
    "nothing": (b"", "end"),
    "closed": (0, "end"),
    "for writing alone": (os.devnull, "end"),
}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("case", INPUTS)
def test_whatever_standard_input_is_it_is_read_or_ends(case, encoding):
    given, expected = INPUTS[case]
    settings = {"input": given} if isinstance(given, bytes) else {}
    if given == 0:
        settings["preexec_fn"] = closed(0)
    if isinstance(given, str):
        settings["stdin"] = os.open(given, os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", READ],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        **settings,
    )
    if isinstance(given, str):
        os.close(settings["stdin"])
    assert done.stdout.decode() == f"{expected}\n", done.stderr.decode()[-500:]


def closed(*numbers):
    return lambda: [os.close(number) for number in numbers]


STREAMS = {
    "read by nobody": ("", None, {}),
    "a full disk": ("/dev/full", None, {}),
    "of ASCII": (os.devnull, None, {"PYTHONIOENCODING": "ascii"}),
    "closed": (os.devnull, closed(1), {}),
    "all closed": (os.devnull, closed(0, 1, 2), {}),
}


@pytest.mark.parametrize("case", STREAMS)
def test_whatever_standard_output_is_a_run_goes_on(case, tmp_path):
    target, before, environment = STREAMS[case]
    read, write = os.pipe()
    if target:
        os.close(write)
        write = os.open(target, os.O_WRONLY)
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", SAY, str(tmp_path / "file")],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        preexec_fn=before,
    )
    os.close(write)
    assert (tmp_path / "file").read_text() == "done"
    assert b"Traceback" not in done.stderr, done.stderr
    if case != "a full disk":  # where Python itself complains as it ends
        assert done.returncode == 0


def test_a_ctrl_c_while_importing_leaves_no_traceback():
    code = "import time; from run import stop; stop.end_quietly(); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        run.stdout.readline()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
    assert run.returncode == -signal.SIGINT and said == b""
