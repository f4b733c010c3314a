"""Data: a dataset's rows become prompts, and prompts an order that any number of ranks can follow and resume.

    name#N ── load_rows ──> {"prompt": [turns], "solution": "43", + every column} ── encode ──> + "prompt_ids"

A row of GSM8K's layout        {"question": "What is 27 + 16?", "answer": "27 and 16 make 43. #### 43"}
becomes these two columns      {"prompt": [{"role": "user", "content": "What is 27 + 16?"}],
and keeps its own beside them   "solution": "27 and 16 make 43. #### 43", "question": …, "answer": …}

The question is the first of `messages`, `prompt`, `query`, `problem` and `question` that has something in it,
text or a list of turns. The prompt is its turns up to the user's last; a row's own system turn wins over
`system`. The reference is `solution`, else `answer`, else (where neither column exists) what the assistant
says after the prompt. It stays as written: to find a `\\boxed{}` or `#### 43` in it is the rewards' work.
A column called `prompt` is kept as `original_prompt`.

Bad input raises a ValueError of one line that begins with the flag and its value. To train on a task of your
own, write a jsonl file, or a function like `arithmetic` and name it in `BUILTINS`.
"""

import csv
import difflib
import functools
import itertools
import json
import os
import random
import re
from pathlib import Path

QUESTIONS = ("messages", "prompt", "query", "problem", "question")
GUIDE_PROMPT = Path(__file__).parent / "examples" / "train" / "grpo" / "prompt.txt"


def load_rows(
    names: list[str], *, flag="--dataset", seed=42, num_proc: int | None = None, system: str | None = None
) -> list[dict]:
    """The rows of all `names`, laid out as above; what a row lacks of the others' columns is None.

    A name is a built-in, a file or a hub id; `#N` behind it draws N of its rows with `seed`. `num_proc`
    processes prepare a hub dataset. `flag` opens error messages and tells which split of it to take.
    """
    rows = []
    for name in names:
        try:
            rows += _load_one(name, flag, seed, num_proc, system)
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise ValueError(f"{flag} {name}: {_one_line(error)}") from error
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _load_one(name: str, flag: str, seed: int, num_proc: int | None, system: str | None) -> list[dict]:
    source, mark, count = name.rpartition("#")
    if not mark or os.path.isfile(name):  # a file's own name may hold a #
        source, count = name, None
    elif not re.fullmatch("0*[1-9][0-9]*", count):
        raise ValueError(f"#{count} is not a number of rows; #1 or more works")
    table = _read(source, flag, num_proc)
    if not len(table):
        raise ValueError("the dataset is empty; one row or more works")
    picked = range(len(table))
    if count:
        if int(count) > len(table):
            raise ValueError(f"#{count} is more rows than there are; #1 to #{len(table)} work")
        picked = sorted(random.Random(seed).sample(picked, int(count)))
    if source in BUILTINS and system is None:
        system = read_system(str(GUIDE_PROMPT))
    return _normalise({i + 1: table[i] for i in picked}, system)


def _normalise(rows: dict[int, dict], system: str | None) -> list[dict]:
    """One dataset's rows, given by number, with their `prompt` and `solution`."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    question = next((c for c in QUESTIONS if any(row.get(c) for row in rows.values())), None)
    if question is None:
        raise ValueError(f"no question in {', '.join(columns)}; a column {_either(QUESTIONS)} works")
    normalised = []
    for number, row in rows.items():
        try:
            if row.get(question) is None:
                raise ValueError(f"no {question}, which other rows have; one layout a dataset works")
            prompt, prose = _conversation(row[question], question)
            if system and prompt[0]["role"] != "system":
                prompt = [{"role": "system", "content": system}, *prompt]
            solution = _reference(row) if columns.keys() & {"solution", "answer"} else prose
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        kept = {"original_prompt" if column == "prompt" else column: value for column, value in row.items()}
        normalised.append({"prompt": prompt, **kept, "solution": solution})
    return normalised


def _conversation(value: str | list[dict], column: str) -> tuple[list[dict], str | None]:
    """The turns up to the user's last one, and what the assistant says at the end, if anything."""
    if isinstance(value, str) and column != "messages":
        value = [{"role": "user", "content": value}]
    try:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in value]
        "".join(text for turn in turns for text in turn.values()).encode()  # a lone surrogate fails here
    except (TypeError, KeyError):
        raise ValueError(f"{column} is not a list of turns, each with a role and a content of text") from None
    end = max((i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    if not end or not turns[end - 1]["content"].strip():
        raise ValueError(f"{column} asks nothing: the user's last turn is missing or empty")
    return turns[:end], turns[-1]["content"] if turns[-1]["role"] == "assistant" else None


def _reference(row: dict) -> str | list | dict | None:
    for column in ("solution", "answer"):
        value = row.get(column)
        if isinstance(value, list | dict):
            return value  # for rewards of one's own; accuracy cannot read it
        if value is not None and str(value).strip():
            return str(value)
    return None


def check_solutions(rows: list[dict]) -> int:
    """How many rows have no reference answer for accuracy to compare with; an error when none has, or one is no text."""
    for row in rows:
        if isinstance(row["solution"], list | dict):
            kind = type(row["solution"]).__name__
            raise ValueError(f"--reward_funcs accuracy: a row's reference is a {kind}; text or a number works")
    missing = sum(row["solution"] is None for row in rows)
    if missing == len(rows):
        raise ValueError("--reward_funcs accuracy: no row has a reference; a column solution or answer works")
    return missing


def read_system(value: str | None) -> str | None:
    """The system prompt that `--system` means: the text itself, or what the text file of that name holds."""
    if not value or not (os.path.isfile(value) or re.search(r"\.(txt|md)$|^\S*/\S*$", value)):
        return value or None
    try:
        text = Path(value).read_text(encoding="utf-8-sig").strip()
        if not text:
            raise ValueError("the file is empty")
    except (OSError, ValueError) as error:
        raise ValueError(f"--system {value}: {_one_line(error)}; a text file or text works") from error
    return text


# Where rows come from ---------------------------------------------------------------------------------------


def arithmetic(test: bool = False) -> list[dict]:
    """Sums of two terms from 2 to 49 behind a worked example: 256 fixed questions to test, the rest to train.

    Training asks neither a + b nor b + a of a test question, and neither asks the example. Its wording
    is the best of three measured with the embedded model at temperature 0.9: of 256 completions, of 24 tokens
    on average, 22 % were right and 49 % in the format.
    """
    terms, example = range(2, 50), (7, 12)
    pairs = [pair for pair in itertools.combinations_with_replacement(terms, 2) if pair != example]
    rng = random.Random(0)
    tested = rng.sample(pairs, 256)
    if test:
        asked = [rng.sample(pair, 2) for pair in tested]
    else:
        trained = set(pairs) - set(tested)
        asked = [pair for pair in itertools.product(terms, terms) if tuple(sorted(pair)) in trained]
    shown = [
        {"role": "user", "content": "What is 12 + 7?"},
        {"role": "assistant", "content": "<think>12 + 7 = 19</think><answer>19</answer>"},
    ]
    return [
        {"messages": [*shown, {"role": "user", "content": f"What is {a} + {b}?"}], "solution": str(a + b)}
        for a, b in asked
    ]


def _read_json(path: Path) -> list[dict]:
    """Rows of one list, or of one object a line, whichever of the two suffixes the file has."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    rows = []
    for number, line in enumerate([text] if is_list else text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                where = f"line {number + error.lineno - 1} is not JSON"
                raise ValueError(f"{where} ({error.msg}); {JSON_WORKS}") from error
            rows += value if is_list else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object; {JSON_WORKS}")
    return rows


def _read_csv(path: Path) -> list[dict]:
    csv.field_size_limit(2**31 - 1)  # from 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the header names {twice[0]} twice")
        rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:  # where DictReader puts what the header has no name for
            raise ValueError(f"row {number} has more fields than the header")
    return rows


def _read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def _read_hub(source: str, flag: str, num_proc: int | None):
    """A `datasets.Dataset`: the training split, or for --val_dataset that for validation or test."""
    import datasets

    datasets.disable_progress_bars()
    repo, _, subset = source.partition(":")  # such as openai/gsm8k:main
    try:
        splits = datasets.load_dataset(repo, subset or None, num_proc=num_proc)
    except Exception as error:  # the hub has a dozen kinds
        raise ValueError(f"cannot be loaded from the hub ({_one_line(error)}); {WORKS}") from error
    wanted = ("validation", "test") if flag == "--val_dataset" else ("train",)
    found = [name for name in wanted if name in splits] or list(splits)
    if found[0] not in wanted and len(splits) > 1:
        raise ValueError(f"no split {_either(wanted)} among {', '.join(splits)}")
    return splits[found[0]]


def _either(names) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _one_line(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:300]
    return text[:1].lower() + text[1:]


BUILTINS = {"arithmetic": arithmetic, "arithmetic-test": functools.partial(arithmetic, test=True)}
JSON_WORKS = "an object a line, or one list of them, works"
READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
WORKS = f"{', '.join(BUILTINS)}, a {_either(READERS)} file, or a hub id such as AI-MO/NuminaMath-TIR works"


def _read(source: str, flag: str, num_proc: int | None):
    """Rows by index: a list, or a `datasets.Dataset`."""
    path = Path(source)
    if source in BUILTINS:
        return BUILTINS[source]()
    if path.suffix.lower() in READERS:
        if not path.exists():
            raise ValueError(f"no such file; {WORKS}")
        return READERS[path.suffix.lower()](path)
    if path.is_file():
        raise ValueError(f"a {path.suffix or 'nameless'} file is not understood; {WORKS}")
    if os.path.isdir(source) or re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", source):
        return _read_hub(source, flag, num_proc)
    close = difflib.get_close_matches(source, BUILTINS, n=1)
    raise ValueError(f"no such dataset{f' (did you mean {close[0]}?)' if close else ''}; {WORKS}")


# From rows to batches ---------------------------------------------------------------------------------------


def encode(
    rows: list[dict], tokenizer, max_length: int | None = None, num_proc: int | None = None
) -> tuple[list[dict], int]:
    """The rows of at most `max_length` tokens with their `prompt_ids`, and how many were longer.

    The ids are the chat template's, up to where the assistant begins. `num_proc` processes tokenize.
    """
    model = f"--model {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise ValueError(f"{model}: no chat template; an instruct model, or a chat_template.jinja, works")

    def tokenize(row: dict) -> dict:
        try:
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        except Exception as error:  # what a template may raise, such as Gemma's "System role not supported"
            raise ValueError(f"{model}: its chat template refuses a prompt: {_one_line(error)}") from error
        return {"prompt_ids": ids}

    encoded = map(tokenize, rows)
    if num_proc and num_proc > 1:
        import datasets

        datasets.disable_progress_bars()
        prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        encoded = prompts.map(tokenize, num_proc=num_proc, keep_in_memory=True)
    encoded = [{**row, "prompt_ids": new["prompt_ids"]} for row, new in zip(rows, encoded, strict=True)]
    kept = [row for row in encoded if max_length is None or len(row["prompt_ids"]) <= max_length]
    if encoded and not kept:
        shortest = min(len(row["prompt_ids"]) for row in encoded)
        raise ValueError(f"--max_length {max_length}: every prompt is longer; {shortest} keeps the shortest")
    return kept, len(rows) - len(kept)


def split(rows: list[dict], ratio: float, seed: int = 42) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and the rows of `ratio` of the questions, at least one, to validate with."""
    flag = f"--split_dataset_ratio {ratio}"
    if not 0 < ratio < 1:
        raise ValueError(f"{flag}: not a share of the rows; a number between 0 and 1 works")
    asked = [json.dumps([turn for turn in row["prompt"] if turn["role"] != "system"]) for row in rows]
    questions = list(dict.fromkeys(asked))
    if len(questions) < 2:
        raise ValueError(f"{flag}: {len(questions)} question cannot be split; two, or a --val_dataset, work")
    count = min(max(1, round(ratio * len(questions))), len(questions) - 1)
    held_out = set(random.Random(seed).sample(questions, count))
    pairs = list(zip(rows, asked, strict=True))
    return [row for row, q in pairs if q not in held_out], [row for row, q in pairs if q in held_out]


def step_rows(step: int, prompts_per_step: int, num_rows: int, seed: int) -> list[int]:
    """Indices of the rows whose groups make batch `step` (from 0); the same on every rank and after a resume.

    Batches are cut from an endless sequence of epochs, each of them all rows in an order of its own:

        4 rows, 3 prompts a step     2 0 3 1 1 3 0 2 0 1 …
                                     └─0─┘ └─1─┘ └─2─┘
    """
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    return [_epoch_order(place // num_rows, num_rows, seed)[place % num_rows] for place in places]


@functools.lru_cache(maxsize=4)
def _epoch_order(epoch: int, num_rows: int, seed: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(num_rows), num_rows)
