"""run/judge.py: verdicts in real processes, which no answer hangs and which outlive no trainer."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rewards
from data import UsageError
from rewards import RIGHT, TIMEOUT, WRONG, Rewards, final_answer
from run import judge as judge_module
from run.judge import Judge
from run.plugins import CheckedRewards

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURES = ROOT / "tests/fixtures/rewards"
GSM8K = ROOT.parent / "shared/data/gsm8k-test.jsonl"
TOWER = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"


@pytest.fixture(scope="module")
def judge():
    """One judge for the tests that need none of their own. Its limit is beyond any busy machine."""
    judge = Judge(60.0)
    judge.start()
    yield judge
    judge.close()


@pytest.fixture
def make():
    """make(timeout) -> a judge of its own, which has started."""
    made = []

    def make(timeout):
        made.append(Judge(timeout))
        assert made[-1]([("is it 5?", "5")]) == [RIGHT]
        return made[-1]

    yield make
    for judge in made:
        judge.close()


def accuracy(judge, completions, solutions):
    """Values, and what was counted."""
    reward = Rewards(["accuracy"], judge=judge)
    about = {"prompts": [[]] * len(completions), "completion_ids": [[]] * len(completions)}
    rows = reward(list(completions), step=0, solution=list(solutions), **about)
    return [value for (value,) in rows], reward.metrics()


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


# What it says ----------------------------------------------------------------------------------


def test_the_judge_says_what_plain_verify_says_on_ordinary_answers(judge):
    ordinary = json.loads((FIXTURES / "ordinary.json").read_text())
    pairs = [(final_answer(text), final_answer(reference)) for text, reference, _ in ordinary]
    assert len(set(pairs)) >= 40
    plain, ours = rewards.verify(pairs), judge(pairs)
    assert [case for case in zip(pairs, plain, ours) if case[1] != case[2]] == []
    assert ours == [verdict for *_, verdict in ordinary]


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
    ("<answer>2 * 3 * 4 = 24</answer>", "24"),
    ("<answer>17 18</answer>", "17 18"),
    ("<answer>3 + 15 = 18</answer>", "18"),
    ("<answer>1e5</answer>", "100000"),
    ("So each pays \\$4.75.", r"\$4.75"),
    ("<answer>x < 8</answer>", r"(-\infty, 8)"),
    ("所以答案是 9√2。", r"9\sqrt{2}"),
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


def test_equal_answers_score_one_and_others_zero_with_a_judge(judge):
    for cases, expected in ((EQUAL, 1.0), (UNEQUAL, 0.0)):
        values, _ = accuracy(judge, *zip(*cases))
        assert [case for case, value in zip(cases, values) if value != expected] == []


@pytest.mark.parametrize("off", [0, 1])
def test_all_gsm8k_answers_in_five_ways_of_writing(off, judge):
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")
    references = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    answers = [int(text.split("#### ")[1].replace(",", "")) + off for text in references]
    sentence = "She sells the rest for $2 each, so what she has made in the end is {}."
    ways = ["<answer>{}</answer>", r"\boxed{{{}}}", "{}.00", "${}", sentence]
    assert len(references) == 1319
    for way in ways:
        values, _ = accuracy(judge, [way.format(answer) for answer in answers], references)
        assert values == [1.0 - off] * 1319, way


def test_towers_and_fractions_in_fractions_time_out(make):
    rows = json.loads((FIXTURES / "completions.json").read_text())
    slow = [rows[i] for i in (580, 581, 582, 646)]
    values, metrics = accuracy(
        make(1.0), [row["completion"] for row in slow], [row["solution"] for row in slow]
    )
    assert values == [0.0] * 4 and metrics["rewards/accuracy/timeouts"] == 4


# Its process -----------------------------------------------------------------------------------


def test_quick_verdicts_start_no_process():
    judge = Judge(5.0)
    assert judge([("**18**", "18"), ("$18$", "17"), ("5", "")]) == [RIGHT, WRONG, "?"]
    assert judge.process is None


def test_a_limit_of_no_time_is_one_line():
    with pytest.raises(UsageError, match="^--accuracy_timeout 0: must be more than 0 seconds$"):
        Judge(0)


def test_the_judge_imports_neither_torch_nor_transformers(judge):
    judge([("so 5", "5")])
    maps = Path(f"/proc/{judge.process.pid}/maps").read_text()
    assert "torch" not in maps and "numpy" not in maps


def test_rewards_start_and_close_their_judge():
    judge = Judge(5.0)
    reward = Rewards(["accuracy"], judge=judge)
    assert judge.process is None
    reward.start()
    session = judge.process.pid
    reward.start()
    assert judge.process.pid == session and processes(session)
    reward.close()
    reward.close()
    assert gone_within(session, 2.5)


def test_a_killed_judge_is_replaced_wherever_the_trainer_stands(judge, tmp_path, monkeypatch):
    judge.start()
    first = judge.process.pid
    os.killpg(first, signal.SIGKILL)
    monkeypatch.chdir(tmp_path)
    assert judge([("so 6", "6")]) == [RIGHT]
    assert judge.process.pid != first


def test_a_judge_that_ends_again_on_a_batch_is_an_error(monkeypatch):
    monkeypatch.setattr(judge_module.sys, "executable", "true")
    with pytest.raises(RuntimeError, match="ended, or fell silent, twice on one batch"):
        Judge(5.0)([("so 6", "6")])


def test_a_judge_that_is_stopped_is_replaced_and_counted(make, monkeypatch):
    judge = make(5.0)
    first = judge.process.pid
    start = judge.start

    def start_patiently():
        """A new one gets its time to import what it needs."""
        monkeypatch.setattr(judge_module, "SILENCE", 60.0 if judge.process is None else 2.0)
        start()

    monkeypatch.setattr(judge, "start", start_patiently)
    os.kill(first, signal.SIGSTOP)
    reward = CheckedRewards(["accuracy"], judge=judge)
    about = {"prompts": [[]], "completion_ids": [[]], "step": 0, "solution": ["6"]}
    assert reward(["so it is 6, is it?"], **about) == [[1.0]]
    assert gone_within(first, 2.5) and judge.process.pid != first
    assert reward.metrics()[judge_module.RESTARTS] == 1.0
    assert reward.metrics()[judge_module.RESTARTS] == 0.0


def test_a_judge_that_takes_longer_than_silence_is_not_replaced(make, monkeypatch):
    judge = make(6.0)
    first = judge.process.pid
    monkeypatch.setattr(judge_module, "SILENCE", 3.0)
    assert judge([(TOWER, "5")]) == [TIMEOUT]
    assert judge.process.pid == first and judge.restarts == 0


def test_a_worker_that_is_stopped_costs_its_answer_a_limit(make):
    """A stopped process gets no signal of a timer."""
    judge = make(0.5)
    thread = threading.Thread(target=lambda: verdicts.extend(judge([(TOWER, "5"), ("6?", "6")])))
    verdicts = []
    thread.start()
    session = judge.process.pid
    deadline = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < deadline:
        for worker in set(processes(session)) - {session}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGSTOP)
            deadline = 0.0
    thread.join(60)
    assert not thread.is_alive() and verdicts[0] == TIMEOUT
    assert processes(session) == [session]


# Answers that hang it --------------------------------------------------------------------------

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
HANGING = [TOWER, TOWER + ".", TOWER + "!", TOWER + "?"]


def test_what_never_returns_costs_its_limit_once_and_leaves_nothing(make):
    """Four answers that hang, or are strange, among sixty: the sixty are judged as ever."""
    limit = 1.0
    judge = make(limit)
    session = judge.process.pid
    good = [
        f"The answer is {i}." if i % 2 else rf"It is \boxed{{\frac{{{i}}}{{7}}}}."
        for i in range(60)
    ]
    wanted = [str(i) if i % 2 else rf"$\frac{{{i}}}{{7}}$" for i in range(60)]
    wanted[10:20] = ["1000"] * 10
    bad = [0, 1, 20, 63]
    for strange in (HANGING, STRANGE[:4], STRANGE[4:]):
        completions, solutions = list(good), list(wanted)
        for place, poison in zip(bad, strange):
            completions.insert(place, poison)
            solutions.insert(place, "5")
        start = time.monotonic()
        values, metrics = accuracy(judge, completions, solutions)
        taken = time.monotonic() - start
        assert taken < 30 * limit  # of real time, however busy the machine is
        expected = iter([0.0 if 10 <= i < 20 else 1.0 for i in range(60)])
        assert values == [0.0 if i in bad else next(expected) for i in range(64)]
        if strange is HANGING:
            assert taken >= limit and metrics["rewards/accuracy/timeouts"] == 4
        assert processes(session) == [session]  # the judge; its workers have ended
    judge.close()
    judge.close()
    assert processes(session) == []


def test_strange_answers_score_zero_in_bounded_time_as_answers_and_as_references(make):
    judge = make(0.25)
    texts = [*STRANGE, *POISON, "so 5"]
    fives = ["5"] * len(texts)
    for completions, solutions in ((texts, fives), (["so 5"] * len(texts), texts)):
        start = time.monotonic()
        values, _ = accuracy(judge, completions, solutions)
        assert values == [0.0] * (len(texts) - 1) + [1.0]
        assert time.monotonic() - start < 60


def test_more_hanging_answers_than_workers_all_end(make):
    judge = make(0.25)
    pairs = [(f"{TOWER} {i}", "5") for i in range(18)] + [("so 5", "5")]
    assert judge(pairs) == [TIMEOUT] * 18 + [RIGHT]


def test_quick_answers_are_not_starved_by_many_that_hang(make):
    judge = make(0.5)
    pairs = []
    for i in range(4):
        pairs += [(f"{TOWER} {i}", "5"), (rf"\boxed{{x^2 + {2 * i}x + {i * i}}}", f"(x + {i})^2")]
    assert judge(pairs) == [TIMEOUT, RIGHT] * 4


def compared(verdict: str, answers: list[str], timeout: float) -> list[str]:
    """What workers say whose verdict is this expression of `answer`."""
    code = f"""
import os, time
from run import judge
judge.PATIENCE = 4
priority = os.getpriority(os.PRIO_PROCESS, 0)
judge.verdict = lambda answer, reference: {verdict}
print(*judge.compare([(answer, "") for answer in {answers}], timeout={timeout}, cores=2))
"""
    return subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()


def test_an_answer_that_has_to_wait_is_judged_as_if_it_had_not():
    """Asleep, a worker uses no processor time, just as when others keep the processor busy."""
    waiting = "time.sleep(float(answer)) or '1'"
    # The limit is 0.5 s. Twice that is nothing; four times is too long for what sleeps.
    assert compared(waiting, ["1", "0", "0", "1"], timeout=0.5) == [RIGHT] * 4
    assert compared(waiting, ["0", "60", "0"], timeout=0.5) == [RIGHT, TIMEOUT, RIGHT]


def test_a_limit_is_of_processor_time_even_in_one_long_computation():
    start = time.monotonic()
    # One call of C code, which no handler of Python's could leave.
    assert compared("str(len(str(1)) if answer == '1' else 3 ** 10**10)", ["1", "2"], 0.5) == [
        RIGHT,
        TIMEOUT,
    ]
    assert time.monotonic() - start < 30


def test_slow_workers_keep_the_priority_of_their_judge():
    slow = "str(int(sum(range(30_000_000)) > 0 and os.getpriority(os.PRIO_PROCESS, 0) == priority))"
    assert compared(slow, ["a", "b", "c"], timeout=60) == [RIGHT] * 3


def test_the_judge_runs_where_a_system_cannot_tell_which_cores_it_may_use(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\ndel os.sched_getaffinity\n")
    code = "from run.judge import Judge; print(Judge(60.0)([('\\\\sqrt{9}', '3')]))"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT, env=env)
    assert out.strip() == str([RIGHT])


def test_an_answer_that_takes_all_memory_ends_its_worker_alone():
    code = """
from run import judge
judge.verdict = lambda answer, reference: "1" if bytes(int(answer) << 20) else "0"
print(judge.compare([("1", ""), ("3000", ""), ("2", "")], timeout=5, cores=1))
"""
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert out.strip() == str(["1", "c", "1"])


def test_an_interrupted_batch_does_not_answer_the_next_one(judge):
    assert judge([("so 5", "5")]) == [RIGHT]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        sender = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -USR1 {os.getpid()}"])
        with pytest.raises(KeyboardInterrupt):
            judge([(TOWER, "5"), ("so 1", "2")])
        sender.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert judge([("so 3", "3"), ("so 4", "4")]) == [RIGHT, RIGHT]


# The end of the trainer ------------------------------------------------------------------------

TRAINER = """
import os, sys, time
sys.path.insert(0, {root!r})
from rewards import Rewards
from run.judge import Judge
from run.plugins import CheckedRewards
judge = Judge(600.0)
reward = Rewards(["accuracy"], judge=judge)
def run(text): reward([text], prompts=[[]], completion_ids=[[]], step=0, solution=["5"])
run("so 5")
print(judge.process.pid, flush=True)
sys.stdin.readline()
{then}
"""
ENDS = {
    "returns": ("", None),
    "raises": ("raise KeyError('a bug')", None),
    "exits at once": ("os._exit(3)", None),
    "terminated": ("time.sleep(600)", signal.SIGTERM),
    "killed": ("time.sleep(600)", signal.SIGKILL),
    "interrupted in a batch": (f"run({TOWER!r})", signal.SIGINT),
    "killed in a batch": (f"run({TOWER!r})", signal.SIGKILL),
    # A child of the trainer's holds the judge's stdin open.
    "killed, leaves a child": (
        "if not os.fork(): time.sleep(600)\ntime.sleep(600)",
        signal.SIGKILL,
    ),
}


@pytest.fixture(scope="module")
def trainers():
    """end → a trainer that waits for a line and then comes to that end; all start at once."""
    started = {}
    for end, (then, _) in ENDS.items():
        started[end] = subprocess.Popen(
            [sys.executable, "-c", TRAINER.format(root=str(ROOT), then=then)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # A shell's background jobs ignore SIGINT.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    yield started
    for trainer in started.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait()
        trainer.stdout.close()
        trainer.stdin.close()


@pytest.mark.parametrize("end", ENDS)
def test_no_process_outlives_the_trainer(end, trainers):
    trainer, signal_sent = trainers[end], ENDS[end][1]
    session = int(trainer.stdout.readline())
    assert processes(session)
    trainer.stdin.write(b"go\n")
    trainer.stdin.flush()
    if signal_sent:
        time.sleep(0.7)  # it is asleep, or in its batch
        assert processes(session)
        trainer.send_signal(signal_sent)
    trainer.wait(30)
    assert gone_within(session, 20)
