"""A run's folder: which checkpoints count, which are whole, what is removed; lines that are whole."""

import json
import os
import re
import resource
import shutil
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import flags_for, train_here
from processes import forked
from safetensors.torch import load_file, save_file

import train
from data import UsageError
from run import checkpoints, folder, tokens
from run import trained as trained_folder
from run.lines import Lines, cut_after
from run.report import folder as report_folder


@pytest.fixture(scope="module")
def trained(model_folder, plugin, tmp_path_factory):
    """A run with three checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "out"
    mask = os.umask(0o027)
    try:
        train_here(*flags_for(model_folder, plugin, out, save_steps=1))
    finally:
        os.umask(mask)
    return out


@pytest.fixture
def resumed(model_folder, plugin, tmp_path, trained, capsys):
    """A copy of that run that is damaged in some way and resumed → exit status, what was said."""

    def resume(damage, which="true", *more):
        out = tmp_path / "out"
        if not out.exists():
            shutil.copytree(trained, out)
        damage(out)
        flags = flags_for(model_folder, plugin, out, max_steps=4)
        flags += ["--resume_from_checkpoint", str(which).format(out=out), *more]
        status = 0
        try:
            train.main([str(flag) for flag in flags])
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out + captured.err

    return resume


# Whole or not ------------------------------------------------------------------------------------


def truncate(name):
    def damage(out):
        file = out / "checkpoint-3" / name
        file.write_bytes(file.read_bytes()[:-100])

    return damage


def write(name, text):
    return lambda out: (out / "checkpoint-3" / name).write_text(text)


def pipe(name):
    """In the place of a file, where a reader would wait for ever."""

    def damage(out):
        (out / "checkpoint-3" / name).unlink()
        os.mkfifo(out / "checkpoint-3" / name)

    return damage


def of_eight_bits(state):
    name = one_of(state, "exp_avg.")
    return {name: state[name].to(torch.float8_e4m3fn)}


def change(how, name="optimizer.safetensors"):
    """how: what is done to the tensors of that file, a dict."""

    def damage(out):
        tensors = load_file(out / "checkpoint-3" / name)
        how(tensors)
        save_file(tensors, out / "checkpoint-3" / name)

    return damage


def one_of(tensors, kind) -> str:
    return min(name for name in tensors if name.startswith(kind))


def lacks(kind):
    return change(lambda state: state.pop(one_of(state, kind)))


def one_number(kind):
    """Of a shape that would be broadcast."""
    return change(lambda state: state.update({one_of(state, kind): torch.ones(1)}))


DAMAGES = {
    "no number of steps": (lacks("steps"), "optimizer.safetensors has no number of steps"),
    "two numbers of steps": (
        change(lambda state: state.update(steps=torch.tensor([3, 3]))),
        "optimizer.safetensors has no number of steps",
    ),
    "state of another step": (
        change(lambda state: state.update(steps=torch.tensor(2))),
        "optimizer.safetensors is of step 2",
    ),
    "no weights of a parameter": (lacks("master."), "_proj.lora_A is [8, 48], its master absent"),
    "no first moment": (lacks("exp_avg."), "_proj.lora_A is absent, its master [8, 48]"),
    "no second moment": (lacks("exp_avg_sq."), "_proj.lora_A is absent, its master [8, 48]"),
    "a first moment of one number": (one_number("exp_avg."), "is [1], its master [8, 48]"),
    "a second moment of one number": (one_number("exp_avg_sq."), "is [1], its master [8, 48]"),
    "a list of progress": (write("trainer_state.json", "[3]"), "trainer_state.json cannot be read"),
    "a word for a count": (
        write("trainer_state.json", '{"step": 3, "draws": "x"}'),
        "trainer_state.json says draws 'x'",
    ),
    "a half of a count": (
        write("trainer_state.json", '{"step": 3, "completions_per_step": 1.5}'),
        "trainer_state.json says completions_per_step 1.5",
    ),
    "no metrics": (
        write("trainer_state.json", '{"step": 3, "unlogged": [1]}'),
        "trainer_state.json has metrics that are none",
    ),
    "metrics without seconds": (
        write("trainer_state.json", '{"step": 3, "unlogged": [{"loss": 1.0}]}'),
        "trainer_state.json has metrics that are none",
    ),
    "a word for a metric": (
        write("trainer_state.json", '{"step": 3, "unlogged": [{"time/step": 1, "loss": "x"}]}'),
        "trainer_state.json has metrics that are none",
    ),
    "progress without a bottom": (
        write("trainer_state.json", "[" * 100_000),
        "trainer_state.json cannot be read: nested too deeply",
    ),
    "a pipe for progress": (pipe("trainer_state.json"), "it has no trainer_state.json"),
    "a pipe for state": (pipe("optimizer.safetensors"), "it has no optimizer.safetensors"),
    "steps that are no number": (
        change(lambda state: state.update(steps=torch.tensor(float("nan")))),
        "optimizer.safetensors: steps is of type F32, not I64",
    ),
    "moments in another type": (
        change(lambda state: state.update(of_eight_bits(state))),
        "is of type F8_E4M3, not F32",
    ),
    "truncated state": (truncate("optimizer.safetensors"), "optimizer.safetensors cannot be read"),
    "truncated weights": (truncate("adapter_model.safetensors"), "adapter_model.safetensors cann"),
    "no state": (
        lambda out: (out / "checkpoint-3" / "optimizer.safetensors").unlink(),
        "it has no optimizer.safetensors",
    ),
    "no weights": (
        lambda out: (out / "checkpoint-3" / "adapter_model.safetensors").unlink(),
        "it has no weights",
    ),
    "empty progress": (write("trainer_state.json", ""), "trainer_state.json cannot be read"),
    "garbled progress": (write("trainer_state.json", '{"step": "x"}'), "has no step"),
    "another step": (write("trainer_state.json", '{"step": 2}'), "is of step 2"),
    "a step below 0": (write("trainer_state.json", '{"step": -3}'), "has no step"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken_and_why_not_a_newer_one(case, trained, tmp_path):
    damage, why = DAMAGES[case]
    shutil.copytree(trained, tmp_path / "out")
    damage(tmp_path / "out")
    newest, notes = folder.newest_whole(tmp_path / "out")
    assert newest == tmp_path / "out" / "checkpoint-2"
    (note,) = notes
    assert note.startswith("checkpoint-3 is not whole (") and why in note


def test_a_run_says_which_checkpoint_it_takes_and_every_flag_that_differs(resumed):
    def damage(out):
        truncate("optimizer.safetensors")(out)
        (out / "checkpoint-best-7").mkdir()

    status, said = resumed(damage, "true", "--save_total_limit", "9")
    assert status == 0
    assert "checkpoint-2; checkpoint-3 is not whole (optimizer.safetensors cannot be read" in said
    for told in ("--max_steps 4 (was 3)", "--save_total_limit 9 (was None)", "(was 1)"):
        assert told in said, said


def test_a_damaged_checkpoint_that_is_named_is_refused(resumed):
    status, said = resumed(truncate("optimizer.safetensors"), "{out}/checkpoint-3")
    assert status == 2
    assert "checkpoint-3: not a whole checkpoint (optimizer.safetensors cannot be read" in said


def test_state_that_is_not_finite_is_refused_when_it_is_read(resumed):
    def damage(out):
        file = out / "checkpoint-3" / "optimizer.safetensors"
        state = load_file(file)
        name = next(name for name in state if name.startswith("exp_avg_sq."))
        state[name][0] = float("nan")
        save_file(state, file)

    status, said = resumed(damage)
    assert status == 2
    assert "exp_avg_sq." in said and "holds numbers that are not finite" in said, said


def test_garbled_args_and_metrics_are_told_and_training_goes_on(resumed):
    def damage(out):
        (out / "args.json").write_text("{")
        file = out / "metrics.jsonl"
        first, *others = file.read_text().splitlines()
        file.write_text("\n".join([first, "\0\0", *others, '{"step": 9']))

    status, said = resumed(damage, "{out}/checkpoint-2")
    assert status == 0
    assert "args.json: cannot be read" in said
    assert "metrics.jsonl: 1 of 5 lines cannot be read and are left out" in said, said


def test_a_run_that_is_done_says_that_nothing_is_left(resumed):
    status, said = resumed(lambda out: None, "true", "--max_steps", "3")
    assert status == 0 and "step 3 of 3 is done: nothing is left to do" in said, said


def test_checkpoints_have_the_permissions_of_the_umask(trained):
    for file in (trained / "checkpoint-3").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file


def test_state_that_is_not_finite_is_never_written(model_folder, plugin, tmp_path, monkeypatch):
    """Not even what no weight has felt yet: a moment of AdamW."""
    import dist

    step = dist.ZeroAdamW.step

    def spoiled(optimizer, learning_rate):
        norm = step(optimizer, learning_rate)
        optimizer.buckets[0].exp_avg_sq[0] = float("inf")
        return norm

    monkeypatch.setattr(dist.ZeroAdamW, "step", spoiled)
    with pytest.raises(SystemExit) as end:
        train.main([str(f) for f in flags_for(model_folder, plugin, tmp_path, max_steps=1)])
    assert end.value.code == 1 and not list(tmp_path.glob("checkpoint-*"))


# Removing ----------------------------------------------------------------------------------------


def test_a_run_that_goes_on_from_elsewhere_moves_an_earlier_run_away(resumed, trained):
    """Another run's lines and checkpoints would mix with its own, and be pruned with them."""
    before = []

    def note(out):
        before.append((out / "metrics.jsonl").read_text())

    elsewhere = trained / "checkpoint-2"
    status, said = resumed(note, elsewhere, "--save_total_limit", "1")
    assert status == 0 and "held an earlier run; now in" in said, said
    (moved,) = re.findall(r"now in (\S+)", said)
    assert (Path(moved) / "metrics.jsonl").read_text() == before[0]
    assert {path.name for path in folder.checkpoints(moved)} >= {"checkpoint-2", "checkpoint-3"}


LONG = "y" * 300  # which no file may be called; one of another user's raises, too


@pytest.mark.parametrize(
    "flag", ["output_dir", "resume_from_checkpoint", "model", "adapters", "external_plugins"]
)
def test_a_path_that_may_not_be_looked_at_is_one_line(model_folder, plugin, tmp_path, flag, capsys):
    given = flags_for(model_folder, plugin, tmp_path / "out") + [f"--{flag}", LONG]
    with pytest.raises(SystemExit) as end:
        train.main(given)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"--{flag} {LONG}: file name too long; a path that you may read works" in said, said


def test_a_checkpoint_that_may_not_be_looked_at_is_one_line():
    with pytest.raises(UsageError, match="file name too long; a path that you may read works"):
        trained_folder.find(LONG)


def test_nothing_is_written_through_a_link_where_a_checkpoint_begins(
    model_folder, plugin, tmp_path
):
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / f"checkpoint-1{folder.UNFINISHED}").symlink_to(mine)
    (tmp_path / f"checkpoint-2{folder.UNFINISHED}").write_text("mine, too")
    train_here(*flags_for(model_folder, plugin, tmp_path, max_steps=2, save_steps=1))
    assert not list(mine.iterdir())
    for step in (1, 2):
        assert not folder.fault(tmp_path / f"checkpoint-{step}")
        assert not (tmp_path / f"checkpoint-{step}").is_symlink()
    left = tmp_path / f"checkpoint-3{folder.UNFINISHED}-2"  # by a kill
    left.mkdir()
    folder.sweep(tmp_path)
    assert not left.exists()


def test_a_link_in_the_way_of_a_checkpoint_stays_under_another_name(tmp_path):
    mine, checkpoint = tmp_path / "mine", tmp_path / "checkpoint-2"
    mine.mkdir()
    checkpoint.symlink_to(mine)
    (tmp_path / "checkpoint-2.removed").symlink_to(mine)
    for _ in range(2):
        unfinished = tmp_path / "checkpoint-2.unfinished"
        unfinished.mkdir()
        (unfinished / folder.STATE).write_text("{}")
        folder.finish(unfinished, checkpoint)
        assert (checkpoint / folder.STATE).exists() and not checkpoint.is_symlink()
    folder.remove(checkpoint)
    (tmp_path / "checkpoint-best.removed").mkdir()  # of somebody else
    folder.sweep(tmp_path)
    left = {"mine", "checkpoint-2.link", "checkpoint-2.removed", "checkpoint-best.removed"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_only_this_runs_own_checkpoints_are_removed(tmp_path):
    names = ["checkpoint-1", "checkpoint-2", "checkpoint-10", "checkpoint-99"]
    others = ["checkpoint-best-2", "checkpoint-0003", "checkpoint-²", "checkpoint-4"]
    for name in names + others:
        (tmp_path / name).mkdir()
        if name != "checkpoint-4":  # another program's: without our optimizer's state
            (tmp_path / name / folder.OPTIMIZER).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / folder.OPTIMIZER).touch()
    (tmp_path / "checkpoint-5").symlink_to(elsewhere)
    folder.prune(tmp_path, step=10, keep=1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "checkpoint-10", "checkpoint-99", "checkpoint-5", "elsewhere"}
    assert (elsewhere / folder.OPTIMIZER).exists()


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """A kill amid the removal leaves no half of one under its name."""
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    seen = []

    def killed(path, **_):
        seen.append((path.name, checkpoint.exists()))

    monkeypatch.setattr(shutil, "rmtree", killed)
    folder.remove(checkpoint)
    assert seen[-1] == ("checkpoint-1.removed", False)
    monkeypatch.undo()
    folder.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    unfinished, checkpoint = tmp_path / "checkpoint-1.unfinished", tmp_path / "checkpoint-1"
    unfinished.mkdir()
    for name in (folder.STATE, folder.OPTIMIZER):
        (unfinished / name).touch()
    synced = []
    monkeypatch.setattr(folder, "sync", lambda path: synced.append((path, checkpoint.exists())))
    folder.finish(unfinished, checkpoint)
    for name in (folder.STATE, folder.OPTIMIZER):
        assert (unfinished / name, False) in synced
    assert synced[-1] == (tmp_path, True)


def test_an_evaluations_numbers_move_away_with_its_completions(model_folder, plugin, tmp_path):
    """Else a run that is trained there would be taken for an evaluation's folder."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("args.json", "completions.jsonl", "evaluation.json"):
        (out / name).write_text("{}")
    train_here(*flags_for(model_folder, plugin, out, max_steps=1))
    assert (out / "earlier-1" / "evaluation.json").exists()
    assert len(report_folder.read(out).steps) == 1


# Whose it is -------------------------------------------------------------------------------------


def take(out, text):
    """As a run of another process does, until it is killed."""
    out.mkdir(exist_ok=True)
    held = folder.Hold(out, text)
    held.write_args()
    (out / "metrics.jsonl").write_text("theirs")
    print("taken", flush=True)
    time.sleep(600)
    held.renew()


@pytest.fixture
def held(tmp_path):
    """A folder that this process has taken, with lines and a checkpoint in it."""
    out = tmp_path / "out"
    out.mkdir()
    hold = folder.Hold(out, "ours")
    hold.write_args()
    (out / "metrics.jsonl").write_text("ours")
    yield hold
    hold.lock.release(force=True)


@pytest.mark.parametrize("removed", ["folder", "lock", "both"])
def test_a_folder_that_is_removed_amid_a_run_is_taken_anew_and_told(
    removed, held, tmp_path, capsys
):
    out = held.folder
    folder.keep(out)
    assert not capsys.readouterr().out
    if removed == "folder":
        shutil.rmtree(out)
    else:
        (out / ".lock").unlink()
    if removed == "both":
        (out / ".holder").unlink()
    for _ in range(2):
        folder.keep(out)
    assert capsys.readouterr().out.count("its lock was removed amid the run; it is taken anew") == 1
    assert (out / "args.json").read_text() == "ours" and not (out / "earlier-1").exists()
    assert (out / "metrics.jsonl").exists() == (removed != "folder")
    with forked(tmp_path / "other", (take, (out, "theirs"), {})) as (other,):  # and is locked
        status, said = other.end(60)
    assert status and f"{folder.this_process()} trains there" in said


def test_a_folder_that_another_run_has_taken_meanwhile_ends_this_one(held, tmp_path):
    out = held.folder
    shutil.rmtree(out)
    with forked(tmp_path / "other", (take, (out, "theirs"), {})) as (other,):
        other.says("taken", 60)
        for write in (lambda: folder.keep(out), lambda: Lines(out / "metrics.jsonl").write([{}])):
            with pytest.raises(UsageError, match=f"process {other.process.pid} on .* trains there"):
                write()
    assert (out / "metrics.jsonl").read_text() == "theirs"
    assert (out / "args.json").read_text() == "theirs"


def test_what_another_run_has_left_there_meanwhile_moves_away(held, tmp_path):
    out = held.folder
    shutil.rmtree(out)
    with forked(tmp_path / "other", (take, (out, "theirs"), {})) as (other,):
        other.says("taken", 60)
    Lines(out / "metrics.jsonl").write([{"step": 4}])
    assert (out / "metrics.jsonl").read_text() == '{"step": 4}\n'
    assert (out / "args.json").read_text() == "ours"
    assert (out / "earlier-1" / "metrics.jsonl").read_text() == "theirs"


def test_a_folder_that_cannot_be_made_yet_is_taken_as_soon_as_it_can(held, tmp_path):
    out, lines = held.folder, Lines(held.folder / "metrics.jsonl")
    shutil.rmtree(out)
    out.write_text("in the way")
    assert "could not be written" in lines.write([{"step": 1}])
    out.unlink()
    assert lines.write([{"step": 2}]) is None
    assert lines.file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (out / "args.json").read_text() == "ours"


def test_a_run_whose_folder_is_removed_saves_into_one_that_is_its_own(
    model_folder, plugin, tmp_path, monkeypatch
):
    out, save = tmp_path / "out", checkpoints.save
    words = [str(word) for word in flags_for(model_folder, plugin, out, save_steps=1, max_steps=2)]

    def removed(args, world, policy, tokenizer, optimizer, progress, reference):
        if progress.step == 2:
            shutil.rmtree(out)
        save(args, world, policy, tokenizer, optimizer, progress, reference)

    monkeypatch.setattr(checkpoints, "save", removed)
    said = train_here(*words)
    assert "its lock was removed amid the run; it is taken anew" in said
    assert {"args.json", ".lock", ".holder", "checkpoint-2"} == {p.name for p in out.iterdir()}


# Lines -------------------------------------------------------------------------------------------


def test_lines_that_find_no_room_are_said_once_and_written_later(tmp_path):
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.write([{"step": 0}])
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limit))  # amid the third line
    try:
        said = [lines.write([{"step": step}]) for step in (1, 2, 3)]
        assert lines.file.read_text() == '{"step": 0}\n{"step": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, limit))
    assert said[0] is None and "could not be written" in said[1] and said[2] is None
    assert lines.write([{"step": 4}]) is None
    steps = [json.loads(line)["step"] for line in lines.file.read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_a_folder_that_is_gone_is_made_again(tmp_path):
    lines = Lines(tmp_path / "out" / "metrics.jsonl")
    lines.write([{"step": 1}])
    shutil.rmtree(tmp_path / "out")
    assert lines.write([{"step": 2}]) is None
    assert lines.file.read_text() == '{"step": 2}\n'


def test_lines_beyond_a_checkpoint_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert cut_after(file, 2) is None
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.fixture
def full_disk():
    """By a limit on the size of files: what is there can be cut, and nothing can be written."""
    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, limit))


def test_lines_beyond_a_checkpoint_are_forgotten_on_a_full_disk_too(tmp_path, request):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n{"st')
    request.getfixturevalue("full_disk")
    note = cut_after(file, 2)
    assert note.endswith(
        "1 of 5 lines cannot be read and stay, for it cannot be written anew (file too large)"
    ), note
    assert file.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n'
    cut_after(file, 1)
    assert file.read_text() == '{"step": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path, request):
    file = tmp_path / "args.json"
    file.write_text("before")
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError):
        folder.write_whole(file, b"after")
    assert file.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_lines_that_one_may_not_cut_are_told_in_one_line(resumed, monkeypatch):
    def refused(file, size):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "truncate", refused)
    status, said = resumed(lambda out: None, "{out}/checkpoint-2")
    assert status == 2
    assert "metrics.jsonl cannot be cut behind step 2 (permission denied); a folder that" in said


def test_tokens_that_find_no_room_are_told(tmp_path, capsys):
    (tmp_path / "out").touch()
    recorder = object.__new__(tokens.Recorder)
    world = SimpleNamespace(is_main=True)
    recorder.run = SimpleNamespace(world=world, args=SimpleNamespace(num_generations=1))
    recorder.lines, recorder.drawn = Lines(tmp_path / "out" / "tokens.jsonl"), 1
    recorder._group = lambda places, numbers: {}
    for step in (1, 2):
        recorder._write(step, {}, [0])
    said = capsys.readouterr().out
    assert said.count("tokens.jsonl could not be written (") == 1
