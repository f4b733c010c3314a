"""python -m run.report FOLDER [--watch [SECONDS]]"""

import argparse
import math
import sys
import time
from pathlib import Path

from data import UsageError
from run import console
from run.report import folder, page


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(message)


def fail(message: str):
    """One line, and status 2."""
    print(f"run.report: {message}", file=sys.stderr)
    sys.exit(2)


def read_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m run.report", description="A page of what a run did.")
    parser.add_argument("folder", type=Path, help="the run's --output_dir")
    text = "write it again as the run goes on, every so many seconds (10)"
    parser.add_argument("--watch", nargs="?", const=10.0, type=float, metavar="SECONDS", help=text)
    args = parser.parse_args(argv)
    if args.watch is not None and not 0 < args.watch < math.inf:
        fail(f"--watch {args.watch:g}: seconds above 0 work")
    return args


def write_page(run: folder.Run, refresh: float = 0.0) -> Path:
    from run.report.story import story  # which imports torch: a wrong folder is told before that

    file = run.folder / "report.html"
    page.write(file, page.render(story(run, refresh)))
    return file


def watch(path: Path, seconds: float) -> folder.Run:
    """Keep the page fresh until the run is over, or Ctrl-C."""
    seen = None
    try:
        while True:
            now = [file.stat().st_size for file in sorted(path.glob("*.jsonl"))]
            run = read_if_started(path)
            if run and now != seen:
                file = write_page(run, seconds)
                if seen is None:
                    print(f"{file} follows the run; open it in a browser", flush=True)
                seen = now
            if run and run.is_over:
                return run
            time.sleep(seconds)
    except KeyboardInterrupt:
        return folder.read(path)


def read_if_started(path: Path) -> folder.Run | None:
    """None before the first step is logged; an evaluation may come before it."""
    folder.refuse_other(path)
    if not folder.has_steps(path):
        return None
    return folder.read(path)


def main(argv: list[str]) -> None:
    args = read_flags(argv)
    try:
        run = watch(args.folder, args.watch) if args.watch else folder.read(args.folder)
        file = write_page(run)
    except UsageError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{args.folder}: {(error.strerror or 'cannot be written').lower()}")

    from run.report import summary

    for line in [*summary.completions(run), *summary.results(run)]:
        print(line)
    picture = args.folder / "curve.png"
    try:
        summary.draw_curve(run, picture)
    except OSError as error:
        fail(f"{picture}: {(error.strerror or 'cannot be written').lower()}")
    print(f"the curve is in {picture}, the page to look at in {file}")
    if not run.completions:
        print(
            "no completions were recorded; --log_completions true records them, "
            "--log_tokens 4 the tokens of four groups a step"
        )


if __name__ == "__main__":
    console.settle()
    main(sys.argv[1:])
