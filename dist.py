"""Many processes: AdamW with its state sharded as in ZeRO stage 2 (Rajbhandari et al., 1910.02054).

In plain data parallelism each of N ranks keeps P parameters, P gradients and 3·P numbers of AdamW
state. Here it keeps 1/N of the gradients and of the state. Parameters lie side by side in flat
buckets. Each bucket is cut into N equal shards, by element and not by tensor:

    bucket   [ w1 w1 w1 w1 w1 | w2 w2 w3 w3 w3 | w3 w3 w3 ·· ]        · is padding
               rank 0's shard   rank 1's         rank 2's

1. Reduce, while the backward pass runs. When the last gradient of a bucket has arrived, each rank
   sends every other one its shard, frees the rest, and sums in float32 what it gets for its own.
2. Update. The squared norm of all shards is summed over the ranks, to clip by the global norm. Then
   AdamW runs on the rank's own shard: on float32 master weights and moments that no other rank has.
3. Gather. The updated shards come straight into the parameters, which are views of their bucket,
   while the next bucket is updated.

Sent by a rank: P·(N-1)/N elements in phase 1 and as many in phase 3, together as much as one
all-reduce. With K micro-batches a step it is (K+1)·P·(N-1)/N: whoever keeps only a shard of the
gradient has to send the rest away after each of them.

Held by a rank with bfloat16 parameters: 2·P bytes of them, and 16·P/N of gradients, master weights
and two moments in float32; during a backward pass also a bucket that fills, and one that is sent
and received. (float32 parameters are their own master weights: 4·P and 12·P/N.)

The loss is a sum over ranks and micro-batches, so its gradient is never divided by N. With one
process nothing is sent, and the same code is plain AdamW. ZeRO stage 3 is at the end of this file.

To try another optimizer, change `ZeroAdamW._update`. It sees flat shards: what needs matrices, as
Muon does, wants buckets that are cut where a tensor ends.
"""

import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Annotated, Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

# torch 2.13 renames this collective on flat tensors.
all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor


@dataclass(frozen=True)
class Options:
    """distributed and optimizer"""

    device: Annotated[Literal["auto", "cpu", "cuda"], "auto: a GPU where there is one"] = "auto"
    deepspeed: Annotated[Literal["none", "zero2", "zero3"], "what the ranks share out"] = "none"
    bucket_size: Annotated[int, "elements in one collective of gradients", "from 1"] = 25_000_000
    ds3_gather_for_generation: Annotated[bool, "with zero3: whole weights for generation"] = True
    node_timeout: Annotated[float, "seconds another machine may be out of reach", "from 1"] = 30.0
    weight_decay: Annotated[float, "AdamW's, on matrices", "from 0"] = 0.1
    adam_beta1: Annotated[float, "decay of the first moment", "0 to 0.999999"] = 0.9
    adam_beta2: Annotated[float, "decay of the second moment", "0 to 0.999999"] = 0.999
    max_grad_norm: Annotated[float, "clip the gradient to this norm; 0 is off", "from 0"] = 1.0


# Who am I ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes of this run and what this one is among them.

    Everything that sends is collective: every rank has to call it, in the same order.
    """

    rank: int  # 0 to size - 1; rank 0 writes files and talks to the user
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def spans_nodes(self) -> bool:
        return self.size > int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def place(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def part_of(self, count: int) -> range:
        """Which of so many things in a row are this rank's: equal parts, where that can be."""
        first = count * self.rank // self.size
        last = count * (self.rank + 1) // self.size
        return range(first, last)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each name's values summed over the ranks; a rank that lacks a name adds nothing to it.

        All ranks get the same names in the same order, that in which they come up rank by rank.
        """
        totals = {}
        for part in self.gather([values]):
            for name, value in part.items():
                totals[name] = totals.get(name, 0) + value
        return totals

    def gather(self, items: list) -> list:
        """The ranks' lists one after the other, on every rank."""
        if self.size == 1:
            return items
        lists = [None] * self.size
        torch_dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def from_main(self, item):
        """Rank 0's item, on every rank."""
        items = [item]
        if self.size > 1:
            torch_dist.broadcast_object_list(items, src=0, device=self.device)
        return items[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            torch_dist.barrier()


def find_world(wanted: str = "auto") -> World:
    """This process's place among those that torchrun started (alone without it), and its GPU, if
    there is one and "cpu" is not what is wanted."""
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    return World(rank, size, device)


def start(world: World, store: torch_dist.Store | None = None) -> None:
    """Join the other processes, by NCCL on GPUs and gloo on CPUs; one process alone joins nothing.

    store: where the ranks find each other (run/watch.py has one); torchrun's own when None.
    """
    backend = "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        backend = "nccl"
    if world.size == 1:
        return
    # Ranks wait in a collective while rank 0's vLLM generates, which may take long.
    patience = timedelta(hours=2)
    torch_dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=patience
    )


def stop() -> None:
    """Leave the other processes, if there are any."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices by itself.

    A CPU that does not is 8 times as fast in float32.
    """
    if device.type != "cpu":
        return True
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# ZeRO-2 -----------------------------------------------------------------------------------------

SUMMED_IN_FLOAT32 = 1 << 20  # so many squares of a norm; float64 adds up the sums


@dataclass
class Bucket:
    """Parameters of one dtype in one flat tensor, all matrices or all vectors, and this rank's
    shard of their training state. N is the number of shards, S the number of elements in one."""

    names: list[str]
    parameters: list[Tensor]
    flat: Tensor  # (N·S,) the parameters themselves, which are views of it; may end in padding
    owned: slice  # the part of flat that is this rank's shard
    master: Tensor = field(init=False)  # (S,) float32 weights
    exp_avg: Tensor = field(init=False)  # (S,) float32, first moment
    exp_avg_sq: Tensor = field(init=False)  # (S,) float32, second moment
    grad: Tensor | None = None  # (S,) float32, summed over ranks and micro-batches since `step`
    arrived: int = 0  # how many of the parameters have got their gradient of this backward pass

    def __post_init__(self):
        # float() of a float32 tensor is that tensor: the master weights are then part of `flat`.
        self.master = self.flat[self.owned].float()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)

    def take_grads(self) -> Tensor:
        """The parameters' gradients, moved into one tensor (N·S,), zeros where there is none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads = [local(grad).flatten() for grad in grads]
        for parameter in self.parameters:
            parameter.grad = None
        self.arrived = 0
        # A large parameter alone in its bucket needs no copy, nor does ZeRO-3's part of one.
        if len(grads[0]) == len(self.flat):
            return grads[0]
        padding = self.flat.new_zeros(len(self.flat) - sum(map(len, grads)))
        return torch.cat([*grads, padding])


def views(flat: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The beginning of a flat tensor as tensors of the parameters' shapes, in the same memory."""
    sizes = [p.numel() for p in parameters]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters)]


def neighbours(trained: list[tuple[str, Tensor]], bucket_size: int) -> Iterator[list]:
    """Share out parameters to buckets: those in one have the same dtype, and all decay or none."""
    filling: dict[tuple, list] = {}  # kind of parameters → those of the bucket that is not full yet
    for name, parameter in trained:
        kind = (parameter.dtype, parameter.ndim >= 2)
        members = filling.setdefault(kind, [])
        size = sum(p.numel() for _, p in members) + parameter.numel()
        if members and size > bucket_size:  # one alone may be larger
            yield filling.pop(kind)
            members = filling.setdefault(kind, [])
        members.append((name, parameter))
    yield from filling.values()


class ZeroAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), as torch.optim.AdamW, over all ranks.

    Call `backward(loss)` for each micro-batch, equally often on every rank, then `step`.

    named_parameters: those that require a gradient are trained. Matrices decay, vectors do not.
    max_grad_norm: of the gradient of all parameters together; 0 does not clip.
    bucket_size: elements in one collective (DeepSpeed's reduce_bucket_size). A parameter with more,
        such as an embedding, is a bucket of its own.
    shard: False keeps all state on every rank (`--deepspeed none`): gradients are all-reduced and
        nothing is gathered. After `shard_parameters` (ZeRO-3) it means nothing.
    waiting: entered while this rank waits for others' numbers, as a stopwatch wants to be.

    Where no rank has a gradient, it counts as zero, as in DeepSpeed: weights and moments decay.
    (torch.optim.AdamW skips the parameter, but a rank without a gradient knows nothing of others.)
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
        waiting: AbstractContextManager | None = None,
    ):
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.waiting = waiting or nullcontext()
        self.settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps}
        self.settings |= {"fused": True, "amsgrad": False, "maximize": False}
        self.rank, self.num_ranks = 0, 1
        if torch_dist.is_initialized():  # one process has no group
            self.rank, self.num_ranks = torch_dist.get_rank(), torch_dist.get_world_size()
        trained = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.is_zero3 = isinstance(trained[0][1], DTensor)
        self.is_zero2 = shard and self.num_ranks > 1 and not self.is_zero3
        self.num_shards = self.num_ranks if self.is_zero2 else 1
        self.steps = 0  # updates made
        self.buckets: list[Bucket] = []
        self.next = 0  # the bucket to reduce next: in one order on all ranks, else sums would mix
        # The bucket that is on its way, what it receives, and what to wait for.
        self.in_flight: tuple[Bucket, Tensor, torch_dist.Work | None] | None = None

        # A backward pass reaches the last layers first, so that is where the first bucket lies.
        trained.reverse()
        if self.is_zero3:  # `fully_shard` has cut each parameter, and sums its gradient
            for name, parameter in trained:
                flat = local(parameter.detach()).view(-1)
                self.buckets.append(Bucket([name], [parameter], flat, owned=slice(None)))
        else:
            for members in neighbours(trained, bucket_size):
                self._make_bucket(members)

    @torch.no_grad()
    def _make_bucket(self, members: list[tuple[str, Tensor]]) -> None:
        """Move these parameters into one flat tensor and watch for their gradients."""
        names, parameters = map(list, zip(*members))
        size = math.ceil(sum(p.numel() for p in parameters) / self.num_shards)  # S
        flat = parameters[0].new_zeros(self.num_shards * size)  # (N·S,)
        for parameter, view in zip(parameters, views(flat, parameters)):
            view.copy_(parameter)
            parameter.data = view
        index = self.rank if self.is_zero2 else 0
        owned = slice(index * size, (index + 1) * size)
        bucket = Bucket(names, parameters, flat, owned)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(partial(self._collect, bucket))
        self.buckets.append(bucket)

    # Phase 1: reduce, while the backward pass runs.

    def backward(self, loss: Tensor) -> None:
        """The backward pass; each rank then holds its shard of the gradient, summed over ranks."""
        loss.backward()
        # What is left are buckets with a parameter that this loss does not reach.
        while self.next < len(self.buckets):
            self._reduce_next()
        self._finish_reduce()
        self.next = 0

    def _collect(self, bucket: Bucket, parameter: Tensor) -> None:
        """Autograd calls this when it has a parameter's gradient of this backward pass."""
        bucket.arrived += 1
        for following in self.buckets[self.next :]:
            if following.arrived < len(following.parameters):
                break
            self._reduce_next()

    def _reduce_next(self) -> None:
        """Start to sum the next bucket's gradient over the ranks. One is under way at a time."""
        self._finish_reduce()
        bucket = self.buckets[self.next]
        self.next += 1
        grads = received = bucket.take_grads()  # (N·S,)
        work = None
        if self.is_zero2:
            # A reduce-scatter that sums in float32, as Megatron-LM's: to send first and then to
            # sum does not round partial sums to bfloat16, as a ring would. (And gloo's own is an
            # all-reduce, which sends twice as much.)
            received = torch.empty_like(grads)
            work = torch_dist.all_to_all_single(received, grads, async_op=True)
        elif self.num_ranks > 1 and not self.is_zero3:
            work = torch_dist.all_reduce(grads, async_op=True)
        self.in_flight = (bucket, received, work)

    def _finish_reduce(self) -> None:
        """Wait for the bucket that is under way, and add what came to its gradient."""
        if self.in_flight is None:
            return
        bucket, received, work = self.in_flight
        self.in_flight = None
        if work is not None:
            with self.waiting:
                work.wait()
        # (N, S): what each rank has for this rank's shard
        first, *others = received.view(self.num_shards, len(bucket.master))
        if bucket.grad is None:
            # A copy, because a view would keep the others alive.
            bucket.grad = first.to(torch.float32, copy=self.is_zero2)
        else:
            bucket.grad.add_(first)
        for other in others:
            bucket.grad.add_(other)

    # Phase 2: update the shard. Phase 3: gather the parameters.

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """One AdamW update of all parameters; returns the global gradient norm before clipping.

        FloatingPointError on all ranks if that norm is not finite, with the parameters as they
        were, or if the updated parameters are not, which have to be thrown away.
        """
        norm = self._grad_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        excess = (norm + 1e-6) / self.max_grad_norm if self.max_grad_norm else 1.0
        # (), on the device; torch.full does not wait for it.
        device = self.buckets[0].flat.device
        divisor = torch.full((), max(1.0, excess), dtype=torch.float32, device=device)
        gathers = []
        for bucket in self.buckets:
            self._update(bucket, learning_rate, divisor)
            gathers += self._gather(bucket)
        self.steps += 1
        with self.waiting:
            for work in gathers:
                work.wait()
        if not self._is_finite():
            raise FloatingPointError(f"update {self.steps} made weights that are not finite")
        return norm

    def _is_finite(self) -> bool:
        """Whether all ranks' shards of the parameters are: a sum of others is not finite either."""
        shards = [bucket.flat[bucket.owned] for bucket in self.buckets]
        total = torch.stack([shard.sum().float() for shard in shards]).sum()
        if self.is_zero2 or self.is_zero3:
            with self.waiting:
                torch_dist.all_reduce(total)
        return math.isfinite(total.item())

    def _grad_norm(self) -> float:
        """Of the gradient of all parameters, summed over ranks and micro-batches."""
        # A float32 sum of many squares would lose the small ones.
        blocks = [b for bucket in self.buckets for b in bucket.grad.split(SUMMED_IN_FLOAT32)]
        norms = torch.stack([torch.linalg.vector_norm(block) for block in blocks])
        squared = norms.double().square().sum()
        if self.is_zero2 or self.is_zero3:  # each rank has seen its own shard
            with self.waiting:
                torch_dist.all_reduce(squared)
        return squared.sqrt().item()

    def _update(self, bucket: Bucket, learning_rate: float, divisor: Tensor) -> None:
        """AdamW on this rank's shard of a bucket; g is its gradient divided by `divisor`.

        m = β1 m + (1 - β1) g,  v = β2 v + (1 - β2) g²,  w = w - lr (λ w + m̂ / (√v̂ + ε))
        where m̂ = m / (1 - β1ᵗ) and v̂ = v / (1 - β2ᵗ) in update t = 1, 2, …
        """
        decay = self.weight_decay if bucket.parameters[0].ndim >= 2 else 0.0
        settings = {"lr": learning_rate, "weight_decay": decay, **self.settings}
        steps = torch.full_like(divisor, self.steps)  # without this one, which the kernel adds
        state = [bucket.master], [bucket.grad], [bucket.exp_avg], [bucket.exp_avg_sq], [], [steps]
        # PyTorch's fused kernel passes over the memory once.
        adamw(*state, grad_scale=divisor, **settings)
        bucket.grad = None
        bucket.flat[bucket.owned] = bucket.master

    def _gather(self, bucket: Bucket) -> list[torch_dist.Work]:
        """Start to collect a bucket's updated shards in the parameters."""
        if not self.is_zero2:
            return []
        if bucket.flat.is_cuda:
            return [all_gather(bucket.flat, bucket.flat[bucket.owned], async_op=True)]
        # N broadcasts send as many bytes as gloo's all-gather, without its copy of the bucket.
        shards = bucket.flat.chunk(self.num_ranks)
        return [torch_dist.broadcast(x, rank, async_op=True) for rank, x in enumerate(shards)]


# ZeRO-3 -----------------------------------------------------------------------------------------


def shard_parameters(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """ZeRO-3, in place: every parameter becomes a DTensor whose rows are shared out over the ranks,
    on their devices.

    A layer's parameters are full while that layer computes, all others while the model does.
    Gradients are summed over the ranks in the parameters' own type (ZeRO-2's in float32) and kept
    in float32. From now on a forward or backward pass is collective: every rank makes the same.
    """
    for part in (*layers, model):
        fully_shard(part, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # not the mean
        part.set_force_sum_reduction_for_comms(True)
    model.run_forward = lambda function: function()
    register_fsdp_forward_method(model, "run_forward")
    # The first to run becomes the root, which any layer could be if it ran by itself.
    forward(lambda model: None, model)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def forward(function: Callable, model: nn.Module, *args):
    """function(model, *args), for a pass through the model that is not a call of it.

    fully_shard gathers the outermost parameters when the model's own forward begins, and here."""
    if not is_sharded(model):
        return function(model, *args)
    return model.run_forward(lambda: function(model, *args))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In this block every rank has full parameters, to read, also of a sharded model."""
    parts = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def full(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, a collective call; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
