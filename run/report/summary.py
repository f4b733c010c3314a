"""What a run did, for the terminal: five completions to read, accuracy before and after, and the
curve as a picture."""

from pathlib import Path

import matplotlib

from run.console import harmless
from run.report.folder import Run
from run.report.story import common_parts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def completions(run: Run, count: int = 5) -> list[str]:
    """Some of the last step's, with what they earned."""
    trained = [record for record in run.completions if record.get("phase") != "eval"]
    if not trained:
        return []
    before, after = common_parts([record["prompt"] for record in trained])
    last = [record for record in trained if record["step"] == trained[-1]["step"]]
    lines = []
    for record in last[:: max(1, len(last) // count)][:count]:
        prompt = record["prompt"]
        question = prompt[len(before) : len(prompt) - len(after)].strip()
        rewards = record["rewards"].items()
        earned = ", ".join(f"{name} {round(v, 3):g}" for name, v in rewards if v is not None)
        lines += ["", f"  {short(question)}", f"  {short(record['completion'].strip())}"]
        advantage = record.get("advantage")
        told = "" if advantage is None else f"; advantage {advantage:+.2f}"
        lines.append(f"  ({earned}{told})")
    return [*lines, ""]


def short(text: str, most: int = 1500) -> str:
    """A text as a terminal may have it, without its middle if it is long: the page has it all."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return harmless(text)


def results(run: Run) -> list[str]:
    """Held-out means before and after, and what it took."""
    lines = []
    for name in run.rewards:
        points = held_out(run, name)
        if len(points) > 1:
            (start, first), (end, last) = points[0], points[-1]
            is_share = all(0 <= value <= 1 for _, value in points)
            first, last = (f"{v:.1%}" if is_share else f"{v:.3g}" for v in (first, last))
            before = "before" if start == 0 else f"at step {start}"
            lines.append(f"{name} on held-out questions: {first} {before}, {last} after step {end}")
    last = run.steps[-1]
    minutes = run.seconds / 60
    told = f"{last['step']} steps in {minutes:.1f} minutes"
    if "num_tokens" in last:
        told += f", {last['num_tokens']:,} tokens"
    lines.append(told)
    return lines


def held_out(run: Run, name: str) -> list[tuple[int, float]]:
    """Steps and means of a reward in evaluations."""
    key = f"eval/rewards/{name}"
    return [(line["step"], line[key]) for line in run.evaluations if line.get(key) is not None]


def draw_curve(run: Run, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for color, name in zip(colors, run.rewards):
        key = f"rewards/{name}"
        points = [(line["step"], line[key]) for line in run.steps if line.get(key) is not None]
        axes.plot(*zip(*points), color=color, alpha=0.45, lw=1.2)
        bold = held_out(run, name) or points[-1:]
        axes.plot(*zip(*bold), color=color, marker="o", lw=2.2, label=name)
    axes.set(xlabel="optimizer step", ylabel="mean reward")
    axes.set_title("bold: held-out questions; thin: each step's batch", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
