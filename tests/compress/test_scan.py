"""The pass over the source before a search: what it tells of every tensor, however far it reads ahead."""

import hashlib

import pytest
import torch

from seedlm.codes.registry import parse_format
from seedlm.compress.items import Item, Target
from seedlm.compress.scan import Scan, scan
from seedlm.errors import TensorError
from seedlm.storage.checkpoint import PackedInfo
from seedlm.storage.source import open_source
from tiny_models import SMALL, save_tensors

AHEAD = pytest.mark.parametrize("ahead", [{}, {"ahead": 1}, {"ahead": 300}], ids=["all", "nothing", "two tensors"])


def scanned(folder, tensors, asked=None, **options):
    """Item name -> what the scan says of it; `asked` notes how much had been read when each came."""
    source, read = open_source(save_tensors(folder, tensors)), [0]

    def tell(count):
        read[0] += count

    items = [
        Item(name, {}, Target(name.removesuffix(".weight"), PackedInfo(parse_format(SMALL), tuple(tensor.shape))))
        for name, tensor in tensors.items()
    ]
    found = {}
    for item, result in scan(source, items, tell, 2, **options):
        found[item.name] = result
        if asked is not None:
            asked.append(read[0])
    return found


@AHEAD
def test_it_says_the_same_however_little_is_read_ahead(tmp_path, ahead):
    tensors = {f"layers.{n}.a.weight": torch.randn(4, 8) * 10.0**n for n in range(6)}
    expected = {
        name: Scan(hashlib.sha256(tensor.numpy().tobytes()).hexdigest(), float(tensor.abs().max()))
        for name, tensor in tensors.items()
    }
    found = scanned(tmp_path / "m", tensors, **ahead)
    assert found == expected
    assert list(found) == list(tensors)


@AHEAD
def test_however_little_is_read_ahead_the_rest_is_read_to_count_what_is_bad(tmp_path, ahead):
    bad = torch.full((4, 8), float("nan"))
    tensors = {f"layers.{n}.a.weight": torch.randn(4, 8) if n < 3 else bad.clone() for n in range(8)}
    with pytest.raises(TensorError, match=r"^layers.3.a.weight: .* 32 NaN and 0 Inf values; and 4 more tensors like it"):
        scanned(tmp_path / "m", tensors, **ahead)


def test_no_more_is_read_than_was_allowed(tmp_path):
    """Tensors of 128 bytes: the one asked for, one beyond, and what has begun."""
    asked = []
    scanned(tmp_path / "m", {f"layers.{n}.a.weight": torch.randn(4, 8) for n in range(20)}, asked, ahead=1)
    assert asked[0] <= 3 * 128
