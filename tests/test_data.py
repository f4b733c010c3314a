"""What data.py promises: on rows written by hand, on GSM8K, with the embedded model's tokenizer."""

import copy
import json
import math
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

import data
from run import readers
from run.checks import check_solutions
from run.readers import map_in_processes

FIXTURES = ROOT / "tests" / "fixtures" / "data"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k-train.jsonl"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.fixture
def write(tmp_path):
    """Writes rows as jsonl (or text as it is) and gives the file's path."""

    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(function, *args, **kwargs):
    """The message of the UsageError that the call raises, which must be a single line."""
    with pytest.raises(data.UsageError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith("--") and "\n" not in message and len(message) < 600, message
    return message


# Layouts ----------------------------------------------------------------------------------------


def test_numina_math_rows_work_as_they_come():
    rows = data.load_rows([str(FIXTURES / "numina.jsonl")], system="Think first.")
    originals = [json.loads(line) for line in (FIXTURES / "numina.jsonl").read_text().splitlines()]
    for row, original in zip(rows, originals, strict=True):
        assert row["prompt"] == [system("Think first."), user(original["problem"])]
        assert row["solution"] == original["solution"] and "\\boxed{" in row["solution"]
        assert {column: row[column] for column in original} == original
        assert set(row) == {"prompt", "problem", "solution", "messages"}


def test_gsm8k_rows_work_as_they_come(write):
    original = {"question": "How many eggs?", "answer": "16 - 3 = <<16-3=13>>13\n#### 13"}
    expected = {"prompt": [user("How many eggs?")], "solution": original["answer"], **original}
    assert data.load_rows([write([original])]) == [expected]


def test_all_of_gsm8k_loads():
    if not GSM8K.exists():
        pytest.skip("GSM8K is not in shared/data beside the repository")
    rows = data.load_rows([str(GSM8K)])
    assert len(rows) == 7473 == len(GSM8K.read_text().splitlines())
    assert all(re.search(r"#### \S+$", row["solution"]) and len(row["prompt"]) == 1 for row in rows)


@pytest.mark.parametrize("column", ["prompt", "query", "problem", "question"])
@pytest.mark.parametrize("layout", ["text", "turns"])
def test_a_question_is_text_or_turns_in_each_column(write, column, layout):
    value = "6 x 7?" if layout == "text" else [user("6 x 7?")]
    (row,) = data.load_rows([write([{column: value, "answer": 42}])])
    assert row["prompt"] == [user("6 x 7?")]
    assert row["solution"] == "42" and row["answer"] == 42
    assert row["original_prompt" if column == "prompt" else column] == value


def test_messages_come_first_and_a_prompt_column_beside_them_is_kept(write):
    (row,) = data.load_rows([write([{"prompt": "other", "messages": [user("asked")]}])])
    assert row["prompt"] == [user("asked")] and row["original_prompt"] == "other"


def test_a_question_column_with_nothing_in_it_gives_way_to_the_next(write):
    rows = data.load_rows([write([{"messages": None, "query": "", "question": q} for q in "ab"])])
    assert [row["prompt"] for row in rows] == [[user("a")], [user("b")]]


def test_a_conversation_keeps_its_turns_up_to_the_last_of_the_user(write):
    turns = [system("own"), user("1"), assistant("one"), user("2"), assistant("two")]
    (row,) = data.load_rows([write([{"messages": turns}])])
    assert row["prompt"] == turns[:4]
    assert row["messages"] == turns


def test_turns_keep_role_and_content_only(write):
    (row,) = data.load_rows([write([{"messages": [{**user("a"), "name": "x", "weight": None}]}])])
    assert row["prompt"] == [user("a")]


def test_the_rows_own_system_turn_wins(write):
    rows = [{"messages": [system("own"), user("a")]}, {"messages": [user("b")]}]
    with_flag = data.load_rows([write(rows)], system="flag")
    assert [row["prompt"][0] for row in with_flag] == [system("own"), system("flag")]
    assert all(turn["role"] != "system" for turn in with_flag[1]["prompt"][1:])
    without = data.load_rows([write(rows)])
    assert [row["prompt"][0] for row in without] == [system("own"), user("b")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "prose"),
        ({"solution": "s"}, "s"),
        ({"answer": "a"}, "a"),
        ({"solution": "s", "answer": "a"}, "s"),
        ({"solution": None, "answer": "a"}, "a"),
        ({"solution": " ", "answer": 0}, "0"),
        (
            {"solution": None},
            None,
        ),  # the column is there, so the prose is not taken for a reference
        ({"answer": 2.5}, "2.5"),
    ],
)
def test_the_reference_is_solution_else_answer_else_the_prose(write, columns, expected):
    (row,) = data.load_rows([write([{"messages": [user("q"), assistant("prose")], **columns}])])
    assert row["solution"] == expected
    assert row["prompt"] == [user("q")]


# Several datasets, files and samples ------------------------------------------------------------


def test_mixed_datasets_fill_missing_columns_with_none(write):
    first = write([{"question": "a", "answer": "1", "level": 3}], "a.jsonl")
    second = write(
        [{"problem": "b", "solution": "2", "messages": [user("b"), assistant("is 2")]}], "b.jsonl"
    )
    third = write([{"prompt": [user("c")]}], "c.jsonl")
    rows = data.load_rows([first, second, third])
    columns = {
        "prompt",
        "solution",
        "question",
        "answer",
        "level",
        "problem",
        "messages",
        "original_prompt",
    }
    assert all(set(row) == columns for row in rows)
    assert [row["solution"] for row in rows] == ["1", "2", None]
    assert [row["level"] for row in rows] == [3, None, None]
    assert [row["prompt"] for row in rows] == [[user("a")], [user("b")], [user("c")]]


def test_what_is_no_number_is_none_wherever_it_stands(write):
    """NaN is how tables of numbers write that there is nothing."""
    content = (
        '{"question": "a", "x": NaN, "y": [1.0, NaN, [NaN]], "z": {"u": NaN, "v": [{"w": NaN}]}}'
    )
    (row,) = data.load_rows([write(content)])
    assert row["x"] is None
    assert row["y"] == [1.0, None, [None]]
    assert row["z"] == {"u": None, "v": [{"w": None}]}


def test_values_of_any_kind_of_a_reader_pass_unchanged():
    import numpy

    array, turns = numpy.array([1.0, 2.0]), ({"role": "user", "content": "a"},)
    read = lambda *_: [{"messages": turns, "array": array, "tuple": (1.0, math.nan)}]  # noqa: E731
    (row,) = data.load_rows(["mine"], read=read)
    assert row["array"] is array and row["tuple"] == (1.0, None)


def test_optional_columns_of_one_file_are_filled(write):
    rows = data.load_rows([write([{"question": "a", "hint": "h"}, {"question": "b"}])])
    assert [row["hint"] for row in rows] == ["h", None]


def test_a_trailing_number_samples_with_a_fixed_seed(write):
    path = write([{"question": str(i), "answer": str(i)} for i in range(100)])
    picked = [row["question"] for row in data.load_rows([f"{path}#10"])]
    assert len(set(picked)) == 10
    assert picked == [row["question"] for row in data.load_rows([f"{path}#10"])]
    assert picked != [row["question"] for row in data.load_rows([f"{path}#10"], seed=43)]
    assert picked != [str(i) for i in range(10)]
    assert data.load_rows([f"{path}#100"]) == data.load_rows([path])
    assert len(data.load_rows([f"{path}#3", "arithmetic#4"])) == 7


def test_a_file_name_may_hold_a_hash(write):
    path = write([{"question": "a"}, {"question": "b"}], "my#2.jsonl")
    assert len(data.load_rows([path])) == 2
    assert len(data.load_rows([f"{path}#1"])) == 1


# The built-in task ------------------------------------------------------------------------------


def terms(row):
    return tuple(
        map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", row["prompt"][-1]["content"]).groups())
    )


def test_arithmetic_asks_sums_under_the_guides_prompt_with_a_worked_example():
    prompt = (ROOT / "examples" / "train" / "grpo" / "prompt.txt").read_text().strip()
    for name in ("arithmetic", "arithmetic-test"):
        for row in data.load_rows([name]):
            first, question, example, asked = row["prompt"]
            assert first == system(prompt)
            a, b = map(int, re.findall(r"\d+", question["content"]))
            total = re.fullmatch(r"<think>.+</think>\s*<answer>(\d+)</answer>", example["content"])[
                1
            ]
            assert int(total) == a + b and example["role"] == "assistant"
            assert asked["role"] == "user" and row["solution"] == str(sum(terms(row)))
            assert sorted(terms(row)) != sorted((a, b))  # or the prompt would hold the answer


def test_arithmetic_test_questions_are_never_trained_on():
    train = [terms(row) for row in data.load_rows(["arithmetic"])]
    test = [terms(row) for row in data.load_rows(["arithmetic-test"])]
    assert len(test) == 256 == len({tuple(sorted(pair)) for pair in test})
    assert not {tuple(sorted(pair)) for pair in test} & {tuple(sorted(pair)) for pair in train}
    everything = {(a, b) for a in range(2, 50) for b in range(2, 50)} - {(12, 7), (7, 12)}
    assert len(train) == len(set(train))
    assert set(train) == {(a, b) for a, b in everything if not {(a, b), (b, a)} & set(test)}
    assert 100 < sum(a > b for a, b in test) < 156  # either order
    assert test[:3] == [(22, 41), (25, 36), (37, 3)]  # the same questions in every run and release


def test_system_replaces_the_guides_prompt_in_arithmetic():
    assert data.load_rows(["arithmetic#1"], system="mine")[0]["prompt"][0] == system("mine")


def test_the_guides_prompt_is_the_papers():
    prompt = (ROOT / "examples" / "train" / "grpo" / "prompt.txt").read_text()
    assert prompt.startswith(
        "A conversation between User and Assistant. The user asks a question, and the"
    )
    assert prompt.endswith(
        "i.e., <think> reasoning process here </think><answer> answer here </answer>\n"
    )
    assert prompt.count("\n") == 1


# --system ---------------------------------------------------------------------------------------


def test_system_is_text_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\ufeffFrom a file.\n", encoding="utf-8")
    (tmp_path / "my prompts").mkdir()
    (tmp_path / "my prompts" / "prompt").write_text("No suffix.")
    assert (
        readers.read_system("a.txt")
        == readers.read_system(str(tmp_path / "a.txt"))
        == "From a file."
    )
    assert readers.read_system("my prompts/prompt") == "No suffix."
    for text in (
        "You are helpful.",
        "Be brief",
        "and/or as you like",
        "Zwei\nZeilen",
        "x" * 5000,
        "a\0b",
    ):
        assert readers.read_system(text) == text
    # "" is no system turn at all, not even the built-in tasks' own.
    assert readers.read_system(None) is None and readers.read_system("") == ""


def test_a_system_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "folder.md").mkdir()
    assert error_of(readers.read_system, "examples/nope.txt").startswith(
        "--system examples/nope.txt: no such file"
    )
    assert error_of(readers.read_system, "nope.md").startswith("--system nope.md: no such file")
    assert error_of(readers.read_system, "prompts/r1").startswith(
        "--system prompts/r1: no such file"
    )
    assert error_of(readers.read_system, "empty.txt").startswith(
        "--system empty.txt: the file is empty"
    )
    assert error_of(readers.read_system, "bytes.txt").startswith(
        "--system bytes.txt: 'utf-8' codec"
    )
    assert error_of(readers.read_system, "folder.md").startswith(
        "--system folder.md: is a directory"
    )


# Bad datasets -----------------------------------------------------------------------------------

GOOD = '{"question": "a", "answer": "1"}\n'


BAD = [
    ("", "", "the dataset is empty; one row or more works"),
    ("\n \n", "", "the dataset is empty"),
    (GOOD * 8, "#0", "#0 is not a number of rows; #1 or more works"),
    (GOOD * 8, "#-3", "#-3 is not a number of rows"),
    (GOOD * 8, "#abc", "#abc is not a number of rows"),
    (GOOD * 8, "#1.5", "#1.5 is not a number of rows"),
    (GOOD * 8, "#", "# is not a number of rows"),
    (GOOD * 8, "#9", "#9 is more rows than there are; #1 to #8 work"),
    (
        '{"text": "a", "label": 1}\n',
        "",
        "no question in text, label; a column messages, prompt, query, problem or question works",
    ),
    (GOOD + '{"messages": [{"role": "user", "content": "b"}]}\n', "", "row 1: no messages, which"),
    (GOOD + '{"query": "b"}\n', "", "row 1: no query, which other rows have; one layout"),
    (GOOD + '{"question": " "}\n', "", "row 2: question asks nothing: the user's last turn"),
    (GOOD + '{"question": 5}\n', "", "row 2: question is not a list of turns, each with a role"),
    (GOOD + '{"question": ["b"]}\n', "", "row 2: question is not a list of turns"),
    ('{"messages": "b"}\n', "", "row 1: messages is not a list of turns"),
    ('{"messages": [{"from": "human", "value": "b"}]}\n', "", "row 1: messages is not a list of"),
    ('{"messages": [{"role": "user", "content": ["b"]}]}\n', "", "row 1: messages is not a list"),
    ('{"messages": [{"role": "assistant", "content": "b"}]}\n', "", "row 1: messages asks"),
    ('{"question": "a \\ud800 b"}\n', "", "row 1: 'utf-8' codec can't encode"),
    (
        '{"prompt": "a", "original_prompt": "b"}\n',
        "",
        "columns prompt and original_prompt: rewards get the first by the name of the second; "
        "rename either",
    ),
    (GOOD + '\n{"question": "b"\n', "", "line 3 is not an object of JSON"),
    (GOOD + "[1, 2]\n", "", "line 2 is not an object of JSON"),
    ("[" * 100_000, "", "line 1 is not an object of JSON"),
]


@pytest.mark.parametrize(("content", "count", "expected"), BAD)
def test_bad_rows_are_one_line_with_flag_and_value(write, content, count, expected):
    path = write(content)
    for flag in ("--dataset", "--val_dataset"):
        message = error_of(data.load_rows, ["arithmetic#2", path + count], flag=flag)
        assert message.startswith(f"{flag} {path}{count}: {expected}"), message


def test_without_a_reader_of_files_jsonl_and_built_in_tasks_are_what_there_is(tmp_path):
    for name in ("gsm8k", "", "#5", "rows.xlsx", "some/where"):
        message = f"--dataset {name}: no such dataset; arithmetic, arithmetic-test, a .jsonl or a .parquet file works"
        assert error_of(data.load_rows, [name]) == message
    gone = tmp_path / "gone.jsonl"
    assert (
        error_of(data.load_rows, [f"{gone}#5"]) == f"--dataset {gone}#5: no such file or directory"
    )


def test_any_function_that_gives_rows_by_index_is_a_reader():
    calls = []

    def read(*args):
        calls.append(args)
        return [{"question": "a"}, {"question": "b"}]

    rows = data.load_rows(
        ["of my own#1", "arithmetic"], flag="--val_dataset", num_proc=3, read=read
    )
    assert calls == [("of my own", "--val_dataset", 3), ("arithmetic", "--val_dataset", 3)]
    assert [row["prompt"][-1]["content"] for row in rows[1:]] == ["a", "b"]


def test_the_row_number_is_that_of_the_file_under_a_sample(write):
    rows = [{"question": "a"}] * 9 + [{"question": 5}]
    assert "row 10: question" in error_of(data.load_rows, [write(rows) + "#10"])


def test_accuracy_needs_a_reference_somewhere(write):
    rows = data.load_rows(
        [write([{"question": "a", "answer": "1"}, {"question": "b", "answer": None}])]
    )
    assert check_solutions(rows) == 1
    assert check_solutions(data.load_rows(["arithmetic"])) == 0
    none = data.load_rows([write([{"question": "a"}])])
    assert error_of(check_solutions, none).startswith(
        "--reward_funcs accuracy: no row has a reference"
    )


def test_a_reference_that_is_no_text_is_for_rewards_of_ones_own(write):
    rows = data.load_rows(
        [write([{"question": "a", "answer": "1"}, {"question": "b", "answer": ["1", "2"]}])]
    )
    assert [row["solution"] for row in rows] == ["1", ["1", "2"]]
    assert "accuracy: a row's reference is a list; text or a number works" in error_of(
        check_solutions, rows
    )


# Tokens -----------------------------------------------------------------------------------------


def test_prompt_ids_are_the_templates_up_to_the_assistants_turn(tokenizer):
    rows = data.load_rows(["arithmetic#5"])
    encoded, dropped = data.encode(rows, tokenizer, max_length=None)
    assert dropped == 0
    for row, before in zip(encoded, rows, strict=True):
        assert {column: row[column] for column in before} == before and "prompt_ids" not in before
        assert type(row["prompt_ids"]) is list and all(type(i) is int for i in row["prompt_ids"])
        by_hand = "".join(
            f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in row["prompt"]
        )
        assert tokenizer.decode(row["prompt_ids"]) == by_hand + "<|im_start|>assistant\n"
        assert len(row["prompt_ids"]) < 160


def test_a_template_that_writes_the_first_token_gets_no_second(tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.add_bos_token = True
    adding.chat_template = (
        "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}:{% endif %}"
    )
    (row,), _ = data.encode([{"prompt": [user("a")]}], adding)
    assert (
        row["prompt_ids"].count(adding.bos_token_id) == 1
        and row["prompt_ids"][0] == adding.bos_token_id
    )


def test_longer_rows_are_dropped_and_counted(tokenizer, write):
    rows = data.load_rows([write([{"question": "word " * n} for n in (1, 50, 5, 80, 10)])])
    lengths = [len(row["prompt_ids"]) for row in data.encode(rows, tokenizer)[0]]
    kept, dropped = data.encode(rows, tokenizer, max_length=lengths[4])
    assert dropped == 2 and [row["question"] for row in kept] == ["word " * n for n in (1, 5, 10)]
    message = error_of(data.encode, rows, tokenizer, max_length=8)
    assert message == f"--max_length 8: every prompt is longer; {lengths[0]} keeps the shortest"
    assert len(data.encode(rows, tokenizer, max_length=lengths[0])[0]) == 1


def test_several_processes_tokenize_the_same_without_a_word(tokenizer, capfd):
    import datasets

    rows = data.load_rows(["arithmetic#7", str(FIXTURES / "numina.jsonl")])
    datasets.enable_progress_bars()  # as they are in a new process
    capfd.readouterr()
    assert data.encode(rows, tokenizer, map=map_in_processes(2)) == data.encode(rows, tokenizer)
    assert data.encode(rows[:2], tokenizer, map=map_in_processes(4)) == data.encode(
        rows[:2], tokenizer
    )
    assert data.encode(rows[:1], tokenizer, map=map_in_processes(4)) == data.encode(
        rows[:1], tokenizer
    )
    assert data.encode([], tokenizer, map=map_in_processes(4)) == ([], 0)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_a_template_or_with_a_stricter_one_is_one_line(tokenizer):
    rows = data.load_rows(["arithmetic#2"])
    other = copy.deepcopy(tokenizer)
    other.name_or_path = "gpt2"
    other.chat_template = None
    message = "--model gpt2: no chat template; an instruct model, or a chat_template.jinja, works"
    assert error_of(data.encode, rows, other) == message
    other.chat_template = "{{ raise_exception('System role not supported') }}"
    for count in (1, 2):
        message = error_of(data.encode, rows, other, map=map_in_processes(count))
        refused = "its chat template refuses a prompt: system role not supported"
        assert message == f"--model gpt2: {refused}; --system '', without a system turn, may work"


# Splitting --------------------------------------------------------------------------------------


def asked(rows):
    return {row["prompt"][-1]["content"] for row in rows}


def test_a_split_takes_its_share_and_never_overlaps(write):
    rows = data.load_rows([write([{"question": f"q{i % 150}", "id": i} for i in range(300)])])
    train, val = readers.split(rows, 0.1, 42)
    assert sorted(row["id"] for row in train + val) == list(range(300))
    assert not asked(train) & asked(val) and len(asked(val)) == 15 and len(val) == 30
    assert (train, val) == readers.split(rows, 0.1, 42) and val != readers.split(rows, 0.1, 43)[1]


def test_a_split_sees_the_question_under_any_system_turn(write):
    rows = data.load_rows(
        [write([{"messages": [system(s), user(q)]} for s in "xy" for q in "abc"])]
    )
    train, val = readers.split(rows, 0.5, 42)
    assert not asked(train) & asked(val)


@pytest.mark.parametrize("ratio", [1e-6, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_side_of_a_split_is_ever_empty(write, ratio, count):
    rows = data.load_rows([write([{"question": f"q{i}"} for i in range(count)])])
    train, val = readers.split(rows, ratio, 42)
    assert train and val and len(train) + len(val) == count


def test_an_impossible_split_is_one_line(write):
    one = data.load_rows([write([{"question": "a"}] * 5)])
    assert error_of(readers.split, one, 0.1, 42).startswith(
        "--split_dataset_ratio 0.1: 1 question cannot be split"
    )
    for ratio in (0, 1, -0.1, 2.0, float("nan")):
        assert error_of(readers.split, one, ratio, 42).startswith(
            f"--split_dataset_ratio {ratio}: not a share"
        )


# The order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "per_step"), [(1, 1), (1, 4), (7, 3), (12, 4), (5, 13), (1000, 32)]
)
def test_every_epoch_takes_each_row_once_in_an_order_of_its_own(num_rows, per_step):
    steps = -(-3 * num_rows // per_step)
    batches = [data.rows_at(step * per_step, per_step, num_rows, 42) for step in range(steps)]
    assert all(len(batch) == per_step for batch in batches)
    taken = [row for batch in batches for row in batch]
    epochs = [taken[i * num_rows : (i + 1) * num_rows] for i in range(3)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    if num_rows > 10:
        assert len({tuple(epoch) for epoch in epochs} | {tuple(range(num_rows))}) == 4


def test_the_order_changes_with_the_seed_and_with_nothing_else():
    order = data.rows_at(24, 8, 100, 42)
    data.rows_at(4995, 5, 7, 1)  # a resumed run has no past
    data._epoch_order.cache_clear()
    assert data.rows_at(24, 8, 100, 42) == order != data.rows_at(24, 8, 100, 43)
    script = "import data; print(data.rows_at(24, 8, 100, 42))"
    env = {"PYTHONHASHSEED": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert json.loads(shown.stdout) == order, shown.stderr


def test_twice_the_prompts_are_the_rows_of_two_draws():
    for first in range(0, 120, 6):
        two = data.rows_at(first, 3, 10, 0) + data.rows_at(first + 3, 3, 10, 0)
        assert data.rows_at(first, 6, 10, 0) == two


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_that_share_a_step_cover_its_groups(ranks):
    """Each rank takes its slice of the step's completions; together they take G of each prompt."""
    group, prompts = 4, 3
    rows = [row for row in data.rows_at(15, prompts, 50, 42) for _ in range(group)]
    share = len(rows) // ranks
    parts = [rows[rank * share : (rank + 1) * share] for rank in range(ranks)]
    together = Counter(row for part in parts for row in part)
    assert together == dict.fromkeys(data.rows_at(15, prompts, 50, 42), group)


# Start-up ---------------------------------------------------------------------------------------


def test_importing_data_imports_nothing_heavy():
    heavy = ("torch", "transformers", "datasets", "pyarrow", "run", "fast")
    script = f"import sys, data; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr
