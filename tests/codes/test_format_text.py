"""FORMAT.md's family `block`, read by a decoder that takes its table of taps from the document and nothing from the package."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from seedlm.codes.encoded import EncodedTensor
from seedlm.codes.registry import parse_format

FORMAT = (Path(__file__).parents[2] / "FORMAT.md").read_text(encoding="utf-8")
TABLE = FORMAT[FORMAT.index("| K | taps |") : FORMAT.index("A seed s is a state from 1")]
TAPS = {int(k): [int(tap) for tap in taps.split(",")] for k, taps in re.findall(r"\| (\d+) \| ([\d, ]+?) (?=\|)", TABLE)}


def states(k, seed, count):
    found = []
    for _ in range(count):
        bit = sum(seed >> tap for tap in TAPS[k]) & 1
        seed = seed >> 1 | bit << (k - 1)
        found.append(seed)
    return found


def signed(field, bits):
    return field - (1 << bits) if field >> (bits - 1) else field


def decode(words, bias, k, c, p, q, x, shape):
    """The weight, float32, by "Packed words" and "Decoding a block"."""
    out, width = shape
    center, divisor, block_bits = 2 ** (k - 1), 2 ** (k - 1) - 1, k + x + p * q
    weight = np.zeros((out, math.ceil(width / c) * c), np.float32)
    for row in range(out):
        bits = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words[row]))
        for block in range(math.ceil(width / c)):
            code = bits >> block * block_bits & ((1 << block_bits) - 1)
            seed, e = code & ((1 << k) - 1), signed(code >> k & ((1 << x) - 1), x)
            coefficients = [signed(code >> (k + x + q * i) & ((1 << q) - 1), q) for i in range(p)]
            matrix = states(k, seed, c * p)
            scale = np.float32(float(np.float32(1 / divisor)) * 2.0 ** (e + bias))
            for i in range(c):
                total = sum((matrix[i * p + j] - center) * coefficients[j] for j in range(p))
                weight[row, block * c + i] = np.float32(total) * scale
    return weight[:, :width]


def test_the_table_names_the_taps_of_every_register():
    assert sorted(TAPS) == list(range(2, 25))


def test_the_examples_of_the_document():
    assert states(3, 4, 8) == [2, 5, 6, 7, 3, 1, 4, 2]
    assert states(16, 1, 6) == [32768, 16384, 8192, 4096, 34816, 17408]
    found = decode([[0x2F1E0001]], 0, 16, 8, 3, 4, 4, (1, 8))
    named = re.search(r"w = (-0\.25.*)", FORMAT)[1]
    assert [f"{value:.7g}" for value in found[0].tolist()] == named.split(", ")


@pytest.mark.parametrize("k", range(2, 25))
def test_a_reader_of_the_document_finds_the_same_weight(k):
    rng = random.Random(k)
    c = rng.randrange(1, 20)
    p = rng.randrange(1, min(c, 4) + 1)
    q, x, bias = rng.randrange(2, 7), rng.randrange(1, 7), rng.randrange(-40, 20)
    width, out, block_bits = 3 * c + rng.randrange(c), 2, k + x + p * q
    blocks = math.ceil(width / c)
    rows = []
    for _ in range(out):
        codes = [rng.randrange(1, 1 << k) | rng.getrandbits(x + p * q) << k for _ in range(blocks)]
        bits = sum(code << block_bits * i for i, code in enumerate(codes))
        words = [bits >> 32 * i & 0xFFFFFFFF for i in range(math.ceil(blocks * block_bits / 32))]
        rows.append([signed(word, 32) for word in words])
    parts = {"words": torch.tensor(rows, dtype=torch.int32), "exponent_bias": torch.tensor([bias], dtype=torch.int32)}
    found = EncodedTensor(parse_format(f"block-k{k}-c{c}-p{p}-q{q}-e{x}"), (out, width), parts).dequantize()
    assert torch.equal(found, torch.from_numpy(decode(rows, bias, k, c, p, q, x, (out, width))))
