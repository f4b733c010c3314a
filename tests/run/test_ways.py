"""What bench/ways.py asks of 2,000 answers, of a few: ten ways of writing, alone and on a busy machine."""

import pytest

from bench import ways


@pytest.mark.parametrize("busy", [0, 4])
def test_right_answers_score_one_and_wrong_ones_zero_in_ten_ways_of_writing(busy):
    answers = 2 * len(ways.WAYS) * 2 * len(ways.MATH)  # every kind of both data sets
    found, scores, _, metrics = ways.judged(answers, busy)
    assert len(found) == answers and len(ways.WAYS) == 10
    misjudged = [case for case, score in zip(found, scores) if score != case[2]]
    assert misjudged == []
    assert set(metrics.values()) == {0.0}  # no timeout, no crash, no reference that is not read
