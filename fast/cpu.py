"""What makes PyTorch quick on a CPU: threads and memory. It changes no result.

torchrun gives each process one thread, whatever the number of cores. glibc, the C library, hands
large blocks of freed memory back to the kernel; the next tensor then gets empty pages, and filling
those costs more than the arithmetic on them.
"""

import ctypes
import os
from contextlib import suppress

import torch

# Names of malloc.h for what `mallopt` sets.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def use_cpu_well(processes: int) -> None:
    """Share this machine's cores among its processes, and keep freed memory for the next tensor.

    What the user sets, by affinity or by MALLOC_ variables of the environment, holds.
    """
    if processes > 1:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // processes))
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own
        mallopt(M_TRIM_THRESHOLD, -1)  # the heap does not shrink
        mallopt(M_TOP_PAD, 64 << 20)  # it grows by this much
