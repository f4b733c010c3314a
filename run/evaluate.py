"""Evaluate a checkpoint: how often it is right, greedily and sampled, and with k tries.

    python -m run.evaluate CHECKPOINT --val_dataset NAME [--num_generations_eval G]

It draws and scores with train.py's own functions. So with the run's seed, batch size and number of
processes it gives the numbers that the run gave at that step. --use_vllm true draws with vLLM.
Several processes share the work: torchrun --nproc_per_node N -m run.evaluate …
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import data
import rewards
from data import UsageError
from run import combinations, console, flags, passes, trained
from run.console import harmless
from run.display import NARROW

NAMES = (*trained.ASKING, "val_dataset", "max_length", "dataset_num_proc", "num_generations_eval")
NAMES += ("per_device_eval_batch_size", "output_dir", "reward_funcs", "reward_weights")
NAMES += ("reward_model", "external_plugins", "accuracy_timeout", "deepspeed", "use_vllm")
NAMES += ("vllm_device", "vllm_gpu_memory_utilization", "vllm_max_model_len", "vllm_timeout")
# Of the run, but not to be typed: what rewards are made with, and the share that was held out.
SILENT = (*(field.name for field in dataclasses.fields(rewards.Options)), "max_steps", "dataset")
SILENT += ("eval_steps", "eval_on_start", "split_dataset_ratio", "ds3_gather_for_generation")
SILENT += ("temperature_eval",)
KNOWN = "greedy, accuracy, pass@K or maj@K"


def read(argv: list[str]) -> tuple[argparse.Namespace, trained.Checkpoint, list[str]]:
    """The flags, the checkpoint and the metrics to tell; UsageError where one is wrong."""
    parser = trained.make_parser("run.evaluate", "Evaluate a checkpoint.", NAMES)
    text = "greedy, accuracy, pass@K, maj@K; all, with K = 1, 2, 4 … G, when absent"
    parser.add_argument("--metrics", nargs="+", default=[], help=text)
    typed = trained.typed(parser, argv)
    checkpoint = trained.find(typed["checkpoint"])
    args = trained.flags_of(checkpoint, (*NAMES, *SILENT), typed)
    if "temperature" in typed:
        args.temperature_eval = args.temperature
    if args.temperature_eval == 0:
        draw_greedily(args, typed)
    if "reward_funcs" in typed and "reward_weights" not in typed:
        args.reward_weights = None  # the run's are of its own rewards
    if "vllm_max_model_len" not in typed:
        args.vllm_max_model_len = None  # the run's was of its own rows
    if not args.reward_funcs and not args.reward_model:
        args.reward_funcs = ["accuracy"]
    if "output_dir" not in typed:
        folder = checkpoint.run_folder / "evaluations" / checkpoint.folder.resolve().name
        args.output_dir = str(folder)
    choose_rows(args)
    metrics = choose_metrics(args, typed["metrics"])
    combinations.check(args, int(os.environ.get("WORLD_SIZE", 1)))
    return args, checkpoint, metrics


def draw_greedily(args: argparse.Namespace, typed: dict) -> None:
    """At temperature 0 a question has one completion."""
    args.temperature = args.temperature or 1.0  # which divides logits, and is not drawn with
    G = typed.get("num_generations_eval", 1)
    if G > 1:
        raise UsageError(
            f"--num_generations_eval {G}: at temperature 0 all completions of a question would be "
            "the same; 1, or a --temperature above 0, works"
        )
    args.num_generations_eval = 1


def choose_rows(args: argparse.Namespace) -> None:
    """Those of --val_dataset, else the share that the run held out of --dataset."""
    held_out = bool(args.dataset) and combinations.evaluates(args)
    if args.val_dataset:
        args.dataset = []
        args.split_dataset_ratio = data.Options().split_dataset_ratio
    elif not held_out:
        works = "a hub id, a file or a built-in name works"
        raise UsageError(f"--val_dataset: names no rows to evaluate on; {works}")
    args.eval_on_start = True  # an evaluation is all that there is


def choose_metrics(args: argparse.Namespace, wanted: list[str]) -> list[str]:
    """The metrics to tell, of those there are."""
    G = args.num_generations_eval
    for name in wanted:
        match = re.fullmatch(r"greedy|accuracy|(?:pass|maj)@([1-9][0-9]*)", name)
        if not match:
            raise UsageError(f"--metrics {name}: no such metric; {KNOWN} works")
        if match[1] and int(match[1]) > G:
            kind = name.partition("@")[0]
            more = f"--num_generations_eval {match[1]}"
            if args.temperature_eval == 0:  # which makes them all the same
                more = "a --temperature above 0"
            raise UsageError(
                f"--metrics {name}: a question has but {G} completions; {kind}@{G} or less, or "
                f"{more}, works"
            )
    if "accuracy" in args.reward_funcs:
        if wanted:
            return wanted
        if args.temperature_eval == 0:
            return ["greedy"]
        several = [k for k in passes.sizes(G) if k > 1]
        chances = [f"pass@{k}" for k in several]
        majorities = [f"maj@{k}" for k in several if k > 2]
        return ["greedy", "accuracy", *chances, *majorities]
    if wanted:
        raise UsageError(
            f"--metrics {wanted[0]}: the reward accuracy tells right from wrong, and it is not "
            "among the run's; --reward_funcs accuracy works"
        )
    return []


def main(argv: list[str]) -> None:
    try:
        args, checkpoint, metrics = read(argv)
        trained.begin(checkpoint)
        import dist
        import train
        from run import session
    except UsageError as error:
        flags.fail(str(error))
    except KeyboardInterrupt:
        flags.fail("interrupted", status=130)
    world = dist.find_world()
    with session.session(args, world, advice=lambda _: "the checkpoint stays as it is"):
        if train.quick(args):
            train.fast.use_cpu_well(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        evaluate(args, world, checkpoint, metrics)


def evaluate(args: argparse.Namespace, world, checkpoint, wanted: list[str]) -> None:
    """Draw, score, write both files, and tell."""
    import train
    from run import checks, setup

    inputs = checks.prepare(args, world)
    policy, _ = setup.load_model(args, world, train.quick(args))
    run = train.make_run(args, world, policy.eval(), inputs)
    inputs.rewards.start()
    G, rows, step = args.num_generations_eval, inputs.val_rows, checkpoint.step
    ways = {"sampled": (G, args.temperature_eval)}
    if "greedy" in wanted and args.temperature_eval > 0:
        ways["greedy"] = (1, 0.0)
    drawn = {name: [] for name in ways}
    with progress(world, len(rows) * len(ways)) as advance:
        for name, (number, temperature) in ways.items():
            for batch in train.evaluation(run, rows, number, temperature, step):
                drawn[name].append(batch)
                advance(len(batch.completions) // number)
    if not world.is_main:
        return
    folder = Path(args.output_dir)
    told = {"greedy": drawn["sampled"]} if args.temperature_eval == 0 else drawn
    write_completions(folder / "completions.jsonl", run, rows, told)
    found = {"checkpoint": str(checkpoint.folder), "step": step, "questions": len(rows)}
    found |= {"completions": G, "temperature": args.temperature_eval}
    found["metrics"] = values_of(wanted, run, drawn, G)
    means = passes.means(run, drawn["sampled"], G)
    found["means"] = {name: mean for name, mean in means.items() if "time/" not in name}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    tell(found, args, folder)


@contextmanager
def progress(world, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere → what advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = world.is_main and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as display:
        task = display.add_task("questions", total=total)
        yield lambda n: display.advance(task, n)


# What it has drawn ------------------------------------------------------------------------------


def values_of(wanted: list[str], run, drawn: dict[str, list], G: int) -> dict[str, dict]:
    """Each metric's mean over the questions, with its 95 % interval."""
    questions = {}
    for name, number in (("greedy", 1), ("sampled", G)):
        batches = drawn.get(name, drawn["sampled"])  # at temperature 0 the same
        questions[name] = [q for batch in batches for q in passes.questions_of(run, batch, number)]
    found = {}
    for name in wanted:
        asked = questions["greedy" if name == "greedy" else "sampled"]
        kind, _, k = name.partition("@")
        count = passes.maj_at_k if kind == "maj" else passes.pass_at_k
        values = [count(question, int(k or 1)) for question in asked]
        number = 1 if name == "greedy" else G
        low, high = passes.interval(values, number / int(k or 1))
        found[name] = {"value": passes.mean(values), "low": low, "high": high}
    return found


def write_completions(file: Path, run, rows: list[dict], drawn: dict[str, list]) -> None:
    """A line for each completion: whose question, how it was drawn, what it earned."""
    from run import log

    with file.open("w", encoding="utf-8") as lines:
        for name, batches in drawn.items():
            records = [record for batch in batches for record in log.records_of(batch, run)]
            done = [completion for batch in batches for completion in batch.completions]
            for i, (record, completion) in enumerate(zip(records, done)):
                row = i * len(rows) // len(records)
                record = {"row": row, "drawn": name, **record}
                record |= {"solution": rows[row]["solution"], "length": len(completion.ids)}
                record["finished"] = completion.finished
                lines.write(json.dumps(record, default=str) + "\n")


def tell(found: dict, args: argparse.Namespace, folder: Path) -> None:
    """A table on the screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = " ".join(args.val_dataset) or f"a held-out share of {' '.join(args.dataset)}"
    title = f"{found['checkpoint']} on {names}"
    drawn = f"{found['questions']} questions × {found['completions']} completions"
    title = Text(harmless(title))  # which no name in brackets marks up
    table = Table(title=title, caption=f"{drawn} at temperature {found['temperature']:g}")
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    screen = Console()
    narrow = screen.width < NARROW
    if narrow:
        table.box = None
        table.caption += "; below a metric its 95 % over questions"
    else:
        table.add_column("95 % over questions", justify="right")
    for name, each in found["metrics"].items():
        value = f"{each['value']:.1%}"
        if narrow:
            table.add_row(Text(name), f"{value}\n{each['low']:.0%} … {each['high']:.0%}")
        else:
            table.add_row(Text(name), value, f"{each['low']:.1%} … {each['high']:.1%}")
    table.add_section()
    for name, value in found["means"].items():
        is_reward = re.fullmatch("rewards?(/[^/]+)?", name) and name not in rewards.COUNTERS
        if is_reward or name == "completion_length":
            table.add_row(Text(name), f"{value:.3f}")
    screen.print(table)
    if args.num_generations_eval == 1 and args.temperature_eval > 0 and found["metrics"]:
        print("pass@k takes several completions a question: --num_generations_eval 8 draws them")
    print(f"every completion: {folder / 'completions.jsonl'}", flush=True)
    print(f"these numbers: {folder / 'evaluation.json'}", flush=True)


if __name__ == "__main__":
    console.settle()
    flags.program = "run.evaluate"
    main(sys.argv[1:])
