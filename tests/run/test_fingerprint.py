"""A fingerprint of weights tells any change."""

import pytest
import torch

from run.fingerprint import Fingerprint

SIZES = [(torch.float32, 64), (torch.bfloat16, 7), (torch.float32, 3), (torch.float32, 1025)]


@pytest.mark.parametrize("dtype, size", SIZES)
def test_a_fingerprint_tells_a_single_bit(dtype, size):
    def digest(name, tensor):
        fingerprint = Fingerprint()
        fingerprint.add("first", torch.ones(5))
        fingerprint.add(name, tensor)
        return fingerprint.digest()

    tensor = torch.randn(size, 3).to(dtype)
    same = digest("w", tensor)
    assert digest("w", tensor.clone()) == same
    assert same not in {digest("v", tensor), digest("w", tensor.T)}
    for row in (0, size - 1):
        other = tensor.clone()
        other.view(torch.int16)[row, 1] ^= 1
        assert digest("w", other) != same
