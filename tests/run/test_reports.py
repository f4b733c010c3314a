"""A report elsewhere that fails is told once, and does not end the run."""

import resource
import shutil
import sys
import threading
import time
import types
from argparse import Namespace

import pytest
import torch
from conftest import flags_for, read_metrics, train_here
from processes import forked

from run import log, reports


class Broken:
    """Whatever is asked of it fails, from a call on; it counts them."""

    def __init__(self, last: str):
        self.asked, self.last = [], last
        if last == "init":
            raise ConnectionError("no server\nto be found")

    def __getattr__(self, name):
        def call(*_):
            self.asked.append(name)
            if name == self.last:
                raise ConnectionError("no server\nto be found")

        return call


CALLS = {"metrics": ({}, 1), "batch": (None, "", 1), "completions": ([], "", 1), "close": ()}


@pytest.mark.parametrize("fails", ["init", *CALLS])
def test_what_fails_is_told_once_and_never_asked_again(fails, capsys):
    guarded = reports.Guarded("wandb", lambda: Broken(fails))
    for _ in range(2):
        for name, arguments in CALLS.items():
            getattr(guarded, name)(*arguments)
    line = "! --report_to wandb: failed (no server to be found); training goes on without it\n"
    assert capsys.readouterr().out == line
    if fails != "init":
        assert guarded.report.asked.count(fails) == 1 and guarded.report.asked[-1] == fails


def test_a_run_goes_on_without_a_report_that_cannot_be_opened(
    model_folder, plugin, tmp_path, monkeypatch
):
    def init(**_):
        raise RuntimeError("not logged in")

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.__spec__ = init, True
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    said = train_here(
        *flags_for(model_folder, plugin, tmp_path / "o", report_to="wandb", max_steps=2)
    )
    assert said.count("--report_to wandb: failed (not logged in); training goes on") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "o")] == [1, 2]


def test_a_folder_that_is_removed_costs_tensorboard_and_not_the_run(
    model_folder, plugin, tmp_path, monkeypatch, capfd
):
    out, step = tmp_path / "out", log.Log.step

    def removed(self, progress, *more):
        if progress.step == 2:
            shutil.rmtree(out)
        step(self, progress, *more)

    monkeypatch.setattr(log.Log, "step", removed)
    train_here(*flags_for(model_folder, plugin, out, report_to="tensorboard", max_steps=3))
    assert [line["step"] for line in read_metrics(out)] == [2, 3]
    assert "Traceback" not in capfd.readouterr().err


def report_without_room(folder) -> None:
    """Numbers for TensorBoard, with files of no more than some bytes."""
    threading.excepthook = threading.__excepthook__  # not pytest's, which prints nothing
    report = reports.Guarded(
        "tensorboard", lambda: reports.TensorBoard(Namespace(output_dir=folder))
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    report.report.writer.file_writer.event_writer._async_writer._worker._flush_secs = 0
    for step in range(200):
        report.metrics({"step": step, "reward": torch.rand(()).item()}, step)
        time.sleep(0.001)
    report.close()


def test_a_full_disk_costs_tensorboard_one_line_and_no_traceback_of_its_thread(tmp_path):
    with forked(tmp_path / "said", (report_without_room, (str(tmp_path / "runs"),), {})) as (one,):
        _, said = one.end(60)
    lines = [line for line in said.splitlines() if "SIGXFSZ" not in line]
    (line,) = lines
    assert line.startswith("! --report_to tensorboard: failed (file too large)"), said
