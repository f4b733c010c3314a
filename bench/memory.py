"""The planner's figures beside what real runs take: peak memory of a process, moment by moment.

    python bench/memory.py            prints a table and writes bench/memory.json; Linux, one process, no GPU

Each row is train.py itself, two steps of the embedded model (in bfloat16, or in float32 on a CPU that has no instructions
for bfloat16) on the built-in task, in a process whose peak resident memory is read and reset (/proc/self/clear_refs) at
the end of every moment of a step. A temperature of 5 makes every completion as long as it may be. "no model" is a model of
nearly no size: what it takes is plan.PROCESS.

By default glibc keeps what is freed, with holes in it, so the process holds more than what lives (docs/speed.md). The
planner counts what lives, so every run has a threshold of 1 MB (MALLOC_MMAP_THRESHOLD_), from which on memory that is
freed goes back to the system.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from step import precision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "2000000"}
COMMON = (
    "--dataset arithmetic --reward_funcs bench --num_generations 8 --max_completion_length 128 --temperature 5 "
    "--max_steps 2"
)
ROWS = {
    "no model": "--gradient_checkpointing false --train_type full --beta 0 --per_device_train_batch_size 8",
    "LoRA": "--gradient_checkpointing false --train_type lora --lora_rank 16 --per_device_train_batch_size 32",
    "full": "--gradient_checkpointing false --train_type full --beta 0 --per_device_train_batch_size 16",
    "full with reference": "--gradient_checkpointing false --train_type full --beta 0.04 --per_device_train_batch_size 16",
    "full, recomputed": "--train_type full --beta 0 --per_device_train_batch_size 32 --gradient_checkpointing true",
}


def flags_of(row: str, folder: str) -> list[str]:
    flags = [
        *COMMON.split(),
        *ROWS[row].split(),
        "--output_dir",
        f"{folder}/run",
        "--torch_dtype",
        precision(),
    ]
    return [*flags, "--model", f"{folder}/model"] if row == "no model" else flags


def small_model(folder: str) -> None:
    """A Llama of 30,000 parameters with the embedded model's tokenizer, cut to a vocabulary of its first tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from run.flags import EMBEDDED_MODEL

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=2, pad_token_id=2, **sizes
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def planned(row: str, folder: str) -> dict[str, float]:
    import dist
    from run import flags, models, plan

    args = flags.parse_args([*flags_of(row, folder), "--dry_run", "true"])
    _, found = plan.make(args, models.model_config(args), dist.find_world())
    return plan.sums(found)


def child(flags: list[str]) -> None:
    """train.py, which tells the peak of each moment on its last line."""
    import dist
    import rewards
    import train
    from run import checkpoints
    from run.flags import parse_args

    def reward(
        completions, **_
    ):  # numbers that differ within a group, so that every completion is trained on
        return [random.Random(text).random() for text in completions]

    def since_last() -> int:
        peak = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        Path("/proc/self/clear_refs").write_text("5")
        return int(peak.split()[1]) * 1024

    peaks: dict[str, int] = {}

    def watch(owner, name: str, moment: str, before: str | None = None) -> None:
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            if before:
                peaks[before] = max(peaks.get(before, 0), since_last())
            result = function(*args, **kwargs)
            peaks[moment] = max(peaks.get(moment, 0), since_last())
            return result

        setattr(owner, name, watched)

    rewards.orms["bench"] = reward
    watch(train, "draw", "generate", before="start")
    watch(dist.ZeroAdamW, "backward", "backward")  # and all since the samples
    watch(dist.ZeroAdamW, "step", "update")
    watch(checkpoints, "save", "save")
    train.train(parse_args(flags), dist.find_world())
    print(json.dumps(peaks))


def measured(row: str, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "child", *flags_of(row, folder)]
    run = subprocess.run(command, env=os.environ | GIVE_BACK, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main(rows: list[str]) -> None:
    file, results = Path(__file__).with_suffix(".json"), {}
    if rows and file.exists():
        results = json.loads(file.read_text())
    print(
        f"{'GB':22}"
        + "".join(f"{moment:>10}" for moment in ("generate", "backward", "update", "save", "peak"))
    )
    with tempfile.TemporaryDirectory() as folder:
        small_model(f"{folder}/model")
        for row in rows or ROWS:
            kinds = {
                "planned": planned(row, folder),
                "measured": measured(row, folder),
            }
            print(row)
            for kind, moments in kinds.items():
                moments.pop(
                    "start", None
                )  # what loading takes, from which the next moment may not have come down
                moments["peak"] = max(moments.values())
                print(
                    f"  {kind:20.20}"
                    + "".join(f"{value / 1e9:10.2f}" for value in moments.values())
                )
            results[row] = {"torch_dtype": precision()} | kinds
            file.write_text(json.dumps(results, indent=2) + "\n")
            error = kinds["planned"]["peak"] / kinds["measured"]["peak"] - 1
            print(f"  the plan's peak is {error:+.1%} off")


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["child"] else main(sys.argv[1:])
