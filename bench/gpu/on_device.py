"""A pytest plugin that has the repository's tests compute on a GPU: `-p on_device` (bench/gpu/kit.py).

Small models and all tensors without a device of their own are made there. What draws with a
generator of the CPU draws there first, and so draws the same.
"""

import functools
import os

import torch

DEVICE = os.environ.get("TESTS_DEVICE", "cuda")


def pytest_sessionstart(session):
    import conftest

    conftest.tiny_model = moved(conftest.tiny_model)
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, drawn_on_cpu(getattr(torch, name)))
    torch.set_default_device(DEVICE)


def moved(tiny_model):
    @functools.wraps(tiny_model)
    def on_device(*args, **kwargs):
        with torch.device("cpu"):  # so that its random weights are those of the CPU's tests
            model = tiny_model(*args, **kwargs)
        return model.to(DEVICE)

    return on_device


def drawn_on_cpu(draw):
    @functools.wraps(draw)
    def wrapper(*args, generator=None, **kwargs):
        if generator is None:
            return draw(*args, **kwargs)
        device = kwargs.pop("device", DEVICE)
        return draw(*args, generator=generator, device="cpu", **kwargs).to(device)

    return wrapper
