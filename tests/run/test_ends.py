"""How runs end: asked to by a signal, with their launcher, by damage; and one run at a time in a folder."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import flags_for, read_metrics, run_train
from processes import FORK, forked, places, run_forked

import dist
import train
from data import UsageError
from rewards import RewardError
from run import flags, session, stop
from run.checkpoints import SaveError
from sampler import SamplerError

HERE = socket.gethostname()
ENDLESS = {"max_steps": 100_000, "reward_funcs": ["vowels", "accuracy"]}


def words_of(flags) -> list[str]:
    return [str(flag) for flag in flags]


def wait_for(holds, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def steps_in(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that these have, zombies apart."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            own, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if state != "Z":
            children.setdefault(int(parent), []).append(int(own.split()[0]))
    found, new = set(), [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found.update(new)
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Asked to end ------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_checkpoint(
    model_folder, plugin, tmp_path
):
    """And what goes on from there is the run that never stopped. (Ctrl-C: test_vllm.py.)"""
    out, size = tmp_path / "out", {"per_device_train_batch_size": 8, "beta": 0.0}
    size |= {"lr_scheduler_type": "constant", "deepspeed": "zero2"}
    words = words_of(flags_for(model_folder, plugin, out, **ENDLESS | size))
    ranks = [(train.main, (words,), place) for place in places(2, LOCAL_WORLD_SIZE=2)]
    with forked(tmp_path / "ranks", *ranks) as (main, other):
        wait_for(lambda: steps_in(out) >= 2)
        os.kill(other.process.pid, signal.SIGTERM)  # rank 0 hears of it from rank 1
        (ended, said), (other_ended, others) = main.end(60), other.end(60)
    assert (ended, other_ended) == (143, 143), said + others
    (checkpoint,) = out.glob("checkpoint-*")
    last = said.strip().splitlines()[-1]
    assert last == (
        f"train.py: stopped by SIGTERM; --resume_from_checkpoint true goes on from {checkpoint}"
    )
    for told in (said, others):
        assert "has told why" not in told and "Traceback" not in told
    step = steps_in(out)
    assert checkpoint.name == f"checkpoint-{step}"

    more = {"max_steps": step + 2, "num_train_epochs": 1}
    again = flags_for(model_folder, plugin, out, **ENDLESS | size | more)
    run_forked([*again, "--resume_from_checkpoint", "true"], 2, tmp_path / "again")
    straight = flags_for(model_folder, plugin, tmp_path / "straight", **ENDLESS | size | more)
    run_forked(straight, 2, tmp_path / "whole")
    for one, other in zip(read_metrics(out), read_metrics(tmp_path / "straight"), strict=True):
        assert one["reward"] == pytest.approx(other["reward"]), (one, other)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_second_signal_ends_a_run_at_once(model_folder, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom rewards import orms\n\n\n"
        "def slow(completions, step, **columns):\n"
        "    time.sleep(0 if step == 1 else 600)\n    return [0.0] * len(completions)\n\n\n"
        "orms['slow'] = slow\n"
    )
    words = words_of(flags_for(model_folder, slow, tmp_path / "out", reward_funcs="slow"))
    with forked(tmp_path / "run", (train.main, (words,), places(1)[0])) as (run,):
        wait_for(lambda: steps_in(tmp_path / "out") == 1)
        os.kill(run.process.pid, signal.SIGTERM)
        run.says("SIGTERM: a checkpoint follows at the end of this step; once more ends", 30)
        os.kill(run.process.pid, signal.SIGTERM)
        status, said = run.end(10)
    assert status == 143
    assert said.endswith("train.py: ended by SIGTERM; there is no checkpoint yet\n"), said


# One run a folder --------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_before_it_moves_anything(
    model_folder, plugin, tmp_path
):
    out = tmp_path / "out"
    words = words_of(flags_for(model_folder, plugin, out, **ENDLESS))
    with forked(tmp_path / "first", (train.main, (words,), places(1)[0])) as (first,):
        wait_for(lambda: steps_in(out) >= 1)
        before = {file.name for file in out.iterdir()}
        for more in ([], ["--resume_from_checkpoint", "true"]):
            said = run_forked([*words, *more], 1, tmp_path / f"second{len(more)}", status=2)
            line = f"train.py: --output_dir {out}: process {first.process.pid} on {HERE} trains"
            assert line in said and "Traceback" not in said, said
        assert {file.name for file in out.iterdir()} == before
        os.kill(first.process.pid, signal.SIGKILL)
        first.end(10)
    run_forked([*words, "--max_steps", "1"], 1, tmp_path / "third")  # a kill gives it back
    assert (out / "earlier-1").exists() and steps_in(out) == 1


# With its launcher -------------------------------------------------------------------------------


def launcher(words: list[str], environments: list[dict]) -> None:
    """As torchrun: starts ranks, and waits."""

    def rank(place):
        os.environ.update({name: str(value) for name, value in place.items()})
        stop.PARENT = os.getppid()
        train.main(words)

    for place in environments:
        FORK.Process(target=rank, args=(place,)).start()
    time.sleep(600)


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_and_judges_end_with_a_killed_launcher(stopped, model_folder, plugin, tmp_path):
    """Even those that are stopped."""
    words = words_of(flags_for(model_folder, plugin, tmp_path / "out", **ENDLESS))
    environments = places(2, LOCAL_WORLD_SIZE=2, TORCHELASTIC_RUN_ID="x")
    with forked(tmp_path / "run", (launcher, (words, environments), {})) as (parent,):
        wait_for(lambda: steps_in(tmp_path / "out") >= 1)
        below = descendants(parent.process.pid)
        assert len(below) >= 4  # two ranks, and a judge of each
        if stopped:
            for pid in below:
                os.kill(pid, signal.SIGSTOP)
        os.kill(parent.process.pid, signal.SIGKILL)
        try:
            wait_for(lambda: not any(map(is_there, below)), timeout=15)
        finally:
            for pid in filter(is_there, below):
                os.kill(pid, signal.SIGKILL)
        # Whichever rank notices first ends; the other may notice that one's end.
        told = re.search(r"train.py: (torchrun has ended|lost rank .*); there is no", parent.said)
        assert told, parent.said


def test_the_launcher_of_ours_is_quiet_and_has_the_runs_status(model_folder, plugin, tmp_path):
    flags = flags_for(model_folder, plugin, tmp_path, num_generations=5)
    result = run_train(*flags, processes=2, launcher="run.launch", check=False)
    assert result.returncode == 2
    assert re.fullmatch(r"train.py: --num_generations 5: .*\n", result.stderr), result.stderr


# What is broken ----------------------------------------------------------------------------------


def test_an_update_to_weights_that_are_not_finite_ends_every_rank_at_that_step(
    model_folder, plugin, tmp_path
):
    """A learning rate beyond what float32 holds."""
    out = tmp_path / "out"
    changes = {"learning_rate": 1e39, "save_steps": 1, "train_type": "full", "beta": 0.0}
    changes |= {"lr_scheduler_type": "constant", "deepspeed": "zero2"}
    changes["per_device_train_batch_size"] = 8
    said = run_forked(
        flags_for(model_folder, plugin, out, **changes), 2, tmp_path / "ranks", status=1
    )
    line = "train.py: update 1 made weights that are not finite; a smaller --learning_rate or "
    assert line in said and "Traceback" not in said, said
    assert not list(out.glob("checkpoint-*")) and steps_in(out) == 0


SHARED = {
    "a reward": (RewardError("reward r, step 1, row 0: no such file"), 1),
    "a sampler": (SamplerError("--use_vllm true: the engine has ended"), 1),
    "a checkpoint": (SaveError("--output_dir out: no room"), 1),
    "an update": (FloatingPointError("the gradient norm is nan"), 1),
    "a file": (UsageError("--model m: no such file"), 2),
}


def fail_in_session(folder, failing, case):
    """A run of several ranks, of which those that are named fail."""
    world = dist.find_world("cpu")
    args = flags.parse_args(["--dataset", "x", "--output_dir", str(folder)])
    with session.session(args, world):
        if world.rank in failing:
            raise SHARED[case][0]
        world.barrier()  # in which it waits for the others


def ends_of(tmp_path, failing, case) -> list[tuple[int, str]]:
    jobs = [(fail_in_session, (tmp_path, failing, case), place) for place in places(3)]
    with forked(tmp_path, *jobs) as ranks:
        return [rank.end(timeout=60) for rank in ranks]


@pytest.mark.parametrize("case", SHARED)
def test_a_failure_that_all_ranks_share_is_told_once(case, tmp_path):
    error, status = SHARED[case]
    ends = ends_of(tmp_path, {0, 1, 2}, case)
    assert [ended for ended, _ in ends] == [status] * 3
    assert ends[0][1].startswith(f"train.py: {error}") and ends[0][1].count("\n") == 1
    assert not ends[1][1] and not ends[2][1], ends


@pytest.mark.parametrize("case", ["a reward", "a file"])
def test_a_failure_of_one_rank_is_told_by_it_and_its_end_by_the_others(case, tmp_path):
    error, status = SHARED[case]
    ends = ends_of(tmp_path, {1}, case)
    assert ends[1][0] == status and ends[1][1].startswith(f"train.py: {error}")
    assert f"(says rank 1 on {HERE})" in ends[1][1]
    for ended, said in (ends[0], ends[2]):
        assert ended == 1 and "lost rank 1 on " in said and "it failed, and has told why" in said


def fail_while_another_dies(folder):
    """Rank 1 fails by itself, and before it has told, rank 2 is killed."""
    world = dist.find_world("cpu")
    args = flags.parse_args(["--dataset", "x", "--output_dir", str(folder)])
    with session.session(args, world):
        if world.rank == 1:
            raise RewardError("reward r, step 1, row 0: no such file")
        if world.rank == 2:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()


def test_what_a_rank_has_failed_of_is_told_though_another_is_lost_meanwhile(tmp_path):
    jobs = [(fail_while_another_dies, (tmp_path,), place) for place in places(3)]
    with forked(tmp_path, *jobs) as ranks:
        ends = [rank.end(timeout=60) for rank in ranks]
    assert "lost rank 2 on " in ends[0][1]
    assert ends[1][1].startswith("train.py: reward r, step 1, row 0: no such file"), ends


@pytest.fixture
def in_session(tmp_path):
    """A run that does as it is told → its exit status."""

    def run(error) -> int:
        args = flags.parse_args(["--dataset", "x", "--output_dir", str(tmp_path)])
        with pytest.raises(SystemExit) as end, session.session(args, dist.find_world()):
            error()
        return end.value.code

    return run


def test_lack_of_memory_is_one_line_with_what_takes_less(in_session, capsys):
    def python():
        raise MemoryError

    for allocate in (lambda: torch.empty(1 << 58), python):
        assert in_session(allocate) == 1
        said = capsys.readouterr().err
        assert said.startswith("train.py: out of memory (") and said.count("\n") == 1, said
        assert "a smaller --per_device_train_batch_size" in said
