"""What the members of the family change, on a task that a laptop learns: variants × seeds.

    python bench/ablate.py                 every variant, three seeds; goes on where it was stopped
    python bench/ablate.py --variants GRPO DAPO --seeds 1 --completions 256
    python bench/ablate.py --processes 1 --parallel 9 --torch_dtype bfloat16      on a GPU
    python bench/ablate.py --table --completions 512      of the runs there are, stopped ones included

Each run trains the embedded model on the built-in sums and is evaluated on the same held-out
questions. Two budgets are read off its curve: completions that were sampled, those included that
dynamic sampling threw away, and seconds of training. The table and the plot tell held-out accuracy
there, with a 95 % interval over seeds (Student's t). Of runs in parallel the seconds tell little:
each takes some of the others'.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "GRPO": "",
    "Dr. GRPO": "--loss_type dr_grpo --scale_rewards none",
    "DAPO, no dynamic sampling": "--loss_type dapo --epsilon_high 0.28 --overlong_filter true",
    "DAPO": "--loss_type dapo --epsilon_high 0.28 --overlong_filter true --dynamic_sample true",
    "MaxRL": "--scale_rewards mean --reward_weights 1 0",
    "GSPO": "--importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4",
    "CISPO": "--loss_type cispo --epsilon_high 5",
    "SAPO": "--loss_type sapo",
    "RLOO": "--advantage_estimator rloo --loss_type dr_grpo",
    "REINFORCE++": "--advantage_estimator reinforce_plus_plus --loss_type dapo",
}
# The same for all. Two updates a rollout, so that ratio and clip act.
COMMON = (
    "--dataset arithmetic --val_dataset arithmetic-test#128 --reward_funcs accuracy format "
    "--reward_weights 1 0.2 --lora_rank 16 --learning_rate 3e-4 --lr_scheduler_type constant "
    "--weight_decay 0 --beta 0 --gradient_checkpointing false --num_generations 8 "
    "--temperature 1.0 --max_completion_length 32 --num_iterations 2 --num_generations_eval 1 "
    "--eval_on_start true --save_steps 1000000"
)
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # 97.5 % by degrees of freedom


def main() -> None:
    options = read_options()
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        sys.exit(f"--variants {unknown[0]}: one of {', '.join(VARIANTS)} works")
    options.folder.mkdir(parents=True, exist_ok=True)
    runs = itertools.product(options.seeds, options.variants)  # a stop leaves whole seeds
    folders = {(v, seed): options.folder / f"{slug(v)}-{seed}" for seed, v in runs}
    if options.table:
        curves = {run: curve_of(folder) for run, folder in folders.items() if folder.exists()}
        short = [run for run, curve in curves.items() if not reached(curve, options.completions)]
        if short or not curves:
            sys.exit(f"--completions {options.completions}: not reached by {short or 'any run'}")
        report(curves, options)
        return
    curves = {}
    with ThreadPoolExecutor(options.parallel) as pool:
        jobs = {pool.submit(train, *run, folder, options): run for run, folder in folders.items()}
        for job in as_completed(jobs):
            job.result()  # raises what the run has raised
            curves[jobs[job]] = curve_of(folders[jobs[job]])
            report(curves, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--completions", type=int, default=3072, help="sampled by each run")
    parser.add_argument("--step", type=int, default=64, help="completions of a rollout")
    parser.add_argument("--processes", type=int, default=2, help="of each run")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--torch_dtype", default="float32")
    parser.add_argument("--table", action="store_true", help="train nothing, tell what there is")
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "ablate")
    parser.add_argument("--plot", type=Path, default=ROOT / "output" / "ablate" / "ablation.png")
    return parser.parse_args()


def slug(variant: str) -> str:
    return variant.lower().replace(". ", "_").replace(", ", "_").replace(" ", "_").replace("+", "p")


def train(variant: str, seed: int, folder: Path, options: argparse.Namespace) -> None:
    """One run, from its start: a run that was stopped is made anew, since its seconds count."""
    if (folder / "done").exists():
        return
    rollouts = options.completions // options.step
    own = {
        "output_dir": folder,
        "seed": seed,
        "torch_dtype": options.torch_dtype,
        "per_device_train_batch_size": options.step // options.processes,
        "per_device_eval_batch_size": 128 // options.processes,
        "max_steps": 2 * rollouts,  # num_iterations 2
        "eval_steps": 2 * max(1, rollouts // 8),
    }
    words = [*COMMON.split(), *VARIANTS[variant].split()]
    for name, value in own.items():
        words += [f"--{name}", str(value)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command = [sys.executable, *launch, str(options.processes), "train.py", *words]
    print(f"{variant}, seed {seed}", flush=True)
    with (options.folder / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    (folder / "done").touch()


def curve_of(folder: Path) -> list[tuple[int, float, float]]:
    """(completions sampled, seconds of training, held-out accuracy) at each evaluation."""
    completions, seconds, curve = 0, 0.0, []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "eval/reward" in line:
            curve.append((completions, seconds, line["eval/rewards/accuracy"]))
            continue
        seconds += line["time/step"]
        if line["time/generate"] > 0:  # the first step of a rollout
            completions += int(line["drawn_completions"])
    return curve


def reached(curve: list[tuple], completions: int) -> bool:
    return bool(curve) and curve[-1][0] >= completions


def at(curve: list[tuple], axis: int, budget: float) -> float:
    """The accuracy at a budget, between two evaluations on the line between them."""
    for before, after in zip(curve, curve[1:]):
        if before[axis] <= budget <= after[axis]:
            share = (budget - before[axis]) / (after[axis] - before[axis])
            return before[2] + share * (after[2] - before[2])
    return curve[-1][2]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval; infinite for one value."""
    if len(values) < 2:
        return values[0], math.inf
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def report(curves: dict, options: argparse.Namespace) -> None:
    """The table on standard output and as ablation.json, and the plot."""
    seconds = min(curve[-1][1] for curve in curves.values())
    rows = {}
    for variant in options.variants:
        own = [curve for (name, _), curve in curves.items() if name == variant]
        if own:
            rows[variant] = {
                "seeds": len(own),
                "start": statistics.mean(curve[0][2] for curve in own),
                "at completions": interval([at(c, 0, options.completions) for c in own]),
                "at seconds": interval([at(c, 1, seconds) for c in own]),
                "seconds": statistics.mean(c[-1][1] for c in own),
            }
    budgets = f"after {options.completions:,} completions | after {seconds:.0f} s"
    print(f"\n| variant | seeds | start | {budgets} |")
    print("|---|---|---|---|---|")
    for variant, row in rows.items():
        first, second = told(*row["at completions"]), told(*row["at seconds"])
        print(f"| {variant} | {row['seeds']} | {row['start']:.1%} | {first} | {second} |")
    kept = {"completions": options.completions, "seconds": seconds, "rows": rows}
    kept["curves"] = {f"{variant}, seed {seed}": c for (variant, seed), c in curves.items()}
    text = json.dumps(kept)
    (options.folder / "ablation.json").write_text(text + "\n")
    plot(curves, options)


def told(mean: float, half: float) -> str:
    return f"{mean:.1%}" if math.isinf(half) else f"{mean:.1%} ± {100 * half:.1f}"


def plot(curves: dict, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, (panel, label) in enumerate(
        zip(axes, ("completions sampled", "seconds of training"))
    ):
        for color, variant in enumerate(options.variants):
            own = [curve for (name, _), curve in curves.items() if name == variant]
            if not own:
                continue
            ends = min(curve[-1][axis] for curve in own)
            grid = [ends * i / 20 for i in range(21)]
            values = [[at(curve, axis, x) for curve in own] for x in grid]
            means = [statistics.mean(column) for column in values]
            panel.plot(grid, means, label=variant, color=f"C{color}")
            if len(own) > 1:
                halves = [interval(column)[1] for column in values]
                low = [mean - half for mean, half in zip(means, halves)]
                high = [mean + half for mean, half in zip(means, halves)]
                panel.fill_between(grid, low, high, alpha=0.12, color=f"C{color}")
        panel.set_xlabel(label)
    axes[0].set_ylabel("held-out accuracy")
    axes[0].set_ylim(0, 1)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
