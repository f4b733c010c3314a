"""Many processes: start-up, and AdamW with its state sharded as in ZeRO stage 2 (Rajbhandari et al., arXiv 1910.02054).

Plain data parallelism keeps P parameters, P gradients and 3·P float32 numbers of AdamW state on every rank. Here a
rank owns 1/N of the gradients and of the state. Parameters live side by side in flat buckets, each cut into N equal
shards, by element and not by tensor:

    bucket   [ w1 w1 w1 w1 w1 | w2 w2 w3 w3 w3 | w3 w3 w3 ·· ]        · is padding
               rank 0's shard   rank 1's         rank 2's

1. Backward. When the last gradient of a bucket arrives, the bucket's gradients are reduce-scattered while the backward
   pass goes on: each rank receives the sum of its own shard, adds it to a float32 accumulator and frees the rest.
2. Update. The squared norm of all shards is all-reduced once to clip by the global norm; then AdamW runs on the
   rank's shard alone, on float32 master weights and moments that exist nowhere else.
3. Gather. The updated shards are all-gathered straight into the parameters, which are views of their bucket.

Each rank sends at most 2·P·(N-1)/N elements a step, as many as an all-reduce. With one process nothing is sent and the
same code is plain AdamW. A loss that is summed, not averaged, over ranks and micro-batches needs no division here.
"""

import ctypes
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames the two collectives on flat tensors.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class World:
    """The processes of this run and what this one is among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over the ranks, which must all have the same names; in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def gather(self, items: list) -> list:
        """The ranks' lists one after the other, on every rank."""
        if self.size == 1:
            return items
        lists = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def from_main(self, item):
        """Rank 0's item, on every rank."""
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items, src=0, device=self.device)
        return items[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def find_world() -> World:
    """This process's place among those that torchrun started (alone without it), and its GPU if there are any."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return World(rank, size, torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu"))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices by itself; a CPU that does not is 8 times as fast in float32."""
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def start(world: World) -> None:
    """Join the other processes: NCCL on GPUs, gloo on CPUs."""
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        use_cpu_well(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if world.size > 1:
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        # Ranks wait here while rank 0's vLLM generates; torchrun and the engine's own limit see to what is lost.
        dist.init_process_group(backend, timeout=timedelta(hours=2))


def use_cpu_well(processes: int) -> None:
    """Share this machine's cores among its processes, and keep freed memory for the next tensor.

    torchrun gives each process one thread, whatever the number of cores. glibc hands large blocks back to the kernel,
    whose empty pages cost more than the arithmetic on them.
    """
    if processes > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 64 << 20)  # M_TOP_PAD: it grows by this much


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass
class Bucket:
    """Parameters of one dtype and weight decay in one flat tensor, and this rank's shard of their training state."""

    names: list[str]
    parameters: list[Tensor]
    weight_decay: float
    flat: Tensor  # (N · shard,) the parameters themselves, which are views of it; the end may be padding
    shard: slice  # the part of flat that this rank owns
    master: Tensor  # (shard,) float32 weights; of float32 parameters they are that part of `flat`, not a copy
    exp_avg: Tensor  # (shard,) float32 first moment
    exp_avg_sq: Tensor  # (shard,) float32 second moment
    grad: Tensor | None = None  # (shard,) float32, summed over ranks and micro-batches; None between steps
    full_grad: Tensor | None = None  # (N · shard,) gradients of the backward pass under way
    grads: list[Tensor] | None = None  # views of full_grad, one a parameter
    arrived: int = 0  # how many of the parameters have their gradient in full_grad

    @property
    def is_complete(self) -> bool:
        return self.arrived == len(self.parameters)

    def views(self, flat: Tensor) -> list[Tensor]:
        """A tensor as long as `flat` cut into pieces of the parameters' shapes."""
        sizes = [p.numel() for p in self.parameters]
        return [part.view(p.shape) for part, p in zip(flat[: sum(sizes)].split(sizes), self.parameters)]


class ZeroAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), the same update as torch.optim.AdamW, sharded over the ranks.

    named_parameters: those that require a gradient are trained. Matrices decay; vectors (norms, biases) do not.
    max_grad_norm: of the whole gradient; 0 does not clip. bucket_size: parameters in one collective.
    shard=False keeps all state on every rank (`--deepspeed none`): gradients are all-reduced, nothing is gathered.

    Call `backward(loss)` for each micro-batch, equally often on every rank, then `step(learning_rate)`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        bucket_size: int = 25_000_000,
        shard: bool = True,
    ):
        self.betas, self.eps, self.weight_decay, self.max_grad_norm = betas, eps, weight_decay, max_grad_norm
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.shards, self.index = (self.ranks, dist.get_rank()) if shard and self.ranks > 1 else (1, 0)
        self.steps = 0  # updates made
        self.buckets: list[Bucket] = []
        self.next = 0  # the bucket to reduce next: every rank reduces in this order, or the collectives would not match
        self.in_flight: tuple[Bucket, Tensor, dist.Work | None] | None = None
        filling: dict[tuple, list] = {}
        # A backward pass reaches the last layers first, so that is where the first bucket lies.
        for name, parameter in reversed([(n, p) for n, p in named_parameters if p.requires_grad]):
            kind = (parameter.dtype, parameter.ndim >= 2)
            if kind in filling and sum(p.numel() for _, p in filling[kind]) + parameter.numel() > bucket_size:
                self._make_bucket(filling.pop(kind))
            filling.setdefault(kind, []).append((name, parameter))
        for members in filling.values():
            self._make_bucket(members)

    @torch.no_grad()
    def _make_bucket(self, members: list[tuple[str, Tensor]]) -> None:
        """Move these parameters into one flat tensor and watch for their gradients."""
        names, parameters = map(list, zip(*members))
        size = -(-sum(p.numel() for p in parameters) // self.shards)  # of a shard, rounded up
        shard = slice(self.index * size, (self.index + 1) * size)
        flat = parameters[0].new_zeros(self.shards * size)
        bucket = Bucket(
            names, parameters, self.weight_decay if parameters[0].ndim >= 2 else 0.0, flat, shard, *[flat] * 3
        )
        for i, (parameter, view) in enumerate(zip(parameters, bucket.views(flat))):
            view.copy_(parameter)
            parameter.data = view
            parameter.register_post_accumulate_grad_hook(partial(self._collect, bucket, i))
        bucket.master = flat[shard].float()  # float() of a float32 tensor is that tensor
        bucket.exp_avg, bucket.exp_avg_sq = torch.zeros_like(bucket.master), torch.zeros_like(bucket.master)
        self.buckets.append(bucket)

    # Phase 1: reduce while the backward pass runs.

    def backward(self, loss: Tensor | None) -> None:
        """The backward pass; afterwards each rank holds its shard of the gradient summed over ranks, and no other.

        None: this rank adds nothing, but the others' gradients still need it.
        """
        if loss is not None:
            loss.backward()
        while self.next < len(self.buckets):  # those with parameters that got no gradient
            self._reduce_next()
        self._finish_reduce()
        self.next = 0

    def _collect(self, bucket: Bucket, i: int, parameter: Tensor) -> None:
        """Autograd calls this when a parameter's gradient of this backward pass is complete."""
        if bucket.full_grad is None:
            bucket.full_grad = torch.zeros_like(bucket.flat)
            bucket.grads = bucket.views(bucket.full_grad)
        bucket.grads[i].add_(parameter.grad)
        parameter.grad = None
        bucket.arrived += 1
        while self.next < len(self.buckets) and self.buckets[self.next].is_complete:
            self._reduce_next()

    def _reduce_next(self) -> None:
        """Start to sum the next bucket's gradient over the ranks. One is under way at a time, so two are in memory."""
        self._finish_reduce()
        bucket = self.buckets[self.next]
        self.next += 1
        full = bucket.full_grad if bucket.full_grad is not None else torch.zeros_like(bucket.flat)
        bucket.full_grad, bucket.grads, bucket.arrived = None, None, 0
        if self.shards > 1:
            result = full.new_empty(len(bucket.master))
            work = reduce_scatter(result, full, async_op=True)
        else:
            result, work = full, dist.all_reduce(full, async_op=True) if self.ranks > 1 else None
        self.in_flight = (bucket, result, work)

    def _finish_reduce(self) -> None:
        if self.in_flight is None:
            return
        bucket, result, work = self.in_flight
        self.in_flight = None
        if work is not None:
            work.wait()
        bucket.grad = result.float() if bucket.grad is None else bucket.grad.add_(result)

    # Phases 2 and 3: update the shard, gather the parameters.

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """One AdamW update of all parameters; returns the global gradient norm before clipping.

        FloatingPointError if that norm is not finite; the parameters are then as they were.
        """
        squared = torch.stack([bucket.grad.square().sum(dtype=torch.float64) for bucket in self.buckets]).sum()
        if self.shards > 1:
            dist.all_reduce(squared)
        norm = squared.sqrt().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        clip = min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for bucket in self.buckets:
            grad, bucket.grad = bucket.grad.mul_(clip), None
            bucket.exp_avg.lerp_(grad, 1 - beta1)
            bucket.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = bucket.exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(self.eps)
            bucket.master.mul_(1 - learning_rate * bucket.weight_decay)
            bucket.master.addcdiv_(bucket.exp_avg, denominator, value=-learning_rate / correction1)
            bucket.flat[bucket.shard] = bucket.master
            if self.shards > 1:
                all_gather(bucket.flat, bucket.flat[bucket.shard].clone())
        return norm

    # Checkpoints: full tensors by parameter name, so that they load on any number of ranks.

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state on the CPU of rank 0, empty on the others. A collective call: every rank makes it."""
        state = {"steps": torch.tensor(self.steps)}
        for bucket in self.buckets:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                full = shard = getattr(bucket, kind)
                if self.shards > 1:
                    full = shard.new_empty(self.shards * len(shard))
                    all_gather(full, shard)
                if not dist.is_initialized() or dist.get_rank() == 0:
                    pieces = zip(bucket.names, bucket.views(full))
                    state |= {f"{kind}.{name}": piece.to("cpu", copy=True) for name, piece in pieces}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a whole state, and the parameters with it. KeyError or RuntimeError if it is of other parameters."""
        self.steps = int(state["steps"])
        for bucket in self.buckets:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                full = torch.zeros(len(bucket.flat))
                for name, piece in zip(bucket.names, bucket.views(full)):
                    piece.copy_(state[f"{kind}.{name}"])
                if kind == "master":
                    bucket.flat.copy_(full)
                getattr(bucket, kind).copy_(full[bucket.shard])
