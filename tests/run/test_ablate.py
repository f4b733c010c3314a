"""bench/ablate.py --table: what it tells of runs that are there, stopped ones included."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def a_run(folder: Path, accuracies: list[float], updates: int = 2) -> None:
    """An evaluation, then as often a rollout of 64 completions with so many updates, 3 s each."""
    folder.mkdir(parents=True)
    lines = []
    for accuracy in accuracies:
        lines.append({"eval/reward": 0.0, "eval/rewards/accuracy": accuracy})
        for update in range(updates):
            drawn = {"time/generate": 1.0, "drawn_completions": 64} if update == 0 else {}
            lines.append({"time/step": 3.0, "time/generate": 0.0} | drawn)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def table(folder: Path, *flags) -> subprocess.CompletedProcess:
    words = ["--table", "--folder", folder, "--plot", folder / "plot.png", *flags]
    command = [sys.executable, "bench/ablate.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_table_has_means_and_intervals_over_seeds_at_both_budgets(tmp_path):
    """Between evaluations on the line between them: 96 completions lie half way from 64 to 128.
    Of three values the half interval is 4.303 s / √3. The shortest run took 12 s."""
    for seed, end in enumerate((0.5, 0.6, 0.7), start=1):
        a_run(tmp_path / f"grpo-{seed}", [0.1, 0.2, end])
    a_run(tmp_path / "dr_grpo-1", [0.1, 0.3, 0.5, 0.9])
    done = table(tmp_path, "--completions", 96)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0] == "| variant | seeds | start | after 96 completions | after 12 s |"
    assert lines[2] == "| GRPO | 3 | 10.0% | 40.0% ± 12.4 | 60.0% ± 24.8 |"
    assert lines[3] == "| Dr. GRPO | 1 | 10.0% | 40.0% | 50.0% |"
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "ablation.json").read_text())
    assert kept["curves"]["Dr. GRPO, seed 1"][-1] == [192, 18.0, 0.9]


def test_runs_that_have_not_come_so_far_are_named(tmp_path):
    a_run(tmp_path / "grpo-1", [0.1, 0.2])
    done = table(tmp_path, "--completions", 96)
    assert done.returncode == 1 and "('GRPO', 1)" in done.stderr
    assert table(tmp_path, "--variants", "PPO").stderr.startswith("--variants PPO: one of GRPO, ")
