"""GSM8K's word problems with a worked example in front of each, which shows a small model the format.

python examples/gsm8k.py openai/gsm8k:main output/gsm8k.jsonl      or a jsonl file of its rows
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from run import readers

EXAMPLE = [
    {
        "role": "user",
        "content": "Tom has 3 apples. He buys 2 bags of 4 apples each. How many does he have now?",
    },
    {"role": "assistant", "content": "<think>2 * 4 = 8, 3 + 8 = 11</think><answer>11</answer>"},
]


def main(source: str, target: str) -> None:
    try:
        rows = data.load_rows([source], read=readers.read)
    except data.UsageError as error:
        sys.exit(str(error))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with open(target, "w") as file:
        for row in rows:
            question = {"role": "user", "content": row["question"]}
            told = {"messages": [*EXAMPLE, question], "solution": row["answer"]}
            file.write(json.dumps(told) + "\n")
    print(f"wrote {len(rows):,} rows to {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
