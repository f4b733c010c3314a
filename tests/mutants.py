"""Would the tests notice? A mutant is one of the seven files with one small thing wrong.

    python tests/mutants.py --mutants 400          a table of what survived, and bench/mutants.json
    python tests/mutants.py --files grpo.py lora.py --mutants 100 --seed 7

First every test runs once, and each line of the seven that it reaches is written down, in its forked
processes too. Then each mutant meets the tests of its own file, and of the others those that reach
its line, the quickest first, until one fails or `--seconds` of the others are used up. Started again
in the same --folder, survivors are tried anew and all others are kept; a test written since takes
part if it lies in the mutant's own test file. A test that knows a file by its text proves nothing,
so those that do are left out; so are tests that take a minute or more, such as with a real vLLM.

What is changed: a comparison, an operator, a condition, a number, a boolean, min and max; a call for
its effect, an argument by name or a default is left out; a value is returned as None. Not what is
only said: messages, help texts, annotations.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEVEN = ("train.py", "grpo.py", "rewards.py", "sampler.py", "lora.py", "dist.py", "data.py")
# They compare text, draw pictures of it, or take minutes.
LEFT_OUT = tuple(f"test_{name}.py" for name in ("layout", "fingerprint", "draw", "vllm"))
# Whole, and first.
OWN = {"lora.py": ("tests/test_lora.py",), "sampler.py": ("tests/test_sampler.py",)}
OWN["data.py"] = ("tests/test_data.py", "tests/run/test_readers.py", "tests/run/test_templates.py")
OWN["rewards.py"] = (
    "tests/test_rewards.py",
    "tests/run/test_plugins.py",
    "tests/run/test_scorer.py",
)
OWN["grpo.py"] = ("tests/test_grpo.py", "tests/test_family.py")
OWN["dist.py"] = ("tests/test_dist.py", "tests/test_zero2.py", "tests/test_zero3.py")
OWN["train.py"] = ("tests/run/test_rollouts.py", "tests/run/test_flags.py")
SLOW = 60.0  # seconds
SAID = {"warn", "print", "UsageError", "exit", "phase"}  # calls whose words are for people


# What is changed ----------------------------------------------------------------------------------

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    start: int  # in the file's bytes
    end: int
    new: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.start}:{self.new}"

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def told(self, source: bytes) -> str:
        old = source[self.start : self.end].decode().split("\n")[0]
        return f"{self.file}:{self.line}: {old}  →  {self.new}"


def mutants_of(file: str) -> list[Mutant]:
    """All that can be made of a file."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []

    def change(node: ast.AST, new: str) -> None:
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        found.append(Mutant(file, node.lineno, start, end, new))

    for node in counted(ast.parse(source)):
        for new in changes(node):
            change(node, new)
    return found


def counted(node: ast.AST):
    """The nodes that do something: not annotations, nor what is only said."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            is_said = isinstance(child, ast.Raise | ast.JoinedStr) or (
                isinstance(child, ast.Call) and name_of(child.func) in SAID
            )
            if isinstance(child, ast.AST) and not is_said:
                yield from counted(child)


def name_of(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def changes(node: ast.AST) -> list[str]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=right):
            return [ast.unparse(ast.Compare(left, [SWAPS[type(operator)]()], right))]
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in SWAPS:
            return ["(" + ast.unparse(ast.BinOp(left, SWAPS[type(operator)](), right)) + ")"]
        case ast.BoolOp(op=operator, values=values):
            return ["(" + ast.unparse(ast.BoolOp(SWAPS[type(operator)](), values)) + ")"]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            return [ast.unparse(operand)]
        case ast.Constant(value=bool(value)):
            return [str(not value)]
        case ast.Constant(value=int(value) | float(value)):
            return [repr(value + 1)]
        case ast.Name(id=name) if name in OTHER_NAMES:
            return [OTHER_NAMES[name]]
        case ast.IfExp(test=test, body=body, orelse=other):
            return ["(" + ast.unparse(ast.IfExp(test, other, body)) + ")"]
        case ast.Expr(value=ast.Call(func=function)) if name_of(function) not in SAID:
            return ["pass"]
        case ast.AugAssign(target=target, value=value):
            return [ast.unparse(ast.Assign([target], value, lineno=0))]
        case ast.Return(value=ast.AST() as value) if ast.unparse(value) != "None":
            return ["return None"]
        case ast.Continue():
            return ["pass"]
        case ast.Break():
            return ["pass"]
        case ast.Call(func=function, args=args, keywords=keywords) if keywords:
            shorter = [keywords[:i] + keywords[i + 1 :] for i in range(len(keywords))]
            return [ast.unparse(ast.Call(function, args, rest)) for rest in shorter]
    return []


# Which tests reach which line ---------------------------------------------------------------------


class Trace:
    """A pytest plugin: each line of the seven that a test is the first to reach, as it is reached, in
    a file that forked processes write to as well."""

    def __init__(self, file: Path, root: Path):
        self.file = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.names = {str(root / name): name for name in SEVEN}
        self.test, self.seen = "", set()
        self.fixtures: dict[str, float] = {}  # seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        started = time.monotonic()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef.argname] = time.monotonic() - started

    def pytest_runtest_logstart(self, nodeid):
        self.test, self.seen = nodeid, set()
        sys.settrace(self.calls)  # again, for what traces a test ends this

    def pytest_runtest_makereport(self, item, call):
        if call.when == "call" and call.excinfo is None:
            before = sum(self.fixtures.get(name, 0.0) for name in item.fixturenames)
            self._write({"test": item.nodeid, "seconds": call.duration + before})

    def calls(self, frame, event, argument):
        if frame.f_code.co_filename in self.names:
            return self.lines
        return None

    def lines(self, frame, event, argument):
        place = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and place not in self.seen:
            self.seen.add(place)
            self._write({"test": self.test, "file": self.names[place[0]], "line": place[1]})
        return self.lines

    def _write(self, fact: dict) -> None:
        os.write(self.file, json.dumps(fact).encode() + b"\n")


def trace(root: Path, file: Path, part: int, parts: int) -> None:
    """Run a part of the test files, in this process."""
    import threading

    files = [str(path) for path in sorted((root / "tests").glob("**/test_*.py"))]
    files = [path for path in files if not path.endswith(LEFT_OUT)][part::parts]
    plugin = Trace(file, root)
    threading.settrace(plugin.calls)
    sys.settrace(plugin.calls)
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[plugin])


def read_traces(files: list[Path]) -> tuple[dict, dict]:
    """(file, line) → tests that reach it, and test → seconds."""
    reach, seconds = {}, {}
    for file in files:
        for line in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # two processes at once
                fact = json.loads(line)
                if "seconds" in fact:
                    seconds[fact["test"]] = fact["seconds"]
                else:
                    reach.setdefault((fact["file"], fact["line"]), set()).add(fact["test"])
    return reach, seconds


# One mutant ---------------------------------------------------------------------------------------


class Quickest:
    """A pytest plugin: tests in the order of their seconds, and none that hangs."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.seconds.get(item.nodeid, 0.0) < SLOW]
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))  # the new ones first
        for item in items:
            limit = 15 + 5 * self.seconds.get(item.nodeid, 10.0)
            item.add_marker(pytest.mark.timeout(limit, method="thread"))

    pytest_collection_modifyitems.trylast = True


def run_tests(root: Path, tests: list[str], seconds: dict[str, float]) -> int:
    """pytest's exit status in a forked copy of this process, which has imported what takes long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silence, number)
        os.chdir(root)
        sys.path[:0] = [str(root), str(root / "tests")]
        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(root)]
        os._exit(pytest.main([*words, *tests], plugins=[Quickest(seconds)]))
    return child


def wait(child: int, limit: float) -> int | None:
    """A process's exit status; None if it had to be ended."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what it has left
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(mutant: Mutant, root: Path, reach: dict, seconds: dict, limit: float) -> dict:
    """What the tests say of a mutant, which stands in its copy of the project meanwhile."""
    own = [name for name in OWN[mutant.file] if (root / name).exists()]
    reached = reach.get((mutant.file, mutant.line), {""})
    if "" in reached:  # when the file is imported: a default, which flags read
        reached = reached | {test for test in seconds if test.startswith("tests/run/test_flags")}
    others = [
        test for test in reached & seconds.keys()
        if seconds[test] < SLOW and not test.startswith(OWN[mutant.file])
    ]  # fmt: skip
    others.sort(key=seconds.get)
    chosen = within(others, seconds, limit)
    file, started, status = root / mutant.file, time.monotonic(), 0
    source = file.read_bytes()
    file.write_bytes(mutant.apply(source))
    for part in filter(None, (own, chosen)):
        status = wait(run_tests(root, part, seconds), 900)
        if status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            break
    file.write_bytes(source)
    return {
        "key": mutant.key,
        "mutant": mutant.told(source),
        "killed": status not in (0, pytest.ExitCode.NO_TESTS_COLLECTED),
        "others": f"{len(chosen)} of {len(others)}",
        "seconds": round(time.monotonic() - started, 1),
    }


def within(tests: list[str], seconds: dict[str, float], limit: float) -> list[str]:
    """The first of them, as many as take so many seconds."""
    chosen, total = [], 0.0
    for test in tests:
        total += seconds[test]
        if total > limit:
            break
        chosen.append(test)
    return chosen


# All of them --------------------------------------------------------------------------------------


def copy(folder: Path) -> Path:
    """What git has of the project, changes included, and the embedded model."""
    root = folder / "project"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    for name in names.decode().strip("\0").split("\0"):
        source = ROOT / name
        if source.is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / name)
    model = "models/SmolLM2-135M-Instruct"
    (root / model).unlink(missing_ok=True)
    (root / model).symlink_to(ROOT / model)
    return root


def work(options) -> None:
    """What one of them does: every n-th mutant, or the trace of every n-th test file."""
    place, folder = options.part, options.folder
    with tempfile.TemporaryDirectory() as own:
        root = copy(Path(own))
        traces = [folder / f"trace-{i}" for i in range(options.workers)]
        if options.trace:
            trace(root, traces[place], place, options.workers)
            return
        import torch  # noqa: F401
        import transformers  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
            from trl import GRPOTrainer  # noqa: F401

        reach, seconds = read_traces(traces)
        out = folder / f"judged-{place}"
        lines = out.read_text().splitlines() if out.exists() else []
        killed = {verdict["key"] for verdict in map(json.loads, lines) if verdict["killed"]}
        for mutant in drawn(options)[place :: options.workers]:
            if mutant.key not in killed:
                verdict = judge(mutant, root, reach, seconds, options.seconds)
                with out.open("a") as file:
                    file.write(json.dumps(verdict, ensure_ascii=False) + "\n")


def drawn(options) -> list[Mutant]:
    """The mutants to try: of all that there are, as many at random."""
    every = [mutant for file in options.files for mutant in mutants_of(file)]
    return random.Random(options.seed).sample(every, min(options.mutants, len(every)))


def main() -> None:
    options = read_options()
    if options.part is not None:
        return work(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    every = Counter(mutant.file for file in options.files for mutant in mutants_of(file))
    print(f"{every.total():,} mutants can be made: {dict(every)}", flush=True)
    if not all((options.folder / f"trace-{i}").exists() for i in range(options.workers)):
        in_workers(options, "--trace")
    in_workers(options)
    verdicts = {}  # the last of each
    for file in options.folder.glob("judged-*"):
        for verdict in map(json.loads, file.read_text().splitlines()):
            verdicts[verdict["key"]] = verdict
    report(list(verdicts.values()), options)


def in_workers(options, *more: str) -> None:
    """`work` in as many processes, each with a copy of its own."""
    words = [sys.executable, __file__, "--files", *options.files, *more]
    for name in ("mutants", "seed", "seconds", "workers", "folder"):
        words += [f"--{name}", str(getattr(options, name))]
    # Without .pyc files, which know a source by its size and second.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    parts = range(options.workers)
    started = [subprocess.Popen([*words, "--part", str(i)], env=environment) for i in parts]
    statuses = [process.wait() for process in started]
    if any(statuses):
        sys.exit("a worker failed, and has told why")


def report(verdicts: list[dict], options) -> None:
    survived = sorted(v["mutant"] for v in verdicts if not v["killed"])
    files = Counter(v["mutant"].split(":")[0] for v in verdicts)
    alive = Counter(line.split(":")[0] for line in survived)
    print("\n| file | mutants | killed |\n|---|---|---|")
    for file, number in files.items():
        print(f"| {file} | {number} | {1 - alive[file] / number:.1%} |")
    print(f"| all | {len(verdicts)} | {1 - len(survived) / len(verdicts):.1%} |\n")
    print("\n".join(survived))
    told = {"seed": options.seed, "tried": dict(files), "survived": survived}
    text = json.dumps(told, indent=1, ensure_ascii=False)
    (ROOT / "bench" / "mutants.json").write_text(text + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", default=list(SEVEN), choices=SEVEN)
    parser.add_argument("--seconds", type=float, default=120, help="of tests that a mutant meets")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "mutants")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
