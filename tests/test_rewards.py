"""rewards.py: the values of its rewards, beside those of the peers, and what a run makes of them.

What a judge in a process of its own promises is in tests/run/test_judge.py, what plugins do is in
tests/run/test_plugins.py.
"""

import gzip
import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fixtures.rewards.classifier import save_classifier

import rewards
from rewards import CRASH, RIGHT, TIMEOUT, UNREADABLE, WRONG, Rewards, final_answer, orms, total

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/rewards"
GSM8K = ROOT.parent / "shared/data/gsm8k-test.jsonl"
ORDINARY = json.loads((FIXTURES / "ordinary.json").read_text())  # completion, reference, verdict


def run(reward, completions, ids=None, step=3, prompts=None, **columns):
    ids = ids or [[0] * 10] * len(completions)
    prompts = prompts or [[{"role": "user", "content": "?"}]] * len(completions)
    return reward(completions, prompts=prompts, completion_ids=ids, step=step, **columns)


def values_of(name, completions, ids=None, **flags):
    return [value for (value,) in run(Rewards([name], **flags), completions, ids)]


@pytest.fixture(scope="module")
def peers():
    rows = json.loads((FIXTURES / "completions.json").read_text())
    values = json.loads(gzip.decompress((FIXTURES / "peers.json.gz").read_bytes()))["values"]
    assert len(rows) == len(values) >= 500
    return rows, values


# Accuracy --------------------------------------------------------------------------------------


def test_equal_answers_score_one_and_others_zero():
    completions, solutions, verdicts = zip(*ORDINARY)
    scores = run(Rewards(["accuracy"]), list(completions), solution=list(solutions))
    wrong = [(case, s) for case, (s,) in zip(ORDINARY, scores) if s != float(case[2] == RIGHT)]
    assert wrong == [] and len(ORDINARY) >= 40
    assert Counter(verdicts)[RIGHT] > 15 and Counter(verdicts)[WRONG] > 15


@pytest.mark.parametrize("off", [0, 1])
def test_gsm8k_answers_in_five_ways_of_writing_without_a_judge(off):
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")
    references = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()][:20]
    answers = [int(text.split("#### ")[1].replace(",", "")) + off for text in references]
    sentence = "She sells the rest for $2 each, so what she has made in the end is {}."
    ways = ["<answer>{}</answer>", r"\boxed{{{}}}", "{}.00", "${}", sentence]
    for way in ways:
        completions = [way.format(answer) for answer in answers]
        rows = run(Rewards(["accuracy"]), completions, solution=references)
        assert rows == [[1.0 - off]] * len(references), way


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>17</answer> no, <answer> 18 </answer> it is", "18"),
        ("<answer>17</answer> no, <answer>18", "17"),
        ("</answer>17<answer>", "</answer>17<answer>"),
        ("4 + 4 = 8\n#### 8\n", "8"),
        ("#### 7\n4 + 4 = 8", "#### 7\n4 + 4 = 8"),
        ("<answer>4 + 4\n#### 8</answer> #### 9", "8"),
        (" So 8. ", "So 8."),
        ("", ""),
    ],
)
def test_the_final_answer_is_the_last_one_or_else_the_text(text, answer):
    assert final_answer(text) == answer


def test_a_judge_is_any_function_of_pairs_and_hears_of_each_batch_once():
    asked = []

    def judge(pairs):
        asked.append(list(pairs))
        return [RIGHT if a == b else WRONG for a, b in pairs]

    reward = Rewards(["accuracy", "cosine"], judge=judge, cosine_max_len=10)
    rows = run(reward, ["<answer>5</answer>", "6", "7"], [[], [], []], solution=[5, "5", None])
    assert rows == [[1.0, 1.0], [0.0, 0.0], [None, None]]
    assert asked == [[("5", "5"), ("6", "5")]]
    run(reward, ["5"], step=3, solution=["5"])  # another batch at the same step is asked for again
    run(reward, ["5"], step=4, solution=["5"])
    assert asked[1:] == [[("5", "5")]] * 2


def test_what_no_judge_can_tell_scores_zero_and_is_counted_by_its_kind():
    said = [UNREADABLE, TIMEOUT, CRASH, TIMEOUT, RIGHT]
    reward = Rewards(["accuracy"], judge=lambda pairs: said)
    assert run(reward, list("abcde"), solution=list("abcde")) == [[0.0]] * 4 + [[1.0]]
    counts = {"unparseable_references": 1, "timeouts": 2, "crashes": 1}
    expected = {f"rewards/accuracy/{name}": count for name, count in counts.items()}
    metrics = reward.metrics()
    assert metrics == expected | {"rewards/unscored": 0}
    assert metrics.keys() == rewards.COUNTERS
    assert set(reward.metrics().values()) == {0.0}  # each is told once


def test_a_missing_reference_is_left_out_and_an_unreadable_one_is_counted():
    reward = Rewards(["accuracy", "cosine"])
    rows = run(reward, ["5", "6", "7"], solution=[None, "no number in here", ""])
    assert [row[0] for row in rows] == [None, 0.0, 0.0]
    assert rows[0] == [None, None]
    metrics = reward.metrics()
    # Not four: cosine asks for the same batch.
    assert metrics["rewards/accuracy/unparseable_references"] == 2
    assert metrics["rewards/unscored"] == 1
    assert set(reward.metrics().values()) == {0.0}


# Format ----------------------------------------------------------------------------------------


def test_format_equals_ms_swift(peers):
    rows, values = peers
    ours = values_of("format", [row["completion"] for row in rows])
    assert ours == [value["swift_format"] for value in values]
    assert 20 < sum(ours) < len(ours) - 20


def test_format_asks_for_an_answer_where_trl_asks_for_a_thought_alone(peers):
    """TRL's is `^<think>(?!.*<think>)(.*?)</think>.*$`: no <answer>, but no second <think>.

    That is the whole difference.
    """
    theirs = pytest.importorskip("trl.rewards").think_format_reward
    texts = [row["completion"] for row in peers[0]]
    theirs = theirs([[{"role": "assistant", "content": text}] for text in texts])
    for text, a, b in zip(texts, values_of("format", texts), theirs):
        answered = re.search(r"</think>\s*<answer>.*</answer>\Z", text, re.DOTALL) is not None
        one_thought = b or text.count("<think>") > 1
        assert a == float(answered and one_thought and text.startswith("<think>")), text


def test_format_equals_the_regular_expression_on_any_mix_of_tags():
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "x"]
    body = ["".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(20000)]
    texts = body + [f"<think>{text}</answer>" for text in body]
    ours = values_of("format", texts)
    assert ours == [float(pattern.fullmatch(text) is not None) for text in texts]
    assert sum(ours) > 500


def test_format_takes_linear_time():
    texts = [
        "<think>" + "</think><answer></answer>" * 40_000,
        "<think>" + "</think> " * 100_000 + "</answer>",
    ]
    start = time.process_time()
    values_of("format", texts)
    assert time.process_time() - start < 2  # the regular expression would take minutes


# Cosine and repetition -------------------------------------------------------------------------


@pytest.mark.parametrize("peer", ["swift", "trl"])
def test_cosine_equals(peer, peers):
    rows, values = peers
    texts, ids = [row["completion"] for row in rows], [[0] * row["tokens"] for row in rows]
    for said, word in ((RIGHT, "right"), (WRONG, "wrong")):
        judge = lambda pairs, said=said: [said] * len(pairs)  # noqa: E731
        cosine = Rewards(["cosine"], cosine_max_len=512, judge=judge)
        ours = [value for (value,) in run(cosine, texts, ids, solution=texts)]
        theirs = [value[f"{peer}_cosine_{word}"] for value in values]
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_cosine_runs_from_the_value_at_no_length_to_the_value_at_most():
    reward = Rewards(["cosine"], max_completion_length=100)
    ids = [[0] * n for n in (0, 50, 100, 1000)]

    def values(answer):
        return [row[0] for row in run(reward, [answer] * 4, ids, solution=["5"] * 4)]

    assert values("5") == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert values("6") == pytest.approx([0.0, -0.25, -0.5, -0.5])
    quarter = run(reward, ["5"], [[0] * 25], solution=["5"])[0][0]
    assert quarter == pytest.approx(0.5 + 0.25 * (1 + math.sqrt(0.5)))


def test_cosine_takes_its_parameters():
    curves = {
        "cosine_min_len_value_wrong": -3,
        "cosine_max_len_value_wrong": -1,
        "cosine_min_len_value_correct": 4,
        "cosine_max_len_value_correct": 2,
    }
    reward = Rewards(["cosine"], cosine_max_len=10, max_completion_length=99, **curves)
    ids = [[], [], [0] * 10, [0] * 10]
    rows = run(reward, ["5", "6", "5", "6"], ids, solution=["5"] * 4)
    assert [row[0] for row in rows] == pytest.approx([4, -3, 2, -1])


def punishment(length: int, longest: int, cache: int) -> float:
    """DAPO (arXiv 2503.14476), equation 13, case by case."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return (longest - cache - length) / cache
    return -1.0


@pytest.mark.parametrize(
    "flags, longest, cache",
    [
        ({"soft_max_length": 100, "soft_cache_length": 30, "max_completion_length": 512}, 100, 30),
        ({"max_completion_length": 50}, 50, 10),
        ({"soft_max_length": 3, "max_completion_length": 50}, 3, 1),
    ],
)
def test_soft_overlong_is_dapos_punishment_at_every_length(flags, longest, cache):
    lengths = range(1, 2 * longest)
    ids = [[0] * length for length in lengths]
    ours = values_of("soft_overlong", ["any"] * len(ids), ids, **flags)
    assert ours == pytest.approx([punishment(length, longest, cache) for length in lengths])


def test_repetition_equals_ms_swift(peers):
    rows, values = peers
    ours = values_of("repetition", [row["completion"] for row in rows])
    assert ours == pytest.approx([value["swift_repetition"] for value in values], abs=1e-9)
    assert min(ours) < -0.9


def test_repetition_equals_trl_on_word_ids(peers):
    rows, values = peers
    ours = values_of("repetition", [row["completion"] for row in rows])
    assert ours == pytest.approx([value["trl_repetition"] for value in values], abs=1e-9)


def test_repetition_takes_its_parameters():
    flags = {"repetition_n_grams": 1, "repetition_max_penalty": -2.0}
    assert values_of("repetition", ["A a b B", "a", ""], **flags) == [-1.0, 0.0, 0.0]


# All of a run's rewards ------------------------------------------------------------------------


@pytest.fixture
def registry():
    before = dict(orms)
    yield orms
    orms.clear()
    orms.update(before)


def test_every_column_reaches_every_reward(registry):
    seen = {}

    def look(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [0.0] * len(completions)

    registry["look"] = look
    prompts = [[{"role": "user", "content": "1?"}], [{"role": "user", "content": "2?"}]]
    columns = {"solution": ["1", "2"], "level": [None, 5]}
    run(Rewards(["look"]), ["a", "b"], [[1], [2, 3]], step=7, prompts=prompts, **columns)
    given = {"completions": ["a", "b"], "completion_ids": [[1], [2, 3]], "step": 7}
    assert seen == columns | given | {"prompts": prompts}


def test_a_class_is_made_with_the_flags_that_its_constructor_names(registry):
    class Named(rewards.ORM):
        def __init__(self, bonus, other=2, args=None):
            super().__init__(args)
            self.value = [bonus, other, args.bonus, args.repetition_n_grams]

        def __call__(self, completions, **columns):
            return self.value

    registry["named"] = Named
    assert values_of("named", list("abcd"), bonus=1, another=5) == [1, 2, 1, 3]


def test_rows_have_a_value_a_reward_and_none_counts_as_unscored(registry):
    registry["never"] = lambda completions, **columns: [None] * len(completions)
    registry["length"] = lambda completions, **columns: [len(text) or None for text in completions]
    reward = Rewards(["never", "length"])
    assert reward.names == ["never", "length"] and reward.weights == [1.0, 1.0]
    assert run(reward, ["abc", ""]) == [[None, 3], [None, None]]
    assert reward.metrics() == {"rewards/unscored": 1.0}  # and no counters of accuracy


def test_the_sum_leaves_none_out():
    rows = [[1.0, None, 2.0], [None, 0.5, None], [None, None, None]]
    assert total(rows, [1.0, 10.0, -1.0]) == [-1.0, 5.0, 0.0]


def test_rewards_are_imported_without_torch():
    code = "import sys, rewards; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# The reward model ------------------------------------------------------------------------------


def test_the_reward_model_is_last_and_scores_as_one_at_a_time(tmp_path):
    import torch
    import transformers

    scorer = save_classifier(tmp_path / "scorer")
    reward = Rewards(["format"], [1.0, 0.5], reward_model=scorer, torch_dtype="float32")
    assert reward.names == ["format", "scorer"] and reward.functions[-1].model is None
    reward.start()
    completions = ["good " * (1 + i % 7) + str(i) for i in range(20)]
    system = {"role": "system", "content": "bad"}
    prompts = [[system, {"role": "user", "content": f"{i} ?"}] for i in range(20)]
    rows = run(reward, completions, prompts=prompts)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        scorer, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(scorer)
    for i, (row, completion) in enumerate(zip(rows, completions)):
        text = f"<system> bad . <user> {i} ? . <assistant> {completion} . "
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            score = model(**inputs).logits.item()
        assert row == [0.0, pytest.approx(score, abs=1e-5)]
    assert len({row[1] for row in rows}) == 20


def test_a_reward_model_alone_and_one_named_like_a_reward(tmp_path):
    path = save_classifier(tmp_path / "format")
    assert Rewards([], reward_model=path).names == ["format"]
    assert Rewards(["format"], reward_model=path).names == ["format", "format-model"]
    reward = Rewards([], reward_model=path)
    ((value,),) = run(reward, ["good"])
    assert math.isfinite(value) and str(reward.functions[-1].model.dtype) == "torch.bfloat16"
