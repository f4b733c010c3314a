r"""Rewards: what a completion is worth, by rules, by functions of your own, by a reward model.

    completions ─┬─ accuracy ── 1.0, 0.0, …  ─┐
                 ├─ format ──── 1.0, 1.0, …  ─┼─ one row a completion ── total() ── r
                 └─ your own ── None, 0.3, … ─┘  (None: does not apply)

A reward is a function of a batch, `reward(completions, **columns)`. It returns a list, one number or
None a completion. `columns` are those of the dataset, as lists, and `prompts` (chat messages),
`completion_ids` (token ids) and `step`. To try an idea, write one in a file of its own, register it
in `orms`, and name the file in --external_plugins.

accuracy and format come from DeepSeek-R1 (arXiv 2501.12948, section 2.2.2), cosine and repetition
from Demystifying Long Chain-of-Thought Reasoning (arXiv 2502.03373, appendix C).

Two things are left out here, and handed over by a run: a judge that no answer can hang
(run/judge.py), and all that a plugin may do otherwise: be async, take only some columns, go wrong
(run/plugins.py).
"""

import inspect
import math
import re
import types
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data import text_of


@dataclass(frozen=True)
class Options:
    """rewards"""

    reward_funcs: Annotated[
        list[str], "accuracy, format, cosine, repetition, soft_overlong, registered names"
    ] = ()
    reward_weights: Annotated[list[float] | None, "one a reward; all 1 when absent"] = None
    reward_model: Annotated[str | None, "sequence classifier, hub id or folder; comes last"] = None
    external_plugins: Annotated[list[str], "Python files that register rewards"] = ()
    accuracy_timeout: Annotated[float, "seconds for comparing one answer", "above 0"] = 5.0
    cosine_min_len_value_wrong: Annotated[float, "value of the shortest wrong answer"] = 0.0
    cosine_max_len_value_wrong: Annotated[float, "value of the longest wrong answer"] = -0.5
    cosine_min_len_value_correct: Annotated[float, "value of the shortest right answer"] = 1.0
    cosine_max_len_value_correct: Annotated[float, "value of the longest right answer"] = 0.5
    cosine_max_len: Annotated[int | None, "in tokens; else max_completion_length", "from 1"] = None
    soft_max_length: Annotated[
        int | None, "soft_overlong: tokens that earn -1; else max_completion_length", "from 1"
    ] = None
    soft_cache_length: Annotated[
        int | None, "soft_overlong: it falls over so many before; else a fifth", "from 1"
    ] = None
    repetition_n_grams: Annotated[int, "n of the n-grams counted", "from 1"] = 3
    repetition_max_penalty: Annotated[float, "value of nothing but repetition"] = -1.0


# What a judge says of an answer. The last three score 0.0 and are counted under these names.
RIGHT, WRONG, UNREADABLE, TIMEOUT, CRASH = "1", "0", "?", "t", "c"
COUNTED = {UNREADABLE: "unparseable_references", TIMEOUT: "timeouts", CRASH: "crashes"}
COUNTERS = {"rewards/unscored", *(f"rewards/accuracy/{name}" for name in COUNTED.values())}


def verify(pairs: list[tuple[str, str]]) -> list[str]:
    """The plain judge: does an answer equal its reference? One verdict a pair.

    It takes `23 + 40` for 63, as math_verify does; a run does not (run/answers.py).
    """
    import math_verify  # its own limit, a few seconds an answer, works in a main thread only

    verdicts = []
    for answer, reference in pairs:
        gold = math_verify.parse(delimited(reference))  # an empty list where it reads nothing
        equal = math_verify.verify(gold, math_verify.parse(delimited(answer)))
        if not gold:
            verdicts.append(UNREADABLE)
        else:
            verdicts.append(RIGHT if equal else WRONG)
    return verdicts


def delimited(text: str) -> str:
    r"""A formula between dollar signs: of a bare 2\sqrt{3}, math_verify would read the 2 alone."""
    # Two letters in a row that are no command's are a word, as in "so 18": that is a sentence.
    sentence_or_delimited = r"(?<![\\A-Za-z])[A-Za-z]{2}|\$|\\boxed|\\\(|\n"
    return text if re.search(sentence_or_delimited, text) else f"${text}$"


def final_answer(text: str) -> str:
    """What states the answer: the last <answer>, a last line's `#### 18`, or else the whole text."""
    # Models change their mind: the last answer counts, and one that is never closed does not.
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        text = text[start + len("<answer>") : end]
    # GSM8K's references are whole solutions whose last line is `#### 18`.
    last_line = text.strip().rpartition("\n")[2]
    if "####" in last_line:
        text = last_line.rpartition("####")[2]
    return text.strip()


class ORM:
    """Base class of rewards (ms-swift's name: outcome reward model). `__call__` may be `async def`.

    A subclass is made when the run starts. Its constructor gets the flags that it names, and
    `args`, all of them.
    """

    def __init__(self, args=None, **kwargs):
        self.args = args

    def __call__(self, completions: list[str], **kwargs) -> list[float | None]:
        raise NotImplementedError


AsyncORM = ORM  # ms-swift has two


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no list of numbers."""


class Accuracy(ORM):
    """1.0 where a completion's answer equals the reference `solution`, else 0.0; None without one.

    judge: any callable from (answer, reference) pairs to verdicts.
    """

    def __init__(self, judge=verify):
        self.judge = judge
        self.counts = Counter()  # verdict → completions, until Rewards.metrics takes them
        self.last = None, []  # the last batch, and what it scored

    def __call__(self, completions, *, solution, step=None, **kwargs):
        batch = step, list(completions), list(solution)
        if batch != self.last[0]:  # cosine asks for the same batch again
            self.last = batch, self.score(completions, solution)
        return list(self.last[1])

    def score(self, completions, solution):
        # The judge hears only of what has a reference; the others stay None.
        known = [i for i, reference in enumerate(solution) if reference is not None]
        pairs = []
        for i in known:
            reference = text_of(solution[i])  # which a dataset may have as a number
            pairs.append((final_answer(completions[i]), final_answer(reference)))
        verdicts = self.judge(pairs)  # one a pair
        self.counts.update(verdicts)
        values = [None] * len(completions)
        for i, verdict in zip(known, verdicts):
            values[i] = float(verdict == RIGHT)
        return values


class Format(ORM):
    r"""1.0 where the whole completion is <think>…</think><answer>…</answer>, else 0.0."""

    def __call__(self, completions, **kwargs):
        return [float(self.matches(completion)) for completion in completions]

    def matches(self, text):
        # <think>.*?</think>\s*<answer>.*?</answer> says the same, in quadratic time; this is linear.
        if text.startswith("<think>") and text.endswith("</answer>"):
            return re.search(r"</think>\s*<answer>", text) is not None
        return False


class Cosine(ORM):
    """Correctness scaled by length: half a cosine over t = generated tokens / cosine_max_len ≤ 1,

        r = max_len_value + (min_len_value - max_len_value) (1 + cos πt) / 2

    With the defaults a correct answer earns less the longer it is, and so does a wrong one:

        correct  1.0 ─╮                   wrong   0.0 ─╮
                      ╰─ 0.5                           ╰─ -0.5
                 0 … cosine_max_len                0 … cosine_max_len

    The paper lets wrong answers earn more with length, to encourage longer thinking. To have that,
    raise the second curve: cosine_min_len_value_wrong -0.5, cosine_max_len_value_wrong 0.0.
    """

    def __init__(self, args, accuracy):
        self.accuracy = accuracy  # which answers are right
        self.wrong = args.cosine_min_len_value_wrong, args.cosine_max_len_value_wrong
        self.correct = args.cosine_min_len_value_correct, args.cosine_max_len_value_correct
        self.max_len = args.cosine_max_len
        if self.max_len is None:
            self.max_len = args.max_completion_length

    def __call__(self, completions, *, solution, completion_ids, step=None, **kwargs):
        correct = self.accuracy(completions, solution=solution, step=step)
        return [self.value(is_right, len(ids)) for is_right, ids in zip(correct, completion_ids)]

    def value(self, is_right, length):
        if is_right is None:  # no reference
            return None
        shortest, longest = self.correct if is_right else self.wrong
        t = min(length / self.max_len, 1.0)  # 0 for no token, 1 for max_len and more
        return longest + (shortest - longest) * (1 + math.cos(math.pi * t)) / 2


class Repetition(ORM):
    """(1 - distinct / all) n-grams of lower-cased words, times the penalty, which is at most 0."""

    def __init__(self, repetition_n_grams, repetition_max_penalty):
        self.n, self.penalty = repetition_n_grams, repetition_max_penalty

    def __call__(self, completions, **kwargs):
        return [self.value(completion.lower().split()) for completion in completions]

    def value(self, words):
        # "a b c d" has the 3-grams (a, b, c) and (b, c, d).
        grams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        if not grams:  # fewer words than n
            return 0.0
        return (1 - len(set(grams)) / len(grams)) * self.penalty


class SoftOverlong(ORM):
    """0 for completions with room to spare, then in a line down to -1 (DAPO, arXiv 2503.14476,
    equation 13). In tokens:

        0 ──────────────────╮
                             ╲
                              ╰── -1
        0 … max - cache … max_length
    """

    def __init__(self, soft_max_length, soft_cache_length, max_completion_length):
        self.max_length = soft_max_length or max_completion_length
        self.cache = soft_cache_length or max(1, self.max_length // 5)

    def __call__(self, completions, *, completion_ids, **kwargs):
        return [self.value(len(ids)) for ids in completion_ids]

    def value(self, length):
        beyond = length - (self.max_length - self.cache)
        return -min(max(beyond / self.cache, 0.0), 1.0)


def load_scorer(path, torch_dtype):
    """The plain loader: a model, its tokenizer, and how many chats to score at once: one.

    More need padding, of which models' files often say nothing or what is wrong (run/scorer.py).
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch_dtype)
    return model, AutoTokenizer.from_pretrained(path), 1


class RewardModel:
    """A sequence classifier with one output, on prompt and completion in its own chat template."""

    def __init__(self, path, torch_dtype, device, load=load_scorer):
        self.path, self.torch_dtype, self.device = path, torch_dtype, device
        self.load, self.model = load, None

    def start(self):
        if self.model is None:
            model, self.tokenizer, self.batch_size = self.load(self.path, self.torch_dtype)
            self.model = model.to(self.device).eval()

    def __call__(self, completions, *, prompts, **kwargs):
        import torch

        self.start()
        # A chat is its prompt's turns and the completion as the assistant's.
        answers = [[{"role": "assistant", "content": completion}] for completion in completions]
        chats = [[*prompt, *answer] for prompt, answer in zip(prompts, answers)]
        # The template writes the special tokens, so the tokenizer adds none below.
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False)
        options = {"add_special_tokens": False, "return_tensors": "pt"}
        options["padding"] = self.batch_size > 1
        scores = []
        for i in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(texts[i : i + self.batch_size], **options)
            with torch.inference_mode():
                logits = self.model(**inputs.to(self.device)).logits  # (batch_size, 1)
            scores += logits[:, 0].tolist()
        return scores


# name → a function, or a class that is made with the run's flags
orms = {"accuracy": Accuracy, "format": Format, "cosine": Cosine, "repetition": Repetition}
orms["soft_overlong"] = SoftOverlong
BUILT_IN = dict(orms)


class Rewards:
    """The rewards of a run: `names` in order, then the reward model, named after its folder.

    weights: one a reward, the reward model's last; None makes all 1.0. judge: Accuracy's, `verify`
    when None. flags: the run's flags, of which each reward class gets those it names.
    Construction loads no model and starts no process: `start` does, or else the first call.
    """

    load_scorer = staticmethod(load_scorer)

    def __init__(
        self, names, weights=None, *, judge=None, reward_model=None, device="cpu", **flags
    ):
        # A run gives every flag. In a notebook one gives few, and the rest is as declared above;
        # these two are declared by other modules.
        others = {"max_completion_length": 512, "torch_dtype": "bfloat16"}
        flags = others | vars(Options()) | flags
        flags |= {"args": types.SimpleNamespace(**flags), "judge": judge or verify}
        self.accuracy = None
        self.helpers = []  # what start() starts and close() closes
        if "accuracy" in names or "cosine" in names:
            # One for both, so that each answer is judged once and counted once.
            self.accuracy = self.make("accuracy", flags)
            self.helpers.append(self.accuracy.judge)
        flags["accuracy"] = self.accuracy
        self.names = list(names)
        self.functions = []
        for name in names:
            function = self.accuracy if name == "accuracy" else self.make(name, flags)
            self.functions.append(function)
        if reward_model:
            model = RewardModel(reward_model, flags["torch_dtype"], device, self.load_scorer)
            self.functions.append(model)
            self.helpers.append(model)
            name = Path(reward_model).resolve().name
            self.names.append(f"{name}-model" if name in names else name)
        self.weights = [1.0] * len(self.names) if weights is None else weights
        self.unscored = 0  # completions to which no reward applied, until metrics() takes them

    def make(self, name, flags):
        """The registered reward, ready to call: a class gets the flags that its constructor names."""
        reward = orms[name]
        if not isinstance(reward, type):
            return reward
        wanted = []
        for parameter in inspect.signature(reward).parameters.values():
            if parameter.kind is not parameter.VAR_POSITIONAL:  # *args are not `args`
                wanted.append(parameter.name)
        return reward(**{flag: value for flag, value in flags.items() if flag in wanted})

    def start(self) -> None:
        """Start the judge, which gets ready in the background, and load the reward model."""
        for helper in self.helpers:
            if hasattr(helper, "start"):  # `verify` has none
                helper.start()

    def close(self) -> None:
        """End the judge."""
        for helper in self.helpers:
            if hasattr(helper, "close"):
                helper.close()

    def __call__(self, completions, *, prompts, completion_ids, step, **columns):
        """One row a completion, one column a reward: float, or None where it does not apply.

        completions: N texts. prompts: their chats. completion_ids: their tokens, as they were
        sampled. columns: N values each. What a reward raises passes through; a run has
        run/plugins.CheckedRewards, which makes it a RewardError that names reward, step and row.
        """
        columns |= {"prompts": prompts, "completion_ids": completion_ids, "step": step}
        by_reward = self.evaluate(completions, columns)  # one list of N a reward
        rows = [list(row) for row in zip(*by_reward, strict=True)]  # N rows
        for row in rows:
            self.unscored += all(value is None for value in row)
        return rows

    def evaluate(self, completions, columns) -> list[list[float | None]]:
        """What each reward gives for the batch."""
        return [function(completions, **columns) for function in self.functions]

    def metrics(self) -> dict[str, float]:
        """COUNTERS since the last call, as numbers that ranks can add."""
        counts = {"rewards/unscored": float(self.unscored)}
        self.unscored = 0
        if self.accuracy:
            for verdict, name in COUNTED.items():
                counts[f"rewards/accuracy/{name}"] = float(self.accuracy.counts[verdict])
            self.accuracy.counts.clear()
        return counts


def total(rows: list[list[float | None]], weights: list[float]) -> list[float]:
    """The weighted sum of each row without its None entries.

    A row of None alone gives 0.0: its completion stays in its group, as one that earned nothing,
    and is counted in `rewards/unscored`.
    """
    sums = []
    for row in rows:
        terms = [w * r for w, r in zip(weights, row, strict=True) if r is not None]
        sums.append(sum(terms, 0.0))  # a float even where no term is left
    return sums
