"""A model of the hub comes onto this node's disk, once for all of its ranks, with its bytes told."""

import os
from contextlib import suppress
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm

from run import display
from run.log import say

# What transformers reads; beside it, repositories hold the same weights in other formats.
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
OTHERS = ["*/*", "consolidated*"]


class Bar(tqdm):
    """In place of huggingface_hub's bars, which would run through the panel: all files' bytes."""

    def __init__(self, *args, **kwargs):
        # The bar of them all.
        self.counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
        super().__init__(*args, **kwargs | {"disable": True})

    def update(self, n=1):
        if self.counts:
            self.n += n
            display.report_bytes(self.n, max(self.n, self.total or 0))


def fetch(world, model: str) -> None:
    """All ranks call it. What cannot be had is told by whoever reads the model next."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and not Path(model).exists():
        # Whatever the hub's libraries raise.
        with display.phase("download the model"), suppress(Exception):
            say(world, f"fetching {model}, unless it is on disk")
            snapshot_download(model, allow_patterns=FILES, ignore_patterns=OTHERS, tqdm_class=Bar)
    world.barrier()
