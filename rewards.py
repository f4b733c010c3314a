"""Rewards: what a completion is worth, from rules, from your own functions, from a reward model.

    completions ──┬─ accuracy ─── [1.0, 0.0, …] ─┐
                  ├─ format ───── [1.0, 1.0, …] ─┼─ rows of one value a function ─ total() ─ r
                  └─ your own ─── [None, 0.3, …] ┘    (None: does not apply)

A reward is a function of a batch: `reward(completions, **columns) -> list of float or None`, one value a completion.
`columns` are the dataset's columns as lists, with `prompts` (chat messages), `completion_ids` and `step`.
To try an idea, write one in a file of its own, register it in `orms` and name the file in --external_plugins.

accuracy and format are those of DeepSeek-R1 (arXiv 2501.12948, section 2.2.2); cosine and repetition those of
Demystifying Long Chain-of-Thought Reasoning (arXiv 2502.03373, appendix C).

Answers are checked by math_verify, which may never return: model output is untrusted, and only ending a process bounds
what it costs. So this file has a second life: run as a script it is the judge, a process without torch that forks
workers to check answers under a time limit that the kernel enforces. See `Judge` and `serve` at the end.
"""

import asyncio
import contextlib
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
import types
from collections import Counter, deque
from pathlib import Path

# Options of the built-in rewards, named like their flags. A reward class gets those that its constructor names.
OPTIONS = {
    "accuracy_timeout": 5.0,  # seconds allowed to check one answer
    "cosine_min_len_value_wrong": 0.0,
    "cosine_max_len_value_wrong": -0.5,
    "cosine_min_len_value_correct": 1.0,
    "cosine_max_len_value_correct": 0.5,
    "cosine_max_len": None,  # tokens; None: max_completion_length
    "max_completion_length": 512,
    "repetition_n_grams": 3,
    "repetition_max_penalty": -1.0,
}


class ORM:
    """Base class of rewards (the name is ms-swift's: outcome reward model). `__call__` may be `async def`."""

    def __init__(self, args=None, **kwargs):
        self.args = args

    def __call__(self, completions: list[str], **kwargs) -> list[float | None]:
        raise NotImplementedError


AsyncORM = ORM  # ms-swift's second base class


class Accuracy(ORM):
    """1.0 where the completion's answer equals the reference `solution`, else 0.0; None where the row has no reference.

    A reference that math_verify cannot read scores 0.0 unless the answer is the same text. So does an answer that takes
    longer than the limit. Both are counted in `counts`.
    """

    def __init__(self, accuracy_timeout=5.0):
        if not accuracy_timeout > 0:
            raise ValueError(f"--accuracy_timeout {accuracy_timeout}: must be more than 0 seconds")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "--reward_funcs accuracy: needs the package math_verify (pip install math-verify)"
            )
        self.judge = Judge(accuracy_timeout)
        self.counts = Counter()
        self._last = None, None

    def __call__(self, completions, *, solution, step=None, **kwargs):
        batch = (step, list(completions), list(solution))
        if batch != self._last[0]:  # cosine asks about the same batch again
            self._last = batch, self._score(completions, solution)
        return list(self._last[1])

    def _score(self, completions, solution):
        pairs = [
            None if s is None else (final_answer(c), final_answer(str(s)))
            for c, s in zip(completions, solution)
        ]
        verdicts = {pair: quick_verdict(*pair) for pair in pairs if pair}
        hard = [pair for pair, verdict in verdicts.items() if verdict is None]
        if hard:
            verdicts.update(zip(hard, self.judge(hard)))
        for pair in filter(None, pairs):
            self.counts[verdicts[pair]] += 1
        return [pair and float(verdicts[pair] == RIGHT) for pair in pairs]


class Format(ORM):
    """1.0 where the whole completion is <think>…</think><answer>…</answer>, else 0.0.

    Equal to the regular expression `<think>.*?</think>\\s*<answer>.*?</answer>`, in linear time: any end of the
    thinking that leaves room for </answer> will do, and the first one leaves the most.
    """

    def __call__(self, completions, **kwargs):
        return [float(self.matches(completion)) for completion in completions]

    @staticmethod
    def matches(text):
        if not (text.startswith("<think>") and text.endswith("</answer>")):
            return False
        middle = re.compile(r"</think>\s*<answer>").search(text, len("<think>"))
        return middle is not None and middle.end() <= len(text) - len("</answer>")


class Cosine(ORM):
    """Correctness scaled by length: half a cosine over t = generated tokens / cosine_max_len, clamped to [0, 1],

        r = max_len_value + (min_len_value − max_len_value) · (1 + cos πt) / 2

    With the default values a correct answer earns less the longer it is, and so does a wrong one:

        correct  1.0 ──╮                  wrong   0.0 ──╮
                        ╰── 0.5                          ╰── −0.5
                 0 ……… cosine_max_len             0 ……… cosine_max_len

    To have wrong answers earn more with length, as the paper does to encourage longer thinking, raise the second curve:
    cosine_min_len_value_wrong -0.5 and cosine_max_len_value_wrong 0.0.
    """

    def __init__(
        self,
        accuracy,
        cosine_min_len_value_wrong,
        cosine_max_len_value_wrong,
        cosine_min_len_value_correct,
        cosine_max_len_value_correct,
        cosine_max_len,
        max_completion_length,
    ):
        self.accuracy = accuracy
        self.wrong = cosine_min_len_value_wrong, cosine_max_len_value_wrong
        self.correct = cosine_min_len_value_correct, cosine_max_len_value_correct
        self.max_len = max_completion_length if cosine_max_len is None else cosine_max_len
        if self.max_len < 1:
            raise ValueError(f"--cosine_max_len {self.max_len}: must be 1 or more tokens")

    def __call__(self, completions, *, solution, completion_ids, step=None, **kwargs):
        correct = self.accuracy(completions, solution=solution, step=step)
        return [None if ok is None else self.value(ok, len(ids)) for ok, ids in zip(correct, completion_ids)]

    def value(self, correct, length):
        shortest, longest = self.correct if correct else self.wrong
        t = min(length / self.max_len, 1.0)
        return longest + (shortest - longest) * (1 + math.cos(math.pi * t)) / 2


class Repetition(ORM):
    """(1 − distinct / all) n-grams of lower-cased words, times the penalty; 0.0 for fewer words than n."""

    def __init__(self, repetition_n_grams, repetition_max_penalty):
        if repetition_n_grams < 1:
            raise ValueError(f"--repetition_n_grams {repetition_n_grams}: must be 1 or more words")
        if repetition_max_penalty > 0:
            raise ValueError(
                f"--repetition_max_penalty {repetition_max_penalty}: must be 0 or less; it is added"
            )
        self.n, self.penalty = repetition_n_grams, repetition_max_penalty

    def __call__(self, completions, **kwargs):
        return [self.value(completion.lower().split()) for completion in completions]

    def value(self, words):
        grams = list(zip(*(words[i:] for i in range(self.n))))
        return (1 - len(set(grams)) / len(grams)) * self.penalty if grams else 0.0


class RewardModel:
    """A sequence classifier with one output, on the prompt and completion in its own chat template."""

    batch_size = 16

    def __init__(self, path, torch_dtype, device):
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(path)
            self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        except (OSError, ValueError) as error:
            raise ValueError(f"--reward_model {path}: cannot be read: {one_line(error)}") from error
        if config.num_labels != 1:
            raise ValueError(
                f"--reward_model {path}: has {config.num_labels} outputs; a model with one is needed"
            )
        if not self.tokenizer.chat_template:
            raise ValueError(f"--reward_model {path}: its tokenizer has no chat template")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.path, self.torch_dtype, self.device, self.model = path, torch_dtype, device, None

    def start(self):
        if self.model is None:
            from transformers import AutoModelForSequenceClassification as Classifier

            model, info = Classifier.from_pretrained(
                self.path, dtype=self.torch_dtype, output_loading_info=True
            )
            if info["missing_keys"]:  # transformers would fill the head with random numbers
                missing = ", ".join(sorted(info["missing_keys"]))
                raise ValueError(
                    f"--reward_model {self.path}: its weights lack {missing}; it was not trained to score"
                )
            model.config.pad_token_id = self.tokenizer.pad_token_id
            self.model = model.to(self.device).eval()

    def __call__(self, completions, *, prompts, **kwargs):
        import torch

        self.start()
        chats = [[*p, {"role": "assistant", "content": c}] for p, c in zip(prompts, completions)]
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        scores = []
        for i in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[i : i + self.batch_size], padding=True, add_special_tokens=False, return_tensors="pt"
            )
            with torch.inference_mode():
                scores += self.model(**batch.to(self.device)).logits[:, 0].tolist()
        return scores


orms = {"accuracy": Accuracy, "format": Format, "cosine": Cosine, "repetition": Repetition}
BUILT_IN = dict(orms)


def load_plugins(paths: list[str]) -> None:
    """Run Python files that register rewards in `orms`. Files written for ms-swift load unchanged."""
    this = sys.modules[__name__]
    # In sys.modules an import finds them without their package, so an installed ms-swift stays as it is.
    shims = "rewards", "swift.plugin", "swift.plugin.orm", "swift.rewards", "swift.rewards.orm"
    sys.modules.update(dict.fromkeys(shims, this))
    if importlib.util.find_spec("swift") is None:
        sys.modules["swift.utils"] = types.SimpleNamespace(get_logger=logging.getLogger)
    taken = dict(BUILT_IN)
    for path in paths:
        before = {**orms, **taken}
        try:
            _run_file(Path(path))
            new = {name: reward for name, reward in orms.items() if before.get(name) is not reward}
            if not new:
                raise ValueError("registers no reward; add orms['name'] = YourReward")
            for name, reward in new.items():
                if name in taken:
                    whose = "the built-in reward" if name in BUILT_IN else "another plugin's reward"
                    raise ValueError(f"overwrites {whose} {name}; choose another name")
                if not callable(reward):
                    raise ValueError(f"orms[{name!r}] is a {type(reward).__name__}, not a class or function")
        except ValueError as error:
            orms.clear()
            orms.update(before)
            raise ValueError(f"--external_plugins {path}: {error}") from error
        taken |= new


def _run_file(path):
    if not path.is_file():
        raise ValueError("no such file")
    sys.path.append(str(path.parent.resolve()))  # for modules beside it
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    try:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"failed to import: {type(error).__name__}: {one_line(error)}") from error


class Rewards:
    """The rewards of one run, in order: `names`, then the reward model.

    weights: one a reward, the reward model's last; None makes them all 1.0. options: see OPTIONS. Raises ValueError in
    one line that begins with the flag. Construction loads no model and starts no process; `start` or the first call do.
    """

    def __init__(
        self,
        names: list[str],
        weights: list[float] | None = None,
        *,
        reward_model: str | None = None,
        torch_dtype="bfloat16",
        device="cpu",
        output_dir: str | None = None,
        **options,
    ):
        if unknown := set(options) - set(OPTIONS):
            raise TypeError(f"unknown options: {sorted(unknown)}")
        if not names and not reward_model:
            raise ValueError("--reward_funcs: no reward at all; name one, or a --reward_model")
        for i, name in enumerate(names):
            if name not in orms:
                close = difflib.get_close_matches(name, orms, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise ValueError(f"--reward_funcs {name}: unknown; {hint}known: {', '.join(sorted(orms))}")
            if name in names[:i]:
                raise ValueError(f"--reward_funcs {name}: named twice")
        self.names = list(names)
        self.options = {**OPTIONS, **options}
        self.output_dir = output_dir
        self.accuracy = None
        if {"accuracy", "cosine"} & set(names):
            self.accuracy = Accuracy(self.options["accuracy_timeout"])
        self.functions = [self.accuracy if name == "accuracy" else self._build(orms[name]) for name in names]
        self.reward_model = None
        if reward_model:
            self.reward_model = RewardModel(reward_model, torch_dtype, device)
            self.functions.append(self.reward_model)
            name = Path(reward_model).resolve().name
            while name in self.names:
                name += "_model"
            self.names.append(name)
        self.weights = [1.0] * len(self.names) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.names):
            given = " ".join(str(weight) for weight in weights)
            raise ValueError(
                f"--reward_weights {given}: {len(self.weights)} for {len(self.names)} rewards ({', '.join(self.names)})"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"--reward_weights {' '.join(map(str, weights))}: must be finite numbers")
        self.unscored = 0

    def _build(self, reward):
        if not isinstance(reward, type):
            return reward
        known = {**self.options, "accuracy": self.accuracy, "args": types.SimpleNamespace(**self.options)}
        wanted = inspect.signature(reward).parameters
        return reward(**{name: value for name, value in known.items() if name in wanted})

    @property
    def notes(self) -> list[str]:
        """Lines worth printing once when the run starts."""
        lines = []
        for cosine in (f for f in self.functions if isinstance(f, Cosine)):
            at_least, at_most = cosine.wrong
            if at_most < at_least:
                lines.append(f"cosine: wrong answers earn less with length, {at_least} falling to {at_most}")
        return lines

    def check_columns(self, columns) -> None:
        """Raise ValueError if a reward asks for a column that the dataset lacks, or one has a name of our own."""
        ours = {"completions", "prompts", "completion_ids", "step"}
        if clash := ours.intersection(columns):
            raise ValueError(f"--dataset: rename column {min(clash)}; rewards get this name from the trainer")
        for name, function in zip(self.names, self.functions):
            for i, p in enumerate(inspect.signature(function).parameters.values()):
                needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                if i > 0 and needed and p.name not in {*ours, *columns}:
                    has = ", ".join(sorted(columns))
                    raise ValueError(
                        f"--reward_funcs {name}: needs the column {p.name}; the dataset has {has}"
                    )

    def start(self) -> None:
        """Start the judge (in the background) and load the reward model. The first call does it otherwise."""
        if self.accuracy:
            self.accuracy.judge.start()
        if self.reward_model:
            self.reward_model.start()

    def __call__(
        self,
        completions: list[str],
        *,
        prompts: list[list[dict]],
        completion_ids: list[list[int]],
        step: int,
        **columns,
    ) -> list[list[float | None]]:
        """One row a completion, one column a reward. Raises RuntimeError when a reward fails or returns no numbers."""
        batch = dict(columns, completions=completions, prompts=prompts, completion_ids=completion_ids)
        results = evaluate(self.functions, batch, step)
        checked = [self._check(i, values, batch, step) for i, values in enumerate(results)]
        rows = [list(row) for row in zip(*checked)]
        self.unscored += sum(all(value is None for value in row) for row in rows)
        return rows

    def _check(self, i, values, batch, step):
        n, row = len(batch["completions"]), None
        if isinstance(values, Exception):
            problem = f"raised {type(values).__name__}: {one_line(values)}"
            # A reward sees the whole batch, so the row is found by giving it one row at a time.
            alone = ({key: [column[r]] for key, column in batch.items()} for r in range(n))
            failed = (isinstance(evaluate([self.functions[i]], one, step)[0], Exception) for one in alone)
            row = next((r for r, failed_alone in enumerate(failed) if failed_alone), None)
        elif not hasattr(values, "__len__") or isinstance(values, (str, dict)):
            problem = f"returned {short(values)}, not a list of {n} values"
        elif len(values) != n:
            problem = f"returned {len(values)} values for {n} completions"
        else:
            row = next((r for r, value in enumerate(values) if not is_reward(value)), None)
            if row is None:
                return [None if value is None else float(value) for value in values]
            problem = f"returned {short(values[row])}, not a finite number or None"
        kept = ""
        if self.output_dir is not None:
            path = Path(self.output_dir, f"failed-reward-step{step}-{os.getpid()}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"reward": self.names[i], "step": step, "row": row, "problem": problem, **batch}
            path.write_text(json.dumps(content, indent=1, default=str))
            kept = f" (the rows are in {path})"
        where = f"rows 0 to {n - 1}" if row is None else f"row {row}"
        cause = values if isinstance(values, Exception) else None
        raise RuntimeError(f"reward {self.names[i]}, step {step}, {where}: {problem}{kept}") from cause

    def metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        counts = {"rewards/unscored": float(self.unscored)}
        self.unscored = 0
        if self.accuracy:
            for key, verdict in (
                ("timeouts", TIMEOUT),
                ("crashes", CRASH),
                ("unparseable_references", UNREADABLE),
            ):
                counts[f"rewards/accuracy/{key}"] = float(self.accuracy.counts[verdict])
            self.accuracy.counts.clear()
        return counts

    def close(self) -> None:
        if self.accuracy:
            self.accuracy.judge.close()


def total(rows: list[list[float | None]], weights: list[float]) -> list[float]:
    """The weighted sum of each row without its None entries.

    A row of None alone gives 0.0, so its completion stays in its group as one that earned nothing; such rows are counted
    in `rewards/unscored`.
    """
    return [
        sum((w * value for w, value in zip(weights, row, strict=True) if value is not None), 0.0)
        for row in rows
    ]


def evaluate(functions, batch, step) -> list:
    """What each function returns for a batch, or the exception it raises. Those that are async run together."""
    results = []
    for function in functions:
        columns = {**batch, "step": step}
        parameters = inspect.signature(function).parameters
        first = [] if "completions" in parameters else [columns.pop("completions")]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            columns = {name: columns[name] for name in parameters if name in columns}
        try:
            results.append(function(*first, **columns))
        except Exception as error:
            results.append(error)
    pending = [i for i, values in enumerate(results) if inspect.isawaitable(values)]

    async def together():
        return await asyncio.gather(*(results[i] for i in pending), return_exceptions=True)

    if pending:
        for i, values in zip(pending, asyncio.run(together())):
            results[i] = values
    return results


def is_reward(value):
    try:
        return value is None or (hasattr(value, "__float__") and math.isfinite(value))
    except (TypeError, ValueError, OverflowError):
        return False


def short(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(error):
    return " ".join(str(error).split())[:300] or "no message"


# Answers: what they are, and the judge that compares them.

RIGHT, WRONG, UNREADABLE, TIMEOUT, CRASH = (
    "1",
    "0",
    "?",
    "t",
    "c",
)  # verdicts; UNREADABLE speaks of the reference

NUMBER = re.compile(r"([+-]?)(?:\\?\$)?((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?)")
WRAPPED = re.compile(r"\$?\\boxed\{([^{}$]*)\}\$?|\$([^$]*)\$|\\\(([^$]*?)\\\)")
COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")


def final_answer(text: str) -> str:
    """The part that states the answer: the last <answer>, else a last line `#### 18`, else the whole text."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        text = text[start + len("<answer>") : end]
    last_line = text.strip().rpartition("\n")[2]
    return (last_line.rpartition("####")[2] if "####" in last_line else text).strip()


def quick_verdict(answer: str, reference: str) -> str | None:
    """A verdict without math_verify, where one is certain: equal texts, and decimals that it would compare exactly."""
    answer, reference = unwrap(answer), unwrap(reference)
    if not reference:
        return UNREADABLE
    if answer == reference:
        return RIGHT
    a, b = decimal(answer), decimal(reference)
    if a is None or b is None:
        return None
    if a == b:
        return RIGHT
    # math_verify rounds to six decimals, so longer fractions may yet be equal.
    return WRONG if max(len(x.partition(".")[2]) for x in (a, b)) <= 6 else None


def unwrap(answer):
    """`$18$`, `\\boxed{18}` and `18.` are 18."""
    answer = answer.strip().removesuffix(".")
    match = WRAPPED.fullmatch(answer)
    return next(group for group in match.groups() if group is not None).strip() if match else answer


def decimal(answer):
    """A plain number in one form: -$1,234.50 is -1234.5. None for anything else."""
    match = NUMBER.fullmatch(answer)
    if not match or not match[2]:
        return None
    whole, _, fraction = match[2].replace(",", "").partition(".")
    number = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".rstrip(".")
    return f"-{number}" if match[1] == "-" and number != "0" else number


class Judge:
    """Verdicts on (answer, reference) pairs, from a process of its own that cannot hang: see `serve`."""

    def __init__(self, timeout: float):
        self.timeout, self.process = timeout, None

    def start(self):
        if self.process is None:
            # A session of its own: signals meant for the run do not reach it, and one kill ends it with its workers.
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), str(self.timeout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
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
            except BaseException:  # half a conversation: the next batch must not read this one's verdicts
                self.close()
                raise
            self.close()  # something ended the judge, say the kernel for lack of memory: try once more
        raise RuntimeError("the process that checks answers ended twice on one batch")

    def close(self):
        if self.process is not None:
            process, self.process = self.process, None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def serve(timeout: float) -> None:
    """The judge: a JSON line of pairs in on stdin, a JSON line of verdicts out on stdout, until the trainer is gone.

    Each batch is shared among workers forked from here, where math_verify is imported and warm, so a new one costs a few
    milliseconds. A worker sets an alarm before each answer that only the kernel handles; it ends even a worker that is
    deep in arithmetic on big integers. What it had left goes to another worker, already while it is slow.
    """
    parent = os.getppid()

    def end_if_orphan(*_):
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)

    # The end of stdin says that the trainer is gone, unless another process of its has inherited the pipe.
    signal.signal(signal.SIGALRM, end_if_orphan)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    logging.disable(logging.CRITICAL)  # math_verify warns that we switch its timeouts off
    for answer in ("7", r"\frac{1}{2}", r"2\sqrt{3}+x^2", "(1, 2]", r"\boxed{\pi}", "the answer is $x = 5$."):
        verdict(answer, answer + " ")
    for line in sys.stdin.buffer:
        verdicts = judge_batch(json.loads(line), timeout, workers=min(4, len(os.sched_getaffinity(0))))
        sys.stdout.write(json.dumps(verdicts) + "\n")
        sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


def judge_batch(pairs, timeout, workers, most_workers=16, slow=0.1):
    """Verdicts on the pairs. `slow` is how many seconds an answer may hold up those behind it."""
    verdicts = [CRASH] * len(pairs)
    waiting = deque(deque(range(start, len(pairs), workers)) for start in range(min(workers, len(pairs))))
    running = {}  # pipe → [worker's pid, indices of the pairs to do, time of its last verdict]
    while waiting or running:
        while waiting and len(running) < most_workers:
            todo = waiting.popleft()
            pid, pipe = fork_worker([pairs[i] for i in todo], timeout)
            running[pipe] = [pid, todo, time.monotonic()]
        for pipe in select.select(list(running), [], [], slow / 2)[0]:
            pid, todo, _ = running[pipe]
            received = os.read(pipe, 4096).decode()
            for mark, _ in zip(received, list(todo)):
                verdicts[todo.popleft()] = mark
            running[pipe][2] = time.monotonic()
            if not todo or not received:
                os.kill(
                    pid, signal.SIGKILL
                )  # at work on pairs that another has taken over, or ended by itself
                _, status = os.waitpid(pid, 0)
                os.close(pipe)
                del running[pipe]
                if todo:
                    timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
                    verdicts[todo.popleft()] = TIMEOUT if timed_out else CRASH
                if todo:
                    waiting.append(todo)
        for worker in running.values():
            if len(worker[1]) > 1 and time.monotonic() - worker[2] > slow:
                first, *rest = worker[1]
                worker[1] = deque([first])
                waiting.append(deque(rest))
    return verdicts


def fork_worker(pairs, timeout, memory=4 << 30):
    """Fork a process that writes one verdict a pair into a pipe and ends. Returns its pid and the pipe."""
    pipe, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, pipe
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # an alarm ends the process
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # stdout is the line to the trainer
            os.dup2(null, stream)
        with contextlib.suppress(ValueError, OSError):
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

    # Left alone, math_verify finds only the 2 of a bare 2\sqrt{3} and the 4 of (3, 4).
    text = f"${text}$" if is_bare_formula(text) else text
    return parse(text, extraction_mode="first_match", parsing_timeout=None)


def is_bare_formula(text):
    """Whether the text is mathematics without delimiters: something more than a number, and no words."""
    if len(text) > 500 or "\n" in text or re.search(r"\$|\\[(\[]|\\boxed", text) or decimal(text) is not None:
        return False
    beyond_a_number = re.search(r"[A-Za-z\\^_{}()\[\]=<>,;:]", text)
    return bool(beyond_a_number) and not re.search(r"[A-Za-z]{3}", COMMAND.sub(" ", text))


if __name__ == "__main__":
    serve(float(sys.argv[1]))
