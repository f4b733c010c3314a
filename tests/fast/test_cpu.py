"""Threads and memory on a CPU."""

import os

import pytest
import torch
from processes import forked

from fast import cpu


def print_threads(processes):
    os.sched_getaffinity = lambda _: range(8)
    cpu.use_cpu_well(processes)
    print(torch.get_num_threads())


@pytest.mark.parametrize("processes, threads", [(1, 1), (2, 4), (3, 2), (16, 1)])
def test_processes_of_a_machine_share_its_cores(processes, threads, tmp_path):
    """Of 8 cores; torchrun sets one thread for each of several processes. One process alone keeps
    the threads it has, which is one in this test."""
    with forked(tmp_path, (print_threads, (processes,), {})) as (process,):
        assert process.end(timeout=60) == (0, f"{threads}\n")


@pytest.mark.parametrize("name, calls", [("MALLOC_ARENA_MAX", 0), ("NOTHING", 3)])
def test_what_the_user_sets_of_malloc_holds(name, calls, monkeypatch):
    for variable in [v for v in os.environ if v.startswith("MALLOC_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv(name, "1")
    made = []

    class Library:
        def __init__(self, _):
            self.mallopt = lambda *settings: made.append(settings)

    monkeypatch.setattr(cpu.ctypes, "CDLL", Library)
    cpu.use_cpu_well(1)
    assert len(made) == calls
