"""run/plugins.py: rewards of one's own of every kind, and one clear line for each mistake."""

import asyncio
import json
import math
import re
import signal
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
from fixtures.rewards.classifier import save_classifier
from processes import forked

import rewards
from data import UsageError
from rewards import RewardError, orms
from run import stop
from run.plugins import CheckedRewards, load_plugins

ROOT = Path(__file__).resolve().parent.parent.parent
PLUGINS = ROOT / "examples/train/grpo/plugin"


@pytest.fixture(autouse=True)
def registry():
    before = dict(orms)
    yield
    orms.clear()
    orms.update(before)


@pytest.fixture
def make():
    """make("format", …) -> CheckedRewards, closed after the test."""
    made = []

    def make(*names, **options):
        made.append(CheckedRewards(list(names), **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def run(reward, completions, ids=None, step=3, prompts=None, **columns):
    ids = ids or [[0] * 10] * len(completions)
    prompts = prompts or [[{"role": "user", "content": "?"}]] * len(completions)
    return reward(completions, prompts=prompts, completion_ids=ids, step=step, **columns)


def plugin(tmp_path, code, name="plugin.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(code))
    return str(path)


# Loading ---------------------------------------------------------------------------------------


def test_the_guides_plugin_loads_and_scores(make):
    load_plugins([str(PLUGINS / "plugin.py")])
    assert run(make("dummy"), ["a" * 1024, "a" * 1025]) == [[0.0], [1.0]]


def test_close_pays_for_near_misses_and_only_for_an_answer_that_is_a_whole_number(make):
    load_plugins([str(PLUGINS / "close.py")])
    answers = ["43", "33", "-7", "44.", "", "1" * 30]
    completions = [f"<think>27 + 16</think><answer>{answer}</answer>" for answer in answers]
    completions.append("43")
    scores = run(make("close"), completions, solution=["43"] * 7)
    assert [score for (score,) in scores] == [1.0, 0.75, 0, 0, 0, 0, 0]
    nothing_near = run(make("close"), completions[:2], solution=["43.5", None])
    assert nothing_near == [[None], [None]]


def test_the_readmes_plugin_loads_and_scores(tmp_path, make):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    load_plugins([plugin(tmp_path, code)])
    assert run(make("brief"), ["a" * 100, "b"], solution=["1", None]) == [[-0.1], [None]]


def test_plugins_of_every_kind(tmp_path, make):
    (tmp_path / "helper_of_plugin.py").write_text("VALUE = 0.25")
    one = """
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
    """
    two = """
        from rewards import ORM, orms

        class Named:
            def __init__(self, bonus, other=2): self.bonus = bonus * other
            def __call__(self, completions, **kwargs): return [self.bonus] * len(completions)

        class Async(ORM):
            async def __call__(self, completions, **kwargs): return [None] * len(completions)

        class Star:
            def __init__(self, *args): assert not args
            def __call__(self, completions, /, level): return level

        def trl(prompts, completions, level):
            return [l * len(c) for l, c in zip(level, completions)]

        orms["named"], orms["instance"], orms["async"] = Named, Named(3), Async
        orms["star"], orms["builtin"], orms["trl"] = Star, max, trl
        orms["plain"] = lambda texts: [len(text) for text in texts]
    """
    load_plugins([plugin(tmp_path, one, "one.py"), plugin(tmp_path, two, "two.py")])
    reward = make("old", "named", "instance", "async", "plain", "trl", "star", bonus=1)
    row = [1.25, 2.0, 6.0, None, 3.0, 6.0, 2.0]
    assert run(reward, ["abc"], solution=["5"], level=[2]) == [row]
    builtin = make("builtin")
    builtin.check_columns([])
    message = "reward builtin, step 3, rows 0 to 0: returned 'abc', not a list"
    with pytest.raises(RewardError, match=message):
        run(builtin, ["abc"])


@pytest.mark.parametrize(
    "line, orms_of",
    [
        ("from swift.plugin import ORM, orms", "orms"),
        ("from rewards import orms", "orms"),
        ("import swift.plugin", "swift.plugin.orms"),
        ("from swift import plugin", "plugin.orms"),
        ("import swift.plugin as plugin", "plugin.orms"),
        ("from swift.rewards.orm import orms", "orms"),
        ("from swift import utils", "__import__('rewards').orms"),
    ],
)
def test_a_plugin_imports_swift_in_any_way(tmp_path, line, orms_of):
    path = plugin(tmp_path, f"{line}\n{orms_of}['mine'] = lambda completions: [0.0]")
    load_plugins([path])
    load_plugins([path])
    assert "mine" in orms


def become_main_program(code):
    exec(code, vars(sys.modules["__main__"]))


def test_a_main_program_shares_its_registry_with_plugins(tmp_path):
    line = "orms['mine'] = lambda completions, **kw: [1.0] * len(completions)"
    path = plugin(tmp_path, f"from rewards import orms\n{line}")
    code = f"""
from run import stop
from run.plugins import CheckedRewards, load_plugins
load_plugins([{path!r}])
print(CheckedRewards(["mine"]).names)
"""
    with forked(tmp_path / "said", (become_main_program, (code,), {})) as (program,):
        assert program.end(timeout=120) == (0, "['mine']\n")


@pytest.mark.parametrize(
    "code, message",
    [
        (
            "import no_such_module",
            "failed to import: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def f(:", "failed to import: SyntaxError: "),
        ("from math import pi\nint('x' * 3)", "failed to import: ValueError: invalid literal"),
        ("import sys; sys.exit(4)", "failed to import: SystemExit: 4"),
        ("raise KeyboardInterrupt", "failed to import: KeyboardInterrupt: no message"),
        ("x = 1", "registers no reward; it needs a line orms['name'] = YourReward"),
        (
            "from swift.plugin import orms\norms['new'] = orms['format'] = len",
            "overwrites the built-in reward format; choose another name",
        ),
        (
            "from swift.plugin import orms\norms['mine'] = 3",
            "orms['mine'] is 3, not a class or function",
        ),
    ],
)
def test_a_bad_plugin_is_one_line_and_leaves_no_trace(tmp_path, code, message):
    path, before = plugin(tmp_path, code), dict(orms)
    with pytest.raises(UsageError) as caught:
        load_plugins([path])
    assert str(caught.value).startswith(f"--external_plugins {path}: {message}")
    assert "\n" not in str(caught.value)
    assert orms == before
    if "ValueError" in message:
        assert f"({path}:2)" in str(caught.value)


def test_a_missing_plugin_and_two_that_clash(tmp_path):
    with pytest.raises(UsageError, match="^--external_plugins nowhere.py: no such file$"):
        load_plugins(["nowhere.py"])
    code = "from rewards import orms\norms['mine'] = lambda completions: [0.0]"
    one, two = plugin(tmp_path, code, "p1.py"), plugin(tmp_path, code, "p2.py")
    message = "p2.py: overwrites another plugin's reward mine; choose another name"
    with pytest.raises(UsageError, match=message):
        load_plugins([one, two])
    load_plugins([one])
    load_plugins([one])  # a second run in one process


# Calling ---------------------------------------------------------------------------------------


def test_checked_rewards_are_those_of_rewards(make):
    """With everything in order, the checks change no value."""
    names = ["accuracy", "format", "cosine", "repetition"]
    texts = ["<think>a</think><answer>5</answer>", "a b c a b c", "6", ""]
    ids, columns = [[0] * n for n in (1, 500, 50, 0)], {"solution": ["5", None, "5", "no number"]}
    plain, checked = rewards.Rewards(names), make(*names)
    assert run(checked, texts, ids, **columns) == run(plain, texts, ids, **columns)
    assert checked.metrics() == plain.metrics()
    assert checked.names == plain.names and checked.weights == plain.weights


def test_async_rewards_run_together(make):
    running, most = 0, 0

    async def wait(completions, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return [0.5] * len(completions)

    orms.update(a=wait, b=wait, c=wait)
    assert run(make("a", "b", "c"), ["x"]) == [[0.5] * 3]
    assert most == 3


def test_what_an_async_reward_keeps_lives_for_the_run(make):
    queue = asyncio.Queue()

    async def put(completions, **kwargs):
        asyncio.get_running_loop().call_later(0.01, queue.put_nowait, 0.5)
        return [await queue.get()]

    orms["put"] = put
    reward = make("put")
    assert [run(reward, ["x"], step=step) for step in (1, 2)] == [[[0.5]]] * 2


def test_a_reward_that_changes_its_lists_changes_no_others(make):
    def spoil(completions, completion_ids, solution, **kwargs):
        completions.reverse()
        solution.clear()
        completion_ids[0].append(9)
        kwargs["prompts"].pop()
        return [0.0, 1.0]

    orms["spoil"] = spoil
    orms["echo"] = lambda completions, solution, **kwargs: list(map(len, solution))
    ids = [[1], [2]]
    rows = run(make("spoil", "echo"), ["a", "b"], ids, solution=["x", "yy"])
    assert rows == [[0.0, 1.0], [1.0, 2.0]]
    assert ids == [[1], [2]]


def test_every_column_reaches_every_reward_that_is_checked(make):
    seen = {}

    def look(completions, **kwargs):
        seen.update(kwargs, completions=completions)
        return [0.0] * len(completions)

    orms["look"] = look
    prompts = [[{"role": "user", "content": "1?"}], [{"role": "user", "content": "2?"}]]
    columns = {"solution": ["1", "2"], "level": [None, 5]}
    run(make("look"), ["a", "b"], [[1], [2, 3]], step=7, prompts=prompts, **columns)
    given = {"completions": ["a", "b"], "completion_ids": [[1], [2, 3]], "step": 7}
    state = seen.pop("trainer_state")
    assert state.global_step == 6 and state.max_steps is None
    replies = [[*p, {"role": "assistant", "content": c}] for p, c in zip(prompts, "ab")]
    swifts = {"messages": replies, "response_token_ids": [[1], [2, 3]]}
    assert seen == columns | given | {"prompts": prompts} | swifts


def test_numbers_of_any_library_are_rewards(make):
    import torch

    orms["array"] = lambda completions: numpy.array([1, 2])
    orms["tensor"] = lambda completions: torch.tensor([0.5, 1.5], dtype=torch.bfloat16)
    orms["mixed"] = lambda completions: [True, torch.tensor(2.0)]
    rows = run(make("array", "tensor", "mixed"), ["a", "b"])
    assert rows == [[1.0, 0.5, 1.0], [2.0, 1.5, 2.0]]
    assert {type(value) for row in rows for value in row} == {float}


# Mistakes --------------------------------------------------------------------------------------


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
        (
            [0.0, numpy.str_("1.0")],
            "row 1: returned np.str_('1.0'), not a finite number or None",
        ),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_wrong_values_name_the_reward_the_step_and_the_row(values, message, is_async, make):
    async def later(completions, **kwargs):
        return values

    orms["mine"] = later if is_async else lambda completions, **kwargs: values
    with pytest.raises(RewardError, match=re.escape(f"reward mine, step 3, {message}")):
        run(make("format", "mine"), ["a", "b"])


def picky(completions, solution, **kwargs):
    return [1 / (len(completion) - 2) for completion in completions]


async def picky_later(completions, solution, **kwargs):
    return picky(completions, solution)


@pytest.mark.parametrize("reward", [picky, picky_later])
def test_a_reward_that_raises_is_named_and_its_rows_are_kept(reward, tmp_path, make):
    orms["picky"] = reward
    output = tmp_path / "not there yet"
    completions = ["a", "bbb", "\ud800c", "d"]
    with pytest.raises(RewardError) as caught:
        run(make("picky", output_dir=str(output)), completions, solution=list("1234"))
    message = str(caught.value)
    assert message.startswith("reward picky, step 3, row 2: raised ZeroDivisionError: ")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    (path,) = output.iterdir()
    assert path.name.startswith("failed-reward-step3-") and str(path) in message
    line = picky.__code__.co_firstlineno + 1
    assert f"zero ({__file__}:{line})" in message
    kept = json.loads(path.read_text())
    assert kept["traceback"][-1].startswith("ZeroDivisionError")
    assert f"line {line}, in" in str(kept["traceback"])
    assert kept["completions"] == completions and kept["solution"] == list("1234")
    assert kept["row"] == 2 and kept["step"] == 3


def test_a_reward_that_exits_is_named_and_so_is_one_whose_rows_find_no_place(make, tmp_path):
    def leaves(completions, **kwargs):
        raise SystemExit(0)  # which would have ended the run as if it were done

    orms["leaves"] = leaves
    place = tmp_path / "a file"
    place.write_text("")
    with pytest.raises(RewardError, match="reward leaves, step 3, row 0: raised SystemExit"):
        run(make("leaves", output_dir=str(place)), ["a", "b"])


class Panic(BaseException):
    """As libraries in other languages raise it; this one cannot even tell why."""

    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize("kind", [Panic, KeyboardInterrupt, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("waits", [False, True])
def test_whatever_a_reward_raises_is_told_in_one_line(make, kind, waits):
    def panics(completions, **kwargs):
        raise kind

    async def panics_later(completions, **kwargs):
        raise kind

    orms["panics"] = panics_later if waits else panics
    with pytest.raises(RewardError, match=f"row 0: raised {kind.__name__}: no message"):
        run(make("panics"), ["a", "b"])


@pytest.mark.parametrize("waits", [False, True])
def test_a_signal_amid_a_reward_is_not_the_reward_s(make, waits):
    def ends(completions, **kwargs):
        raise stop.Ended(signal.SIGINT)

    async def ends_later(completions, **kwargs):
        ends(completions)

    orms["ends"] = ends_later if waits else ends
    with pytest.raises(stop.Ended):
        run(make("ends"), ["a", "b"])


def test_a_reward_that_raises_on_the_whole_batch_alone(make):
    def whole(completions, **kwargs):
        assert len(completions) < 2, "too\nmany"
        return [0.0]

    orms["whole"] = whole
    message = r"reward whole, step 3, rows 0 to 1: raised AssertionError: too many"
    with pytest.raises(RewardError, match=message):
        run(make("whole"), ["a", "b"])


KNOWN = "known: accuracy, cosine, format, repetition, soft_overlong"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"names": ["acuracy"]},
            f"--reward_funcs acuracy: unknown; did you mean accuracy? {KNOWN}",
        ),
        ({"names": ["zzz"]}, f"--reward_funcs zzz: unknown; {KNOWN}"),
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
        (
            {"names": ["format"], "weights": []},
            "--reward_weights : must be 1 finite numbers, for format",
        ),
        (
            {"names": ["cosine"], "cosine_max_len": 0},
            "--cosine_max_len 0: must be 1 token or more",
        ),
        (
            {"names": ["repetition"], "repetition_n_grams": 0},
            "--repetition_n_grams 0: must be 1 word or more",
        ),
        (
            {"names": ["repetition"], "repetition_max_penalty": 0.5},
            "--repetition_max_penalty 0.5: must be 0 or less",
        ),
    ],
)
def test_a_bad_flag_is_one_line(arguments, message):
    with pytest.raises(UsageError) as caught:
        CheckedRewards(**arguments)
    assert str(caught.value) == message


def test_accuracy_without_math_verify_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("accuracy", "cosine"):
        message = "^--reward_funcs accuracy: needs math_verify; pip install math-verify$"
        with pytest.raises(UsageError, match=message):
            CheckedRewards([name])
    CheckedRewards(["format"])


def test_a_constructor_that_fails_is_one_line():
    class Broken(rewards.ORM):
        def __init__(self, tokenizer):
            pass

    orms["broken"] = Broken
    message = "^--reward_funcs broken: its constructor failed: TypeError: "
    with pytest.raises(UsageError, match=message):
        CheckedRewards(["broken"])


def test_a_class_without_call_is_one_line():
    orms["mute"] = type("Mute", (), {})
    with pytest.raises(UsageError, match="^--reward_funcs mute: its class has no __call__$"):
        CheckedRewards(["mute"])


def test_columns_are_checked_before_the_run(make):
    orms["level"] = lambda completions, level, bonus=1, **kwargs: level
    reward = make("accuracy", "format", "cosine", "repetition", "level")
    reward.check_columns(["solution", "problem", "level"])
    for columns, message in (
        (["level"], "--reward_funcs accuracy: needs a column solution; the dataset has level"),
        (["solution"], "--reward_funcs level: needs a column level; the dataset has solution"),
    ):
        with pytest.raises(UsageError) as caught:
            reward.check_columns(columns)
        assert str(caught.value) == message
    taken = ["self", "completions", "prompts", "completion_ids", "step", "is_truncated"]
    for name in [*taken, "prompt_ids", "trainer_state", "response_token_ids"]:
        with pytest.raises(UsageError) as caught:
            reward.check_columns(["solution", "level", name], "--val_dataset a.jsonl")
        what = f"rename its column {name}; rewards are handed something else by this name"
        assert str(caught.value) == f"--val_dataset a.jsonl: {what}"


def test_a_column_by_the_name_that_a_reward_has_for_completions_is_one_line(make):
    orms["plain"] = lambda texts, **kwargs: [0.0] * len(texts)
    orms["few"] = lambda texts, level: [0.0] * len(texts)
    orms["bounded"] = eval("lambda texts, /, **kwargs: kwargs['texts']")
    for name in ("plain", "few"):
        with pytest.raises(UsageError) as caught:
            make(name).check_columns(["level", "texts"], "--dataset a.jsonl")
        what = "rename its column texts; the reward " + name + " takes its completions by this name"
        assert str(caught.value) == f"--dataset a.jsonl: {what}"
    bounded = make("bounded")
    bounded.check_columns(["level", "texts"])
    assert run(bounded, ["a"], texts=[2.0]) == [[2.0]]


@pytest.mark.parametrize(
    "name", ["function", "batch", "state", "columns", "args", "kwargs", "a b", ""]
)
def test_a_column_may_have_any_other_name(name, make):
    orms["sees"] = lambda completions, **kwargs: kwargs[name]
    reward = make("sees", "format")
    reward.check_columns([name])
    assert run(reward, ["a"], **{name: [2.0]}) == [[2.0, 0.0]]


def test_a_falling_curve_for_wrong_answers_is_said_in_one_line(make):
    said = "cosine: a wrong answer earns less with length, from 0.0 to -0.5"
    assert make("cosine").notes == [said]
    rising = {"cosine_min_len_value_wrong": -0.5, "cosine_max_len_value_wrong": 0.0}
    assert make("cosine", **rising).notes == make("format").notes == []


def test_a_bad_reward_model_is_one_line(tmp_path):
    headless = save_classifier(tmp_path / "headless", architecture="LlamaForCausalLM")
    cases = [
        (
            save_classifier(tmp_path / "three", outputs=3),
            "has 3 outputs; a model with one is needed",
        ),
        (save_classifier(tmp_path / "mute", template=None), "its tokenizer has no chat template"),
        (headless, "its weights lack score.weight"),
        (str(tmp_path), "cannot be read: "),
        (str(tmp_path / "nowhere"), "cannot be read: "),
    ]
    for path, message in cases:
        with pytest.raises(UsageError) as caught:
            CheckedRewards([], reward_model=path)
        assert str(caught.value).startswith(f"--reward_model {path}: {message}")
        assert "\n" not in str(caught.value)
    CheckedRewards([], reward_model=save_classifier(tmp_path / "good"))


SWIFTS = {
    "from swift.llm import PtEngine, Template": "swift.llm",
    "from swift.plugin import ORM, orms, rm_plugins": "rm_plugins",
    "from swift.plugin.multi_turn import MultiTurnScheduler": "swift.plugin.multi_turn",
    "from swift.rewards.rm_plugin import DefaultRMPlugin": "swift.rewards.rm_plugin",
    "from swift.utils import gc_collect": "gc_collect",
    "import swift.rlhf_trainers": "swift.rlhf_trainers",
}


@pytest.mark.parametrize("line", SWIFTS)
def test_a_plugin_that_needs_more_of_ms_swift_is_told_which_part(line, tmp_path):
    """Its newest example files bring engines and schedulers beside their rewards."""
    file = tmp_path / "plugin.py"
    file.write_text(f"{line}\n")
    with pytest.raises(UsageError) as error:
        load_plugins([str(file)])
    said = f"--external_plugins {file}: imports {SWIFTS[line]}, which is a part of ms-swift; "
    assert str(error.value).startswith(said)
