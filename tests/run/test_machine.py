"""What a machine has room for."""

import os

import torch

from fast import decoder
from run import machine


def test_processes_of_a_machine_share_its_free_memory(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.free_memory(torch.device("cpu")) < installed
    file = tmp_path / "meminfo"
    file.write_text("MemFree: 10 kB\nMemAvailable:   4096 kB\nCached: 20 kB\n")
    monkeypatch.setattr(machine, "Path", lambda _: file)
    assert machine.free_memory(torch.device("cpu")) == 4 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_memory(torch.device("cpu")) == 1 << 20


def test_room_is_reckoned_for_the_cache_that_the_quick_decoder_makes():
    assert machine.ROOM == decoder.ROOM
