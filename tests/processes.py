"""Ranks as processes forked from the tests' own, which saves them the seconds of every import."""

import gc
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  # which fully_shard would import in every rank
import torch.multiprocessing as multiprocessing

import dist

FORK = multiprocessing.get_context("fork")


# Ranks that compute ------------------------------------------------------------------------------


def in_processes(ranks: int, folder: Path, function: Callable, *args) -> list:
    """What function(world, *args) returns in each of `ranks` processes that have met."""
    folder.mkdir(exist_ok=True)
    arguments = (ranks, folder, function, *args)
    # What is frozen is not looked at by the ranks' garbage collectors, so it need not be copied.
    gc.collect()
    gc.freeze()
    try:
        multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="fork")
    finally:
        gc.unfreeze()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, function: Callable, *args) -> None:
    torch.set_num_threads(1)
    world = dist.World(rank, ranks, torch.device("cpu"))
    dist.start(world, torch.distributed.FileStore(str(folder / "store"), ranks))
    torch.save(function(world, *args), folder / f"rank{rank}.pt")
    world.barrier()  # a rank that leaves early would be missed by those that still send
    dist.stop()


# Ranks that talk and end -------------------------------------------------------------------------


class Forked:
    """function(*args) in a process of its own, with changes to the environment."""

    def __init__(self, output: Path, function: Callable, *args, **environment):
        self.file, self.environment = output, environment
        arguments = (output, environment, function, *args)
        self.process = FORK.Process(target=_talk, args=arguments)
        self.process.start()

    @property
    def said(self) -> str:
        """What it has printed so far, errors included."""
        return self.file.read_text() if self.file.exists() else ""

    def end(self, timeout: float) -> tuple[int, str]:
        """Wait for its end → exit status, and all that it has printed."""
        if not self._ends(timeout):
            raise AssertionError(f"still running after {timeout} s: {self.said}")
        return self.process.exitcode, self.said

    def says(self, line: str, timeout: float) -> None:
        """Wait until it has printed this."""
        deadline = time.monotonic() + timeout
        while True:
            goes_on = time.monotonic() < deadline and self.process.is_alive()
            if line in self.said:
                return
            assert goes_on, self.said
            time.sleep(0.02)

    def kill(self) -> None:
        """End it, stopped or not, and let it end what it has started."""
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            if self.process.is_alive():
                os.kill(self.process.pid, number)
            if number != signal.SIGCONT:
                self._ends(timeout=10)

    def _ends(self, timeout: float) -> bool:
        """Not by join, which does not see the end of another program in the process."""
        deadline = time.monotonic() + timeout
        while self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.process.is_alive()


def _talk(output: Path, environment: dict, function: Callable, *args) -> None:
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update({name: str(value) for name, value in environment.items()})
    # A shell's background jobs ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    function(*args)


@contextmanager
def forked(folder: Path, *jobs: tuple):
    """Jobs, (function, arguments, environment) each, as processes; none outlives the block."""
    folder.mkdir(exist_ok=True)
    processes = []
    try:
        for number, (function, args, environment) in enumerate(jobs):
            output = folder / f"said-{number}"
            processes.append(Forked(output, function, *args, **environment))
        yield processes
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def places(ranks: int, **changes) -> list[dict[str, object]]:
    """The environment of each rank of a run that is started by hand, one a node."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": ranks}
    return [{"RANK": rank, "GROUP_RANK": rank} | common | changes for rank in range(ranks)]


def run_forked(flags: list, processes: int, folder: Path, status: int = 0, **environment) -> str:
    """train.py in forked processes of one node → what rank 0 printed. status: that it ends with."""
    import train

    words = [str(flag) for flag in flags]
    here = places(processes, LOCAL_WORLD_SIZE=processes, **environment)
    jobs = [(train.main, (words,), place | {"LOCAL_RANK": place["RANK"]}) for place in here]
    with forked(folder, *jobs) as ranks:
        ends = [rank.end(timeout=600) for rank in ranks]
    assert [ended for ended, _ in ends] == [status] * processes, ends
    return ends[0][1]


# Instruments -------------------------------------------------------------------------------------


def forget_tensors() -> None:
    """Let `live_bytes` be of what comes from now on."""
    gc.collect()
    gc.freeze()


def live_bytes(model: torch.nn.Module) -> int:
    """Of all tensors that this process has made since `forget_tensors`, each memory once; the
    gradients of the model's parameters, which Python does not see by itself, among them."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    storages = [dist.local(t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def settled_bytes(model: torch.nn.Module, most: float, patience: float = 10.0) -> int:
    """The same, when it is down to `most`, or else after a while: gloo's threads hold on to the
    tensors of a collective for a moment after its end."""
    deadline = time.monotonic() + patience
    held = live_bytes(model)
    while held > most and time.monotonic() < deadline:
        time.sleep(0.01)
        held = live_bytes(model)
    return held


def bytes_sent() -> int:
    """What this process has sent on all its TCP connections, as the kernel counts it (Linux)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    # tcp_info's tcpi_bytes_sent and, of those, tcpi_bytes_retrans
                    sent, again = struct.unpack_from("QQ", info, 200)
                    total += sent - again
        except OSError:  # not a socket, or closed meanwhile
            continue
    return total
