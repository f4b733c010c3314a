"""The panel that follows a run: it moves, it leaves the terminal clean, and it is not there elsewhere."""

import io
import json
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import flags_for, train_here
from terminal import on_a_terminal

from run import display, setup, shown

HOSTILE = "a\x1b[2J\x1b]0;owned\x07b\u202ec\nd [bold]e"
GENERATES = """
import time
from run import console, display
console.settle()
display.start()
display.screen.begin(3, 10, lambda step: {"evaluate": 2, "save": 1})
with display.phase("generate"):
    for t in range(1, 121):
        display.report(t, 2048, 9, 16)
        time.sleep(0.05)
"""


def test_a_generation_moves_more_than_every_other_second_and_never_rests():
    """Of 6 seconds, so one of 3 minutes changes the screen more than 100 times."""
    seen = on_a_terminal("-c", GENERATES)
    assert seen.status == 0
    frames = [(at, frame) for at, frame in seen.frames if "generate" in frame]
    assert len(frames) >= 9
    assert all(b - a < 2 for (a, _), (b, _) in zip(frames, frames[1:]))
    assert any("of 2,048 tokens, 9 of 16 going" in frame for _, frame in frames)
    assert "step 3 of 10" in frames[0][1]


def test_the_first_sign_of_life_comes_before_torch():
    code = "import sys; from run import flags; "
    code += "flags.answer_early(['--dataset', 'arithmetic', '--reward_funcs', 'format']); "
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    seen = on_a_terminal("-c", code)
    assert seen.status == 0 and b"import torch" in seen.written


LOST = "from run import session; session.end_for_loss(None, lambda _: 'go on', 'lost rank 1')"
ENDS = {  # what happens → status, last line
    "the end": ("pass", 0, "done"),
    "a last line": ("flags.fail('broken', 1)", 1, "train.py: broken"),
    "an error": ("raise ValueError('x')", 1, "ValueError: x"),
    "Ctrl-C": ("os.kill(os.getpid(), 2); time.sleep(9)", 130, "KeyboardInterrupt"),
    "lost": (LOST, 1, "train.py: lost"),
}


@pytest.mark.parametrize("case", ENDS)
def test_at_any_end_the_panel_is_gone_and_the_last_line_is_last(case):
    what, status, last = ENDS[case]
    code = (
        "import os, signal, time; from run import console, display, flags\n"
        "signal.signal(2, signal.default_int_handler)\n"
        "console.settle(); display.start()\n"
        "display.screen.begin(0, 10, lambda step: {})\n"
        "with display.phase('save'):\n"
        f"    time.sleep(0.7)\n    display.say('said')\n    {what}\n"
        "display.screen.close(); print('done')\n"
    )
    seen = on_a_terminal("-c", code)
    assert seen.status in (status, -signal.SIGINT if status == 130 else status)
    assert seen.last_line.startswith(last), seen.frames[-1]
    assert "step 0 of 10" in seen.frames[-2][1] or len(seen.frames) > 2
    assert "step 0 of 10" not in seen.frames[-1][1] and "said" in seen.frames[-1][1]
    assert seen.cursor == (False, 0) and b"\x1b[?25l" not in seen.written


FACTS = {"reward": "0.500", "groups that teach": "60%", "length": "23.1", "kl": "0.0012"}


@pytest.mark.parametrize("width", [60, 72, 90])
def test_rewards_of_several_names_leave_room_for_the_answers(width):
    from rich.console import Console

    screen = display.Screen()
    screen.console = Console(width=width, file=io.StringIO(), force_terminal=True)
    earned = "accuracy 1, close 0.327, format 1, soft_overlong -0.25"
    answers = [("<think>23 + 45 = 68</think><answer>68</answer>", earned, 0.71)] * 4
    screen.show_sample("What is 23 + 45?", "68", answers)
    assert len(screen.sample) < 30  # where each letter had a line there were 187
    with screen.console.capture() as shown_now:
        screen.console.print(*screen.sample)
    assert "<think>23 + 45" in shown_now.get()


@pytest.mark.parametrize("width", [90, 30, 12, 1])
def test_a_panel_fits_its_terminal(width, monkeypatch):
    """In 30 columns the step, its numbers, answers and advantages are whole; no width ends a run."""
    from rich.console import Console

    screen = display.Screen()
    screen.console = Console(width=width, height=50, file=io.StringIO(), force_terminal=True)
    screen.live = object()
    screen.begin(3, 10, lambda step: {"evaluate": 2, "save": 1})
    for reward in range(50):
        screen.step(5, FACTS, {"time/step": 10.0, "reward": reward})
    answers = [("so it is <answer>68</answer>", "accuracy 1", 0.71), ("no", "accuracy 0", -0.71)]
    screen.show_sample("What is 23 + 45? " * 9, "68", answers)
    with screen.console.capture() as shown_now:
        screen.console.print(screen.panel())
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown_now.get())
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= width
    if width >= 30:
        for told in ("step 5 of 10", "groups that teach 60%", "+0.71", "-0.71", "</answer>"):
            assert told in plain, told
        (bars,) = (line for line in plain.splitlines() if "▁" in line)
        assert bars.startswith("reward ▁") and "█" in bars


def test_a_terminal_of_ascii_gets_nothing_else():
    sample = "display.screen.show_sample('1 × 2?', 'π', [('…', 'a 1', 0.5)])\n    for t"
    code = GENERATES.replace("for t", sample, 1).replace("121", "30")
    seen = on_a_terminal("-c", code, PYTHONIOENCODING="ascii")
    assert seen.status == 0 and max(seen.written) < 128
    assert "1 ? 2?" in seen.frames[-2][1]


def test_the_line_of_what_was_reached_is_broken_between_words():
    reached = "12 steps in 0:11; held out: " + ", ".join(
        f"rewards{i} 0.100 to 0.200" for i in range(9)
    )
    copied = "next: python -m run.chat " + "long" * 30
    code = f"display.start()\ndisplay.end([{reached!r}, {copied!r}])\n"
    seen = on_a_terminal("-c", "from run import display\n" + code)
    told = seen.frames[-1][1]
    assert reached in told.replace("\n", " ") and copied in told.replace("\n", "")


# A run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A reward that takes a while, and whose rows would steer a terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "slow.py").write_text(
        "import time\nfrom rewards import orms\n\n\n"
        "def slow(completions, **columns):\n"
        "    time.sleep(0.8)\n    return [len(set(text)) / 9 for text in completions]\n\n\n"
        "orms['slow'] = slow\n"
    )
    rows = [{"question": HOSTILE, "answer": HOSTILE} for _ in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_on_a_terminal_shows_phases_numbers_and_a_sample(model_folder, hostile, tmp_path):
    changes = {"dataset": hostile / "rows.jsonl", "reward_funcs": "slow", "max_steps": 3}
    changes |= {"val_dataset": "arithmetic-test#8", "eval_steps": 2, "num_generations_eval": 1}
    seen = on_a_terminal(
        "train.py", *flags_for(model_folder, hostile / "slow.py", tmp_path / "out", **changes)
    )
    assert seen.status == 0, seen.frames[-1][1]
    screens = "\n".join(frame for _, frame in seen.frames)
    for shown_once in ("import torch", "score  0:0", "evaluate 1 of 1 · "):
        assert shown_once in screens, shown_once
    for number in ("slow ", "groups that teach ", "length ", "kl ", "entropy ", "left"):
        assert number in screens, number
    assert "a␛[2J␛]0;owned␇b\N{REPLACEMENT CHARACTER}c d [bold]e" in screens
    assert b"\x1b[2J" not in seen.written and b"owned\x07" not in seen.written
    last = "".join(seen.frames[-1][1].splitlines())  # the terminal has broken long ones
    for told in ("3 steps in 0:0", "checkpoint-3, metrics.jsonl", "next: python -m run.chat"):
        assert told in last, told
    assert last.endswith(f"python -m run.report {tmp_path / 'out'}")
    assert seen.cursor == (False, 0)


def test_asked_to_stop_a_run_on_a_terminal_ends_with_one_line(model_folder, hostile, tmp_path):
    changes = {"dataset": hostile / "rows.jsonl", "reward_funcs": "slow", "max_steps": 1000}
    words = flags_for(model_folder, hostile / "slow.py", tmp_path / "out", **changes)
    seen = on_a_terminal("train.py", *words, when="step 2 of 1000", number=signal.SIGINT)
    assert seen.status == 130
    tail = "".join(seen.frames[-1][1].splitlines()[-2:])
    assert "train.py: stopped by Ctrl-C; --resume_from_checkpoint true goes on from" in tail
    assert "next:" not in seen.frames[-1][1] and seen.cursor == (False, 0)


def test_without_a_terminal_each_logged_step_is_a_line_without_control_characters(
    model_folder, plugin, tmp_path
):
    changes = {"max_steps": 4, "logging_steps": 2, "eval_steps": 2, "num_generations_eval": 1}
    changes |= {"val_dataset": "arithmetic-test#8"}
    said = train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    assert not {c for c in said if ord(c) < 32} - {"\n"}
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [
        "step 1 of 4",
        "step 2 of 4",
        "step 2, held out",
        "step 4 of 4",
        "step 4, held out",
    ]
    assert "reward 0." in steps[0] and "groups that teach" in steps[0] and "left" in steps[0]
    assert "next: python -m run.chat" in said


def test_other_ranks_show_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    display.start()
    assert display.screen.live is None and capsys.readouterr().out == ""


# What is left -----------------------------------------------------------------------------------


def counts(max_steps, rollout, args) -> list[dict]:
    """By walking through a run as train does, behind each rollout."""
    steps = [*range(0, max_steps, rollout), max_steps]
    found = []
    for i, _ in enumerate(steps[:-1]):
        told = {"evaluate": 0, "save": 0}
        for end in steps[i + 1 :]:
            at_end = end == max_steps
            told["evaluate"] += at_end or setup.reached(args.eval_steps, end, rollout)
            told["save"] += at_end or setup.reached(args.save_steps, end, rollout)
        found.append(told)
    return found


@pytest.mark.parametrize("rollout", [1, 2, 3, 6])
def test_what_is_to_come_is_what_will_come(rollout):
    args = SimpleNamespace(eval_steps=4, eval_on_start=False, save_steps=5)
    for max_steps in (1, 4, 5, 12, 23, 60):
        expected = counts(max_steps, rollout, args)
        for i, told in enumerate(expected):
            assert shown.to_come(args, max_steps, rollout, i * rollout) == told
        assert shown.to_come(args, max_steps, rollout, max_steps) == {}


def test_the_time_left_counts_evaluations_and_saves(monkeypatch):
    screen, now = display.Screen(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen.begin(0, 10, lambda step: {"evaluate": 2, "save": 1})
    assert screen.left() == ""
    screen.step(4, {}, {"time/step": 10.0, "reward": 0.0})
    assert screen.left() == ", about 1:00 and 2 evaluations left"
    screen.took["evaluate"].append(30.0)
    screen.took["save"].append(5.0)
    assert screen.left() == ", about 2:05 left"
    now += 3
    assert screen.left() == ", about 2:02 left"


def test_a_curve_has_a_bar_for_each_value_and_means_when_they_are_many():
    assert display.curve([0.0, 1.0]) == "▁█" and display.curve([2.0, 2.0]) == "▁▁"
    assert len(display.curve([float(i) for i in range(1000)])) == display.CURVE
