"""A process that is shut in: what it can no longer do, and what it still can."""

import ctypes
import fcntl
import os
import platform
import re
import resource
import signal
import socket
import struct
import threading
from functools import partial
from pathlib import Path

import pytest

from run import jail, judge

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in jail.ARCHITECTURES,
    reason="no filter for this system",
)


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def call(function, *args):
    """A function of the C library, for which Python has none."""
    if getattr(LIBC, function)(*args) < 0:
        raise OSError(ctypes.get_errno(), function)


def of_file(function, *args):
    """function(descriptor, *args) on a file that is open to be read."""

    def deed(kept):
        with kept.open("rb") as file:
            function(file, *args)

    return deed


def deeds(folder):
    kept = folder / "kept"
    me, siginfo = os.getpid(), bytes(128)
    cores, limits = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NPROC)
    of_files = {
        "a lock": of_file(fcntl.flock, fcntl.LOCK_EX),
        "a lock of bytes": of_file(fcntl.lockf, fcntl.LOCK_SH),
        "who gets signals": of_file(fcntl.fcntl, fcntl.F_SETOWN, me),
        "attributes by ioctl": of_file(fcntl.ioctl, 0x40086602, struct.pack("Q", 0)),
        "to wait for the disk": of_file(os.fsync),
    }
    return {name: partial(deed, kept) for name, deed in of_files.items()} | {
        "a queued signal": lambda: call("sigqueue", me, signal.SIGCONT, None),
        "a descriptor of a process": lambda: os.pidfd_open(me),
        "a session": os.setsid,
        "a limit": lambda: resource.setrlimit(resource.RLIMIT_NPROC, limits),
        "another's limit": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NPROC, limits),
        "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
        "cores": lambda: os.sched_setaffinity(0, cores),
        "a scheduler": lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)),
        "times": lambda: os.utime(kept, (0, 0)),
        "an attribute": lambda: os.setxattr(kept, "user.new", b"x"),
        "an attribute less": lambda: os.removexattr(kept, "user.kept"),
        "another's files": lambda: call("unshare", 0x04000000),  # CLONE_NEWIPC
        "a mount": lambda: call("mount", b"none", os.fsencode(folder), b"no such", 0, None),
        "memory without an owner": lambda: call("shmget", os.getpid(), 4096, 0),
        "a file in memory": lambda: os.memfd_create("new"),
        "locked memory": lambda: call("mlock", siginfo, 128),
        "a pipe": os.pipe,
        "to watch": lambda: call("inotify_init1", 0),
        "to outlive the judge": lambda: call("prctl", 1, 0, 0, 0, 0),  # PR_SET_PDEATHSIG
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
    said = os.read(read, 1 << 16).decode()
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
            except PermissionError:
                pass
            except (
                RuntimeError,
                ValueError,
            ) as error:  # as Python says it of a thread, and a limit
                assert str(error).startswith(("can't start new thread", "not allowed to raise"))
            except BaseException as error:
                left.append(f"{name}: {error!r}")
        return left

    assert in_a_child(all_deeds) == "[]"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"


def test_the_same_is_done_outside(tmp_path):
    """Else the test above would pass wherever a deed fails for another reason."""
    (tmp_path / "kept").write_text("kept")
    free = {"connect", "a program", "a thread", "a signal", "fork", "remove", "rename"}
    # What a file system, or a user, may not allow, and what would be left behind.
    free |= {"an attribute", "an attribute less", "another's files", "attributes by ioctl"}
    free |= {"a mount", "memory without an owner"}
    for name, deed in deeds(tmp_path).items():
        if name not in free:
            assert "Error" not in in_a_child(deed), name


def test_it_still_reads_computes_and_speaks(tmp_path):
    (tmp_path / "kept").write_text("kept")

    def work():
        assert jail.shut()
        import fractions  # perhaps from its file

        limits = resource.getrlimit(resource.RLIMIT_NPROC)
        assert limits == resource.prlimit(os.getppid(), resource.RLIMIT_NPROC)
        return (tmp_path / "kept").read_text(), fractions.Fraction(1, 3) * 6, len(bytes(1 << 24))

    assert in_a_child(work) == "('kept', Fraction(2, 1), 16777216)"


def said_of(architecture: int, place: int, number: int, *arguments: int) -> int:
    """What the filter returns, by a small machine that runs it."""
    data = struct.pack("iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    made_for = list(jail.ARCHITECTURES.values())[place]
    program, at, value = jail.filter_for(*made_for), 0, 0
    while True:
        code, if_true, if_false, k = struct.unpack("HBBI", program[at])
        at += 1
        if code == jail.RETURN:
            return k
        if code == jail.LOAD:
            (value,) = struct.unpack_from("I", data, k)
            continue
        holds = {
            jail.EQUAL: value == k,
            jail.AT_LEAST: value >= k,
            jail.ANY_BIT: bool(value & k),
        }[code]
        at += if_true if holds else if_false


@pytest.mark.parametrize("machine", jail.ARCHITECTURES)
def test_every_call_of_the_table_is_refused_and_a_newer_one_is_not_there(machine):
    known = jail.ARCHITECTURES[machine]
    numbers = {name: pair[known[1]] for name, pair in jail.REFUSED.items()}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    assert len(set(numbers.values())) == len(numbers)
    said = {name: said_of(*known, number) for name, number in numbers.items()}
    assert set(said.values()) == {jail.REFUSE}
    for newer in (jail.NEWEST + 1, 463, 466, 0x40000000):  # setxattrat, removexattrat; x32's read
        assert said_of(*known, newer) == jail.UNKNOWN
    assert said_of(0, known[1], 0) == jail.REFUSE  # a call of another architecture's
    pair, at = jail.LIMITS
    for pointer, answer in ((0, jail.ALLOW), (1 << 12, jail.REFUSE), (1 << 40, jail.REFUSE)):
        assert said_of(*known, pair[known[1]], *[9] * at, pointer) == answer
    for pairs, at, allowed in jail.ASKING.values():
        for value in range(1 << 12):
            answer = jail.ALLOW if value in allowed else jail.REFUSE
            assert said_of(*known, pairs[known[1]], *[9] * at, value) == answer
    for read_or_compute in {"x86_64": (0, 9, 12, 231), "aarch64": (63, 222, 214, 94)}[machine]:
        assert said_of(*known, read_or_compute) == jail.ALLOW


# The kernel's own lists of numbers, where its headers are installed.
HEADERS = {
    "x86_64": ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"],
    "aarch64": ["/usr/include/asm-generic/unistd.h"],
}


@pytest.mark.parametrize("machine", jail.ARCHITECTURES)
def test_the_numbers_are_the_kernels(machine):
    texts = [Path(file).read_text() for file in HEADERS[machine] if Path(file).exists()]
    if not texts:
        pytest.skip("no headers of the kernel")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", texts[0], re.MULTILINE)
    kernels = {name: int(number) for name, number in found}
    ours = dict(jail.REFUSED) | {name: rule[0] for name, rule in jail.OPENING.items()}
    ours |= {name: rule[0] for name, rule in jail.ASKING.items()} | {"prlimit64": jail.LIMITS[0]}
    place = jail.ARCHITECTURES[machine][1]
    wrong = {name: pair for name, pair in ours.items() if pair[place] != kernels.get(name)}
    # Older headers do not know of the newest calls.
    assert not {name for name in wrong if name in kernels}


def test_a_worker_has_no_pipe_but_its_own(monkeypatch):
    """Or it could take what another says."""
    other, write = os.pipe()
    os.write(write, b"verdict")
    monkeypatch.setattr(judge, "verdict", lambda *_: os.read(other, 7).decode())
    _, pipe = judge.fork_worker([("1", "1")], 5.0)
    assert os.read(pipe, 10) == b""
    assert os.read(other, 7) == b"verdict"
    for descriptor in (pipe, other, write):
        os.close(descriptor)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 16), (2, 8), (8, 2), (16, 1), (64, 1)])
def test_the_ranks_of_a_machine_share_the_workers(ranks, workers):
    assert judge.workers_of(ranks) == workers


def test_the_judges_workers_are_shut_in(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "verdict", lambda *_: (tmp_path / "new").write_text("x") and "1")
    _, pipe = judge.fork_worker([("1", "1")], 5.0)
    assert os.read(pipe, 10) == b"" and not (tmp_path / "new").exists()
    os.close(pipe)
