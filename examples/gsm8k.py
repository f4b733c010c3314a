"""GSM8K's word problems with two worked examples in front of each, which show a small model the format.

python examples/gsm8k.py openai/gsm8k:main output/gsm8k.jsonl      or a jsonl file of its rows
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from run import readers

EXAMPLES = {
    "Tom has 3 apples. He buys 2 bags of 4 apples each. How many does he have now?": (
        "<think>2 * 4 = 8, 3 + 8 = 11</think><answer>11</answer>"
    ),
    "A book has 90 pages. Ann reads 20 pages a day for 3 days. How many pages are left?": (
        "<think>20 * 3 = 60, 90 - 60 = 30</think><answer>30</answer>"
    ),
}


def main(source: str, target: str) -> None:
    try:
        rows = data.load_rows([source], read=readers.read)
    except data.UsageError as error:
        sys.exit(str(error))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    worked = []
    for question, answer in EXAMPLES.items():
        worked += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    with open(target, "w") as file:
        for row in rows:
            messages = [*worked, {"role": "user", "content": row["question"]}]
            solution = row["answer"].rpartition("#### ")[2]  # the number, behind how it comes about
            file.write(json.dumps({"messages": messages, "solution": solution}) + "\n")
    print(f"wrote {len(rows):,} rows to {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    main(*sys.argv[1:])
