"""pass@k and maj@k: how often k completions of a question hold a right one, or agree on it.

Of n completions of a question, c are right (reward accuracy). Both numbers are means over all sets
of k of them, counted and not drawn:

    pass@k   1 - C(n - c, k) / C(n, k): not all of the k are wrong (Chen et al., 2107.03374, eq. 1)
    maj@k    the share of sets whose most frequent answer is right (Wang et al., 2203.11171); of t
             answers that are equally frequent, each counts 1 / t

Answers that read the same are one answer, and so are all right ones. Intervals are over questions:
more completions of the same ones do not make them narrower than the questions' own spread.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rewards import final_answer
from run.alphabet import cleaned
from run.answers import typed
from run.quantities import decimal

Z95 = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations


@dataclass
class Question:
    """The completions of one question: how many are right, and how many give each wrong answer."""

    right: int
    wrong: list[int]

    @property
    def size(self) -> int:
        return self.right + sum(self.wrong)


def pass_at_k(question: Question, k: int) -> float:
    """k from 1 to the number of completions."""
    n = question.size
    return 1 - math.comb(n - question.right, k) / math.comb(n, k)


def maj_at_k(question: Question, k: int) -> float:
    """The same."""
    won = 0.0  # sets of k that vote for the right answer
    for votes in range(1, min(question.right, k) + 1):
        ways = ways_to_vote(question.wrong, votes, k - votes)
        agreeing = math.comb(question.right, votes)
        won += agreeing * sum(number / (1 + ties) for ties, number in ways.items())
    return won / math.comb(question.size, k)


def ways_to_vote(wrong: list[int], most: int, others: int) -> dict[int, int]:
    """In how many ways `others` votes fall to wrong answers, none of which gets more than `most`:
    by the number of answers that get as many."""
    ways = Counter({(0, 0): 1})  # (votes so far, answers with `most` votes) → ways
    for count in wrong:
        further = Counter()
        for (given, ties), number in ways.items():
            for votes in range(min(count, most, others - given) + 1):
                place = (given + votes, ties + (votes == most))
                further[place] += number * math.comb(count, votes)
        ways = further
    return {ties: number for (given, ties), number in ways.items() if given == others}


# Of batches of completions ----------------------------------------------------------------------


def questions_of(run, batch, num_generations: int) -> list[Question]:
    """What accuracy says of each group of a batch (train.Batch); groups without a reference are
    left out."""
    if "accuracy" not in run.rewards.names:
        return []
    column = run.rewards.names.index("accuracy")
    texts = run.texts(batch.completions)
    found = []
    for first in range(0, len(texts), num_generations):
        group = range(first, first + num_generations)
        scores = [batch.scores[i][column] for i in group]
        if None in scores:
            continue
        wrong = [answer_of(texts[i]) for i, score in zip(group, scores) if not score]
        right = num_generations - len(wrong)
        found.append(Question(right, list(Counter(wrong).values())))
    return found


def answer_of(text: str) -> str:
    """An answer in one form: `**1,024.0**` and `\\boxed{1024}` are both 1024."""
    answer = typed(cleaned(final_answer(text)))
    return decimal(answer) or answer.casefold()


def sizes(num_generations: int) -> list[int]:
    """The k that are told of G completions: 1, 2, 4, … and G."""
    doubled = [2**i for i in range(num_generations.bit_length())]
    return sorted({*doubled, num_generations})


def metrics_of(run, batch, num_generations: int) -> dict[str, float]:
    """pass@k and maj@k of a batch. pass@1 is the mean of accuracy, and so is maj@k below 3."""
    questions = questions_of(run, batch, num_generations)
    if not questions:
        return {}
    metrics = {}
    for k in sizes(num_generations):
        if k > 1:
            metrics[f"pass@{k}"] = mean([pass_at_k(each, k) for each in questions])
        if k > 2:
            metrics[f"maj@{k}"] = mean([maj_at_k(each, k) for each in questions])
    return metrics


def means(run, batches: Iterable, num_generations: int) -> dict[str, float]:
    """What an evaluation tells of all its completions, these two among the others. Rewards that do
    not apply everywhere, and extremes, are those of the whole, however it was batched."""
    from run import log

    first, *others = batches  # of one row at least
    whole = sum(others, first)
    sizes = [(len(batch.completions), batch.metrics) for batch in (first, *others)]
    whole.metrics = log.weighted_mean(sizes)  # of drawing them
    return log.metrics_of(whole, run.rewards.names) | metrics_of(run, whole, num_generations)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# How sure that is -------------------------------------------------------------------------------


def interval(values: list[float], tries: float = math.inf) -> tuple[float, float]:
    """Between what 95 % the mean of such values lies, each from 0 to 1, one a question.

    Wilson's score interval, which stays within 0 and 1 and has a width where all values are equal.
    It counts as many questions as the spread of the values is worth: n p (1 - p) / variance. That
    is itself seen in n values, so it is never more than the independent tries behind them: tries for
    each, as G / k are for pass@k.
    """
    n, p = len(values), mean(values)
    squares = sum((value - p) ** 2 for value in values)
    worth = float(n)
    if squares > 0:
        worth = min(n * p * (1 - p) * (n - 1) / squares, max(1.0, tries) * n)
    spread = Z95**2 / worth
    middle = (p + spread / 2) / (1 + spread)
    half = math.sqrt(spread * p * (1 - p) + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
