"""How generation and the training pass grow with completion length, group size and vocabulary.

    python bench/growth.py [T] [G] [vocabulary]    prints a table and puts its rows into bench/growth.json (of others the
                                                   last figures stay); all three where none is named

The embedded model in bfloat16 (in float32 on a CPU that has no instructions for it), full training, one prompt and its G
completions of exactly T tokens; a vocabulary of 152 k is its own head and embedding with random rows behind them. Every
figure is a process of its own: seconds of generation are of one call, of the training pass the median of three (of one
from MANY tokens on), each after one that does not count; generation warms up with a few tokens alone. Memory is what
the process's peak lies above its size with the model loaded and all that this freed given back. The head's memory is that
of `fast.head.logps_from_hidden_states` alone, forward and backward, with a head that is frozen: one that is trained has its
gradient besides, whatever the number of tokens.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
BASE = {"G": 4, "T": 128, "vocabulary": 49_152}
ROWS = {
    "T": [BASE | {"T": T} for T in (128, 256, 512, 1024, 2048)],
    "G": [BASE | {"G": G} for G in (8, 16, 32, 64)],
    "vocabulary": [BASE | {"vocabulary": 151_936, "T": T} for T in (128, 1024)],
}
MANY = 2_048  # tokens whose pass is timed once: it takes long enough


def peak_MB() -> float:
    """The most that was resident since the last call."""
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak) * 1024 / 1e6


def seconds(work, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(what: str, G: int, T: int, vocabulary: int) -> dict[str, float]:
    import torch
    from step import load_model, prompt_ids

    import dist
    import fast
    from fast.head import logps_from_hidden_states
    from sampler import ModelSampler

    dist.start(dist.find_world())
    fast.use_cpu_well(1)
    model = load_model()
    if vocabulary > model.config.vocab_size:
        model.resize_token_embeddings(vocabulary)
    fast.prepare(model)
    prompts = prompt_ids(8)[:1] * G
    completions = torch.randint(
        100, 40_000, (G, T), generator=torch.Generator().manual_seed(0)
    ).tolist()
    ctypes.CDLL(None).malloc_trim(0)
    peak_MB()
    before = peak_MB()
    if what == "generate":
        settings = {"eos_token_ids": [], "decoder": fast.decoder_for(model)}
        ModelSampler(model, max_new_tokens=8, **settings).generate(prompts, range(G))
        sampler = ModelSampler(model, max_new_tokens=T, **settings)
        taken = seconds(lambda: sampler.generate(prompts, range(G)), 1)
        return {"generate_s": taken, "generate_MB": peak_MB() - before}
    if what == "head":
        model.requires_grad_(False)
        hidden = torch.randn(G * T, model.config.hidden_size, dtype=model.dtype).requires_grad_()
        targets = torch.tensor(completions).flatten()
        logps, _ = logps_from_hidden_states(model, hidden, targets, 1.0)
        logps.sum().backward()
        return {"head_MB": peak_MB() - before}

    def train() -> None:
        model.zero_grad()
        logps, _, mask = fast.completion_logps(model, prompts, completions, 1.0)
        (logps * mask).sum().backward()

    train()
    return {"pass_s": seconds(train, 3 if G * T < MANY else 1), "pass_MB": peak_MB() - before}


def main(names: list[str]) -> None:
    from step import precision

    file = HERE / "growth.json"
    columns = ["generate s", "tokens/s", "MB", "pass s", "tokens/s", "MB", "head MB"]
    print(
        f"{precision():12}{'G':>4}{'T':>6}{'vocabulary':>12}"
        + "".join(f"{name:>11}" for name in columns)
    )
    known = json.loads(file.read_text()) if file.exists() else []
    for row in (row for name in names for row in ROWS[name]):
        result = {"torch_dtype": precision()} | row
        known = [
            other for other in known if any(other[name] != value for name, value in result.items())
        ]
        for what in ("generate", "train", "head"):
            command = [sys.executable, __file__, what, *map(str, row.values())]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            result |= json.loads(run.stdout)
        known.append(result)
        file.write_text(json.dumps(known, indent=2) + "\n")
        tokens, r = row["G"] * row["T"], result
        print(
            f"{'':12}{row['G']:4}{row['T']:6}{row['vocabulary']:12,}{r['generate_s']:11.2f}"
            f"{tokens / r['generate_s']:11.0f}{r['generate_MB']:11.0f}{r['pass_s']:11.2f}{tokens / r['pass_s']:11.0f}"
            f"{r['pass_MB']:11.0f}{r['head_MB']:11.0f}",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] not in ROWS:
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
    elif unknown := [name for name in sys.argv[1:] if name not in ROWS]:
        sys.exit(f"bench/growth.py: no rows {unknown[0]!r}; there are: {', '.join(ROWS)}")
    else:
        main(sys.argv[1:] or list(ROWS))
