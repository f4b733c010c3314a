"""rewards.py: the values of its rewards, a judge that nothing hangs, plugins, and one clear line for each mistake."""

import contextlib
import functools
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402
from rewards import Rewards, load_plugins, orms, total  # noqa: E402

FIXTURES = ROOT / "tests/fixtures/rewards"
GSM8K = ROOT.parent / "shared/data/gsm8k-test.jsonl"
TOWER = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"


@pytest.fixture(autouse=True)
def registry():
    before = dict(orms)
    yield
    orms.clear()
    orms.update(before)


@pytest.fixture
def make():
    made = []

    def make(*names, **options):
        made.append(Rewards(list(names), **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


@pytest.fixture(scope="module")
def accuracy():
    """accuracy(completions, solutions) -> values, with one judge for the module."""
    reward = Rewards(["accuracy"])
    reward.start()

    def accuracy(completions, solutions):
        return [row[0] for row in run(reward, completions, solution=solutions)]

    accuracy.reward = reward
    yield accuracy
    reward.close()


def run(reward, completions, ids=None, step=3, prompts=None, **columns):
    ids = ids or [[0] * 10] * len(completions)
    prompts = prompts or [[{"role": "user", "content": "?"}]] * len(completions)
    return reward(completions, prompts=prompts, completion_ids=ids, step=step, **columns)


def processes(session):
    """Pids of the processes in a session, zombies apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" ", 1)
            state, _, _, sid = rest.rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append(int(pid))
    return found


def gone_within(session, seconds):
    deadline = time.monotonic() + seconds
    while processes(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes(session)


# ── Against the peers ──


@pytest.fixture(scope="module")
def peers():
    rows = json.loads((FIXTURES / "completions.json").read_text())
    values = json.loads(gzip.decompress((FIXTURES / "peers.json.gz").read_bytes()))["values"]
    assert len(rows) == len(values) >= 500
    return rows, values


def test_format_equals_ms_swift(peers):
    rows, values = peers
    ours = [row[0] for row in run(Rewards(["format"]), [row["completion"] for row in rows])]
    assert ours == [value["swift_format"] for value in values]
    assert 20 < sum(ours) < len(ours) - 20


def test_format_asks_for_an_answer_where_trl_asks_for_a_thought_alone(peers):
    """TRL's is `^<think>(?!.*<think>)(.*?)</think>.*$`: no <answer>, but no second <think>. That is the whole difference."""
    rewards = pytest.importorskip("trl.rewards")
    texts = [row["completion"] for row in peers[0]]
    theirs = rewards.think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    ours = [row[0] for row in run(Rewards(["format"]), texts)]
    for text, a, b in zip(texts, ours, theirs):
        answered = re.search(r"</think>\s*<answer>.*</answer>\Z", text, re.DOTALL) is not None
        assert a == float(answered and (b or text.count("<think>") > 1) and text.startswith("<think>")), text


def test_format_equals_the_regular_expression_on_any_mix_of_tags():
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "x"]
    body = ["".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(20000)]
    texts = body + [f"<think>{text}</answer>" for text in body]
    ours = [row[0] for row in run(Rewards(["format"]), texts)]
    assert ours == [float(pattern.fullmatch(text) is not None) for text in texts]
    assert sum(ours) > 500


def test_format_takes_linear_time():
    texts = [
        "<think>" + "</think><answer></answer>" * 40_000,
        "<think>" + "</think> " * 100_000 + "</answer>",
    ]
    start = time.monotonic()
    run(Rewards(["format"]), texts)
    assert time.monotonic() - start < 2


def test_repetition_equals_ms_swift(peers):
    rows, values = peers
    ours = [row[0] for row in run(Rewards(["repetition"]), [row["completion"] for row in rows])]
    assert ours == pytest.approx([value["swift_repetition"] for value in values], abs=1e-9)
    assert min(ours) < -0.9


def test_repetition_equals_trl_on_word_ids(peers):
    rows, values = peers
    ours = [row[0] for row in run(Rewards(["repetition"]), [row["completion"] for row in rows])]
    assert ours == pytest.approx([value["trl_repetition"] for value in values], abs=1e-9)


@pytest.mark.parametrize("peer", ["swift", "trl"])
def test_cosine_equals(peer, peers, monkeypatch):
    rows, values = peers
    texts, ids = [row["completion"] for row in rows], [[0] * row["tokens"] for row in rows]
    cosine = Rewards(["cosine"], cosine_max_len=512)
    for verdict, correct in (("right", 1.0), ("wrong", 0.0)):
        monkeypatch.setattr(cosine.accuracy, "score", lambda c, s, correct=correct: [correct] * len(c))
        ours = [row[0] for row in run(cosine, texts, ids, step=verdict, solution=texts)]
        assert ours == pytest.approx([value[f"{peer}_cosine_{verdict}"] for value in values], abs=1e-9)


# Every difference in accuracy by its row in completions.json, under the reason why ours is right.
STATED_LAST = (
    "402 405 408 411 414 417 423 429 432 435 441 444 459 468 477 480 483 492 498 504 507 510 525 531 "
    "534 552 555 561 567 570 573 576 579 588 591 594 597 652 653 657 662 663"
)
DIFFERENCES = {
    "swift": {
        "no <answer>, no \\boxed{}: the text ends in its answer; the peer wants \\boxed{} or the word": STATED_LAST,
        "the same rule, which cannot know that a text was cut short: the spec compares the whole of it": "103 105",
        "an <answer> needs no dollar signs": "439 442 457 466 481 490 496 502 508 523 550 553 559 565 592",
        "nor does a reference, and a word is a reference too": (
            "452 453 454 455 456 460 461 462 469 470 471 488 489 511 512 513 517 526"
        ),
        "a bare formula is read whole; the peer takes one number in it for all": "448 449 463 464 472 473 580",
        "the last <answer> counts, not the first": "634 637",
        "\\dfrac34 is 3/4": "436 437 438",
    },
    "trl": {
        "no <answer>, no \\boxed{}: the text ends in its answer; the peer wants \\boxed{} or the word": STATED_LAST,
        "the same rule, which cannot know that a text was cut short: the spec compares the whole of it": "103 105",
        "an <answer> is an answer; the peer reads LaTeX alone": (
            "242 244 248 250 254 256 260 262 266 268 272 274 278 280 284 286 290 292 296 298 302 304 "
            "308 310 314 316 320 322 326 328 332 334 338 340 344 346 350 352 356 358 362 364 368 370 "
            "374 376 380 382 386 388 392 394 398 400 403 406 409 412 415 421 427 439 442 457 466 475 "
            "478 481 490 496 502 505 508 523 529 532 535 550 553 559 565 568 571 574 577 586 589 592 "
            "595 598 621 622 623 624 625 626 627 628 630 631 633 634 635 636 637 639 640 641 642 643"
        ),
        "a reference needs no dollar signs": "451 452 453 460 461 462 469 470 471 487 488 489",
        "a bare formula is read whole; the peer takes one number in it for all": "449 464 473",
        "\\dfrac34 is 3/4": "436 437 438",
    },
}


@pytest.mark.parametrize("peer", ["swift", "trl"])
def test_accuracy_equals_where_both_answer(peer, peers, accuracy):
    rows, values = peers
    ours = accuracy([row["completion"] for row in rows], [row["solution"] for row in rows])
    theirs = [value[f"{peer}_accuracy"] for value in values]
    answered = [i for i, value in enumerate(theirs) if value in (0.0, 1.0)]  # else None, or a word
    assert len(answered) > 600
    listed = [int(i) for indices in DIFFERENCES[peer].values() for i in indices.split()]
    assert [i for i in answered if theirs[i] != ours[i]] == sorted(listed)


# ── Accuracy ──


@pytest.mark.parametrize("off", [0, 1])
def test_gsm8k_answers_in_five_ways_of_writing(off, accuracy):
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")
    references = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    answers = [int(text.split("#### ")[1].replace(",", "")) + off for text in references]
    sentence = "She sells the rest for $2 each, so what she has made in the end is {}."
    ways = ["<answer>{}</answer>", r"\boxed{{{}}}", "{}.00", "${}", sentence]
    assert len(references) == 1319
    for way in ways:
        values = accuracy([way.format(answer) for answer in answers], references)
        assert values == [1.0 - off] * 1319, way


EQUAL = [
    ("<think>no 3</think><answer> 18 </answer>", "so 9 * 2 = <<9*2=18>>18\n#### 18"),
    ("<answer>17</answer> no, <answer>18</answer>", "18"),
    ("<answer>$-1,234.50</answer>", "-1234.5"),
    ("-$5", "-5"),
    (r"\boxed{70{,}000}", "70,000"),
    (r"The sum is \(\frac{1}{2}\).", "0.5"),
    ("3 + 4 = 7\n#### 7", r"The result is \boxed{7}."),
    (r"<answer>\frac{2}{4}</answer>", r"Hence the ratio is $\boxed{\frac{1}{2}}$, as claimed."),
    (r"<answer>\sqrt{12}</answer>", r"2\sqrt{3}"),
    ("<answer>(3,4)</answer>", "(3, 4)"),
    ("<answer>(x+1)^2</answer>", "x^2+2x+1"),
    ("<answer>1, 2</answer>", "2, 1"),
    ("<answer>(B)</answer>", "B"),
    ("<answer>Monday</answer>", "Monday"),
    (r"\boxed{\text{yes}}", "yes"),
    ("0.333333", r"\frac{1}{3}"),
    ("<answer>5</answer>", "<answer>5</answer>"),
    ("<answer>9" + "0" * 5000 + "</answer>", "9" + "0" * 5000),
    ("<answer>**18**</answer>", "18"),
    ("So it is **18**.", "18"),
    ("So it is `18`.", "18"),
    ('<answer>"18"</answer>', "18"),
    ("So the word is “18”.", "18"),
    ("<answer>\u22125</answer>", "-5"),
    ("<answer>12 000</answer>", "12,000"),
    ("<answer>2 * 3 * 4</answer>", "24"),
    ("<answer>17 18</answer>", "17 18"),
    ("<answer>3 + 15 = 18</answer>", "18"),
]
UNEQUAL = [
    ("<answer>17 18</answer>", "18"),
    ("<answer>" + " ".join(map(str, range(30))) + "</answer>", "29"),
    ("<answer>1 2 … 18</answer>", "18"),
    ("<answer>17=18</answer>", "18"),
    ("\\boxed{17\n18}", "18"),
    ("<answer>**17**</answer>", "18"),
    ("<answer>2</answer>", r"2\sqrt{3}"),
    ("<answer>4</answer>", "(3, 4)"),
    ("<answer>18</answer> no, <answer>17</answer>", "18"),
    (r"18 \boxed{17}", "18"),
    ("<answer>1234567.5</answer>", "1234567.6"),
    ("<answer>Tuesday</answer>", "Monday"),
    ("<answer></answer>", "5"),
    ("", "5"),
    (r"<answer>\frac{1}{3}</answer>", "0.5"),
]


def test_equal_answers_score_one_and_others_zero(accuracy):
    for cases, expected in ((EQUAL, 1.0), (UNEQUAL, 0.0)):
        values = accuracy([completion for completion, _ in cases], [reference for _, reference in cases])
        assert [case for case, value in zip(cases, values) if value != expected] == []


def test_emphasis_is_not_mistaken_for_mathematics():
    for text in ("2 * 3 * 4", r"\{a\}_{1}, \{b\}_{2}", "x_1 + y_1", "2**3 + 4**2", "f'(x) = g'(x)", "6' 2\"", "*" * 99):
        assert rewards.final_answer(text) == text


def test_a_quick_verdict_is_the_one_that_math_verify_gives():
    rng = random.Random(0)
    numbers = [
        "0",
        "7",
        "18",
        "-18",
        "1,234",
        "0.5",
        "18.00",
        "99.99",
        "0.1234567",
        "0.1234568",
        "1.0000001",
        "1",
        "-0.5",
        "12.3456789",
    ]
    numbers += [str(round(rng.uniform(-2000, 2000), rng.randrange(8))) for _ in range(20)]
    quick = [(a, b, rewards.quick_verdict(a, b)) for a in numbers for b in numbers]
    wrong = [(a, b, verdict) for a, b, verdict in quick if verdict not in (None, rewards.verdict(a, b))]
    assert wrong == []
    assert sum(verdict is not None for *_, verdict in quick) > len(quick) / 2


def test_quick_verdicts_start_no_process(make):
    reward = make("accuracy", "format")
    assert run(reward, ["<answer>18</answer>", "$18$"], solution=["#### 18", "17"]) == [
        [1.0, 0.0],
        [0.0, 0.0],
    ]
    assert reward.accuracy.judge.process is None


def test_a_missing_reference_is_left_out_and_an_unreadable_one_is_counted(make):
    reward = make("accuracy", "cosine")
    rows = run(reward, ["5", "6", "7"], solution=[None, "no number in here", ""])
    assert [row[0] for row in rows] == [None, 0.0, 0.0]
    assert rows[0] == [None, None]
    metrics = reward.metrics()
    assert metrics["rewards/accuracy/unparseable_references"] == 2  # not four: cosine asks for the same batch
    assert metrics["rewards/unscored"] == 1
    assert set(reward.metrics().values()) == {0.0}


# ── A judge that nothing hangs ──

POISON = [
    TOWER,
    r"<answer>9^{9^{9^{9^{9}}}}</answer>",
    r"\boxed{\binom{10^{9}}{5\cdot 10^{8}}}",
    r"$(10^{10^{9}})!$",
]
STRANGE = [
    "\\frac{1}{" * 3000 + "1" + "}" * 3000,
    "9" * 1_000_000,
    "$" + "9" * 1_000_000 + "$",
    "".join(map(chr, range(32))) + "17",
    "\ud800\udfff 17",
    "",
    "(" * 100_000,
    r"\boxed{" * 20_000,
]


@pytest.mark.parametrize("strange", [[TOWER, TOWER + ".", TOWER + "!", TOWER + "?"], STRANGE[:4], STRANGE[4:]])
def test_strange_and_hanging_answers_cost_one_limit_and_leave_nothing(strange, make):
    reward = make("accuracy", accuracy_timeout=3.0)
    run(reward, ["is it 5?"], solution=["5"])  # the judge is up
    session = reward.accuracy.judge.process.pid
    good = [f"The answer is {i}." if i % 2 else rf"It is \boxed{{\frac{{{i}}}{{7}}}}." for i in range(60)]
    wanted = [str(i) if i % 2 else rf"$\frac{{{i}}}{{7}}$" for i in range(60)]
    wanted[10:20] = ["1000"] * 10
    completions, solutions = list(good), list(wanted)
    bad = [0, 1, 20, 63]
    for place, poison in zip(bad, strange):
        completions.insert(place, poison)
        solutions.insert(place, "5")
    start = time.monotonic()
    values = [row[0] for row in run(reward, completions, solution=solutions)]
    assert time.monotonic() - start < 4.0
    assert len(values) == 64
    expected = iter([0.0 if 10 <= i < 20 else 1.0 for i in range(60)])
    assert values == [0.0 if i in bad else next(expected) for i in range(64)]
    if TOWER in strange:
        assert reward.metrics()["rewards/accuracy/timeouts"] == 4
    assert len(processes(session)) == 1  # the judge; its workers have ended
    reward.close()
    reward.close()
    assert processes(session) == []


def test_strange_answers_score_zero_in_bounded_time(make):
    reward = make("accuracy", accuracy_timeout=1.0)
    reward.start()
    completions = [*STRANGE, *POISON, "so 5"]
    start = time.monotonic()
    values = [row[0] for row in run(reward, completions, solution=["5"] * len(completions))]
    assert values == [0.0] * (len(completions) - 1) + [1.0]
    assert time.monotonic() - start < 1 + 1 + 2  # the judge's own start is in it
    # As references they are as harmless.
    values = [row[0] for row in run(reward, ["so 5"] * len(completions), solution=completions)]
    assert values == [0.0] * (len(completions) - 1) + [1.0]


def test_more_hanging_answers_than_workers_all_end(make):
    reward = make("accuracy", accuracy_timeout=0.5)
    completions = [f"{TOWER} {i}" for i in range(40)] + ["so 5"]
    values = [row[0] for row in run(reward, completions, solution=["5"] * 41)]
    assert values == [0.0] * 40 + [1.0]
    assert reward.metrics()["rewards/accuracy/timeouts"] == 40


def test_an_answer_that_takes_all_memory_ends_its_worker_alone():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import rewards
rewards.verdict = lambda answer, reference: "1" if bytes(int(answer) << 20) else "0"
print(rewards.judge([("1", ""), ("3000", ""), ("2", "")], timeout=5, cores=1))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(["1", "c", "1"])


def test_quick_answers_are_not_starved_by_many_that_hang(make):
    reward = make("accuracy", accuracy_timeout=3.0)
    run(reward, ["so 5"], solution=["5"])
    completions = [c for i in range(12) for c in (f"{TOWER} {i}", rf"\boxed{{x^2 + {2 * i}x + {i * i}}}")]
    solutions = [s for i in range(12) for s in ("5", f"(x + {i})^2")]
    assert [row[0] for row in run(reward, completions, solution=solutions)] == [0.0, 1.0] * 12


def test_a_killed_judge_is_replaced(make):
    reward = make("accuracy")
    assert run(reward, ["so 5"], solution=["5"]) == [[1.0]]
    os.killpg(reward.accuracy.judge.process.pid, signal.SIGKILL)
    assert run(reward, ["so 6"], solution=["6"]) == [[1.0]]


def test_an_interrupted_batch_does_not_answer_the_next_one(make):
    reward = make("accuracy")
    run(reward, ["so 5"], solution=["5"])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        sender = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -USR1 {os.getpid()}"])
        with pytest.raises(KeyboardInterrupt):
            run(reward, [TOWER, "so 1"], solution=["5", "2"])
        sender.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert run(reward, ["so 3", "so 4"], solution=["3", "4"]) == [[1.0], [1.0]]


TRAINER = """
import os, sys, time
sys.path.insert(0, {root!r})
from rewards import Rewards
reward = Rewards(["accuracy"], accuracy_timeout=60.0)
def run(completion): reward([completion], prompts=[[]], completion_ids=[[]], step=0, solution=["5"])
run("so 5")
print(reward.accuracy.judge.process.pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    "then, signal_sent",
    [
        ("", None),
        ("raise KeyError('a bug')", None),
        ("os._exit(3)", None),
        ("time.sleep(60)", signal.SIGTERM),
        ("time.sleep(60)", signal.SIGKILL),
        (f"run({TOWER!r})", signal.SIGINT),
        (f"run({TOWER!r})", signal.SIGKILL),
        # A child of the trainer's holds the judge's stdin open.
        ("if not os.fork(): time.sleep(10)\ntime.sleep(60)", signal.SIGKILL),
    ],
)
def test_no_process_outlives_the_trainer(then, signal_sent):
    code = TRAINER.format(root=str(ROOT), then=then)
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's & has it ignored
    )
    session = int(trainer.stdout.readline())
    if signal_sent:
        time.sleep(0.7)
        assert processes(session)
        trainer.send_signal(signal_sent)
    trainer.wait(10)
    assert gone_within(session, 2.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trainer.pid, signal.SIGKILL)
    trainer.stdout.close()


def test_the_judge_imports_neither_torch_nor_transformers(accuracy):
    accuracy(["so 5"], ["5"])
    maps = Path(f"/proc/{accuracy.reward.accuracy.judge.process.pid}/maps").read_text()
    assert "torch" not in maps and "numpy" not in maps


# ── Cosine and repetition ──


def test_cosine_runs_from_the_value_at_no_length_to_the_value_at_most(make):
    reward = make("cosine", max_completion_length=100)
    lengths = [0, 50, 100, 1000]
    ids = [[0] * n for n in lengths]
    values = lambda answer: [row[0] for row in run(reward, [answer] * 4, ids, solution=["5"] * 4)]  # noqa: E731
    assert values("5") == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert values("6") == pytest.approx([0.0, -0.25, -0.5, -0.5])
    quarter = run(reward, ["5"], [[0] * 25], solution=["5"])[0][0]
    assert quarter == pytest.approx(0.5 + 0.25 * (1 + math.sqrt(0.5)))


def test_cosine_takes_its_parameters(make):
    values = {
        "min_len_value_wrong": -3,
        "max_len_value_wrong": -1,
        "min_len_value_correct": 4,
        "max_len_value_correct": 2,
    }
    reward = make("cosine", cosine_max_len=10, **{f"cosine_{name}": value for name, value in values.items()})
    ids = [[], [], [0] * 10, [0] * 10]
    rows = run(reward, ["5", "6", "5", "6"], ids, solution=["5"] * 4)
    assert [row[0] for row in rows] == pytest.approx([4, -3, 2, -1])


def test_a_falling_curve_for_wrong_answers_is_said_in_one_line():
    assert Rewards(["cosine"]).notes == ["cosine: a wrong answer earns less with length, from 0.0 to -0.5"]
    rising = Rewards(["cosine"], cosine_min_len_value_wrong=-0.5, cosine_max_len_value_wrong=0.0)
    assert rising.notes == Rewards(["format"]).notes == []


def test_repetition_takes_its_parameters():
    reward = Rewards(["repetition"], repetition_n_grams=1, repetition_max_penalty=-2.0)
    assert run(reward, ["A a b B", "a", ""]) == [[-1.0], [0.0], [0.0]]


# ── Rewards of one's own ──


def plugin(tmp_path, code, name="plugin.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(code))
    return str(path)


def test_the_guides_plugin_loads_and_scores():
    load_plugins([str(ROOT / "examples/train/grpo/plugin/plugin.py")])
    assert run(Rewards(["dummy"]), ["a" * 1024, "a" * 1025]) == [[0.0], [1.0]]


def test_close_pays_for_near_misses_and_only_for_an_answer_that_is_a_whole_number():
    load_plugins([str(ROOT / "examples/train/grpo/plugin/close.py")])
    answers = ["43", "33", "-7", "44.", "", "1" * 30]
    completions = [f"<think>27 + 16</think><answer>{answer}</answer>" for answer in answers] + ["43"]
    close = Rewards(["close"])
    assert [score for (score,) in run(close, completions, solution=["43"] * 7)] == [1.0, 0.75, 0, 0, 0, 0, 0]
    assert run(close, completions[:2], solution=["43.5", None]) == [[None], [None]]  # nothing to be near to


def test_the_readmes_plugin_loads_and_scores(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    load_plugins([plugin(tmp_path, code)])
    assert run(Rewards(["brief"]), ["a" * 100, "b"], solution=["1", None]) == [[-0.1], [None]]


def test_plugins_of_every_kind(tmp_path):
    (tmp_path / "helper_of_plugin.py").write_text("VALUE = 0.25")
    load_plugins(
        [
            plugin(
                tmp_path,
                """
                from typing import List
                from swift.plugin.orm import ORM, orms
                from swift.utils import get_logger
                from helper_of_plugin import VALUE
                logger = get_logger()

                class Old(ORM):
                    def __init__(self, args=None, **kwargs):
                        super().__init__(args, **kwargs)
                    def __call__(self, completions, solution, **kwargs) -> List[float]:
                        return [VALUE + self.args.bonus] * len(solution)

                orms["old"] = Old
                """,
                "one.py",
            ),
            plugin(
                tmp_path,
                """
                from rewards import ORM, orms

                class Named:
                    def __init__(self, bonus, other=2): self.bonus = bonus * other
                    def __call__(self, completions, **kwargs): return [self.bonus] * len(completions)

                class Async(ORM):
                    async def __call__(self, completions, **kwargs): return [None] * len(completions)

                class Star:
                    def __init__(self, *args): assert not args
                    def __call__(self, completions, /, level): return level

                orms["named"], orms["instance"], orms["async"] = Named, Named(3), Async
                orms["star"], orms["builtin"] = Star, max
                orms["plain"] = lambda texts: [len(text) for text in texts]
                orms["trl"] = lambda prompts, completions, level: [l * len(c) for l, c in zip(level, completions)]
                """,
                "two.py",
            ),
        ]
    )
    reward = Rewards(["old", "named", "instance", "async", "plain", "trl", "star"], bonus=1)
    assert run(reward, ["abc"], solution=["5"], level=[2]) == [[1.25, 2.0, 6.0, None, 3.0, 6.0, 2.0]]
    with pytest.raises(RuntimeError, match="reward builtin, step 3, rows 0 to 0: returned 'abc', not a list"):
        run(Rewards(["builtin"]), ["abc"])
    Rewards(["builtin"]).check_columns([])


@pytest.mark.parametrize(
    "line",
    ["import swift.plugin", "from swift import plugin", "import swift.plugin as plugin", "from swift import utils"],
)
def test_a_plugin_imports_swift_in_any_way(tmp_path, line):
    orms_of = {"import swift.plugin": "swift.plugin", "from swift import utils": "__import__('rewards')"}
    code = f"{line}\n{orms_of.get(line, 'plugin')}.orms['mine'] = lambda completions: [0.0]"
    load_plugins([plugin(tmp_path, code)])
    load_plugins([plugin(tmp_path, code)])
    assert "mine" in orms


def test_train_py_run_as_main_shares_its_registry_with_plugins(tmp_path):
    path = plugin(
        tmp_path,
        "from rewards import orms\norms['mine'] = lambda completions, **kw: [1.0] * len(completions)",
    )
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import rewards
rewards.load_plugins([{path!r}])
print(rewards.Rewards(["mine"]).names)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "['mine']"


def test_async_rewards_run_together():
    import asyncio

    async def wait(completions, **kwargs):
        await asyncio.sleep(0.3)
        return [0.5] * len(completions)

    orms.update(a=wait, b=wait, c=wait)
    start = time.monotonic()
    assert run(Rewards(["a", "b", "c"]), ["x"]) == [[0.5] * 3]
    assert time.monotonic() - start < 0.6


def test_what_an_async_reward_keeps_lives_for_the_run(make):
    import asyncio

    queue = asyncio.Queue()

    async def put(completions, **kwargs):
        asyncio.get_running_loop().call_later(0.01, queue.put_nowait, 0.5)
        return [await queue.get()]

    orms["put"] = put
    reward = make("put")
    assert [run(reward, ["x"], step=step) for step in (1, 2)] == [[[0.5]]] * 2


def test_a_reward_that_changes_its_lists_changes_no_others():
    def spoil(completions, completion_ids, solution, **kwargs):
        completions.reverse(), solution.clear(), completion_ids[0].append(9), kwargs["prompts"].pop()
        return [0.0, 1.0]

    orms["spoil"], orms["echo"] = spoil, lambda completions, solution, **kwargs: list(map(len, solution))
    ids = [[1], [2]]
    assert run(Rewards(["spoil", "echo"]), ["a", "b"], ids, solution=["x", "yy"]) == [[0.0, 1.0], [1.0, 2.0]]
    assert ids == [[1], [2]]


def test_every_column_reaches_every_reward():
    seen = {}

    def look(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [0.0] * len(completions)

    orms["look"] = look
    prompts = [[{"role": "user", "content": "1?"}], [{"role": "user", "content": "2?"}]]
    columns = {"solution": ["1", "2"], "level": [None, 5]}
    run(Rewards(["look"]), ["a", "b"], [[1], [2, 3]], step=7, prompts=prompts, **columns)
    assert seen == dict(columns, completions=["a", "b"], prompts=prompts, completion_ids=[[1], [2, 3]], step=7)


def test_the_sum_leaves_none_out():
    assert total([[1.0, None, 2.0], [None, 0.5, None], [None, None, None]], [1.0, 10.0, -1.0]) == [
        -1.0,
        5.0,
        0.0,
    ]


def test_numbers_of_any_library_are_rewards():
    import torch

    orms["array"] = lambda completions: numpy.array([1, 2])
    orms["tensor"] = lambda completions: torch.tensor([0.5, 1.5], dtype=torch.bfloat16)
    orms["mixed"] = lambda completions: [True, torch.tensor(2.0)]
    rows = run(Rewards(["array", "tensor", "mixed"]), ["a", "b"])
    assert rows == [[1.0, 0.5, 1.0], [2.0, 1.5, 2.0]]
    assert {type(value) for row in rows for value in row} == {float}


# ── Mistakes ──


@pytest.mark.parametrize(
    "values, message",
    [
        ([0.0, math.nan], "row 1: returned nan, not a finite number or None"),
        ([math.inf, 0.0], "row 0: returned inf, not a finite number or None"),
        ([0.0, "1.0"], "row 1: returned '1.0', not a finite number or None"),
        ([0.0, [1.0]], "row 1: returned [1.0], not a finite number or None"),
        ([0.0], "rows 0 to 1: returned 1 values for 2 completions"),
        ([0.0] * 3, "rows 0 to 1: returned 3 values for 2 completions"),
        (1.0, "rows 0 to 1: returned 1.0, not a list of 2 values"),
        (None, "rows 0 to 1: returned None, not a list of 2 values"),
        ("ab", "rows 0 to 1: returned 'ab', not a list of 2 values"),
        (b"ab", "rows 0 to 1: returned b'ab', not a list of 2 values"),
        ({1.0, 2.0}, "rows 0 to 1: returned {1.0, 2.0}, not a list of 2 values"),
        ([0.0, numpy.str_("1.0")], "row 1: returned np.str_('1.0'), not a finite number or None"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_wrong_values_name_the_reward_the_step_and_the_row(values, message, is_async):
    async def later(completions, **kwargs):
        return values

    orms["mine"] = later if is_async else lambda completions, **kwargs: values
    with pytest.raises(RuntimeError, match=re.escape(f"reward mine, step 3, {message}")):
        run(Rewards(["format", "mine"]), ["a", "b"])


def test_a_reward_that_raises_is_named_and_its_rows_are_kept(tmp_path):
    def picky(completions, solution, **kwargs):
        return [1 / (len(completion) - 2) for completion in completions]

    async def later(completions, solution, **kwargs):
        return picky(completions, solution)

    for reward in (picky, later):
        orms["picky"] = reward
        output = tmp_path / reward.__name__
        with pytest.raises(RuntimeError) as caught:
            run(
                Rewards(["picky"], output_dir=str(output)),
                ["a", "bbb", "\ud800c", "d"],
                solution=list("1234"),
            )
        assert str(caught.value).startswith("reward picky, step 3, row 2: raised ZeroDivisionError: ")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        (path,) = output.iterdir()
        assert str(path) in str(caught.value)
        line = picky.__code__.co_firstlineno + 1
        assert f"zero ({__file__}:{line})" in str(caught.value)
        kept = json.loads(path.read_text())
        assert kept["traceback"][-1].startswith("ZeroDivisionError") and f"line {line}, in" in str(kept["traceback"])
        assert kept["completions"][2] == "\ud800c" and kept["solution"] == list("1234") and kept["row"] == 2


def test_a_reward_that_raises_on_the_whole_batch_alone():
    def whole(completions, **kwargs):
        assert len(completions) < 2, "too\nmany"
        return [0.0]

    orms["whole"] = whole
    with pytest.raises(RuntimeError, match=r"reward whole, step 3, rows 0 to 1: raised AssertionError: too many"):
        run(Rewards(["whole"]), ["a", "b"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"names": ["acuracy"]},
            "--reward_funcs acuracy: unknown; did you mean accuracy? known: accuracy, cosine, format, repetition",
        ),
        ({"names": ["zzz"]}, "--reward_funcs zzz: unknown; known: accuracy, cosine, format, repetition"),
        ({"names": ["format", "format"]}, "--reward_funcs format: named twice"),
        ({"names": []}, "--reward_funcs: no reward at all; name one, or a --reward_model"),
        ({"names": None}, "--reward_funcs: no reward at all; name one, or a --reward_model"),
        (
            {"names": ["format", "cosine"], "weights": [1.0]},
            "--reward_weights 1.0: must be 2 finite numbers, for format, cosine",
        ),
        (
            {"names": ["format"], "weights": [math.nan]},
            "--reward_weights nan: must be 1 finite numbers, for format",
        ),
        ({"names": ["format"], "weights": []}, "--reward_weights : must be 1 finite numbers, for format"),
        ({"names": ["cosine"], "cosine_max_len": 0}, "--cosine_max_len 0: must be 1 token or more"),
        (
            {"names": ["repetition"], "repetition_n_grams": 0},
            "--repetition_n_grams 0: must be 1 word or more",
        ),
        (
            {"names": ["repetition"], "repetition_max_penalty": 0.5},
            "--repetition_max_penalty 0.5: must be 0 or less",
        ),
        ({"names": ["accuracy"], "accuracy_timeout": 0}, "--accuracy_timeout 0: must be more than 0 seconds"),
    ],
)
def test_a_bad_flag_is_one_line(arguments, message):
    with pytest.raises(ValueError) as caught:
        Rewards(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "code, message",
    [
        ("import no_such_module", "failed to import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "failed to import: SyntaxError: "),
        ("from math import pi\nint('x' * 3)", "failed to import: ValueError: invalid literal"),
        ("import sys; sys.exit(4)", "failed to import: SystemExit: 4"),
        ("x = 1", "registers no reward; it needs a line orms['name'] = YourReward"),
        (
            "from swift.plugin import orms\norms['new'] = orms['format'] = len",
            "overwrites the built-in reward format; choose another name",
        ),
        ("from swift.plugin import orms\norms['mine'] = 3", "orms['mine'] is 3, not a class or function"),
    ],
)
def test_a_bad_plugin_is_one_line_and_leaves_no_trace(tmp_path, code, message):
    path, before = plugin(tmp_path, code), dict(orms)
    with pytest.raises(ValueError) as caught:
        load_plugins([path])
    assert str(caught.value).startswith(f"--external_plugins {path}: {message}")
    assert "\n" not in str(caught.value)
    assert orms == before
    if "ValueError" in message:
        assert f"({path}:2)" in str(caught.value)


def test_a_missing_plugin_and_two_that_clash(tmp_path):
    with pytest.raises(ValueError, match="^--external_plugins nowhere.py: no such file$"):
        load_plugins(["nowhere.py"])
    code = "from rewards import orms\norms['mine'] = lambda completions: [0.0]"
    one, two = plugin(tmp_path, code, "p1.py"), plugin(tmp_path, code, "p2.py")
    with pytest.raises(ValueError, match="p2.py: overwrites another plugin's reward mine; choose another name"):
        load_plugins([one, two])
    load_plugins([one])
    load_plugins([one])  # a second run in one process


def test_a_constructor_that_fails_is_one_line():
    class Broken(rewards.ORM):
        def __init__(self, tokenizer):
            pass

    orms["broken"] = Broken
    with pytest.raises(ValueError, match="^--reward_funcs broken: its constructor failed: TypeError: "):
        Rewards(["broken"])


def test_a_class_without_call_is_one_line():
    orms["mute"] = type("Mute", (), {})
    with pytest.raises(ValueError, match="^--reward_funcs mute: its class has no __call__$"):
        Rewards(["mute"])


def test_columns_are_checked_before_the_run():
    orms["level"] = lambda completions, level, bonus=1, **kwargs: level
    reward = Rewards(["accuracy", "format", "cosine", "repetition", "level"])
    reward.check_columns(["solution", "problem", "level"])
    with pytest.raises(ValueError, match="^--reward_funcs accuracy: needs a column solution; the dataset has level$"):
        reward.check_columns(["level"])
    with pytest.raises(ValueError, match="^--reward_funcs level: needs a column level; the dataset has solution$"):
        reward.check_columns(["solution"])
    with pytest.raises(ValueError, match="^--dataset: rename its column step; "):
        reward.check_columns(["solution", "level", "step"])
    with pytest.raises(ValueError, match="^--dataset: rename its column prompt_ids; "):
        reward.check_columns(["solution", "level", "prompt_ids"])


# ── The reward model ──

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} . {% endfor %}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """model_dir(outputs=1, template=TEMPLATE, architecture=...) saves a small random Llama and a word tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    def model_dir(name, outputs=1, template=TEMPLATE, architecture="LlamaForSequenceClassification"):
        path = tmp_path_factory.mktemp("models") / name
        words = [
            "[UNK]",
            "[PAD]",
            "<",
            ">",
            "user",
            "assistant",
            "system",
            ".",
            "good",
            "bad",
            "?",
            *map(str, range(20)),
        ]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_labels=outputs, pad_token_id=1,
        )  # fmt: skip
        getattr(transformers, architecture)(config).save_pretrained(path)
        return str(path)

    return model_dir


def test_the_reward_model_is_last_and_scores_as_one_at_a_time(model_dir, make):
    import torch
    import transformers

    path = model_dir("scorer")
    reward = make("format", reward_model=path, torch_dtype="float32", weights=[1.0, 0.5])
    assert reward.names == ["format", "scorer"] and reward.reward_model.model is None
    reward.start()
    completions = ["good " * (1 + i % 7) + str(i) for i in range(20)]
    prompts = [[{"role": "system", "content": "bad"}, {"role": "user", "content": f"{i} ?"}] for i in range(20)]
    rows = run(reward, completions, prompts=prompts)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for i, (row, completion) in enumerate(zip(rows, completions)):
        text = f"<system> bad . <user> {i} ? . <assistant> {completion} . "
        with torch.no_grad():
            score = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.item()
        assert row == [0.0, pytest.approx(score, abs=1e-5)]
    assert len({row[1] for row in rows}) == 20


def test_a_reward_model_alone_and_one_named_like_a_reward(model_dir, make):
    path = model_dir("format")
    assert make(reward_model=path).names == ["format"]
    assert make("format", reward_model=path).names == ["format", "format-model"]
    reward = make(reward_model=path)
    ((value,),) = run(reward, ["good"])
    assert math.isfinite(value) and str(reward.reward_model.model.dtype) == "torch.bfloat16"


def test_a_bad_reward_model_is_one_line(model_dir, tmp_path):
    import torch
    from safetensors.torch import load_file

    cases = [
        (model_dir("three", outputs=3), "has 3 outputs; a model with one is needed"),
        (model_dir("mute", template=None), "its tokenizer has no chat template"),
        (model_dir("headless", architecture="LlamaForCausalLM"), "its weights lack score.weight"),
        (str(tmp_path), "cannot be read: "),
        (str(tmp_path / "nowhere"), "cannot be read: "),
    ]
    for path, message in cases:
        with pytest.raises(ValueError) as caught:
            Rewards([], reward_model=path)
        assert str(caught.value).startswith(f"--reward_model {path}: {message}")
        assert "\n" not in str(caught.value)
    pickled = Path(model_dir("pickled", architecture="LlamaForCausalLM"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights lack score.weight"):
        Rewards([], reward_model=str(pickled)).start()
