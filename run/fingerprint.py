"""Whether two have the same weights, told by a few bytes: the engine and the trainer, or two nodes."""

import hashlib

import torch
from torch import Tensor


class Fingerprint:
    """Of tensors in their order: their names, shapes, types, and sums of their bits.

    A tensor's elements are read as whole numbers of their size. There are 1,024 sums: element i is
    in the one of i modulo 1,024. What is left at the end goes in as it is.
    """

    def __init__(self):
        self.hash = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        shape = tuple(tensor.shape)
        self.hash.update(f"{name} {shape} {tensor.dtype}".encode())
        whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = tensor.flatten().view(whole_numbers[tensor.itemsize])
        in_rows = len(bits) // 1024 * 1024
        table = bits[:in_rows].view(-1, 1024)
        # On a CPU so few rows at once that one thread sums them: the engine's and the trainer's
        # threads would wait for each other.
        rows = 31 if tensor.device.type == "cpu" else max(1, len(table))
        sums = torch.tensor(0)
        for part in table.split(rows):
            sums = sums + part.sum(0, dtype=torch.int64)  # (1024,)
        for part in (sums, bits[in_rows:]):
            self.hash.update(part.cpu().numpy())

    def digest(self) -> str:
        return self.hash.hexdigest()
