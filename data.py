"""Data: rows become prompts, and prompts an order that any number of ranks follows and resumes.

    name#N ── load_rows ──> {"prompt": [turns], "solution": "43", …} ── encode ──> + "prompt_ids"
                            rows_at: which of these rows comes when

A row of GSM8K's layout     {"question": "What is 27 + 16?", "answer": "27 and 16 make 43. #### 43"}
gets these two columns      {"prompt": [{"role": "user", "content": "What is 27 + 16?"}],
and keeps its own            "solution": "27 and 16 make 43. #### 43", "question": …, "answer": …}

The question is the first of the columns `QUESTIONS` that has something in it: text, or a list of
turns. The prompt is its turns up to the user's last one. The reference, which rewards compare with,
is `solution`, else `answer` as text, else what the assistant says after the prompt. It stays as
written: to find the 43 in it is the rewards' work. So do all columns, but NaN, which is None.

To train on a task of your own, write a jsonl file, or a function like `arithmetic` and name it in
`BUILTINS`. run/readers.py reads other formats and the hub.
"""

import decimal
import functools
import json
import math
import numbers
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

QUESTIONS = ("messages", "prompt", "query", "problem", "question")  # the first one wins
RENAMED = {"prompt": "original_prompt"}  # a row's own column, where ours takes its name
# DeepSeek-R1's template (arXiv 2501.12948, table 1), for built-in tasks without a --system.
GUIDE_PROMPT = Path(__file__).parent / "examples/train/grpo/prompt.txt"


class UsageError(ValueError):
    """What the user has to mend: one line that names the flag, its value and what works."""


@dataclass(frozen=True)
class Options:
    """data"""

    dataset: Annotated[
        list[str], "hub ids (id:subset), files, built-in names; #N draws N rows"
    ] = ()
    val_dataset: Annotated[list[str], "the same, to evaluate on"] = ()
    split_dataset_ratio: Annotated[float, "else a share to evaluate on", "0 to 1"] = 0.01
    system: Annotated[str | None, "system prompt, or the text file that holds it"] = None
    chat_template_kwargs: Annotated[str | None, "JSON, such as '{\"enable_thinking\": false}'"] = (
        None
    )
    response_prefix: Annotated[str, "text that every completion begins with"] = ""
    max_length: Annotated[int | None, "tokens of a prompt; longer ones are dropped", "from 1"] = (
        None
    )
    dataset_num_proc: Annotated[int, "processes that tokenize", "from 1"] = 1
    dataloader_num_workers: Annotated[int, "no effect: prompts are in memory", "from 0"] = 0


# Where rows come from ---------------------------------------------------------------------------


EXAMPLE = [
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "<think>12 + 7 = 19</think><answer>19</answer>"},
]


def arithmetic(test: bool = False) -> list[dict]:
    """Sums of two terms from 2 to 49: 256 fixed questions to test, all others to train.

    Each stands behind a worked example, which shows a small model the format. Training asks
    neither a + b nor b + a of a test question, and neither asks the example.
    """
    ordered = [(a, b) for a in range(2, 50) for b in range(2, 50)]
    pairs = [(a, b) for a, b in ordered if a <= b]  # a sum is one pair, asked in two orders
    pairs.remove((7, 12))  # the example
    rng = random.Random(0)  # not the run's seed: every run tests the same questions
    tested = rng.sample(pairs, 256)
    if test:
        asked = [rng.sample(pair, 2) for pair in tested]  # each in one order, drawn
    else:
        trained = set(pairs) - set(tested)
        asked = [pair for pair in ordered if tuple(sorted(pair)) in trained]
    rows = []
    for a, b in asked:
        question = {"role": "user", "content": f"What is {a} + {b}?"}
        rows.append({"messages": [*EXAMPLE, question], "solution": str(a + b)})
    return rows


BUILTINS = {
    "arithmetic": arithmetic,
    "arithmetic-test": functools.partial(arithmetic, test=True),
}


def read_plain(source: str, flag: str, num_proc: int | None) -> list[dict]:
    """The rows of a built-in task, a jsonl or a parquet file: the least that a reader does.

    `load_rows` takes any function from these three to a table: rows by index, and their number.
    """
    if source in BUILTINS:
        return BUILTINS[source]()
    if source.endswith(".parquet"):
        return read_parquet(source)
    if not source.endswith(".jsonl"):
        known = ", ".join(BUILTINS)
        raise ValueError(f"no such dataset; {known}, a .jsonl or a .parquet file works")
    text = Path(source).read_text(encoding="utf-8-sig")  # sig: a mark that some editors put first
    rows = []
    # Not splitlines: it would break a row at a \u2028 within its text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append({**json.loads(line)})
            except (TypeError, ValueError, RecursionError) as error:  # an object alone unpacks
                raise ValueError(f"line {number} is not an object of JSON") from error
    return rows


def read_parquet(source: str | Path) -> list[dict]:
    import pyarrow.parquet

    return as_written(pyarrow.parquet.read_table(source)).to_pylist()


def as_written(table):
    """A table of Arrow whose short floats are the numbers that somebody wrote: 99.99, which float32
    holds as 99.98999786376953."""
    import pyarrow
    from pyarrow import compute

    def with_floats_as(kind, type):
        if pyarrow.types.is_list(type):
            return pyarrow.list_(with_floats_as(kind, type.value_type))
        return kind if type == pyarrow.float32() else type

    for place, field in enumerate(table.schema):
        as_text = with_floats_as(pyarrow.string(), field.type)
        if as_text != field.type:
            digits = compute.cast(table.column(place), as_text)  # as few as tell it apart
            column = compute.cast(digits, with_floats_as(pyarrow.float64(), field.type))
            table = table.set_column(place, field.name, column)
    return table


# From rows to prompts ---------------------------------------------------------------------------


def load_rows(
    names: list[str], *, flag="--dataset", seed=42, num_proc=None, system=None, read=read_plain
) -> list[dict]:
    """The rows of all `names`, laid out as above; what a row lacks of others' columns is None.

    A name is one that `read` knows, with `#N` behind it for N rows drawn with `seed`. The text
    `system` opens prompts that have no system turn of their own. `num_proc` processes prepare a
    dataset of the hub, and `flag` says which split of it is meant. What cannot be read is a
    UsageError that opens with the flag and the name.
    """
    rows = []
    for name in names:
        try:
            source, numbered = _draw(name, flag, seed, num_proc, read)
            opening = system
            if source in BUILTINS and system is None:  # "" is none at all
                opening = GUIDE_PROMPT.read_text(encoding="utf-8").strip()
            rows += _normalise(numbered, opening)
        except (OSError, ValueError, RecursionError) as error:  # the last: JSON nested too deep
            raise UsageError(f"{flag} {name}: {one_line(error)}") from error
    # Rewards are handed columns, not rows, so every row gets the columns of all.
    columns = _columns(rows)
    return [{column: row.get(column) for column in columns} for row in rows]


def _draw(name, flag, seed, num_proc, read):
    """The source that a name means, and the rows, by their numbers there from 1."""
    source, mark, count = name.rpartition("#")  # "a.jsonl#100"
    if not mark or os.path.isfile(name):  # a file's own name may hold a #
        source, count = name, None
    elif not re.fullmatch("0*[1-9][0-9]*", count):
        raise ValueError(f"#{count} is not a number of rows; #1 or more works")
    table = read(source, flag, num_proc)
    size = len(table)
    if not size:
        raise ValueError("the dataset is empty; one row or more works")
    picked = range(size)
    if count:
        if int(count) > size:
            raise ValueError(f"#{count} is more rows than there are; #1 to #{size} work")
        drawn = random.Random(seed).sample(picked, int(count))
        picked = sorted(drawn)  # the table's order, so that drawing all is drawing none
    return source, {i + 1: table[i] for i in picked}


def _columns(rows):
    """The names of all columns, in the order in which they come up."""
    return dict.fromkeys(column for row in rows for column in row)


def _normalise(numbered, system):
    """The rows of one dataset with their `prompt` and `solution`."""
    numbered = {number: without_nan({**row}) for number, row in numbered.items()}
    rows = numbered.values()
    columns = _columns(rows)
    for name, ours in RENAMED.items():
        if name in columns and ours in columns:
            problem = "rewards get the first by the name of the second; rename either"
            raise ValueError(f"columns {name} and {ours}: {problem}")
    # A column with nothing in it gives way to the next, as an optional `messages` does.
    filled = [c for c in QUESTIONS if any(row.get(c) for row in rows)]
    if not filled:
        known = ", ".join(columns)
        raise ValueError(f"no question in {known}; a column {either(QUESTIONS)} works")
    question = filled[0]  # one for all rows, so that none is read unlike the others
    has_reference = "solution" in columns or "answer" in columns
    normalised = []
    for number, row in numbered.items():
        try:
            prompt, prose = _conversation(row.get(question), question)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        # A row that brings a system turn of its own knows better than the flag.
        if system and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": system})
        # Where there is a column for references, an empty one means that this row has none.
        solution = _reference(row) if has_reference else prose
        kept = {RENAMED.get(column, column): value for column, value in row.items()}
        normalised.append({"prompt": prompt, **kept, "solution": solution})
    return normalised


def _conversation(value, column):
    """The turns up to the user's last one, and what the assistant says at the end, if anything."""
    if value is None:
        raise ValueError(f"no {column}, which other rows have; one layout a dataset works")
    if isinstance(value, bytes):
        raise ValueError(f"{column} is bytes; text, or a list of turns, works")
    if isinstance(value, str) and column != "messages":
        value = [{"role": "user", "content": value}]
    try:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in value]
        # Fail here, with the row's number: what is no text, and half a surrogate pair.
        for turn in turns:
            "".join(turn.values()).encode()
    except (TypeError, KeyError):
        wanted = "a list of turns, each with a role and a content of text"
        raise ValueError(f"{column} is not {wanted}") from None
    prompt = list(turns)  # what the assistant says at the end is to be sampled, not given
    while prompt and prompt[-1]["role"] != "user":
        prompt.pop()
    if not prompt or not prompt[-1]["content"].strip():
        raise ValueError(f"{column} asks nothing: the user's last turn is missing or empty")
    last = turns[-1]
    return prompt, last["content"] if last["role"] == "assistant" else None


def without_nan(value):
    """A row with None for NaN, which is how tables of numbers write that there is nothing."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_nan, value))
    is_number = isinstance(value, numbers.Number)
    return None if is_number and value != value else value


def _reference(row):
    for column in ("solution", "answer"):
        value = row.get(column)
        if value is None or not str(value).strip():
            continue
        # Lists and bytes are for rewards of one's own; accuracy cannot read them.
        as_it_is = column == "solution" or isinstance(value, list | dict | bytes)
        return value if as_it_is else text_of(value)
    return None


def text_of(value) -> str:
    """A number as a person writes it: 0.00001, where Python has 1e-05."""
    if isinstance(value, float) and math.isfinite(value):
        return format(decimal.Decimal(repr(value)), "f")
    return str(value)


# From prompts to tokens -------------------------------------------------------------------------


def encode(
    rows, tokenizer, max_length=None, map=map, prefix="", template=None
) -> tuple[list[dict], int]:
    """The rows of at most `max_length` tokens with their `prompt_ids`, and how many were longer.

    The ids are the chat template's, which gets `template` as arguments, up to where the assistant
    begins, and those of `prefix`, the text that every completion begins with. map: Python's, or one
    that several processes share. UsageError for a template that is missing or refuses a prompt, or
    if no row is left.
    """
    model = f"--model {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        works = "an instruct model, or a chat_template.jinja, works"
        raise UsageError(f"{model}: no chat template; {works}")

    settings = {"add_generation_prompt": True, "return_dict": False, **(template or {})}
    prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)

    def tokenize(row):
        try:  # not text first and ids then: that would put a second <s> before the template's own
            ids = tokenizer.apply_chat_template(row["prompt"], **settings)
        except Exception as error:  # what a template may raise: "System role not supported"
            problem = f"its chat template refuses a prompt: {one_line(error)}"
            if row["prompt"][0]["role"] == "system":
                problem += "; --system '', without a system turn, may work"
            raise UsageError(f"{model}: {problem}") from error
        return {"prompt_ids": ids + prefix_ids}

    kept, lengths = [], []
    for row, new in zip(rows, map(tokenize, rows)):
        ids = new["prompt_ids"]
        lengths.append(len(ids))
        if max_length is None or len(ids) <= max_length:
            kept.append({**row, "prompt_ids": ids})  # a new row: the caller's stays as it is
    if rows and not kept:
        works = f"{min(lengths)} keeps the shortest"
        raise UsageError(f"--max_length {max_length}: every prompt is longer; {works}")
    return kept, len(rows) - len(kept)


# From prompts to batches ------------------------------------------------------------------------


def rows_at(first: int, count: int, num_rows: int, seed: int) -> list[int]:
    """Indices of the rows at the places from `first` on, in an endless sequence of epochs, each of
    them all rows in an order of its own.

    These four numbers decide, so ranks agree without a word, and a run that resumes goes on as if
    it had not stopped:

        4 rows, 3 prompts at a time    2 0 3 1 1 3 0 2 0 1 …
                                       └─0─┘ └─3─┘ └─6─┘
    """
    rows = []
    for place in range(first, first + count):
        epoch, position = divmod(place, num_rows)  # may begin in one epoch and end in the next
        order = _epoch_order(epoch, num_rows, seed)
        rows.append(order[position])
    return rows


@functools.lru_cache(maxsize=4)  # the epoch's order is asked for once a prompt
def _epoch_order(epoch, num_rows, seed):
    rng = random.Random(f"{seed} {epoch}")  # as text, no two pairs are alike; sums would be
    return rng.sample(range(num_rows), num_rows)


def either(names) -> str:
    """a, b or c"""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def one_line(error: Exception) -> str:
    """What an error says, ready to stand behind a colon."""
    text = getattr(error, "strerror", None) or str(error)  # the first without number and path
    text = " ".join(text.split())[:300]
    return text[:1].lower() + text[1:]
