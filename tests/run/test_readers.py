"""What run/readers.py promises: four formats and the hub, and a line for each bad file."""

import csv
import json

import pytest

import data
from run import checks, readers


def load(*names, **settings):
    return data.load_rows(list(names), read=readers.read, **settings)


def write_parquet(path, rows, kinds=None):
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(kinds) if kinds else None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


def error_of(*names, **settings):
    """The message of the UsageError that loading raises, which must be a single line."""
    with pytest.raises(data.UsageError) as caught:
        load(*names, **settings)
    message = str(caught.value)
    assert message.startswith("--") and "\n" not in message and len(message) < 600, message
    return message


def user(text):
    return {"role": "user", "content": text}


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "lines.json", "json", "csv", "parquet", "JSONL"])
def test_each_file_type_gives_the_same_rows(tmp_path, suffix):
    rows = [
        {"question": 'What is "2 + 3",\nin words\u2028or figures?', "answer": "五 = 5"},
        {"question": "And 4 + 5?", "answer": "9"},
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(lines + "\r\n", encoding="utf-8-sig")
    expected = [{"prompt": [user(r["question"])], "solution": r["answer"], **r} for r in rows]
    assert load(str(path)) == expected
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no cache beside the file
    if suffix == "jsonl":
        assert data.load_rows([str(path)]) == expected  # data.py's own reader


def test_parquet_holds_conversations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    turns = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    table = pyarrow.Table.from_pylist([{"messages": turns, "solution": "d"}])
    pyarrow.parquet.write_table(table, path)
    (row,) = load(str(path))
    assert row["prompt"] == turns and row["solution"] == "d"


@pytest.mark.parametrize("column", ["question", "problem", "prompt"])
def test_a_question_of_bytes_is_one_line(tmp_path, column):
    path = write_parquet(tmp_path / "a.parquet", [{column: b"a", "answer": "1"}])
    message = f"--dataset {path}: row 1: {column} is bytes; text, or a list of turns, works"
    assert error_of(str(path)) == message


@pytest.mark.parametrize("column", ["solution", "answer"])
def test_a_reference_of_bytes_is_for_rewards_of_ones_own(tmp_path, column):
    path = write_parquet(
        tmp_path / "a.parquet", [{"question": "a", column: b"1", "image": b"\xff"}]
    )
    rows = load(str(path))
    assert rows[0]["solution"] == b"1" and rows[0]["image"] == b"\xff"
    with pytest.raises(
        data.UsageError, match="^--reward_funcs accuracy: a row's reference is of bytes"
    ):
        checks.check_solutions(rows)


def test_short_floats_are_the_numbers_that_were_written_in_lists_too(tmp_path):
    import pyarrow

    kinds = {"a": pyarrow.float32(), "b": pyarrow.list_(pyarrow.float32())}
    kinds["c"] = pyarrow.list_(kinds["b"])
    row = {"a": 99.99, "b": [0.1, None], "c": [[2.7]]}
    path = write_parquet(
        tmp_path / "a.parquet", [{"question": "q", **row}], {"question": pyarrow.string(), **kinds}
    )
    assert {name: load(str(path))[0][name] for name in row} == row


def test_a_csv_field_may_be_long(tmp_path):
    text = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"question,answer\n{text},1\n")
    assert load(str(tmp_path / "a.csv"))[0]["question"] == text


def test_built_in_tasks_and_files_are_drawn_from_together(tmp_path):
    (tmp_path / "a.json").write_text('[{"question": "a"}, {"question": "b"}]')
    assert len(load(f"{tmp_path / 'a.json'}#1", "arithmetic#3")) == 4


# Bad files --------------------------------------------------------------------------------------

GOOD = '{"question": "a", "answer": "1"}\n'
EXPECTS_NAME = "line 1 is not JSON (expecting property name enclosed in double quotes); an object"
BAD_FILES = [
    ("gone.jsonl", None, "", "no such file; arithmetic, arithmetic-test, a .jsonl, .json, .csv or"),
    ("gone.csv", None, "#5", "no such file"),
    ("empty.jsonl", "", "", "the dataset is empty"),
    ("blank.jsonl", "\n \n", "", "the dataset is empty"),
    ("empty.json", "[]", "", "the dataset is empty"),
    ("header.csv", "question,answer\n", "#1", "the dataset is empty"),
    ("a.jsonl", GOOD * 8, "#9", "#9 is more rows than there are; #1 to #8 work"),
    ("a.jsonl", GOOD + '\n{"question": "b"\n', "", "line 3 is not JSON (Expecting ',' delimiter)"),
    ("a.jsonl", GOOD + "[1, 2]\n", "", "row 2 is not an object; an object a line, or one list of"),
    ("a.json", '[{"question": "a"},\n{"question" 2}]', "", "line 2 is not JSON"),
    ("a.json", "[1]", "", "row 1 is not an object"),
    ("a.json", '{\n"data": []}', "", EXPECTS_NAME),
    ("a.json", "[" * 100_000, "", "line 1 is not json (nested too deeply)"),
    ("a.csv", "question,answer,answer\na,1,2\n", "", "the header names answer twice"),
    ("a.csv", "question,answer\na,1\nb,2,3\n", "", "row 2 has more fields than the header"),
    ("a.csv", "question,answer,level\na,1,2\nb,2\n", "", "row 2 has fewer fields than the header"),
    ("a.csv", "question,answer\nWhat is\n2 + 2?,4\n", "", "row 1 has fewer fields than the header"),
    ("a.csv", 'question,answer\n"a,1\n', "", "unexpected end of data"),
    ("a.parquet", "not parquet", "", "could not open parquet input"),
    ("a.txt", "What?", "", "a .txt file is not understood; arithmetic"),
    ("a.csv", "question\na\n \n", "", "row 2: question asks nothing"),
]


@pytest.mark.parametrize(("name", "content", "count", "expected"), BAD_FILES)
def test_a_bad_file_is_one_line_with_flag_and_value(tmp_path, name, content, count, expected):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    for flag in ("--dataset", "--val_dataset"):
        message = error_of("arithmetic#2", f"{path}{count}", flag=flag)
        assert message.lower().startswith(f"{flag} {path}{count}: {expected}".lower()), message


def test_a_file_that_may_not_be_read_is_one_line(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert "folder.jsonl: is a directory" in error_of(str(tmp_path / "folder.jsonl"))


# The hub ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Replaces datasets.load_dataset by a table of splits and notes its calls."""
    import datasets

    calls = []

    def load_dataset(path, name=None, num_proc=None):
        calls.append((path, name, num_proc))
        if path == "some/where":
            raise ConnectionError("Couldn't reach 'some/where' on the Hub\n(offline)")
        splits = {"some/test-only": ["test"], "some/odd": ["easy", "hard"]}
        splits["some/two"] = ["train", "test"]
        splits["some/three"] = ["test", "train", "validation"]
        made = datasets.DatasetDict()
        for split in splits.get(path, ["train"]):
            rows = [{"problem": f"{split} {i}", "solution": "1"} for i in range(9)]
            made[split] = datasets.Dataset.from_list(rows)
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_id_is_loaded_sampled_and_prepared_by_num_proc(hub):
    rows = load("AI-MO/NuminaMath-TIR#5", num_proc=4, system="s")
    assert hub == [("AI-MO/NuminaMath-TIR", None, 4)]
    assert len(rows) == 5
    for row in rows:
        assert row["prompt"] == [{"role": "system", "content": "s"}, user(row["problem"])]


def test_a_hub_id_names_its_subset_behind_a_colon(hub):
    assert len(load("openai/gsm8k:main#2")) == 2
    assert hub == [("openai/gsm8k", "main", None)]


def test_a_folder_is_read_as_the_hub_reads_one(hub, tmp_path):
    assert len(load(f"{tmp_path}#2")) == 2
    assert hub == [(str(tmp_path), None, None)]


def test_training_takes_the_train_split_and_validation_another(hub):
    assert load("some/two")[0]["problem"] == "train 0"
    assert load("some/two", flag="--val_dataset")[0]["problem"] == "test 0"
    assert load("some/three", flag="--val_dataset")[0]["problem"] == "validation 0"
    assert load("some/test-only")[0]["problem"] == "test 0"  # the only one there is
    assert error_of("some/odd") == "--dataset some/odd: no split train among easy, hard"
    message = "--val_dataset some/odd: no split validation or test among easy, hard"
    assert error_of("some/odd", flag="--val_dataset") == message


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    message = error_of("some/where#5")
    opening = "--dataset some/where#5: cannot be loaded from the hub (couldn't reach"
    assert message.startswith(opening)
    assert "arithmetic" in message and ".jsonl" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arithmetc", "no such dataset (did you mean arithmetic?); arithmetic, arithmetic-test, a"),
        ("arithmetic_test#5", "no such dataset (did you mean arithmetic-test?)"),
        ("gsm8k", "no such dataset; arithmetic"),
        ("", "no such dataset; arithmetic"),
        ("#5", "no such dataset; arithmetic"),
        ("/nowhere/to/be/found", "no such dataset; arithmetic"),
        ("some/where/else", "no such dataset; arithmetic"),
    ],
)
def test_an_unknown_name_needs_no_network_to_be_refused(hub, name, expected):
    assert error_of(name).startswith(f"--dataset {name}: {expected}")
    assert hub == []
