"""Rewards: what a completion is worth, by rules, by functions of your own, by a reward model.

    completions ─┬─ accuracy ── 1.0, 0.0, …  ─┐
                 ├─ format ──── 1.0, 1.0, …  ─┼─ one row a completion ── total() ── r
                 └─ your own ── None, 0.3, … ─┘  (None: does not apply)

A reward is a function of a batch, `reward(completions, **columns) -> list of float or None`. `columns` are those of the
dataset as lists, and `prompts` (chat messages), `completion_ids` and `step`. To try an idea, write one in a file of its
own, register it in `orms`, and name the file in --external_plugins.

accuracy and format come from DeepSeek-R1 (arXiv 2501.12948, section 2.2.2), cosine and repetition from Demystifying Long
Chain-of-Thought Reasoning (arXiv 2502.03373, appendix C).

math_verify compares answers. It may never return on what a model writes, and only ending a process bounds that, so this
file has a second life: run as a script it is the judge (`serve`, at the end), a process without torch that forks workers.
"""

import asyncio
import difflib
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path

# What the judge says of an answer. The last three score 0.0 and are counted under these names.
RIGHT, WRONG, UNREADABLE, TIMEOUT, CRASH = "1", "0", "?", "t", "c"
COUNTED = {UNREADABLE: "unparseable_references", TIMEOUT: "timeouts", CRASH: "crashes"}
COUNTERS = {"rewards/unscored", *(f"rewards/accuracy/{name}" for name in COUNTED.values())}


class ORM:
    """Base class of rewards (ms-swift's name: outcome reward model). `__call__` may be `async def`.

    A subclass is made when the run starts. Its constructor gets the flags that it names, and `args`, all of them.
    """

    def __init__(self, args=None, **kwargs):
        self.args = args

    def __call__(self, completions: list[str], **kwargs) -> list[float | None]:
        raise NotImplementedError


AsyncORM = ORM  # ms-swift has two


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no list of numbers."""


class Accuracy(ORM):
    """1.0 where the answer in a completion equals the reference `solution`, else 0.0; None without a reference."""

    def __init__(self, accuracy_timeout=5.0):
        if not accuracy_timeout > 0:
            raise ValueError(f"--accuracy_timeout {accuracy_timeout}: must be more than 0 seconds")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("--reward_funcs accuracy: needs math_verify; pip install math-verify")
        self.judge = Judge(accuracy_timeout)
        self.counts = Counter()
        self.last = None, []

    def __call__(self, completions, *, solution, step=None, **kwargs):
        batch = step, list(completions), list(solution)
        if batch != self.last[0]:  # cosine asks for the same batch again
            self.last = batch, self.score(completions, solution)
        return list(self.last[1])

    def score(self, completions, solution):
        known = [reference is not None for reference in solution]
        pairs = [k and (final_answer(c), final_answer(str(s))) for k, c, s in zip(known, completions, solution)]
        verdicts = {pair: quick_verdict(*pair) for pair in pairs if pair}
        hard = [pair for pair, verdict in verdicts.items() if verdict is None]
        if hard:
            verdicts.update(zip(hard, self.judge(hard)))
        self.counts.update(verdicts[pair] for pair in pairs if pair)
        return [float(verdicts[pair] == RIGHT) if pair else None for pair in pairs]


class Format(ORM):
    """1.0 where the whole completion is <think>…</think><answer>…</answer>, else 0.0.

    The pattern `<think>.*?</think>\\s*<answer>.*?</answer>` says the same, in quadratic time; this is linear.
    """

    def __call__(self, completions, **kwargs):
        return [float(self.matches(completion)) for completion in completions]

    def matches(self, text):
        ends = text.startswith("<think>") and text.endswith("</answer>")
        return ends and re.search(r"</think>\s*<answer>", text) is not None


class Cosine(ORM):
    """Correctness scaled by length: half a cosine over t = generated tokens / cosine_max_len, at most 1,

        r = max_len_value + (min_len_value - max_len_value) (1 + cos πt) / 2

    With the defaults a correct answer earns less the longer it is, and so does a wrong one:

        correct  1.0 ─╮                   wrong   0.0 ─╮
                      ╰─ 0.5                           ╰─ -0.5
                 0 … cosine_max_len                0 … cosine_max_len

    The paper lets wrong answers earn more with length, to encourage longer thinking. To have that, raise the second
    curve: cosine_min_len_value_wrong -0.5, cosine_max_len_value_wrong 0.0.
    """

    def __init__(
        self,
        accuracy,
        cosine_min_len_value_wrong=0.0,
        cosine_max_len_value_wrong=-0.5,
        cosine_min_len_value_correct=1.0,
        cosine_max_len_value_correct=0.5,
        cosine_max_len=None,
        max_completion_length=512,
    ):
        self.accuracy = accuracy
        self.wrong = cosine_min_len_value_wrong, cosine_max_len_value_wrong
        self.correct = cosine_min_len_value_correct, cosine_max_len_value_correct
        self.max_len = max_completion_length if cosine_max_len is None else cosine_max_len
        if self.max_len < 1:
            raise ValueError(f"--cosine_max_len {self.max_len}: must be 1 token or more")

    def __call__(self, completions, *, solution, completion_ids, step=None, **kwargs):
        correct = self.accuracy(completions, solution=solution, step=step)
        return [None if ok is None else self.value(ok, len(ids)) for ok, ids in zip(correct, completion_ids)]

    def value(self, correct, length):
        shortest, longest = self.correct if correct else self.wrong
        t = min(length / self.max_len, 1.0)
        return longest + (shortest - longest) * (1 + math.cos(math.pi * t)) / 2


class Repetition(ORM):
    """(1 - distinct / all) n-grams of lower-cased words, times the penalty; 0.0 for fewer words than n."""

    def __init__(self, repetition_n_grams=3, repetition_max_penalty=-1.0):
        if repetition_n_grams < 1:
            raise ValueError(f"--repetition_n_grams {repetition_n_grams}: must be 1 word or more")
        if repetition_max_penalty > 0:
            raise ValueError(f"--repetition_max_penalty {repetition_max_penalty}: must be 0 or less")
        self.n, self.penalty = repetition_n_grams, repetition_max_penalty

    def __call__(self, completions, **kwargs):
        return [self.value(completion.lower().split()) for completion in completions]

    def value(self, words):
        grams = list(zip(*(words[i:] for i in range(self.n))))
        return (1 - len(set(grams)) / len(grams)) * self.penalty if grams else 0.0


class RewardModel:
    """A sequence classifier with one output, on prompt and completion in its own chat template."""

    batch_size = 16

    def __init__(self, path, torch_dtype, device):
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
            missing = missing_head(path, config)
        except (OSError, ValueError) as error:
            raise ValueError(f"--reward_model {path}: cannot be read: {one_line(error)}") from error
        if config.num_labels != 1:
            raise ValueError(f"--reward_model {path}: has {config.num_labels} outputs; a model with one is needed")
        if missing:
            raise ValueError(f"--reward_model {path}: its weights lack {', '.join(missing)}")
        if not self.tokenizer.chat_template:
            raise ValueError(f"--reward_model {path}: its tokenizer has no chat template")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.path, self.torch_dtype, self.device, self.model = path, torch_dtype, device, None

    def start(self):
        if self.model is None:
            from transformers import AutoModelForSequenceClassification

            load = AutoModelForSequenceClassification.from_pretrained
            model, info = load(self.path, dtype=self.torch_dtype, output_loading_info=True)
            if missing := ", ".join(info["missing_keys"]):  # transformers made them up
                raise ValueError(f"--reward_model {self.path}: its weights lack {missing}")
            model.config.pad_token_id = self.tokenizer.pad_token_id
            self.model = model.to(self.device).eval()

    def __call__(self, completions, *, prompts, **kwargs):
        import torch

        self.start()
        chats = [[*p, {"role": "assistant", "content": c}] for p, c in zip(prompts, completions)]
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        scores = []
        for i in range(0, len(texts), self.batch_size):
            chunk = texts[i : i + self.batch_size]
            inputs = self.tokenizer(chunk, padding=True, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                scores += self.model(**inputs.to(self.device)).logits[:, 0].tolist()
        return scores


def missing_head(path, config) -> list[str]:
    """The weights of a classifier's head if a local folder's files lack them all, read from their headers alone."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification

    there = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            there.update(weights.keys())
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    head = [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]
    return head if there and there.isdisjoint(head) else []


orms = {"accuracy": Accuracy, "format": Format, "cosine": Cosine, "repetition": Repetition}
BUILT_IN = dict(orms)


def load_plugins(paths: list[str]) -> None:
    """Run Python files that register rewards in `orms`. Files written for ms-swift load unchanged."""
    # An import finds these in sys.modules without their package, so an installed ms-swift stays as it is.
    this = sys.modules[__name__]
    names = "rewards", "swift.plugin", "swift.plugin.orm", "swift.rewards", "swift.rewards.orm"
    sys.modules.update(dict.fromkeys(names, this))
    if "swift" not in sys.modules and importlib.util.find_spec("swift") is None:
        utils = types.SimpleNamespace(get_logger=logging.getLogger)
        swift = types.SimpleNamespace(plugin=this, rewards=this, utils=utils)
        sys.modules.update({"swift": swift, "swift.utils": utils})
    before, taken = dict(orms), dict(BUILT_IN)
    for path in map(Path, paths):
        start = {**orms, **taken}
        try:
            run_file(path)
            new = {name: reward for name, reward in orms.items() if start.get(name) is not reward}
            if not new:
                raise ValueError("registers no reward; it needs a line orms['name'] = YourReward")
            for name, reward in new.items():
                if name in taken:
                    whose = "the built-in reward" if name in BUILT_IN else "another plugin's reward"
                    raise ValueError(f"overwrites {whose} {name}; choose another name")
                if not callable(reward):
                    raise ValueError(f"orms[{name!r}] is {short(reward)}, not a class or function")
        except ValueError as error:
            orms.clear()
            orms.update(before)
            raise ValueError(f"--external_plugins {path}: {error}") from error
        taken.update(new)


def run_file(path):
    if not path.is_file():
        raise ValueError("no such file")
    sys.path.append(str(path.parent.resolve()))  # for modules beside it
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"failed to import: {describe(error)}") from error


class Rewards:
    """The rewards of a run: `names` in order, then the reward model, named after its folder.

    weights: one a reward, the reward model's last; None makes all 1.0. flags: the run's flags, of which each reward
    class takes those it names. Raises ValueError, one line that begins with the flag at fault.
    Construction loads no model and starts no process: `start` does, or else the first call.
    """

    def __init__(self, names, weights=None, *, reward_model=None, device="cpu", output_dir=None, **flags):
        names = list(names or [])
        if not names and not reward_model:
            raise ValueError("--reward_funcs: no reward at all; name one, or a --reward_model")
        for name in names:
            if name not in orms:
                close = difflib.get_close_matches(name, orms, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ValueError(f"--reward_funcs {name}: unknown; {hint}known: {', '.join(sorted(orms))}")
            if names.count(name) > 1:
                raise ValueError(f"--reward_funcs {name}: named twice")
        self.names, self.output_dir, self.unscored = names, output_dir, 0
        self.runner = asyncio.Runner()  # one event loop for the run: what async rewards keep may belong to it
        self.accuracy = make("accuracy", flags) if {"accuracy", "cosine"} & set(names) else None
        flags = {**flags, "args": types.SimpleNamespace(**flags), "accuracy": self.accuracy}
        self.functions = [self.accuracy if name == "accuracy" else make(name, flags) for name in names]
        self.reward_model = None
        if reward_model:
            self.reward_model = RewardModel(reward_model, flags.get("torch_dtype", "bfloat16"), device)
            name = Path(reward_model).resolve().name
            self.names = [*names, f"{name}-model" if name in names else name]
            self.functions.append(self.reward_model)
        self.weights = [1.0] * len(self.names) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.names) or not all(map(math.isfinite, self.weights)):
            given = " ".join(map(str, weights))
            need = f"{len(self.names)} finite numbers, for {', '.join(self.names)}"
            raise ValueError(f"--reward_weights {given}: must be {need}")

    @property
    def notes(self) -> list[str]:
        """Lines worth printing once as the run starts."""
        wrong = [function.wrong for function in self.functions if isinstance(function, Cosine)]
        return [f"cosine: a wrong answer earns less with length, from {a} to {b}" for a, b in wrong if b < a]

    def check_columns(self, columns) -> None:
        """Raise ValueError if a reward needs a column that the dataset lacks, or if one has a name of ours."""
        ours = {"completions", "prompts", "completion_ids", "step"}
        if clash := {*ours, "prompt_ids"}.intersection(columns):
            raise ValueError(f"--dataset: rename its column {min(clash)}; we keep our own under this name")
        for reward, function in zip(self.names, self.functions):
            for p in list(parameters(function).values())[1:]:
                optional = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                if not optional and p.name not in {*ours, *columns}:
                    problem = f"needs a column {p.name}; the dataset has {', '.join(sorted(columns))}"
                    raise ValueError(f"--reward_funcs {reward}: {problem}")

    def start(self) -> None:
        """Start the judge, which gets ready in the background, and load the reward model."""
        if self.accuracy:
            self.accuracy.judge.start()
        if self.reward_model:
            self.reward_model.start()

    def __call__(self, completions, *, prompts, completion_ids, step, **columns) -> list[list[float | None]]:
        """One row a completion, one column a reward. RuntimeError when a reward fails or returns other than numbers."""
        batch = {**columns, "completions": completions, "prompts": prompts, "completion_ids": completion_ids}
        results = evaluate(self.functions, batch, step, self.runner)
        checked = [self.check(i, values, batch, step) for i, values in enumerate(results)]
        rows = [list(row) for row in zip(*checked)]
        self.unscored += sum(all(value is None for value in row) for row in rows)
        return rows

    def check(self, i, values, batch, step):
        """The values that reward i returned, as floats and None; RewardError, with the batch kept, if they are not."""
        n, row = len(batch["completions"]), None
        if hasattr(values, "tolist"):  # a tensor or an array
            values = values.tolist()
        if isinstance(values, BaseException):
            problem = f"raised {describe(values)}"
            # It saw the whole batch, so the row is the first one on which it fails alone.
            alone = ({key: [column[r]] for key, column in batch.items()} for r in range(n))
            again = (evaluate([self.functions[i]], one, step, self.runner)[0] for one in alone)
            row = next((r for r, result in enumerate(again) if isinstance(result, BaseException)), None)
        elif not isinstance(values, list | tuple):
            problem = f"returned {short(values)}, not a list of {n} values"
        elif len(values) != n:
            problem = f"returned {len(values)} values for {n} completions"
        else:
            row = next((r for r, value in enumerate(values) if not is_reward(value)), None)
            if row is None:
                return [None if value is None else float(value) for value in values]
            problem = f"returned {short(values[row])}, not a finite number or None"
        where = f"rows 0 to {n - 1}" if row is None else f"row {row}"
        message = f"reward {self.names[i]}, step {step}, {where}: {problem}"
        if self.output_dir is not None:
            path = Path(self.output_dir, f"failed-reward-step{step}-{os.getpid()}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"error": message, "row": row, "step": step, **batch}
            if isinstance(values, BaseException):
                kept["traceback"] = "".join(traceback.format_exception(values)).splitlines()
            path.write_text(json.dumps(kept, indent=1, default=str))
            message += f" (the rows are in {path})"
        raise RewardError(message) from (values if isinstance(values, BaseException) else None)

    def metrics(self) -> dict[str, float]:
        """COUNTERS since the last call."""
        counts = {"rewards/unscored": float(self.unscored)}
        self.unscored = 0
        if self.accuracy:
            counts |= {f"rewards/accuracy/{COUNTED[v]}": float(self.accuracy.counts[v]) for v in COUNTED}
            self.accuracy.counts.clear()
        return counts

    def close(self) -> None:
        self.runner.close()
        if self.accuracy:
            self.accuracy.judge.close()


def total(rows: list[list[float | None]], weights: list[float]) -> list[float]:
    """The weighted sum of each row without its None entries.

    A row of None alone gives 0.0: its completion stays in its group, as one that earned nothing, and is counted in
    `rewards/unscored`.
    """
    return [sum((w * r for w, r in zip(weights, row, strict=True) if r is not None), 0.0) for row in rows]


def make(name, flags):
    """The registered reward, ready to call: a class is given the flags that its constructor names."""
    reward = orms[name]
    if not isinstance(reward, type):
        return reward
    try:
        wanted = [p.name for p in inspect.signature(reward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        made = reward(**{flag: value for flag, value in flags.items() if flag in wanted})
    except Exception as error:
        if name in BUILT_IN:
            raise
        raise ValueError(f"--reward_funcs {name}: its constructor failed: {describe(error)}") from error
    if not callable(made):
        raise ValueError(f"--reward_funcs {name}: its class has no __call__")
    return made


def parameters(function):
    """The parameters of a function by name; none if it is a built-in that does not tell."""
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def evaluate(functions, batch, step, runner) -> list:
    """What each function returns for the batch, or the exception that it raises. Async ones run together.

    Each gets lists of its own, for a function may sort or cut them.
    """
    results = []
    for function in functions:
        columns = {name: list(column) for name, column in batch.items()}
        columns |= {"completion_ids": list(map(list, batch["completion_ids"])), "step": step}
        wanted = parameters(function)
        by_name = "completions" in wanted and wanted["completions"].kind is not inspect.Parameter.POSITIONAL_ONLY
        first = [] if by_name else [columns.pop("completions")]
        if not any(p.kind is p.VAR_KEYWORD for p in wanted.values()):
            columns = {name: columns[name] for name in wanted if name in columns}
        try:
            results.append(function(*first, **columns))
        except Exception as error:
            results.append(error)
    pending = [i for i, values in enumerate(results) if inspect.isawaitable(values)]

    async def together():
        return await asyncio.gather(*(results[i] for i in pending), return_exceptions=True)

    if pending:
        for i, values in zip(pending, runner.run(together())):
            results[i] = values
    return results


def is_reward(value):
    try:
        is_number = hasattr(value, "__float__") and not isinstance(value, str | bytes)  # numpy's strings have it, too
        return value is None or (is_number and math.isfinite(float(value)))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def describe(error):
    """The error in one line, with the file and line at fault: the last that is not Python's or a package's."""
    steps = [(step.filename, step.lineno) for step in traceback.extract_tb(error.__traceback__)]
    own = [f" ({file}:{line})" for file, line in steps if file != __file__ and not re.search("^<|/lib/python", file)]
    return f"{type(error).__name__}: {one_line(error)}{own[-1] if own else ''}"


def one_line(error):
    return " ".join(str(error).split())[:300] or "no message"


# ── Answers, and the judge that compares them ──

NUMBER = re.compile(r"([+-]?)(?:\\?\$)?((?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?)")
SEVERAL = re.compile(r"[+-]?\$?[0-9][0-9,.]*(?<!,)(?:[\s=…][\s=….]*[+-]?\$?[0-9][0-9,.]*(?<!,))+")
# Emphasis, code and quotes, as in **18**; not the _ of a_{1}, nor the * of 2 * 3 * 4.
MARKED = re.compile(r"(?<![\w)}\]*_`])(\*{1,3}|_{1,3}|`{1,3}|[\"'])(?!\s)((?:(?!\1).){1,200})(?<!\s)\1(?![\w({\[])")
PLAIN = str.maketrans("−“”", '-""')
WRAPPED = re.compile(r"\$?\\boxed\{([^{}$]*)\}\$?|\$([^$]*)\$|\\\(([^$]*?)\\\)")
COMMAND = re.compile(r"\\(?:text|mathrm|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|\b(?:and|or)\b")
WORD = re.compile(r"[A-Za-z]{3}|(?<!\S)(?=.?[AEIOUaeiou])[A-Za-z]{2}(?!\w)")  # "so" is one, "kg" and "2xy" are not


def final_answer(text: str) -> str:
    """The part that states the answer: in the last <answer>, on a last line `#### 18`, or else the whole text."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        text = text[start + len("<answer>") : end]
    last_line = text.strip().rpartition("\n")[2]
    text = last_line.rpartition("####")[2] if "####" in last_line else text
    return MARKED.sub(r"\2", text.translate(PLAIN)).strip()


def quick_verdict(answer: str, reference: str) -> str | None:
    """A verdict without math_verify where one is certain: on equal texts and on decimals. Linear time."""
    answer, reference = unwrap(answer), unwrap(reference)
    if not reference:
        return UNREADABLE
    a, b = decimal(answer), decimal(reference)
    if answer == reference or (a is not None and a == b):
        return RIGHT
    if a is None and SEVERAL.fullmatch(answer):  # math_verify would take the last
        return WRONG
    # math_verify rounds to six decimals: longer ones may still be equal.
    certain = a and b and max(len(x.partition(".")[2]) for x in (a, b)) <= 6
    return WRONG if certain else None


def unwrap(answer):
    """`\\boxed{18}`, `$18$`, `\\text{18}` and `18.` are `18`."""
    answer = re.sub(r"\\text\{([^{}]*)\}", r"\1", answer.strip().removesuffix("."))
    match = WRAPPED.fullmatch(answer)
    return match[match.lastindex].strip() if match else answer


def decimal(answer):
    """A plain number in one form, `-$1,234.50` and `-1 234.5` as `-1234.5`; None for anything else."""
    match = NUMBER.fullmatch(answer)
    if not match or not match[2]:
        return None
    whole, _, fraction = re.sub("[, ]", "", match[2]).partition(".")
    number = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".removesuffix(".")
    return f"-{number}" if match[1] == "-" and number != "0" else number


class Judge:
    """Verdicts on (answer, reference) pairs, by a process of its own that no answer can hang: see `serve`."""

    def __init__(self, timeout: float):
        self.timeout, self.process = timeout, None

    def start(self):
        if self.process is None:
            command = [sys.executable, os.path.abspath(__file__), str(self.timeout)]
            # In a session of its own, signals meant for the run miss it, and one kill ends it with its workers.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        for _ in range(2):
            self.start()
            try:
                self.process.stdin.write(json.dumps(pairs).encode() + b"\n")
                self.process.stdin.flush()
                if line := self.process.stdout.readline():
                    return json.loads(line)
            except BrokenPipeError:
                pass
            except BaseException:
                self.close()  # or the next batch would read this one's verdicts
                raise
            self.close()  # something ended it, perhaps the kernel for lack of memory: once more
        raise RuntimeError("the process that checks answers ended twice on one batch")

    def close(self):
        if self.process is not None:
            process, self.process = self.process, None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()


def serve(timeout: float) -> None:
    """The judge: a line of pairs in (JSON, stdin), a line of verdicts out (stdout), until the trainer is gone.

    A batch is shared among workers forked from here, where math_verify is imported and warm, so a fork costs a few
    milliseconds. A worker sets an alarm before each answer and leaves it to the kernel, which ends even one deep in
    arithmetic on big integers. The answers behind a slow one go to a new worker at once.
    """
    trainer = os.getppid()

    def end_if_orphan(*_):  # in case another process of the trainer's holds our stdin open
        if os.getppid() != trainer:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end_if_orphan)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    logging.disable(logging.CRITICAL)  # math_verify warns that its own time limits are off
    for answer in ("7", r"\frac{1}{2}", "x^2+2x+1", "(1, 2]", r"\boxed{\pi}", "the answer is $x = 5$."):
        for reference in ("0.5", "(x+1)^2", r"2\sqrt{3}"):  # warms what parsing and comparing load and cache
            verdict(answer, reference)
    for line in sys.stdin.buffer:
        print(json.dumps(judge(json.loads(line), timeout, len(os.sched_getaffinity(0)))), flush=True)
    os.killpg(0, signal.SIGKILL)


def judge(pairs, timeout, cores, slow=0.1, most_workers=16):
    """Verdicts on the pairs. An answer may hold up those behind it for `slow` seconds."""
    verdicts = [CRASH] * len(pairs)
    share = math.ceil(len(pairs) / min(cores, 4))  # neighbours stay together: groups share their reference
    waiting = deque(deque(range(i, min(i + share, len(pairs)))) for i in range(0, len(pairs), share))
    running = {}  # pipe → worker: its pid, the indices of the pairs left to it, when it last said something
    while waiting or running:
        while waiting and len(running) < most_workers:
            todo = waiting.popleft()
            pid, pipe = fork_worker([pairs[i] for i in todo], timeout)
            running[pipe] = types.SimpleNamespace(pid=pid, todo=todo, since=time.monotonic())
        for pipe in select.select(list(running), [], [], slow / 2)[0]:
            worker = running[pipe]
            worker.since, marks = time.monotonic(), os.read(pipe, 4096).decode()
            for mark in marks[: len(worker.todo)]:
                verdicts[worker.todo.popleft()] = mark
            if not marks or not worker.todo:
                os.kill(worker.pid, signal.SIGKILL)  # it may be at pairs that another has taken over
                _, status = os.waitpid(worker.pid, 0)
                os.close(pipe)
                del running[pipe]
                if worker.todo:  # it died on the first of these
                    alarm = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
                    verdicts[worker.todo.popleft()] = TIMEOUT if alarm else CRASH
                if worker.todo:
                    waiting.append(worker.todo)
        for worker in running.values():
            if len(worker.todo) > 1 and time.monotonic() - worker.since > slow:
                os.setpriority(os.PRIO_PROCESS, worker.pid, 10)  # or many of them would starve the quick ones
                held_up = [worker.todo.pop() for _ in range(len(worker.todo) - 1)]
                waiting.append(deque(reversed(held_up)))
    return verdicts


def fork_worker(pairs, timeout, memory=2 << 30):
    """Fork a process that writes one verdict a pair into a pipe and ends. Returns its pid and the pipe."""
    pipe, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, pipe
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the alarm ends the process
        for stream in (0, 1, 2):  # what sympy prints must not reach the trainer
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        for answer, reference in pairs:
            signal.setitimer(signal.ITIMER_REAL, timeout)
            mark = verdict(answer, reference)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(write, mark.encode())
    finally:
        os._exit(0)


def verdict(answer: str, reference: str) -> str:
    """math_verify's verdict, without a time limit."""
    from math_verify import verify

    gold = parse_answer(reference)
    if not gold:
        return UNREADABLE
    return RIGHT if verify(gold, parse_answer(answer), timeout_seconds=None) else WRONG


@functools.lru_cache(maxsize=256)  # the completions of a group share their reference
def parse_answer(text):
    from math_verify import parse

    # math_verify would find only the 2 of a bare 2\sqrt{3}, and the 4 of (3, 4).
    text = f"${text}$" if is_bare_formula(text) else text
    return parse(text, extraction_mode="first_match", parsing_timeout=None)


def is_bare_formula(text):
    """Whether this is mathematics without delimiters: more than a number, and no words."""
    if len(text) > 500 or decimal(text) is not None or re.search(r"\n|\$|\\[(\[]|\\boxed", text):
        return False
    more_than_number = re.search(r"[A-Za-z\\^_{}()\[\]=<>,;:]", text)
    return bool(more_than_number) and not WORD.search(COMMAND.sub(" ", text))


if __name__ == "__main__":
    serve(float(sys.argv[1]))
