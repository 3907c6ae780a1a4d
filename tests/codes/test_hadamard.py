"""The input transform, against a matrix built entry by entry."""

import pytest
import torch

from seedlm.codes import hadamard
from seedlm.codes.block.lfsr import step


def matrix(width: int, largest: int) -> torch.Tensor:
    """The transform as a matrix float64 [width, width]: x -> matrix @ x."""
    blocks = []
    for size in hadamard.block_sizes(width, largest):
        state, block = hadamard.SIGN_SEED, torch.empty(size, size, dtype=torch.float64)
        for j in range(size):
            state = step(state, 16)
            for i in range(size):
                block[i, j] = (-1) ** ((i & j).bit_count() + (state & 1)) * size**-0.5
        blocks.append(block)
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    ("width", "largest", "sizes"),
    [
        (576, 256, [256, 256, 64]),
        (100, 64, [64, 32, 4]),
        (1, 64, [1]),
        (7, 4, [4, 2, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_a_width_is_cut_greedily(width, largest, sizes):
    assert hadamard.block_sizes(width, largest) == sizes


@pytest.mark.parametrize(("width", "largest"), [(576, 256), (100, 64), (7, 4), (1, 128), (5, 1)])
def test_forward_is_the_matrix_and_inverse_its_transpose(width, largest):
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = matrix(width, largest)
    torch.testing.assert_close(hadamard.forward(x, largest), x @ dense.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard.inverse(x, largest), x @ dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hadamard.inverse(hadamard.forward(x, largest), largest), x, rtol=1e-12, atol=1e-12)


def test_columns_of_whole_blocks_are_transformed_alone():
    x = torch.randn(2, 192, generator=torch.Generator().manual_seed(1))
    assert torch.equal(hadamard.forward(x, 64)[:, 64:128], hadamard.forward(x[:, 64:128], 64))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        hadamard.forward(torch.zeros(4, dtype=torch.int32), 4)
