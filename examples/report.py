"""What a run did: accuracy before and after, five completions to read, and a picture of the curve.

python examples/report.py output/demo
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(file: Path) -> list[dict]:
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.exists()
        else []
    )


def main(folder: Path) -> None:
    lines = read(folder / "metrics.jsonl")
    steps = [line for line in lines if "reward" in line]
    if not steps:
        sys.exit(
            f"report.py: {folder}: no steps in its metrics.jsonl yet; a run's output_dir works"
        )
    evaluations = [line for line in lines if "eval/reward" in line]
    names = [name for name in steps[0] if name.startswith("rewards/") and name.count("/") == 1]
    names = [name for name in names if any(line[name] for line in steps)]

    records = read(folder / "completions.jsonl")
    last = (
        [record for record in records if record["step"] == records[-1]["step"]] if records else []
    )
    for record in last[:: max(1, len(last) // 5)][:5]:
        turns = record["prompt"].rstrip().splitlines()  # the last line only opens the answer
        question = (
            turns[-2 if len(turns) > 1 else -1]
            .removeprefix("user")
            .removesuffix("<|im_end|>")
            .strip()
        )
        rewards = ", ".join(
            f"{name} {value:g}" for name, value in record["rewards"].items() if value is not None
        )
        print(
            f"\n  {question}\n  {record['completion'].strip()}\n  ({rewards}; advantage {record['advantage']:+.2f})"
        )
    print()

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for color, name in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], names):
        label = name.removeprefix("rewards/")
        axes.plot(
            [s["step"] for s in steps], [s[name] for s in steps], color=color, alpha=0.45, lw=1.2
        )
        held_out = [(e["step"], e[f"eval/{name}"]) for e in evaluations]
        axes.plot(
            *zip(*held_out or [(steps[-1]["step"], steps[-1][name])]),
            color=color,
            marker="o",
            lw=2.2,
            label=label,
        )
        if len(held_out) > 1:
            print(
                f"{label} on held-out questions: {held_out[0][1]:.1%} before, {held_out[-1][1]:.1%} after"
            )
    minutes = sum(step["time/step"] for step in steps) / 60
    print(f"{steps[-1]['step']} steps in {minutes:.1f} minutes, {steps[-1]['num_tokens']:,} tokens")
    axes.set(xlabel="optimizer step", ylabel="mean reward")
    axes.set_title("bold: held-out questions; thin: each step's batch", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=130)
    print(f"the curve is in {folder / 'curve.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "output/demo"))
