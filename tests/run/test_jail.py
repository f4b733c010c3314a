"""A process that is shut in: what it can no longer do, and what it still can."""

import os
import platform
import signal
import socket
import threading

import pytest

from run import jail, judge

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in jail.ARCHITECTURES,
    reason="no filter for this system",
)


def deeds(folder):
    kept = folder / "kept"
    return {
        "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
        "listen": lambda: socket.create_server(("127.0.0.1", 0)),
        "a pair of sockets": socket.socketpair,
        "fork": os.fork,
        "a program": lambda: os.execv("/bin/true", ["true"]),
        "a thread": lambda: threading.Thread(target=print).start(),
        "a signal": lambda: os.kill(os.getppid(), signal.SIGCONT),
        "write": lambda: (folder / "new").write_text("x"),
        "append": lambda: kept.open("a"),
        "empty": lambda: os.truncate(kept, 0),
        "remove": kept.unlink,
        "rename": lambda: kept.rename(folder / "other"),
        "a folder": lambda: (folder / "sub").mkdir(),
        "a link": lambda: (folder / "link").symlink_to(kept),
        "modes": lambda: kept.chmod(0o777),
    }


def in_a_child(function) -> str:
    """What function returns there, as text, or the kind of error that it raises."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(function())
        except BaseException as error:
            said = type(error).__name__
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 4096).decode()
    os.close(read)
    os.waitpid(pid, 0)
    return said


def test_what_changes_anything_outside_is_refused(tmp_path):
    (tmp_path / "kept").write_text("kept")

    def all_deeds():
        assert jail.shut()
        left = []
        for name, deed in deeds(tmp_path).items():
            try:
                deed()
                left.append(name)
            except (PermissionError, RuntimeError):  # the latter: can't start new thread
                pass
        return left

    assert in_a_child(all_deeds) == "[]"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"


def test_the_same_is_done_outside(tmp_path):
    """Else the test above would pass wherever a deed fails for another reason."""
    (tmp_path / "kept").write_text("kept")
    free = {"connect", "a program", "a thread", "a signal", "fork", "remove", "rename"}
    for name, deed in deeds(tmp_path).items():
        if name not in free:
            assert "Error" not in in_a_child(deed), name


def test_it_still_reads_computes_and_speaks(tmp_path):
    (tmp_path / "kept").write_text("kept")

    def work():
        assert jail.shut()
        import fractions  # perhaps from its file

        return (tmp_path / "kept").read_text(), fractions.Fraction(1, 3) * 6, len(bytes(1 << 24))

    assert in_a_child(work) == "('kept', Fraction(2, 1), 16777216)"


def test_the_judges_workers_are_shut_in(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "verdict", lambda *_: (tmp_path / "new").write_text("x") and "1")
    _, pipe = judge.fork_worker([("1", "1")], 5.0)
    assert os.read(pipe, 10) == b"" and not (tmp_path / "new").exists()
    os.close(pipe)
