"""The house: who may import whom, what goes without fast/, and that the quick path trains as the plain one."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    EMBEDDED_MODEL,
    ROOT,
    checkpoint_weights,
    flags_for,
    read_metrics,
    run_train,
    timeless,
    train_here,
)
from processes import run_forked

# The tiny model finds all 49,152 tokens about equally likely, so rounding would now and then draw
# the neighbour of a token. Among few it does not.
FEW = 20
SIX = ("grpo", "sampler", "rewards", "data", "lora", "dist")
COMMANDS = ("evaluate", "chat", "merge")  # programs beside train.py, with its functions


def imports(file) -> set[str]:
    """The first parts of all names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            found.add(file.parent.name)
    return found


def test_the_seven_are_the_only_files_at_the_top():
    assert {file.stem for file in ROOT.glob("*.py")} == {*SIX, "train"}


def test_the_six_import_neither_folder_and_commands_alone_import_train():
    for name in SIX:
        assert not imports(ROOT / f"{name}.py") & {"fast", "run", "train"}, name
    for folder in ("fast", "run"):
        for file in (ROOT / folder).glob("*.py"):
            assert "train" not in imports(file) or file.stem in COMMANDS, file


def test_fast_knows_nothing_of_run_and_run_takes_only_what_fast_offers():
    for file in (ROOT / "fast").glob("*.py"):
        assert "run" not in imports(file), file
    for file in (ROOT / "run").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith("fast."), file


@pytest.mark.parametrize("folder", ["fast", "run"])
def test_every_file_of_a_folder_has_a_line_in_its_table(folder):
    table = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    there = {file.name for file in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert there <= set(table.split())


@pytest.fixture(scope="module")
def without_fast(tmp_path_factory):
    """A copy of the tree without fast/, with the embedded model where it was."""
    tree = tmp_path_factory.mktemp("plain") / "tree"
    names = ("fast", "models", ".git", ".venv", "output*", "bench", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*names))
    (tree / "models").symlink_to(ROOT / "models")
    return tree


def test_without_fast_the_tests_of_the_seven_pass(without_fast):
    """Of those that fast/ has quicker parts for, without the comparisons with TRL, of which nothing
    leads to fast/."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    tests = [f"tests/test_{name}.py" for name in ("grpo", "sampler", "lora")]
    tests += ["-k", "not equal_the_peer"]
    done = subprocess.run(
        [*command, *tests],
        cwd=without_fast,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_without_fast_a_run_draws_and_earns_the_same(without_fast, model_folder, plugin, tmp_path):
    changes = {"log_completions": "true", "max_completion_length": 24, "top_k": FEW}
    out = run_train(*flags_for(model_folder, plugin, tmp_path / "a", **changes), root=without_fast)
    assert "fast parts: none" in out.stdout
    train_here(*flags_for(model_folder, plugin, tmp_path / "b", **changes))
    same_runs(tmp_path / "a", tmp_path / "b")


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def same_runs(a, b):
    """The same completions and rewards, and log-probabilities within 1e-5."""
    assert len(records(a)) == 3 * 16
    for one, other in zip(records(a), records(b), strict=True):
        assert one.pop("advantage") == pytest.approx(other.pop("advantage"), abs=1e-4)
        assert one == other
    for one, other in zip(timeless(read_metrics(a)), timeless(read_metrics(b)), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    for folder in (a, b):  # the sampler's log-probabilities are the trainer's
        assert all(line["sampler/logp_diff_max"] < 1e-5 for line in read_metrics(folder))


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_plain_path_trains_as_the_quick_one(
    train_type, processes, model_folder, plugin, tmp_path
):
    """Three steps in float32, with a reference. AdamW makes a full step of any gradient above its ε of
    1e-8, rounding among them, so the learning rate is what parameters may differ by at most."""
    size = {"train_type": train_type, "per_device_train_batch_size": 16 // processes}
    size |= {"deepspeed": "zero2", "log_completions": "true", "learning_rate": 3e-4}
    size["top_k"] = FEW
    for name in ("plain", "fast"):
        words = flags_for(
            model_folder, plugin, tmp_path / name, **size, plain=str(name == "plain").lower()
        )
        if processes == 1:
            out = train_here(*words)
        else:
            out = run_forked(words, processes, tmp_path / f"{name}-ranks")
        assert ("fast parts: none" in out) == (name == "plain")
    same_runs(tmp_path / "plain", tmp_path / "fast")
    plain, quick = (
        checkpoint_weights(tmp_path / name / "checkpoint-3") for name in ("plain", "fast")
    )
    for name, value in plain.items():
        torch.testing.assert_close(
            quick[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.skipif(not EMBEDDED_MODEL.exists(), reason="make model puts the model on disk")
def test_one_line_at_the_start_tells_which_fast_parts_are_on(model_folder, plugin, tmp_path):
    out = train_here(*flags_for(model_folder, plugin, tmp_path, max_steps=1))
    (line,) = [line for line in out.splitlines() if line.startswith("fast parts: ")]
    for part in ("packed", "head", "norms", "adapters", "decoder"):
        assert part in line
