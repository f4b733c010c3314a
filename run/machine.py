"""What this machine has room for."""

import os
from pathlib import Path

import torch

# A row's cache may have room for so many tokens beyond those in it (fast/decoder.py, fast/graphs.py).
ROOM, ROOM_ON_GPU = 16, 128


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # PyTorch holds on to what tensors leave behind, and fills it first.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not on Linux: whatever it takes
        return 1 << 62
    kilobytes = meminfo.read_text().partition("MemAvailable:")[2].split()[0]
    return int(kilobytes) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rows_at_once(model: torch.nn.Module, length: int) -> int:
    """How many rows of `length` tokens half of the free memory has room for, one at least.

    A row takes its keys and values, its logits, and what `sample_tokens` makes of these.
    """
    config = model.config.get_text_config()
    parameter = next(model.parameters())
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    numbers = 2 * config.num_hidden_layers * key_heads * dim  # a token's keys and values
    room = ROOM_ON_GPU if parameter.is_cuda else ROOM
    cache = parameter.itemsize * numbers * (length + room)  # bytes
    logits = 40 * config.vocab_size  # bytes, with all that is made of them
    free = free_memory(parameter.device) // 2
    return max(1, free // (cache + logits))
