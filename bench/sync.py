"""Time to send the embedded model's weights into a running vLLM engine, beside a plain copy of them.

    python bench/sync.py               prints a table and writes bench/sync.json

Interleaved, medians of 5: a copy in memory; the same tensors through a process group of two, received
into memory that is there already; and `send_weights`, which has vLLM load and repack them and compares
fingerprints.
"""

import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora  # noqa: E402
from dist import has_bfloat16  # noqa: E402
from run.engine import Engine  # noqa: E402
from run.weights import WeightGroup, send_weights  # noqa: E402

MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
CPU = torch.device("cpu")
REPEATS = 5


def receive(port: int, shapes: list, dtype: torch.dtype) -> None:
    """The other side of the process group, which only receives."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2)
    group = WeightGroup(store, 1, "gloo", CPU)
    tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
    for _ in range(REPEATS):
        for tensor in tensors:
            group.group.recv([tensor], 0, 0).wait()


def measure(dtype: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, dtype))
    tensors = [tensor for _, tensor in lora.plain_parameters(model)]
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    settings = {"model": str(MODEL), "dtype": dtype, "enforce_eager": True}
    settings["kv_cache_memory_bytes"] = 1 << 30
    log = Path(tempfile.gettempdir()) / "bench-sync-vllm.log"
    engine = Engine(settings, CPU, trainer=CPU, log=log)
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    arguments = (store.port, [tensor.shape for tensor in tensors], tensors[0].dtype)
    peer = multiprocessing.get_context("spawn").Process(target=receive, args=arguments)
    peer.start()
    group = WeightGroup(store, 0, "gloo", CPU)

    def copy():
        for target, source in zip(copies, tensors):
            target.copy_(source)

    def sync():
        announced = [(name, p.shape, p.dtype) for name, p in lora.plain_parameters(model)]
        send_weights(engine, announced, lora.merged_parameters(model))

    def send():
        for tensor in tensors:
            group.group.send([tensor], 1, 0).wait()

    ways = {"copy": copy, "process group": send, "sync": sync}
    times = {name: [] for name in ways}
    try:
        sync()
        for _ in range(REPEATS):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - started)
    finally:
        engine.close()
        peer.join()
    medians = {name: statistics.median(values) for name, values in times.items()}
    megabytes = sum(tensor.nbytes for tensor in tensors) / 1e6
    return {"dtype": dtype, "MB": megabytes, "seconds": medians, "tensors": len(tensors)}


if __name__ == "__main__":
    if importlib.util.find_spec("vllm") is None:
        print(
            "bench/sync.py: vLLM is not installed, there is nothing to measure; make vllm adds it"
        )
        sys.exit()
    results = [measure(dtype) for dtype in ("float32", "bfloat16")]
    print(f"{'':10}{'MB':>8}{'copy s':>10}{'group s':>10}{'sync s':>10}", end="")
    print(f"{'sync / copy':>14}{'sync / group':>14}")
    for r in results:
        copied, sent, synced = r["seconds"].values()
        print(f"{r['dtype']:10}{r['MB']:8.0f}{copied:10.3f}{sent:10.3f}{synced:10.3f}", end="")
        print(f"{synced / copied:14.1f}{synced / sent:14.1f}")
    cpu = platform.processor() or platform.machine()
    machine = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__}
    machine["bfloat16 instructions"] = has_bfloat16(CPU)
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "results": results}, indent=2) + "\n"
    )
