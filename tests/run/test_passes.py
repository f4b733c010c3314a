"""pass@k and maj@k beside a count over all sets of k, and intervals beside what they promise."""

import itertools
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train
from run import passes
from run.passes import Question, interval, maj_at_k, pass_at_k
from sampler import Completion

RIGHT = "the right one"


def answers_of(question: Question) -> list[str]:
    wrong = [[f"wrong {i}"] * count for i, count in enumerate(question.wrong)]
    return [RIGHT] * question.right + list(itertools.chain(*wrong))


def brute_force(question: Question, k: int) -> tuple[float, float]:
    """Of all sets of k completions: the share with a right one, and the votes won, ties in parts."""
    found = won = sets = 0
    for drawn in itertools.combinations(answers_of(question), k):
        votes = Counter(drawn)
        most = max(votes.values())
        winners = [answer for answer, count in votes.items() if count == most]
        sets += 1
        found += RIGHT in drawn
        won += (RIGHT in winners) / len(winners)
    return found / sets, won / sets


def test_pass_at_k_and_maj_at_k_are_the_means_over_all_sets_of_k():
    rng = random.Random(0)
    questions = [Question(0, [3, 1]), Question(5, []), Question(1, [1]), Question(2, [2, 2, 1, 1])]
    for _ in range(20):
        wrong = [rng.randrange(1, 4) for _ in range(rng.randrange(4))]
        questions.append(Question(rng.randrange(0 if wrong else 1, 5), wrong))
    for question in questions:
        for k in range(1, question.size + 1):
            found = pass_at_k(question, k), maj_at_k(question, k)
            assert found == pytest.approx(brute_force(question, k)), (question, k)


def test_many_completions_are_counted_in_little_time():
    question = Question(8, [1] * 30 + [5, 5, 4, 12])
    assert 0 < maj_at_k(question, 32) < pass_at_k(question, 32) < 1


def batch(*answers: str, reference: str):
    """A run and a batch of its completions as passes reads them."""
    texts = [f"<think>so</think><answer>{answer}</answer>" for answer in answers]
    scores = [[0.5, 1.0 if answer == reference else 0.0] for answer in answers]
    run = SimpleNamespace(rewards=SimpleNamespace(names=["format", "accuracy"]))
    run.texts = lambda completions: completions
    return run, SimpleNamespace(completions=texts, scores=scores)


def test_answers_that_read_the_same_are_one_answer():
    same = [r"\boxed{1024}", "1,024", "**1024.0**", "1024."]
    run, drawn = batch(*same, "7", "Even", "even", "9", reference="9")
    (question,) = passes.questions_of(run, drawn, 8)
    assert question == Question(1, [4, 1, 2])


def test_groups_without_a_reference_are_left_out_and_none_has_no_metric():
    run, drawn = batch("1", "2", "1", "1", reference="1")
    drawn.scores[0][1] = drawn.scores[1][1] = None
    assert passes.questions_of(run, drawn, 2) == [Question(2, [])]
    drawn.scores = [[0.5, None]] * 4
    assert passes.metrics_of(run, drawn, 2) == {}
    run.rewards.names = ["format", "other"]
    assert passes.metrics_of(run, drawn, 2) == {}


@pytest.mark.parametrize("chance", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("tries", [1, 4])
def test_the_interval_holds_the_truth_nineteen_times_of_twenty(chance, tries):
    """Questions of their own difficulty each; the mean over all possible ones is `chance`."""
    rng, held, trials = random.Random(1), 0, 2000
    for _ in range(trials):
        values = []
        for _ in range(80):
            own = min(1.0, max(0.0, rng.choice([chance - 0.02, chance + 0.02])))
            values.append(sum(rng.random() < own for _ in range(tries)) / tries)
        low, high = interval(values)
        held += low <= chance <= high
    assert 0.93 < held / trials < 0.99


@pytest.mark.parametrize("questions", [8, 20])
@pytest.mark.parametrize("chance", [0.5, 0.7])
def test_the_interval_of_pass_at_4_holds_for_few_questions_too(questions, chance):
    """All are as hard: their values lie closer together than their number could tell."""
    rng, held, trials, G, k = random.Random(1), 0, 500, 8, 4
    for _ in range(trials):
        values = []
        for _ in range(questions):
            right = sum(rng.random() < chance for _ in range(G))
            values.append(pass_at_k(Question(right, [G - right] if right < G else []), k))
        low, high = interval(values, G / k)
        held += low <= 1 - (1 - chance) ** k <= high
    assert held / trials > 0.93


def test_an_evaluation_is_of_all_its_completions_however_they_were_batched():
    """Two questions without a reference lie in the first batch, and a long completion in the last."""

    def part(lengths, scores):
        completions = [Completion([5] * n, [-1.0] * n, True) for n in lengths]
        rewards = torch.tensor([score or 0.0 for score in scores])
        columns = [[score] for score in scores]
        metrics = {"time/reward": 1.0, "rewards/unscored": 1.0}
        return train.Batch([{}] * 4, completions, columns, rewards, rewards, metrics)

    parts = [part([3, 4, 5, 6], [None, None, 1.0, 0.0]), part([1, 2, 2, 9], [1.0, 1.0, 1.0, 0.0])]
    names = SimpleNamespace(names=["accuracy"])
    run = SimpleNamespace(rewards=names, texts=lambda done: ["1"] * len(done))
    found = passes.means(run, parts, 2)
    assert found["rewards/accuracy"] == pytest.approx(4 / 6)
    assert found["pass@2"] == 1.0
    assert (found["completion_length/min"], found["completion_length/max"]) == (1, 9)
    assert found["completion_length"] == 4 and found["reward"] == 0.5
    assert found["time/reward"] == 1.0 and found["rewards/unscored"] == 2.0


def test_an_interval_has_a_width_where_all_answers_are_right_and_narrows_with_questions():
    low, high = interval([1.0] * 50)
    assert 0.9 < low < 0.95 and high == pytest.approx(1.0)
    few, many = interval([0.0, 1.0] * 10), interval([0.0, 1.0] * 1000)
    assert few[1] - few[0] > 5 * (many[1] - many[0])
    assert interval([0.5]) == pytest.approx((0.0546, 0.9454), abs=1e-3)
