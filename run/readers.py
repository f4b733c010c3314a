"""Readers: the rows of built-in tasks, of jsonl, json, csv and parquet files, and of the hub.

    data.load_rows(names, read=readers.read)

`read` takes the place of `data.read_plain`, with the same three arguments. What it cannot read is a
ValueError or an OSError, which `load_rows` puts behind the flag and the name. To read one more
format, write a function from a path to a list of rows and name its suffix in `READERS`.
"""

import csv
import difflib
import json
import os
import random
import re
from pathlib import Path

from data import BUILTINS, UsageError, either, one_line, read_parquet
from run.values import from_json

MISSING = object()  # a field of a row that ends too early
JSON_WORKS = "an object a line, or one list of them, works"


def read(source: str, flag: str, num_proc: int | None):
    """A table: rows by index, and their number. A list, or a `datasets.Dataset` for the hub."""
    path = Path(source)
    suffix = path.suffix.lower()
    if source in BUILTINS:
        return BUILTINS[source]()
    if suffix in READERS:
        if not path.exists():
            raise ValueError(f"no such file; {WORKS}")
        return READERS[suffix](path)
    if path.is_file():
        raise ValueError(f"a {path.suffix or 'nameless'} file is not understood; {WORKS}")
    # Only what can be on the hub is asked for there: a slip in a name is told without a network.
    if os.path.isdir(source) or re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", source):
        return read_hub(source, flag, num_proc)
    close = difflib.get_close_matches(source, BUILTINS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(f"no such dataset{hint}; {WORKS}")


def read_json(path: Path) -> list[dict]:
    """Rows of one list, or of one object a line, whichever of the two suffixes the file has."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = parse_json(text, 1)
    else:  # not splitlines, which would break a row at a \u2028 within its text
        lines = enumerate(text.split("\n"), 1)
        rows = [parse_json(line, number) for number, line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object; {JSON_WORKS}")
    return rows


def parse_json(text: str, first_line: int):
    try:
        return from_json(text)
    except ValueError as error:  # of a number that is too long, and of what is too deep, too
        line = first_line + getattr(error, "lineno", 1) - 1
        problem = getattr(error, "msg", one_line(error))
        raise ValueError(f"line {line} is not JSON ({problem}); {JSON_WORKS}") from error


def read_csv(path: Path) -> list[dict]:
    csv.field_size_limit(2**31 - 1)  # from 131,072 characters
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, restval=MISSING)
            names = reader.fieldnames or []
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"the header names {twice[0]} twice")
            rows = list(reader)
    except csv.Error as error:  # a kind that is no ValueError
        raise ValueError(str(error)) from error
    for number, row in enumerate(rows, 1):
        if None in row:  # where DictReader puts what the header has no name for
            raise ValueError(f"row {number} has more fields than the header")
        if MISSING in row.values():  # often half of a row, broken at a line end within its text
            raise ValueError(f"row {number} has fewer fields than the header")
    return rows


def read_hub(source: str, flag: str, num_proc: int | None):
    """A `datasets.Dataset`: the split to train on, or for --val_dataset to validate or to test."""
    import datasets

    datasets.disable_progress_bars()
    repo, _, subset = source.partition(":")  # such as openai/gsm8k:main
    try:
        splits = datasets.load_dataset(repo, subset or None, num_proc=num_proc)
    except Exception as error:  # the hub has a dozen kinds
        problem = f"cannot be loaded from the hub ({one_line(error)})"
        raise ValueError(f"{problem}; {WORKS}") from error
    wanted = ("validation", "test") if flag == "--val_dataset" else ("train",)
    found = [name for name in wanted if name in splits]
    if found:
        return splits[found[0]]
    if len(splits) == 1:  # no other can be meant
        return next(iter(splits.values()))
    raise ValueError(f"no split {either(wanted)} among {', '.join(splits)}")


READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
HUB = "a hub id such as AI-MO/NuminaMath-TIR works"
WORKS = f"{', '.join(BUILTINS)}, a {either(READERS)} file, or {HUB}"


def read_system(value: str | None) -> str | None:
    """The system prompt that `--system` means: the text itself, or what a file of that name holds.

    UsageError for what looks like a file (some/path, or .txt or .md at its end) and cannot be read.
    """
    if not value:
        return value  # "" is no system turn at all, of built-in tasks either
    looks_like_file = re.search(r"\.(txt|md)$|^\S*/\S*$", value)
    if not looks_like_file and not os.path.isfile(value):
        return value
    try:
        text = Path(value).read_text(encoding="utf-8-sig").strip()
        if not text:
            raise ValueError("the file is empty")
    except (OSError, ValueError) as error:
        works = "a text file or text works"
        raise UsageError(f"--system {value}: {one_line(error)}; {works}") from error
    return text


def split(rows: list[dict], ratio: float, seed: int = 42) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and the rows of `ratio` of the questions, at least one, to validate with.

    Rows that differ in nothing but their system turns ask the same, and stay on the same side.
    """
    flag = f"--split_dataset_ratio {ratio}"
    if not 0 < ratio < 1:
        raise UsageError(f"{flag}: not a share of the rows; a number between 0 and 1 works")
    asked = []
    for row in rows:  # the same question from two datasets may stand behind two system turns
        turns = [turn for turn in row["prompt"] if turn["role"] != "system"]
        asked.append(json.dumps(turns))
    # Each once. A set would do so, too, but in an order of its own in every process.
    questions = list(dict.fromkeys(asked))
    total = len(questions)
    if total < 2:
        raise UsageError(f"{flag}: {total} question cannot be split; two, or a --val_dataset, work")
    count = max(1, round(ratio * total))
    count = min(count, total - 1)  # or nothing would be left to train on
    held_out = set(random.Random(seed).sample(questions, count))
    train, val = [], []
    for row, question in zip(rows, asked):
        side = val if question in held_out else train
        side.append(row)
    return train, val


def map_in_processes(count: int):
    """Python's `map`, in so many processes, of functions that read a row's prompt."""

    def map_rows(function, rows):
        processes = min(count, len(rows))
        if processes < 2:
            return map(function, rows)
        import datasets  # takes seconds, which only who asks for processes waits

        # Prompts alone: other columns may mix types, which Arrow's tables refuse.
        datasets.disable_progress_bars()
        prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        return prompts.map(function, num_proc=processes, keep_in_memory=True)

    return map_rows
