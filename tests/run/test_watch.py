"""Ranks that meet, and that end when another one is lost: real processes on this machine."""

import ctypes
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress

import pytest
import torch
import torch.distributed as torch_dist
from processes import forked, places

import dist
from data import UsageError
from run import watch

HERE = socket.gethostname()
TIMEOUT = {"busy": 1.5, "done": 1.5}  # else 1 s; more where nobody is to be lost

# Case → how the others tell of rank 1.
LOST = {
    "killed": f"lost rank 1 on {HERE}: its process has ended",
    "stopped": f"lost rank 1 on {HERE}: no sign of life for 4 s",
    "failed": f"lost rank 1 on {HERE}: it failed, and has told why",
    "asked": f"lost rank 1 on {HERE}: a signal asked it to end",
}
NOT_LOST = ("done", "busy", "late")


def rank_of_a_run(case: str, rank: int, size: int) -> None:
    """What each rank of the cases does."""

    def lost(line):
        print(line)
        os._exit(1)

    world, timeout = dist.World(rank, size, torch.device("cpu")), TIMEOUT.get(case, 1.0)
    watch.Watch.PATIENCE = 2.0 if case == "late" else 15.0
    if case == "late" and rank == 2:
        time.sleep(4 * timeout + 1)
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch_dist.PrefixStore("train/0", torch_dist.TCPStore(*address, is_master=False))
        port = int(store.get("watch").split()[0])
        visit(port)
    meeting = 3.0 if case == "absent" else 30.0
    try:
        store, watcher = watch.meet(rank, size, world.place, timeout, lost, meeting)
    except UsageError as error:
        print(error)
        sys.exit(2)
    dist.start(world, store)
    print("ready")
    world.barrier()  # rank 0 serves the store, which the others read until they have met
    if case == "busy" and rank == 1:
        # Holds Python's lock for longer than `timeout`, and for less than four of them.
        ctypes.PyDLL(None).usleep(2_500_000)
    if case == "done" and rank == 2:
        time.sleep(3)  # the others have ended by then
    if case == "failed" and rank == 1:
        print("my own reason")
        watcher.close()
        return
    if case == "asked" and rank == 1:
        watcher.close(watcher.ASKED)
        return
    if case == "busy":
        world.barrier()  # the others wait for it
    while case in LOST:
        try:
            world.barrier()
        except RuntimeError:
            watcher.defer()
            raise
    watcher.close(watcher.DONE)


def visit(port: int) -> None:
    """Strangers of several kinds, one of whom says nothing, slowly."""
    for said in (b"", b"\xff\0\n", b"2 a rank by number alone\n", b"x" * 5000, b"0 " * 400 + b"\n"):
        with socket.create_connection(("127.0.0.1", port)) as stranger, suppress(OSError):
            stranger.sendall(said)
            stranger.settimeout(10)
            stranger.recv(1)  # rank 0 hangs up
    slow = socket.create_connection(("127.0.0.1", port))
    begun = time.monotonic()
    with suppress(OSError):
        while time.monotonic() < begun + 30:
            slow.sendall(b"x")
            time.sleep(0.1)
    assert time.monotonic() < begun + 10


def jobs_of(case: str, size: int = 3, **changes) -> list:
    environments = places(size, **changes)
    return [(rank_of_a_run, (case, rank, size), env) for rank, env in enumerate(environments)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The ranks of every case, which all run at the same time."""
    with ExitStack() as stack:

        def start(name, jobs):
            return stack.enter_context(forked(tmp_path_factory.mktemp(name), *jobs))

        server = stack.enter_context(socket.create_server(("", 0)))
        taken = server.getsockname()[1]
        ranks = {
            "taken": start("taken", jobs_of("taken", 2, MASTER_PORT=taken)[:1]),
            "absent": start("absent", jobs_of("absent")[:2]),
            "unreached": start("unreached", jobs_of("absent", 2)[1:]),
        }
        for case in (*NOT_LOST, *LOST):
            ranks[case] = start(case, jobs_of(case))
        for case in LOST:
            for process in ranks[case]:
                process.says("ready\n", timeout=60)
        os.kill(ranks["killed"][1].process.pid, signal.SIGKILL)
        os.kill(ranks["stopped"][1].process.pid, signal.SIGSTOP)
        yield ranks


@pytest.mark.parametrize("case", LOST)
def test_every_rank_ends_with_the_name_of_the_one_that_is_lost(cases, case):
    for process in (cases[case][0], cases[case][2]):
        status, said = process.end(timeout=30)
        assert status == 1 and said.count("lost") == 1, said
        assert LOST[case] in said.splitlines()
        assert "Traceback" not in said


@pytest.mark.parametrize("case", NOT_LOST)
def test_a_rank_that_ends_early_holds_pythons_lock_or_comes_late_is_not_lost(cases, case):
    for rank, process in enumerate(cases[case]):
        waits = "waiting for rank 2 of 3\n" if (case, rank) == ("late", 0) else ""
        assert process.end(timeout=60) == (0, waits + "ready\n")


@pytest.mark.parametrize(
    "case, rank, reason",
    [
        ("taken", 0, "--master_port {port}: in use on this machine"),
        ("absent", 0, "--nnodes: rank 2 of 3 did not come within the time to meet"),
        ("absent", 1, "--"),  # whatever rank 0's end looks like from here
        ("unreached", 0, "rank 1 on {here} did not meet rank 0 there within 3 s"),
    ],
)
def test_ranks_that_never_come_and_a_port_in_use_are_one_line(cases, case, rank, reason):
    process = cases[case][rank]
    status, said = process.end(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith("--")]  # torch has its own
    assert status == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert reason.format(port=process.environment["MASTER_PORT"], here=HERE) in lines[0]


def test_one_process_meets_nobody():
    assert watch.meet(0, 1, "rank 0 on here") == (None, None)


def test_the_interface_to_a_host_is_found():
    """gloo takes it, instead of what the host name stands for."""
    assert watch.interface_to("127.0.0.1") == "lo"
    assert watch.interface_to("::1") is None  # no IPv4 address


def test_servers_are_heard_at_the_address_they_name_alone():
    def answers(host, port):
        with suppress(ConnectionRefusedError), socket.create_connection((host, port), 5):
            return True
        return False

    store = watch.serve_store("127.0.0.1", 0, 2)
    with watch.listen("127.0.0.1", 2) as server:
        for port in (server.getsockname()[1], store.port):
            assert answers("127.0.0.1", port) and not answers("127.0.0.2", port)
    other = torch_dist.TCPStore("127.0.0.1", store.port, 2, is_master=False)
    other.set("name", "value")
    assert store.get("name") == b"value"


def test_a_name_that_is_loopback_here_alone_is_heard_on_all_addresses(monkeypatch):
    def found(host, port, **settings):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.1.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with watch.listen("node-0", 2) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with watch.listen("node-0", 2) as server:
        assert server.getsockname()[0] == "127.0.1.1"


def test_an_address_that_forwards_to_this_machine_is_heard_on_all_of_its_own():
    with watch.listen("192.0.2.1", 2) as server:  # nobody's: RFC 5737
        assert server.getsockname()[0] in ("::", "0.0.0.0")


def test_what_another_says_reaches_no_terminal_as_commands():
    said = "lost rank 1 on \x1b]0;owned\x07\x1b[2J\u202ehost\n"
    shown = watch.harmless(said, keep="")
    assert not {"\x1b", "\u202e", "\n"} & set(shown) and "␛" in shown
    assert watch.harmless("rank 1 on näve-7") == "rank 1 on näve-7"
