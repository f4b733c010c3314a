"""Plugins: rewards in files of your own, and one clear line for each mistake that one can make.

    load_plugins(["mine.py"])                       runs the file, which registers in rewards.orms
    CheckedRewards(["accuracy", "mine"], …)         rewards.Rewards that
        also calls rewards that are async, or that take some of the columns alone
        names the flag, or the reward, the step and the row, where something is wrong

A file written for ms-swift loads unchanged: `from swift.plugin import ORM, orms` finds rewards.py.
A reward that fails leaves its batch in failed-reward-step*.json, in the output folder.
"""

import asyncio
import difflib
import functools
import importlib.machinery
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import sys
import traceback
import types
from contextlib import suppress
from pathlib import Path

import rewards
from data import UsageError
from rewards import BUILT_IN, Cosine, Repetition, RewardError, Rewards, orms
from run import scorer, stop
from run.judge import RESTARTS

HERE = Path(__file__).parent
# Columns of ours. A dataset's own may not have these names, nor those of `TAKEN`.
OURS = {"completions", "prompts", "completion_ids", "step", "is_truncated"}
SWIFTS = {"response_token_ids", "trainer_state"}  # what else ms-swift hands over
TAKEN = OURS | SWIFTS | {"prompt_ids", "self"}


# Loading ---------------------------------------------------------------------------------------


def load_plugins(paths: list[str]) -> None:
    """Run Python files that register rewards in `orms`.

    UsageError, one line that names the file, if one fails; then none is registered.
    """
    pose_as_swift()
    before, taken = dict(orms), dict(BUILT_IN)
    for path in map(Path, paths):
        start = orms | taken
        try:
            run_file(path)
            new = {name: orms[name] for name in orms if start.get(name) is not orms[name]}
            check_new(new, taken)
        except ValueError as error:
            orms.clear()
            orms.update(before)
            raise UsageError(f"--external_plugins {path}: {error}") from error
        taken.update(new)


def pose_as_swift() -> None:
    """Let plugins import rewards.py, also by ms-swift's names for it."""
    # An import finds these without their package, so an installed ms-swift stays as it is.
    for name in ("swift.plugin", "swift.plugin.orm", "swift.rewards", "swift.rewards.orm"):
        sys.modules[name] = rewards
    if "swift" not in sys.modules and importlib.util.find_spec("swift") is None:
        utils = types.SimpleNamespace(get_logger=logging.getLogger)
        swift = types.SimpleNamespace(plugin=rewards, rewards=rewards, utils=utils)
        sys.modules.update({"swift": swift, "swift.utils": utils})


def run_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError("no such file")
    sys.path.append(str(path.parent.resolve()))  # for modules beside it
    name = f"plugin_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))  # whatever its ending
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    error = stop.attempt(spec.loader.exec_module, module)
    missing = swifts_own(error) if isinstance(error, ImportError) else None
    if missing:
        here = "ORM, AsyncORM and orms are here, for rewards alone"
        raise ValueError(f"imports {missing}, which is a part of ms-swift; {here}") from error
    if error is not None:
        raise ValueError(f"failed to import: {describe(error)}") from error


def swifts_own(error: ImportError) -> str | None:
    """The part of ms-swift that an import asked for in vain, if it did."""
    # rewards.py poses as swift.plugin, and a namespace without a name as swift.utils.
    ours = rf"cannot import name '(\w+)' from '({rewards.__name__}|<unknown module name>)'"
    name = re.match(ours, str(error))
    if name:
        return name[1]
    return error.name if (error.name or "").split(".")[0] == "swift" else None


def check_new(new: dict, taken: dict) -> None:
    """ValueError if a file has registered nothing, something of another's, or no reward."""
    if not new:
        raise ValueError("registers no reward; it needs a line orms['name'] = YourReward")
    for name, reward in new.items():
        if name in taken:
            whose = "the built-in reward" if name in BUILT_IN else "another plugin's reward"
            raise ValueError(f"overwrites {whose} {name}; choose another name")
        if not callable(reward):
            raise ValueError(f"orms[{name!r}] is {short(reward)}, not a class or function")


# Rewards with checks ---------------------------------------------------------------------------


class CheckedRewards(Rewards):
    """The rewards of a run, with each mistake named. Arguments are those of Rewards.

    UsageError, one line that begins with the flag at fault, if the flags or the columns are wrong.
    RewardError if a reward fails on a batch, which is then kept in output_dir.
    """

    def __init__(self, names, weights=None, *, reward_model=None, output_dir=None, **flags):
        names = list(names or [])
        check_names(names, reward_model)
        flags |= {"reward_model": reward_model, "output_dir": output_dir}
        trusted = flags.get("trust_remote_code", False)
        self.load_scorer = functools.partial(scorer.load, trust_remote_code=trusted)
        super().__init__(names, weights, **flags)
        self.output_dir = output_dir
        self.max_steps = flags.get("max_steps")
        self.reward_model = None
        # One event loop for the run: what async rewards keep (a connection) may belong to it.
        self.runner = asyncio.Runner()
        if reward_model:
            self.reward_model = scorer.check(reward_model, trusted)
        check_weights(self.weights, self.names)
        self.weights = [float(weight) for weight in self.weights]

    def make(self, name, flags):
        try:
            made = super().make(name, flags)
        except Exception as error:
            if name in BUILT_IN:
                raise
            problem = f"its constructor failed: {describe(error)}"
            raise UsageError(f"--reward_funcs {name}: {problem}") from error
        if not callable(made):
            raise UsageError(f"--reward_funcs {name}: its class has no __call__")
        check_parameters(made)
        return made

    @property
    def notes(self) -> list[str]:
        """Lines worth printing once as the run starts."""
        lines = []
        for function in self.functions:
            if isinstance(function, Cosine):
                short_one, long_one = function.wrong
                if long_one < short_one:
                    curve = f"from {short_one} to {long_one}"
                    lines.append(f"cosine: a wrong answer earns less with length, {curve}")
        return lines

    def check_columns(self, columns, given: str = "--dataset") -> None:
        """UsageError if a reward needs a column that the dataset lacks, or if one is called as ours.

        given: the flag that names the dataset, and its value.
        """
        clash = TAKEN.intersection(columns)
        if clash:
            reason = "rewards are handed something else by this name"
            raise UsageError(f"{given}: rename its column {min(clash)}; {reason}")
        for reward, function in zip(self.names, self.functions):
            name = name_of_completions(function)
            if name in columns:
                problem = f"the reward {reward} takes its completions by this name"
                raise UsageError(f"{given}: rename its column {name}; {problem}")
            for name in needed(function):
                if name not in {*OURS, *SWIFTS, "messages", *columns}:
                    there = ", ".join(sorted(columns))
                    problem = f"needs a column {name}; the dataset has {there}"
                    raise UsageError(f"--reward_funcs {reward}: {problem}")

    def metrics(self) -> dict[str, float]:
        """Those of Rewards, and how often the judge had to be replaced."""
        counts = super().metrics()
        if self.accuracy and hasattr(self.accuracy.judge, "take_restarts"):
            counts[RESTARTS] = float(self.accuracy.judge.take_restarts())
        return counts

    def evaluate(self, completions, columns) -> list[list[float | None]]:
        """What each reward gives for the batch. Async ones run together."""
        columns = dict(columns)
        step = columns.pop("step")
        batch = columns | {"completions": completions}
        # As in ms-swift the messages end in the completion, whatever the dataset's own end in.
        replies = [{"role": "assistant", "content": completion} for completion in completions]
        batch["messages"] = [[*p, reply] for p, reply in zip(columns["prompts"], replies)]
        batch["response_token_ids"] = columns["completion_ids"]
        results = call_all(self.functions, batch, self.state(step), self.runner)
        return [self.check(i, values, batch, step) for i, values in enumerate(results)]

    def state(self, step: int) -> types.SimpleNamespace:
        """What a reward may ask of the run: `global_step`, updates made before, and `max_steps`."""
        return types.SimpleNamespace(step=step, global_step=step - 1, max_steps=self.max_steps)

    def check(self, i, values, batch, step) -> list[float | None]:
        """What reward i returned, as floats and None; RewardError, with the batch kept, if it can't."""
        if hasattr(values, "tolist"):  # a tensor or an array
            values = values.tolist()
        n = len(batch["completions"])
        problem, row = find_problem(values, n)
        if problem is None:
            return [None if value is None else float(value) for value in values]
        error = values if isinstance(values, BaseException) else None
        if error:
            row = self.find_row(self.functions[i], batch, step)
        where = f"rows 0 to {n - 1}" if row is None else f"row {row}"
        message = f"reward {self.names[i]}, step {step}, {where}: {problem}"
        if self.output_dir is not None:
            kept = {"error": message, "row": row, "step": step, **batch}
            if error:
                kept["traceback"] = "".join(traceback.format_exception(error)).splitlines()
            path = Path(self.output_dir, f"failed-reward-step{step}-{os.getpid()}.json")
            with suppress(OSError):  # no room, no right: the reason is told all the same
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(kept, indent=1, default=str))
                message += f" (the rows are in {path})"
        raise RewardError(message) from error

    def find_row(self, function, batch, step) -> int | None:
        """The first row on which a reward fails alone: it has seen the whole batch, and tells none."""
        for row in range(len(batch["completions"])):
            alone = {name: [column[row]] for name, column in batch.items()}
            (result,) = call_all([function], alone, self.state(step), self.runner)
            if isinstance(result, BaseException):
                return row
        return None

    def close(self) -> None:
        self.runner.close()
        super().close()


# Calling ---------------------------------------------------------------------------------------


def call_all(functions, batch, state, runner) -> list:
    """What each function returns for the batch, or the exception that it raises."""
    results = [stop.attempt(call, function, batch, state) for function in functions]
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]

    async def together():
        return await asyncio.gather(*(stop.awaited(results[i]) for i in pending))

    if pending:  # a loop runs only for async rewards: a notebook has one already
        for i, result in zip(pending, runner.run(together())):
            results[i] = result
    return results


def call(function, batch, state):
    """function(completions, **columns), with those columns that it takes. state: of the run."""
    # Each gets lists of its own, for a function may sort or cut them.
    columns = {name: list(column) for name, column in batch.items()}
    for name in ("completion_ids", "response_token_ids"):
        columns[name] = [list(ids) for ids in batch[name]]
    columns |= {"step": state.step, "trainer_state": state}
    wanted = parameters(function)
    # TRL's begin (prompts, completions, …), others (texts): by name where there is one.
    first = []
    named = wanted.get("completions")
    if named is None or named.kind is named.POSITIONAL_ONLY:
        first = [columns.pop("completions")]
    if not any(p.kind is p.VAR_KEYWORD for p in wanted.values()):
        columns = {name: columns[name] for name in wanted if name in columns}
    return function(*first, **columns)


def parameters(function):
    """The parameters of a function by name; none if it is a built-in that does not tell."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def name_of_completions(function) -> str | None:
    """What a function calls the completions, if not that; None where no column can be meant by it."""
    wanted = parameters(function)
    first = next(iter(wanted.values()), None)
    if first is None or "completions" in wanted or first.kind is not first.POSITIONAL_OR_KEYWORD:
        return None
    return first.name


def needed(function) -> list[str]:
    """The columns that a function can't do without: its first parameter is the completions."""
    names = []
    for p in list(parameters(function).values())[1:]:
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            names.append(p.name)
    return names


# Finding what is wrong -------------------------------------------------------------------------


def find_problem(values, n: int) -> tuple[str | None, int | None]:
    """What is wrong with what a reward returned, and in which row, where that can be told."""
    if isinstance(values, BaseException):
        return f"raised {describe(values)}", None
    if not isinstance(values, list | tuple):
        return f"returned {short(values)}, not a list of {n} values", None
    if len(values) != n:
        return f"returned {len(values)} values for {n} completions", None
    for row, value in enumerate(values):
        if not is_reward(value):
            return f"returned {short(value)}, not a finite number or None", row
    return None, None


def is_reward(value) -> bool:
    if value is None:
        return True
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):  # numpy's strings have it
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def check_names(names: list[str], reward_model: str | None) -> None:
    if not names and not reward_model:
        raise UsageError("--reward_funcs: no reward at all; name one, or a --reward_model")
    for name in names:
        if name not in orms:
            hint = f"known: {', '.join(sorted(orms))}"
            close = difflib.get_close_matches(name, orms, n=1)
            if close:
                hint = f"did you mean {close[0]}? {hint}"
            raise UsageError(f"--reward_funcs {name}: unknown; {hint}")
        if names.count(name) > 1:
            raise UsageError(f"--reward_funcs {name}: named twice")
    judged = "accuracy" in names or "cosine" in names
    if judged and importlib.util.find_spec("math_verify") is None:
        raise UsageError("--reward_funcs accuracy: needs math_verify; pip install math-verify")


def check_weights(weights: list[float], names: list[str]) -> None:
    if len(weights) == len(names) and all(map(math.isfinite, weights)):
        return
    given = " ".join(map(str, weights))
    need = f"{len(names)} finite numbers, for {', '.join(names)}"
    raise UsageError(f"--reward_weights {given}: must be {need}")


def check_parameters(function) -> None:
    """UsageError if a built-in reward was made with flags that it cannot work with."""
    if isinstance(function, Cosine) and function.max_len < 1:
        raise UsageError(f"--cosine_max_len {function.max_len}: must be 1 token or more")
    if isinstance(function, Repetition):
        if function.n < 1:
            raise UsageError(f"--repetition_n_grams {function.n}: must be 1 word or more")
        if function.penalty > 0:
            problem = "must be 0 or less"
            raise UsageError(f"--repetition_max_penalty {function.penalty}: {problem}")


# Saying it in one line -------------------------------------------------------------------------


def short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def describe(error: BaseException) -> str:
    """The error in one line, with the file and line at fault: the last that is the plugin's own."""
    place = ""
    for step in traceback.extract_tb(error.__traceback__):
        ours = step.filename == rewards.__file__ or Path(step.filename).parent == HERE
        if not ours and not re.search("^<|/lib/python", step.filename):
            place = f" ({step.filename}:{step.lineno})"
    told = ""
    with suppress(Exception):  # an error of a plugin's own may fail to tell
        told = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {told or 'no message'}{place}"
