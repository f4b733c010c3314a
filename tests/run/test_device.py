"""Which device a run takes: another one than may be expected is never taken in silence."""

import glob

import pytest
import torch
from conftest import tiny_model

import dist
import fast
from data import UsageError
from run import placement


def machine(monkeypatch, *, there: bool, sees: int = 0, cuda="12.8", error="too old (11040)"):
    """A machine with a GPU or without, of which torch sees some."""

    def init():
        raise RuntimeError(f"The NVIDIA driver on your system is {error}")

    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"] if there else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: sees)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    "cuda, why",
    [("12.8", r"built for CUDA 12.8, cannot use it \(.*too old"), (None, "built without CUDA")],
)
def test_a_gpu_that_torch_cannot_use_is_one_line(wanted, cuda, why, monkeypatch, tmp_path):
    machine(monkeypatch, there=True, cuda=cuda)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    monkeypatch.setattr(placement, "DRIVER", str(version))
    line = f"--device {wanted}: there is a GPU with NVIDIA's driver 470.82.01, but torch .*{why}"
    with pytest.raises(UsageError, match=line):
        placement.check_device(wanted)
    placement.check_device("cpu")


def test_a_gpu_that_is_not_there_is_told_only_to_who_asked_for_it(monkeypatch):
    machine(monkeypatch, there=False)
    placement.check_device("auto")
    with pytest.raises(UsageError, match="--device cuda: there is no GPU; cpu works"):
        placement.check_device("cuda")


def test_a_gpu_that_the_user_has_hidden_is_not_there(monkeypatch):
    machine(monkeypatch, there=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    placement.check_device("auto")


def test_more_processes_than_gpus_are_told_how_many_work(monkeypatch):
    machine(monkeypatch, there=True, sees=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    placement.check_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UsageError, match="needs GPU 4, and torch sees 4; --nproc_per_node 4 works"):
        placement.check_device("auto")


def test_cpu_insists(monkeypatch):
    machine(monkeypatch, there=True, sees=1)
    assert dist.find_world("cpu").device.type == "cpu"
    assert dist.find_world().device.type == "cuda"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out"), RuntimeError("can't allocate memory")]
)
def test_a_fast_part_that_lacks_memory_is_not_dropped(error, monkeypatch):
    model = tiny_model()
    own = fast.trial(model)

    def fails(*_):
        raise error

    monkeypatch.setattr(fast, "trial", fails)
    with pytest.raises(RuntimeError, match=str(error)):
        fast.differs(model, own)
