"""Many processes: start-up, and AdamW with its state sharded as in ZeRO stage 2 (Rajbhandari et al., arXiv 1910.02054).

Plain data parallelism keeps P parameters, P gradients and 3·P float32 numbers of AdamW state on every rank. Here a
rank owns 1/N of the gradients and of the state. Parameters live side by side in flat buckets, each cut into N equal
shards, by element and not by tensor:

    bucket   [ w1 w1 w1 w1 w1 | w2 w2 w3 w3 w3 | w3 w3 w3 ·· ]        · is padding
               rank 0's shard   rank 1's         rank 2's

1. Backward. When the last gradient of a bucket arrives, the bucket's gradients are reduce-scattered while the backward
   pass goes on: each rank sends every other one its shard, frees the whole, and sums what it receives for its own in
   float32 (all-to-all and a local sum, as Megatron-LM's reduce-scatter with fp32 accumulation: a ring would round its
   partial sums to bfloat16, and gloo's own reduce-scatter is an all-reduce, which sends twice as much).
2. Update. The squared norm of all shards is all-reduced once to clip by the global norm; then AdamW (PyTorch's fused
   kernel, one pass over the memory) runs on the rank's shard alone, on float32 master weights and moments that exist
   nowhere else.
3. Gather. The updated shards are all-gathered straight into the parameters, which are views of their bucket, while the
   next bucket is updated (with gloo each rank broadcasts its own: its all-gather makes a copy of the bucket).

A rank sends P·(N-1)/N elements in phase 1 and as many in phase 3: 2·P·(N-1)/N a step, like one all-reduce. With K
micro-batches a step it is (K+1)·P·(N-1)/N, since phase 1 comes K times: to keep nothing but its shard between them, a
rank has to send the rest away each time. (To that add less than N numbers of padding a bucket, and one for the norm.)

Bytes a rank for bfloat16 parameters: 2·P for them, and 16·P/N for gradients, master weights and two moments in float32;
while a backward pass runs also one bucket that fills and one that is sent and received. (float32 parameters are their
own master weights: 4·P and 12·P/N.) With one process nothing is sent and the same code is plain AdamW. A loss that is
summed, not averaged, over ranks and micro-batches needs no division here.

Stage 3 shards the parameters, too. PyTorch's `fully_shard` all-gathers a layer's when its forward or backward pass
begins, frees them when it ends and reduce-scatters their gradients; what is left is to update the rank's part of each
parameter, a bucket of its own here. Its hooks sit in the model's forward, so other ways through the model go through
`forward`, or stand in a `gathered` block. All of it is collective: every rank makes the same passes, as often.
"""

import ctypes
import errno
import fcntl
import math
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

# torch 2.13 renames this collective on flat tensors.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
BLOCK = 1 << 20  # squares summed in float32 before float64 takes over


@dataclass(frozen=True)
class World:
    """The processes of this run and what this one is among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def spans_nodes(self) -> bool:
        return self.size > int(os.environ.get("LOCAL_WORLD_SIZE", 1))

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

    @property
    def place(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def together(self, function: Callable, *args):
        """What the call returns; a ValueError about a flag that it raises on some rank is raised on every rank."""
        if self.size == 1:
            return function(*args)
        result = problem = None
        try:
            result = function(*args)
        except ValueError as error:
            if not str(error).startswith("--"):
                raise
            problem = error
        problems = self.gather([problem and (str(problem), self.place)])
        for text, place in filter(None, problems):
            raise ValueError(text if all(problems) else f"{text} (says {place})") from problem
        return result

    def agree(self, values: dict[str, object]) -> None:
        """ValueError on every rank, of the first flag whose value is not the same on all."""
        (first, expected), *others = self.gather([(self.place, values)])
        for place, theirs in others:
            for flag, value in expected.items():
                if theirs.get(flag) != value:
                    raise ValueError(
                        f"--{flag} {value}: on {first}, but {theirs.get(flag)} on {place}; all ranks need the same"
                    )


def find_world() -> World:
    """This process's place among those that torchrun started (alone without it), and its GPU if there are any."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return World(rank, size, torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu"))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices by itself; a CPU that does not is 8 times as fast in float32."""
    able = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not on Linux: whatever it takes
        return 1 << 62
    kilobytes = meminfo.read_text().partition("MemAvailable:")[2].split()[0]
    return int(kilobytes) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start(
    world: World, timeout: float = 30.0, on_loss: Callable[[str], None] = print, meeting: float = 300.0
) -> "Watch | None":
    """Join the other processes, NCCL on GPUs and gloo on CPUs, and watch that none is lost; see `Watch`.

    meeting: seconds in which all must have come. ValueError, one line, when they have not.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        use_cpu_well(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if world.size == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # or else torchrun does
    try:
        store = dist.TCPStore(
            host, port, is_master=serves, wait_for_workers=False, timeout=timedelta(seconds=meeting), multi_tenant=True
        )
        store = dist.PrefixStore(f"train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        watch = Watch(world, host, store, timeout, on_loss, meeting)
    except (dist.DistError, OSError) as error:
        if os.strerror(errno.EADDRINUSE).lower() in str(error).lower():
            raise ValueError(
                f"--master_port {port}: in use on this machine; a free one, on every node, works"
            ) from error
        raise ValueError(
            f"--master_addr {host} --master_port {port}: {world.place} did not meet rank 0 there within {meeting:g} s; "
            "an address of rank 0's machine that all others reach works"
        ) from error
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_to(host)):
        os.environ["GLOO_SOCKET_IFNAME"] = name  # gloo would take what the host name stands for, often loopback
    # Ranks wait here while rank 0's vLLM generates; the watch and the engine's own limit see to what is lost.
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timedelta(hours=2))
    return watch


def use_cpu_well(processes: int) -> None:
    """Share this machine's cores among its processes, and keep freed memory for the next tensor.

    torchrun gives each process one thread, whatever the number of cores. glibc hands large blocks back to the kernel,
    whose empty pages cost more than the arithmetic on them.
    """
    if processes > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    if any(name.startswith("MALLOC_") for name in os.environ):  # the user's own settings
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-2, 64 << 20)  # M_TOP_PAD: it grows by this much


def stop(watch: "Watch | None" = None) -> None:
    """Leave the process group, if there is one."""
    if watch:
        watch.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host over IPv4, where that can be told."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == probe.getsockname()[0]:
                    return name
    return None


class Watch:
    """Ends this process when another one of the run is lost. Without it, gloo waits for hours and NCCL for ever.

    Every rank keeps a connection to rank 0, apart from all others, on which a thread says each second that it lives:

        its process ends without a good-bye      the connection closes: at once
        its machine is switched off or cut off   the kernel gets no acknowledgement (TCP_USER_TIMEOUT): `timeout` s
        it is stopped, or holds Python's lock    nothing is said: 4 · `timeout` s, since it may yet go on

    Rank 0 tells the others of whom it lost. `on_loss` gets one line that names rank and host, from the thread, and has
    to end the process: its main thread may be deep in a collective that never returns.
    """

    ALIVE, FAILED, DONE = b"\1", b"\2", b"\3"
    PATIENCE = 15.0  # seconds until rank 0 says for whom it waits
    GRACE = 3.0  # seconds for a process to end with an error of its own when another one has said that it failed

    def __init__(self, world: World, host: str, store, timeout: float, on_loss: Callable[[str], None], meeting: float):
        self.timeout, self.on_loss = timeout, on_loss
        self.peers: dict[socket.socket, str] = {}  # connections, and who is at their other ends
        self.closed, self.deferred = False, threading.Event()
        if world.is_main:
            self._await_all(world, store, time.monotonic() + meeting)
        else:
            port, place = store.get("watch").decode().split(" ", 1)
            connection = socket.create_connection((host, int(port)), meeting)
            connection.sendall(f"{world.rank} {world.place}\n".encode())
            if not connection.recv(1):  # rank 0's first sign of life: all have come
                raise ConnectionError(f"{place} has ended")
            self.peers[connection] = place
        for connection in self.peers:
            connection.settimeout(None)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(timeout * 1000))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _await_all(self, world: World, store, deadline: float) -> None:
        missing = set(range(1, world.size))
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=world.size, dualstack_ipv6=dual) as server:
            store.set("watch", f"{server.getsockname()[1]} {world.place}")
            speak = time.monotonic() + self.PATIENCE
            while missing:
                try:
                    server.settimeout(max(0.001, min(speak, deadline) - time.monotonic()))
                    connection, _ = server.accept()
                except TimeoutError:
                    if time.monotonic() < deadline:
                        speak = math.inf
                        print(f"waiting for rank {', '.join(map(str, sorted(missing)))} of {world.size}", flush=True)
                        continue
                    raise ValueError(
                        f"--nnodes: rank {', '.join(map(str, sorted(missing)))} of {world.size} did not come within "
                        "the time to meet; the same command on every node, each with its --node_rank, works"
                    ) from None
                try:
                    connection.settimeout(5.0)
                    with connection.makefile() as line:
                        rank, place = line.readline(1000).strip().split(" ", 1)
                    missing.remove(int(rank))
                except (ValueError, KeyError, OSError):  # a stranger, who looks for open ports
                    connection.close()
                    continue
                self.peers[connection] = place
        for connection in self.peers:
            connection.sendall(self.ALIVE)

    def close(self, word: bytes = FAILED) -> None:
        """Watch no more, and tell the others that this process ends: as it should (DONE), or with a failure of its own."""
        if not self.closed:
            self.closed = True
            for connection in list(self.peers):
                with suppress(OSError):
                    connection.sendall(word)
                connection.close()

    def defer(self) -> None:
        """The main thread has failed, perhaps because another process is lost; if so this ends the process."""
        self.deferred.set()
        self.thread.join(self.GRACE)

    def _run(self) -> None:
        lost, grace = self._await_loss()
        if lost and not self.closed:
            for connection in self.peers:  # rank 0's, to all others
                with suppress(OSError):
                    connection.sendall(self.FAILED * (grace > 0) + lost.encode())
            self.deferred.wait(grace)
        if lost and not self.closed:
            self.on_loss(lost)

    def _await_loss(self) -> tuple[str, float]:
        """Who was lost and how, and the seconds to wait for an error of one's own; no text if nobody ever is."""
        heard, spoken = dict.fromkeys(self.peers, time.monotonic()), 0.0
        selector = selectors.DefaultSelector()
        for connection in self.peers:
            selector.register(connection, selectors.EVENT_READ)
        try:
            while self.peers and not self.closed:
                for key, _ in selector.select(1.0):
                    connection, place = key.fileobj, self.peers[key.fileobj]
                    said = connection.recv(4096)
                    heard[connection] = time.monotonic()
                    if told := said.strip(self.ALIVE + self.FAILED + self.DONE):
                        return told.decode(), self.GRACE * (self.FAILED in said)
                    if self.FAILED in said:
                        return f"lost {place}: it failed, and has told why", self.GRACE
                    if not said:
                        return f"lost {place}: its process has ended", 0.0
                    if self.DONE in said:
                        selector.unregister(connection)
                        del self.peers[connection]
                if time.monotonic() > spoken + 1.0:
                    spoken = time.monotonic()
                    for connection, place in self.peers.items():
                        if spoken > heard[connection] + 4 * self.timeout:
                            return f"lost {place}: no sign of life for {4 * self.timeout:g} s", 0.0
                        with suppress(ConnectionError):  # recv has its last words, if there are any
                            connection.sendall(self.ALIVE)
        except ConnectionError:
            return f"lost {place}: its process has ended", 0.0
        except OSError as error:
            return f"lost {place}: out of reach for {self.timeout:g} s ({error.strerror})", 0.0
        return "", 0.0


class FileOfMain:
    """A safetensors file on rank 0's disk, as every rank reads it: `file[name]`, the same names in the same order.

    Rank 0 reads one tensor at a time and sends it to the others, so no rank holds more than that.
    """

    def __init__(self, world: World, path: Path):
        self.world, self.file = world, safe_open(path, "pt") if world.is_main else None
        names = self.file.keys() if world.is_main else ()
        self.shapes = world.from_main({name: tuple(self.file.get_slice(name).get_shape()) for name in names})

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]  # a KeyError is every rank's
        tensor = self.file.get_tensor(name) if self.world.is_main else None
        if self.world.size == 1:
            return tensor
        dtype = self.world.from_main(tensor is not None and tensor.dtype)
        tensor = torch.empty(shape, dtype=dtype) if tensor is None else tensor
        tensor = tensor.to(self.world.device)
        dist.broadcast(tensor, src=0)
        return tensor


def shard_parameters(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """ZeRO-3, in place: every parameter becomes a DTensor, its rows shared out over the ranks, and moves to their devices.

    Parameters in one of `layers` are whole while that layer computes, all others while the model does. Gradients are
    summed over the ranks in the parameters' own type (ZeRO-2's in float32) and kept in float32.
    """
    for part in (*layers, model):
        fully_shard(part, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # not the mean
        part.set_force_sum_reduction_for_comms(True)
    model.run_forward = lambda function: function()
    register_fsdp_forward_method(model, "run_forward")
    forward(lambda model: None, model)  # the first to run is the root, and each layer could be that


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def forward(function: Callable, model: nn.Module, *args):
    """function(model, *args), a forward pass that does not begin with the model's own."""
    return model.run_forward(lambda: function(model, *args)) if is_sharded(model) else function(model, *args)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In this block every rank has a model's parameters whole, to read, if they are sharded outside."""
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


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, a collective call; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    arrived: int = 0  # how many of the parameters have their gradient of the backward pass under way

    @property
    def is_complete(self) -> bool:
        return self.arrived == len(self.parameters)

    def views(self, flat: Tensor) -> list[Tensor]:
        """A tensor as long as `flat` cut into pieces of the parameters' shapes."""
        sizes = [p.numel() for p in self.parameters]
        return [part.view(p.shape) for part, p in zip(flat[: sum(sizes)].split(sizes), self.parameters)]

    def take_grads(self) -> Tensor:
        """The parameters' gradients, zeros where there is none, moved into one tensor as long as `flat`."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        for parameter in self.parameters:
            parameter.grad = None
        self.arrived = 0
        if grads[0].numel() == len(self.flat):  # a large parameter alone in its bucket, or ZeRO-3's part of one
            return grads[0].flatten()
        padding = self.flat.new_zeros(len(self.flat) - sum(g.numel() for g in grads))
        return torch.cat([*(g.flatten() for g in grads), padding])


class ZeroAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), the same update as torch.optim.AdamW, sharded over the ranks.

    named_parameters: those that require a gradient are trained. Matrices decay; vectors (norms, biases) do not.
    max_grad_norm: of the whole gradient; 0 does not clip. bucket_size: elements in one collective, as DeepSpeed's
    reduce_bucket_size; a parameter with more (an embedding) is a bucket of its own.
    shard=False keeps all state on every rank (`--deepspeed none`): gradients are all-reduced, nothing is gathered.
    After `shard_parameters` neither holds: each rank keeps and updates its part.
    A parameter that gets no gradient on any rank is updated as if it were zero, as in DeepSpeed: its moments and weights
    decay. (torch.optim.AdamW skips it; but a rank that got none cannot know whether another did.)

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
        trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self.stage3 = isinstance(trained[0][1], DTensor)
        in_shards = shard and self.ranks > 1 and not self.stage3
        self.shards, self.index = (self.ranks, dist.get_rank()) if in_shards else (1, 0)
        self.steps = 0  # updates made
        self.buckets: list[Bucket] = []
        self.next = 0  # the bucket to reduce next: every rank reduces in this order, or the collectives would not match
        self.in_flight: tuple[Bucket, Tensor, dist.Work | None] | None = None
        self.waits: list[tuple] = []  # when this rank began and ceased to wait for others
        filling: dict[tuple, list] = {}
        # A backward pass reaches the last layers first, so that is where the first bucket lies.
        for name, parameter in reversed(trained):
            if self.stage3:
                self._take_shard(name, parameter)
                continue
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
        for parameter, view in zip(parameters, bucket.views(flat)):
            view.copy_(parameter)
            parameter.data = view
            parameter.register_post_accumulate_grad_hook(partial(self._collect, bucket))
        bucket.master = flat[shard].float()  # float() of a float32 tensor is that tensor
        bucket.exp_avg, bucket.exp_avg_sq = torch.zeros_like(bucket.master), torch.zeros_like(bucket.master)
        self.buckets.append(bucket)

    def _take_shard(self, name: str, parameter: DTensor) -> None:
        """A bucket of this rank's part of one parameter, whose gradient `fully_shard` sums."""
        local = parameter.detach().to_local().view(-1)
        weight_decay = self.weight_decay if parameter.ndim >= 2 else 0.0
        master = local.float()
        moments = torch.zeros_like(master), torch.zeros_like(master)
        self.buckets.append(Bucket([name], [parameter], weight_decay, local, slice(None), master, *moments))

    # Phase 1: reduce while the backward pass runs.

    def backward(self, loss: Tensor) -> None:
        """The backward pass; afterwards each rank holds its shard of the gradient summed over ranks, and no other."""
        loss.backward()
        while self.next < len(self.buckets):  # those with parameters that got no gradient
            self._reduce_next()
        self._finish_reduce()
        self.next = 0

    def _collect(self, bucket: Bucket, parameter: Tensor) -> None:
        """Autograd calls this when a parameter's gradient of this backward pass is complete."""
        bucket.arrived += 1
        while self.next < len(self.buckets) and self.buckets[self.next].is_complete:
            self._reduce_next()

    def _reduce_next(self) -> None:
        """Start to sum the next bucket's gradient over the ranks. One is under way at a time, while another fills."""
        self._finish_reduce()
        bucket = self.buckets[self.next]
        self.next += 1
        grads = received = bucket.take_grads()
        work = None
        if self.shards > 1:
            received = torch.empty_like(grads)
            work = dist.all_to_all_single(received, grads, async_op=True)
        elif self.ranks > 1 and not self.stage3:
            work = dist.all_reduce(grads, async_op=True)
        self.in_flight = (bucket, received, work)

    def _finish_reduce(self) -> None:
        if self.in_flight is None:
            return
        bucket, received, work = self.in_flight
        self.in_flight = None
        if work is not None:
            with self._waiting():
                work.wait()
        first, *others = received.view(self.shards, len(bucket.master))  # what each rank has for this rank's shard
        if bucket.grad is None:
            bucket.grad = first.to(torch.float32, copy=self.shards > 1)  # a copy does not keep the others alive
        else:
            bucket.grad.add_(first)
        for other in others:
            bucket.grad.add_(other)

    # Phases 2 and 3: update the shard, gather the parameters.

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """One AdamW update of all parameters; returns the global gradient norm before clipping.

        m = β1 m + (1 - β1) g,  v = β2 v + (1 - β2) g²,  w = w - lr (λ w + m / (1 - β1ᵗ) / (√(v / (1 - β2ᵗ)) + ε))

        FloatingPointError if that norm is not finite; the parameters are then as they were.
        """
        blocks = [block for bucket in self.buckets for block in bucket.grad.split(BLOCK)]
        squared = torch.stack([torch.linalg.vector_norm(block) for block in blocks]).double().square().sum()
        if self.shards > 1 or self.stage3:
            with self._waiting():
                dist.all_reduce(squared)
        norm = squared.sqrt().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        scale = max(1.0, (norm + 1e-6) / self.max_grad_norm) if self.max_grad_norm else 1.0
        scale, steps = torch.tensor([scale, self.steps], dtype=torch.float32, device=squared.device)
        self.steps += 1
        gathers = []
        for bucket in self.buckets:
            adamw(
                [bucket.master],
                [bucket.grad],
                [bucket.exp_avg],
                [bucket.exp_avg_sq],
                [],
                [steps.clone()],  # of before, which it counts on
                lr=learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                weight_decay=bucket.weight_decay,
                grad_scale=scale,  # divides the gradient
                amsgrad=False,
                maximize=False,
                fused=True,
            )
            bucket.grad = None
            bucket.flat[bucket.shard] = bucket.master
            gathers += self._gather(bucket)
        with self._waiting():
            for work in gathers:
                work.wait()
        return norm

    def _gather(self, bucket: Bucket) -> list[dist.Work]:
        """Start to collect a bucket's updated shards in the parameters."""
        if self.shards == 1:
            return []
        if bucket.flat.is_cuda:
            return [all_gather(bucket.flat, bucket.flat[bucket.shard], async_op=True)]
        # N broadcasts send as many bytes as gloo's all-gather, without its copy of the whole bucket.
        return [dist.broadcast(x, rank, async_op=True) for rank, x in enumerate(bucket.flat.chunk(self.shards))]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = self._now()
        yield
        self.waits.append((started, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        """On a GPU, where Python runs ahead, a mark in the stream of computations: what waits there is that stream."""
        if not self.buckets[0].flat.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_waited(self) -> float:
        """Seconds that this rank waited for gradients, norms and parameters of others since the last call."""
        waits, self.waits = self.waits, []
        if not self.buckets[0].flat.is_cuda:
            return sum(end - start for start, end in waits)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in waits) / 1000

    # Checkpoints: full tensors by parameter name, so that they load on any number of ranks.

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state on the CPU of rank 0, empty on the others. A collective call: every rank makes it."""
        state = {"steps": torch.tensor(self.steps)}
        for bucket in self.buckets:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                full = shard = getattr(bucket, kind)
                if self.stage3:
                    p = bucket.parameters[0]
                    local = shard.view(p.to_local().shape)
                    full = whole(
                        DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                    )
                elif self.shards > 1:
                    full = shard.new_empty(self.shards * len(shard))
                    all_gather(full, shard)
                if not dist.is_initialized() or dist.get_rank() == 0:
                    pieces = zip(bucket.names, bucket.views(full.flatten()))
                    state |= {f"{kind}.{name}": piece.to("cpu", copy=True) for name, piece in pieces}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a whole state, and the parameters with it. KeyError or RuntimeError if it is of other parameters."""
        self.steps = int(state["steps"])
        for bucket in self.buckets:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                if self.stage3:
                    full, p = state[f"{kind}.{bucket.names[0]}"], bucket.parameters[0]
                    full = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None).to_local().flatten()
                else:
                    full = torch.zeros(len(bucket.flat))
                    for name, piece in zip(bucket.names, bucket.views(full)):
                        piece.copy_(state[f"{kind}.{name}"])
                if kind == "master":
                    bucket.flat.copy_(full)
                getattr(bucket, kind).copy_(full[bucket.shard])
