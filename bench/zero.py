"""Memory, bytes sent and time of a training step of the sharded AdamW, beside what PyTorch has for the same.

    python bench/zero.py               prints tables and writes bench/zero.json

The embedded model with random weights, all of them trained. Memory is what malloc has handed out
and not taken back, C++ included: at the end of the second backward pass, when all gradients and
moments are there, and the most seen in it. Bytes sent are what the kernel has sent on this
process's TCP connections in one step. For the time, contestants take ROUNDS turns, in two processes
of one thread each, with one step that does not count and STEPS that do; the ratio is the median
over rounds of a contestant's seconds to ours in the same round.
"""

import ctypes
import functools
import gc
import json
import os
import platform
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
import torch.distributed  # noqa: E402
import torch.multiprocessing  # noqa: E402
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dist  # noqa: E402
from fast.cpu import use_cpu_well  # noqa: E402
from run.log import Waits  # noqa: E402

MODEL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
LIBC = ctypes.CDLL(None)
ROUNDS, STEPS, SEQUENCES, LENGTH, LEARNING_RATE = 5, 2, 2, 64, 1e-5


# Contestants: each makes, of a model, a backward pass and an update. ---------------------------------------------


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


class WithoutOverlap(dist.ZeroAdamW):
    def _reduce_next(self):
        super()._reduce_next()
        self._finish_reduce()


def ours(dtype, kind=dist.ZeroAdamW, **settings):
    model = new_model(dtype)
    waits = Waits(torch.device("cpu"))
    optimizer = kind(model.named_parameters(), weight_decay=0.1, waiting=waits, **settings)
    ranks = torch.distributed.get_world_size()

    def backward(ids):
        optimizer.backward(loss_of(model, ids) / ranks)

    def update():
        optimizer.step(LEARNING_RATE)
        return waits.seconds()

    return backward, update


def ddp(dtype, make):
    model = DistributedDataParallel(new_model(dtype), gradient_as_bucket_view=True)
    return peer(model, make(model.parameters()))


def fsdp(dtype, **settings):
    """reshard_after_forward=False is its ZeRO-2; in bfloat16 it too has float32 master weights."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = new_model(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for module in (*model.model.layers, model):
        fully_shard(module, reshard_after_forward=False, mp_policy=policy)
    return peer(model, adamw(model.parameters(), **settings))


def peer(model, optimizer):
    def backward(ids):
        loss_of(model, ids).backward()

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return backward, update


def new_model(dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL), dtype=dtype).train()


adamw = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.1)
zero_redundancy = functools.partial(
    ZeroRedundancyOptimizer,
    optimizer_class=torch.optim.AdamW,
    parameters_as_bucket_view=True,
    lr=LEARNING_RATE,
    weight_decay=0.1,
)
CONTESTANTS = {
    "ours, zero2": ours,
    "ours, zero2, overlap off": functools.partial(ours, kind=WithoutOverlap),
    "ours, none": functools.partial(ours, shard=False),
    "DDP + AdamW": functools.partial(ddp, make=adamw),
    "DDP + ZeroRedundancyOptimizer": functools.partial(ddp, make=zero_redundancy),
    "the same, fused AdamW": functools.partial(
        ddp, make=functools.partial(zero_redundancy, fused=True)
    ),
    "fully_shard + AdamW": fsdp,
    "fully_shard + fused AdamW": functools.partial(fsdp, fused=True),
}

NOT_TIMED = ["DDP + AdamW"]
# Weights as each trains them in bfloat16: DDP and ZeroRedundancyOptimizer have no master weights
# beside bfloat16 ones.
IN_MEMORY = {
    "ours, zero2": torch.bfloat16,
    "ours, none": torch.bfloat16,
    "DDP + AdamW": torch.float32,
    "DDP + ZeroRedundancyOptimizer": torch.float32,
    "fully_shard + AdamW": torch.bfloat16,
}


# Instruments -----------------------------------------------------------------------------------------------------


class MallocInfo(ctypes.Structure):  # struct mallinfo2 of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_held() -> int:
    """Bytes that malloc has handed out, to whatever library, and not taken back (glibc).

    Of threads other than the first it knows only large blocks, those that have pages of their own:
    from 64 KiB on if `malloc_by_pages` was called first of all.
    """
    info = LIBC.mallinfo2()
    return info.hblkhd + info.uordblks


def malloc_by_pages() -> None:
    LIBC.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    LIBC.mallinfo2.restype = MallocInfo


def memory(*phases) -> list[tuple[int, int]]:
    """Run functions one after the other → for each, bytes held at its end, and the most seen while
    it ran, counted from when the first began."""
    gc.collect()
    start, results = bytes_held(), []
    for phase in phases:
        seen, done = [0], threading.Event()

        def watch(seen=seen, done=done):
            while not done.wait(0.001):
                seen.append(bytes_held())

        watcher = threading.Thread(target=watch)
        watcher.start()
        phase()
        done.set()
        watcher.join()
        gc.collect()
        time.sleep(0.05)  # for gloo's threads to let go of what they sent
        results.append((bytes_held() - start, max(seen) - start))
    return results


def bytes_sent() -> int:
    """What this process has sent on all its TCP connections so far, as the kernel counts it."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    # Linux's tcp_info: tcpi_bytes_sent and, of those, tcpi_bytes_retrans
                    sent, again = struct.unpack_from("QQ", info, 200)
                    total += sent - again
        except OSError:  # not a socket, or closed meanwhile
            continue
    return total


# What is measured ------------------------------------------------------------------------------------------------


def measure_memory(name: str, dtype: torch.dtype) -> dict:
    """Bytes a parameter on this rank, and elements sent in a step, a parameter."""
    malloc_by_pages()  # which makes allocation slow: not where time is measured
    contestant, ids = {}, torch.randint(1000, (1, 16))

    def make():
        contestant["backward"], contestant["update"] = CONTESTANTS[name](dtype)

    def backward():
        contestant["backward"](ids)

    def update():
        contestant["update"]()

    def step():
        backward()
        update()

    _, _, (state, peak_backward), (_, peak_update) = memory(make, step, backward, update)
    torch.distributed.barrier()
    before = bytes_sent()
    step()
    torch.distributed.barrier()
    sent = bytes_sent() - before
    parameters = sum(p.numel() for p in new_model(dtype).parameters())
    return {
        "bytes a parameter": state / parameters,
        "at its peak": max(peak_backward, peak_update) / parameters,
        "elements sent a parameter": sent / parameters / dtype.itemsize,
    }


def measure_turn(name: str, dtype: torch.dtype) -> dict:
    """Seconds of a step, the median of STEPS after one that does not count, and how many of them
    ours waited."""
    use_cpu_well(2)  # all contestants, as train.py does
    backward, update = CONTESTANTS[name](dtype)
    slow = dtype == torch.bfloat16 and not dist.has_bfloat16(torch.device("cpu"))
    # Emulated it is so slow that with more tokens nothing else would be seen.
    shape = (1, 4) if slow else (SEQUENCES, LENGTH)
    ids, turns = torch.randint(1000, shape), []
    for _ in range(1 + STEPS):
        torch.distributed.barrier()
        started = time.perf_counter()
        backward(ids)
        waited = update()
        torch.distributed.barrier()
        turns.append((time.perf_counter() - started, waited))
    seconds, waited = sorted(turns[1:])[STEPS // 2]
    return {"seconds": seconds, "waiting": waited}


def measure_time(dtype: torch.dtype) -> dict:
    """Medians over ROUNDS turns, in which each contestant has two processes of its own."""
    names, rounds = [name for name in CONTESTANTS if name not in NOT_TIMED], []
    for _ in range(ROUNDS):
        rounds.append({name: run(2, measure_turn, name, dtype) for name in names})
        print(
            dtype,
            {name: round(turn["seconds"], 3) for name, turn in rounds[-1].items()},
            file=sys.stderr,
            flush=True,
        )
    table = {}
    for name in names:
        table[name] = {
            "seconds": statistics.median(r[name]["seconds"] for r in rounds),
            "times ours": statistics.median(
                r[name]["seconds"] / r["ours, zero2"]["seconds"] for r in rounds
            ),
        }
        if rounds[0][name]["waiting"] is not None:
            table[name]["waiting"] = statistics.median(r[name]["waiting"] for r in rounds)
    return table


def rank(index: int, ranks: int, folder: str, measure, *args) -> None:
    """One process of a measurement; rank 0 keeps the result."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=index, world_size=ranks
    )
    torch.manual_seed(index)
    result = measure(*args)
    if index == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    os._exit(0)


def run(ranks: int, measure, *args) -> dict:
    """What `measure` returns on rank 0 of so many processes. Forked, since to import everything
    takes longer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, measure, *args)
        torch.multiprocessing.start_processes(rank, arguments, nprocs=ranks, start_method="fork")
        return json.loads((Path(folder) / "result.json").read_text())


def main(what: list[str]) -> None:
    import transformers  # noqa: F401  # once, before processes fork
    from torch.distributed.fsdp import fully_shard  # noqa: F401

    file = Path(__file__).with_suffix(".json")
    results = json.loads(file.read_text()) if what and file.exists() else {}
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    machine["bfloat16 instructions"] = dist.has_bfloat16(torch.device("cpu"))
    results["machine"] = machine
    if not what or "memory" in what:
        table = {}
        for name, dtype in IN_MEMORY.items():
            table[name] = {ranks: run(ranks, measure_memory, name, dtype) for ranks in (1, 2, 4)}
        results["memory"] = table
        print(
            f"{'bytes a parameter, a rank':32}"
            + "".join(f"{f'N = {n}':>8}{'peak':>8}{'sent':>8}" for n in (1, 2, 4))
        )
        for name, row in table.items():
            print(
                f"{name:32}"
                + "".join(f"{value:8.2f}" for cell in row.values() for value in cell.values())
            )
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        if what and kind not in what:
            continue
        results[kind] = measure_time(dtype)
        print(f"{'a step, 2 processes, ' + kind:32}{'seconds':>9}{'× ours':>8}{'waiting':>9}")
        for name, row in results[kind].items():
            waiting = f"{row['waiting']:9.3f}" if "waiting" in row else ""
            print(f"{name:32}{row['seconds']:9.3f}{row['times ours']:8.2f}{waiting}")
    file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
