"""How generation and the training pass grow with completion length, group size and vocabulary.

    python bench/growth.py             prints a table and writes bench/growth.json

The embedded model in bfloat16 (in float32 on a CPU that has no instructions for it), full training, one prompt and its G
completions of exactly T tokens; a vocabulary of 152 k is its own head and embedding with random rows behind them. Every
row is a process of its own: seconds are the median of three passes after one that does not count, memory is what the
process's peak lies above its size with the model loaded. The head's memory is that of `grpo.logps_from_hidden_states` alone, forward and backward.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
BASE = {"G": 4, "T": 128, "vocabulary": 49_152}
ROWS = [BASE | {"T": T} for T in (128, 256, 512, 1024, 2048)]
ROWS += [BASE | {"G": G} for G in (8, 16, 32, 64)]
ROWS += [BASE | {"vocabulary": 151_936, "T": T} for T in (128, 1024)]
GENERATED = [row for row in ROWS if row["vocabulary"] == 49_152 and row["T"] <= 512]


def peak_MB() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(work, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure(what: str, G: int, T: int, vocabulary: int) -> dict[str, float]:
    import torch
    from step import load_model, prompt_ids

    import dist
    import grpo
    from sampler import ModelSampler

    dist.start(dist.find_world())
    model = load_model()
    if vocabulary > model.config.vocab_size:
        model.resize_token_embeddings(vocabulary)
    grpo.prepare(model)
    prompts = prompt_ids(8)[:1] * G
    completions = torch.randint(100, 40_000, (G, T), generator=torch.Generator().manual_seed(0)).tolist()
    before = peak_MB()
    if what == "generate":
        sampler = ModelSampler(model, eos_token_ids=[], max_new_tokens=T)
        return {"generate_s": seconds(lambda: sampler.generate(prompts, range(G)), 1)}
    if what == "head":
        hidden = torch.randn(G * T, model.config.hidden_size, dtype=model.dtype).requires_grad_()
        targets = torch.tensor(completions).flatten()
        logps, _ = grpo.logps_from_hidden_states(model, hidden, targets, 1.0)
        logps.sum().backward()
        return {"head_MB": peak_MB() - before}

    def train() -> None:
        model.zero_grad()
        logps, _, mask = grpo.completion_logps(model, prompts, completions, 1.0)
        (logps * mask).sum().backward()

    return {"pass_s": seconds(train, 3), "pass_MB": peak_MB() - before}


def main() -> None:
    results = []
    print(
        f"{'G':>4}{'T':>6}{'vocabulary':>12}{'generate s':>12}{'tokens/s':>10}{'pass s':>8}{'tokens/s':>10}{'MB':>7}{'head MB':>9}"
    )
    for row in ROWS:
        result = dict(row)
        for what in ["train", "head"] + ["generate"] * (row in GENERATED):
            command = [sys.executable, __file__, what, *map(str, row.values())]
            result |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        results.append(result)
        tokens = row["G"] * row["T"]
        generated = result.get("generate_s")
        print(
            f"{row['G']:4}{row['T']:6}{row['vocabulary']:12,}"
            + (f"{generated:12.2f}{tokens / generated:10.0f}" if generated else " " * 22)
            + f"{result['pass_s']:8.2f}{tokens / result['pass_s']:10.0f}{result['pass_MB']:7.0f}{result['head_MB']:9.0f}",
            flush=True,
        )
    (HERE / "growth.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        main()
