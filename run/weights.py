"""How new weights reach a running engine: one tensor at a time, each loaded as it comes.

    rank 0    send_weights      ── announce: names, shapes, types, by a pipe ──>   engine
                                ── WeightGroup.send: one tensor, the next … ──>    receive_weights
                                <── fingerprint of all that came, by the pipe ──

run/engine.py has both ends; sampler.VLLMSampler says which weights, and when.
"""

import datetime
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as torch_dist
from torch import Tensor


def send_weights(engine, announced: list[tuple], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Stream weights into the engine, which loads each as it comes: the trainer's end.

    announced: (name, shape, dtype) of each, in their order. SamplerError if others arrived.
    """
    engine.announce(announced)
    for name, tensor in weights:
        engine.send(name, tensor)
    engine.check_arrived()


def receive_weights(group: "WeightGroup", announced: list[tuple], load: Callable) -> None:
    """What `send_weights` sends, as it arrives: the engine's end.

    load: a function of an iterator over (name, tensor).
    """

    def arriving() -> Iterator[tuple[str, Tensor]]:
        for name, shape, dtype in announced:
            yield name, group.receive(shape, dtype)

    load(arriving())


class WeightGroup:
    """A process group of two beside all others: the trainer, 0, and the engine, 1, which run on one
    machine. backend: nccl between two GPUs, or gloo."""

    def __init__(self, store: torch_dist.Store, rank: int, backend: str, device: torch.device):
        self.backend = backend
        if backend == "nccl":
            self.device, self.group = device, torch_dist.ProcessGroupNCCL(store, rank, 2)
            return
        options = torch_dist.ProcessGroupGloo._Options()
        options._devices = [torch_dist.ProcessGroupGloo.create_device(interface="lo")]
        options._timeout = datetime.timedelta(seconds=20)  # in which the two, who wait, must meet
        self.device = torch.device("cpu")
        self.group = torch_dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, tensor: Tensor, is_there: Callable[[], bool], timeout: float) -> None:
        """ConnectionError when the engine is not there any more."""
        work = self.group.send([tensor], 1, 0)
        # gloo fails when its peer is gone; NCCL would wait for ever.
        while self.backend == "nccl" and not work.is_completed():
            if not is_there():
                self.group.abort()
                raise ConnectionError("the engine is gone")
            time.sleep(1e-4)
        work.wait(datetime.timedelta(seconds=timeout))

    def receive(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        # The trainer watches, and its end is the engine's, so this waits as long as it takes.
        self.group.recv([tensor], 0, 0).wait(datetime.timedelta(days=1))
        return tensor
