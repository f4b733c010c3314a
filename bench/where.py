"""Where the time of a step goes: generation and the training pass, part by part.

    python bench/where.py              prints a table, writes it into bench/where.json, and docs/where-bfloat16.png

The embedded model in bfloat16 (in float32 on a CPU that has no instructions for it: the picture is then named for that),
completions of exactly TOKENS tokens, all cores. Parts are wall-clock times around the
functions that do the work, medians of REPEATS turns after one that does not count. `floor` is what the matrix products
of the same step would take at the speed of one large product, measured in the same run; for products that read all
weights for a few rows, as in generation, it is out of reach, and reading the weights once a token is the other floor.
"""

import functools
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from step import TOKENS, a_batch, limits, load_model, operations, precision  # noqa: E402

import dist  # noqa: E402
import fast  # noqa: E402
import grpo  # noqa: E402
import lora  # noqa: E402
import sampler  # noqa: E402
from fast.decoder import DecodingLayer, FusedLinear  # noqa: E402
from fast.head import HeadLogps  # noqa: E402
from fast.packed import PackedAttention  # noqa: E402

REPEATS = 3
ROWS = {"16 completions, full": (16, "full"), "64 completions, LoRA": (64, "lora")}
spent: Counter = Counter()


def timed(owner, name: str, part: str) -> None:
    """Count the time inside owner.name as `part`, and no longer as the part it is called from."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        started, inner = time.perf_counter(), sum(spent.values())
        result = function(*args, **kwargs)
        spent[part] += time.perf_counter() - started - (sum(spent.values()) - inner)
        return result

    static = isinstance(owner.__dict__[name], staticmethod)
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def parts(count: int, kind: str) -> dict[str, dict[str, float]]:
    model = load_model()
    if kind == "lora":
        lora.inject(model, 16, 32)
    fast.prepare(model)
    optimizer = dist.ZeroAdamW(model.named_parameters(), max_grad_norm=1.0)
    ids, completions, advantages, _ = a_batch(count)
    settings = {"eos_token_ids": [], "max_new_tokens": TOKENS}
    policy = sampler.ModelSampler(model, **settings, decoder=fast.decoder_for(model))
    normalizers = grpo.Normalizers(count, count * TOKENS, TOKENS)

    def generate() -> None:
        policy.generate(ids, range(count))

    def train() -> None:
        logps, entropies, mask = fast.completion_logps(model, ids, completions, 1.0)
        tensors = (logps, entropies, logps.detach(), None, advantages, mask)
        options = grpo.Options(beta=0.0)
        loss, _ = grpo.grpo_loss(*tensors, options=options, normalizers=normalizers)
        optimizer.backward(loss)
        optimizer.step(0.0)

    result = {}
    for name, work in (("generation", generate), ("training", train)):
        turns = []
        for _ in range(REPEATS + 1):
            spent.clear()
            started = time.perf_counter()
            work()
            total = time.perf_counter() - started
            turns.append(dict(spent) | {"the rest": total - sum(spent.values())})
        result[name] = {
            part: statistics.median(turn[part] for turn in turns[1:]) for part in turns[-1]
        }
    for name, what in (("generation", "generate"), ("training", "pass")):
        result[name]["operations"] = operations(what, count, kind)
    return result


def main() -> None:
    dist.start(dist.find_world())
    fast.use_cpu_well(1)
    timed(PackedAttention, "forward", "attention")
    timed(PackedAttention, "backward", "attention")
    timed(HeadLogps, "forward", "head and log-probabilities")
    timed(HeadLogps, "backward", "head and log-probabilities")
    timed(fast, "completion_hidden_states", "layers, forward")
    timed(dist.ZeroAdamW, "backward", "layers, backward")
    timed(dist.ZeroAdamW, "step", "optimizer")
    timed(FusedLinear, "__init__", "packing the weights")
    timed(FusedLinear, "__call__", "linear layers and head")
    timed(DecodingLayer, "attend", "attention")
    timed(DecodingLayer, "update", "attention")
    timed(fast, "sample_tokens", "drawing tokens")
    peaks, results = [limits()], {}
    for row, settings in ROWS.items():
        results[row] = parts(*settings)
        peaks.append(limits())
    machine = {
        name: max(peak[name] for peak in peaks) for name in peaks[0]
    }  # others use these cores, too
    for row, works in results.items():
        for name, turn in works.items():
            operations = turn.pop("operations")
            total = sum(turn.values())
            turn["floor"] = operations / machine["matmul_GFLOP_per_s"] / 1e9
            print(f"\n{row}, {name}: {total:.2f} s; matrix products alone {turn['floor']:.2f} s")
            for part, seconds in sorted(turn.items(), key=lambda item: -item[1]):
                if part != "floor":
                    print(f"    {part:28}{seconds:8.2f} s {seconds / total:6.0%}")
    file = HERE / "where.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(
        json.dumps(known | {precision(): {"machine": machine, "results": results}}, indent=2) + "\n"
    )
    draw(results)


def draw(results: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{row}\n{name}", turn) for row, works in results.items() for name, turn in works.items()
    ][::-1]
    names = sorted({part for _, turn in bars for part in turn} - {"floor", "the rest"}) + [
        "the rest"
    ]
    figure, axes = plt.subplots(figsize=(10, 4.5))
    left = [0.0] * len(bars)
    for color, part in zip(plt.get_cmap("tab20").colors, names):
        widths = [turn.get(part, 0.0) / (sum(turn.values()) - turn["floor"]) for _, turn in bars]
        axes.barh([label for label, _ in bars], widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths)]
    for y, (_, turn) in enumerate(bars):
        total = sum(turn.values()) - turn["floor"]
        axes.text(1.01, y, f"{total:.1f} s", va="center")
        axes.plot([turn["floor"] / total] * 2, [y - 0.4, y + 0.4], color="black", lw=2)
    axes.set(
        xlim=(0, 1), xlabel="share of the time; black: what its matrix products alone would take"
    )
    axes.legend(ncol=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / f"where-{precision()}.png", dpi=120)


if __name__ == "__main__":
    main()
