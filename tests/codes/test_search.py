"""Every search returns Algorithm 3's argmin: the same codes and scores as scoring all seeds, on easy and hard blocks."""

from functools import cache

import pytest
import torch
from torch.overrides import TorchFunctionMode

from seedlm.codes.base import totals
from seedlm.codes.block.basis import basis
from seedlm.codes.block.codec import BlockCodes, dequantize, dequantize_rows
from seedlm.codes.block.encode import SEARCHES, encode_rows, reason_no_search
from seedlm.codes.block.format import PRESETS
from seedlm.codes.block.search import torch_search
from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format
from seedlm.errors import BackendError, TensorError

SMALL = [
    "block-k3-c8-p3-q4-e4",  # seven seeds, which is less than a tile, and blocks longer than the cycle
    "block-k5-c3-p3-q4-e4",  # as many columns as rows
    "block-k8-c1-p1-q8-e4",
    "block-k10-c5-p2-q3-e3",
    "block-k9-c17-p4-q5-e4",  # sign tables of three pieces, not all of one length
    "block-k9-c12-p4-q2-e5",
    "block-k13-c6-p1-q8-e4",
]
"""Every kind of shape, few shapes: numba compiles each pair of c and p for some seconds. Half of these are presets' pairs."""


def _backend_params():
    for name in SEARCHES:
        reason = reason_no_search(name, torch.device("cpu"))
        yield pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))


BACKEND_PARAMS = list(_backend_params())


def search_with(backend, *args):
    if backend == "numba":
        from seedlm.codes.block.search import numba_search as module
    else:
        module = torch_search
    pieces = list(module.search(*args))
    codes = BlockCodes(*(torch.cat(field) for field in zip(*(codes for codes, _ in pieces), strict=True)))
    return codes, torch.cat([scores for _, scores in pieces])


def hard_blocks(size, exponent_bias=-7):
    """Blocks of every kind that broke a search once, float32 [N, size]; the smallest exponent reaches 2^(bias - 8)."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(6, size, generator=generator)
    heavy = torch.randn(4, size, generator=generator) / torch.rand(4, size, generator=generator)
    one_hot = torch.zeros(3, size)
    one_hot[0, 0] = one_hot[1, -1] = 1.0
    one_hot[2, size // 2] = -1e-3
    limits = [torch.full((1, size), value) for value in (0.0, 1.0, -1.0, 1e-45, 1e30, -3e38, 2.0**-15, 2.0**-16)]
    scales = 2.0 ** torch.tensor([-2.0, -9.0, -14.0, -15.0, -16.0, -18.0, -22.0, -30.0, -40.0, -126.0])
    scaled = torch.randn(len(scales), size, generator=generator) * scales.unsqueeze(1)
    alternating = torch.ones(1, size)
    alternating[0, ::2] = -1.0
    return torch.cat([normal, heavy, one_hot, *limits, scaled, alternating, normal.bfloat16().float()])


def assert_same(found, expected):
    """Codes and scores, to the bit."""
    assert torch.equal(found[1], expected[1])
    for name, a, b in zip(BlockCodes._fields, found[0], expected[0], strict=True):
        assert torch.equal(a, b), f"{name} of blocks {(a != b).view(len(a), -1).any(1).nonzero()[:8, 0].tolist()}"


@cache
def small_answers(spec, rounding):
    """Blocks, and for every exponent bias the brute force's answer."""
    format = parse_format(spec)
    blocks = hard_blocks(format.block_size)
    return blocks, {bias: torch_search.brute_force(blocks, bias, format, rounding) for bias in (-7, 0, -30)}


@pytest.mark.parametrize("backend", BACKEND_PARAMS)
@pytest.mark.parametrize("rounding", ["best", "nearest"])
@pytest.mark.parametrize("spec", SMALL)
def test_equals_brute_force_for_small_formats(spec, rounding, backend):
    blocks, answers = small_answers(spec, rounding)
    for bias, expected in answers.items():
        assert_same(search_with(backend, blocks, bias, parse_format(spec), rounding), expected)


@cache
def preset_answer(name, rounding):
    """Blocks for a preset, and the brute force's answer, which takes a second a block: the paper's presets get the most."""
    blocks = hard_blocks(PRESETS[name].block_size)[:: 3 if name in ("4", "3") else 13]
    blocks = blocks[:: 4 if name in ("4", "3") else 3] if rounding == "best" else blocks
    return blocks, torch_search.brute_force(blocks, -7, PRESETS[name], rounding)


@pytest.mark.parametrize("backend", BACKEND_PARAMS)
@pytest.mark.parametrize("name", PRESETS)
def test_equals_brute_force_for_presets(name, backend):
    for rounding in ("nearest", "best")[: 1 if backend == "torch" else 2]:
        blocks, expected = preset_answer(name, rounding)
        assert_same(search_with(backend, blocks, -7, PRESETS[name], rounding), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_does_not_change_a_bit(threads):
    pytest.importorskip("numba")
    weight = torch.randn(37, 333, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        encoded, error = encode(weight, parse_format("block-k10-c8-p3-q4-e4"), backend="numba")
    finally:
        torch.set_num_threads(before)
    expected, expected_error = encode(weight, encoded.format, backend="torch")
    assert torch.equal(encoded.parts["words"], expected.parts["words"])
    assert error == pytest.approx(expected_error, rel=1e-12)


@pytest.mark.parametrize("backend", BACKEND_PARAMS)
def test_scores_are_the_error_less_the_energy(backend):
    format = parse_format("block-k9-c5-p2-q4-e4")
    blocks = torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
    codes, scores = search_with(backend, blocks, -4, format, "best")
    error = (blocks.double() - dequantize(codes, -4, format).double()).square().sum(1)
    torch.testing.assert_close(scores / format.divisor**2 + blocks.double().square().sum(1), error, rtol=1e-5, atol=1e-6)


def test_a_valid_code_encodes_to_an_exact_reconstruction():
    format = parse_format("block-k10-c8-p3-q4-e4")
    codes = BlockCodes(
        torch.arange(1, 1001, dtype=torch.int32),
        torch.randint(-4, 4, (1000,), generator=torch.Generator().manual_seed(3), dtype=torch.int8),
        torch.randint(-8, 8, (1000, 3), generator=torch.Generator().manual_seed(4), dtype=torch.int8),
    )
    weight = dequantize(codes, -3, format)
    words, errors = encode_rows(weight, -3, format)
    error, found = totals([errors])[0], dequantize_rows(words, -3, 8, format)
    assert error <= 1e-7 * float(weight.double().square().sum())  # not 0: the weights were rounded to float32
    assert float((found - weight).square().sum()) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("sigma", [1e-8, 1e-4, 1e-3, 0.02, 1.0, 1e4])
@pytest.mark.parametrize(("name", "expected"), [("4", 0.1205), ("3", 0.2195)])
def test_relative_error_at_any_scale(name, expected, sigma):
    pytest.importorskip("numba")
    weight = torch.randn(32, 480, generator=torch.Generator().manual_seed(5)) * sigma
    encoded, error = encode(weight, PRESETS[name])
    relative = error**0.5 / float(weight.double().norm())
    assert relative == pytest.approx(expected, rel=0.02)
    assert relative == pytest.approx(float((encoded.dequantize().double() - weight).norm() / weight.double().norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "draw", "expected"),
    [("4", "normal", 0.123), ("3", "normal", 0.226), ("4", "student", 0.126), ("3", "student", 0.234)],
)
def test_relative_error_of_the_papers_rounding(name, draw, expected):
    """All seeds, nearest rounding, which is the published method; the numbers come from an independent implementation."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(64, 960, generator=generator)
    if draw == "student":
        weight = weight / (torch.randn(4, 64, 960, generator=generator).square().mean(0)).sqrt()
    _, error = encode(weight, PRESETS[name], rounding="nearest")
    assert error**0.5 / float(weight.norm()) == pytest.approx(expected, rel=0.02)


def test_absolute_exponents_collapse_small_tensors():
    """What the exponent bias is for: the paper's range alone loses tensors of sigma 1e-3 and below."""
    pytest.importorskip("numba")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(8)) * 1e-4
    error, _ = totals([encode_rows(weight, 0, PRESETS["4"], "nearest")[1]])
    assert error**0.5 / float(weight.norm()) == pytest.approx(0.59, abs=0.05)


def test_ties_go_to_the_smallest_seed():
    """Column p of a seed is column p - 1 of the next one, so single-column reconstructions tie at P consecutive seeds."""
    format = parse_format("block-k8-c4-p3-q4-e4")
    tables = basis(format)
    states = tables.cycle[40 : 40 + 12].view(4, 3) - format.center
    block = states[:, 1].double().mul(4 / format.divisor).float().unsqueeze(0)
    codes, _ = torch_search.brute_force(block, 0, format)
    neighbours = tables.cycle[[38, 39, 40]]
    assert int(codes.seeds) == int(neighbours.min())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"matrix .* got shape \[3\]"),
        (torch.zeros(0, 4), r"non-empty .* got shape \[0, 4\]"),
        (torch.zeros(2, 2, dtype=torch.float64), "got float64"),
        (torch.tensor([[float("nan"), float("inf"), 1.0]]), "got 1 NaN and 1 Inf values"),
    ],
)
def test_refuses_weights_it_cannot_encode(weight, message):
    with pytest.raises(TensorError, match=message):
        encode(weight, PRESETS["4"])


def test_more_seed_bits_are_exact_or_refused():
    format = parse_format("block-k17-c2-p1-q2-e2")
    blocks = torch.randn(3, 2, generator=torch.Generator().manual_seed(9))
    expected, _ = torch_search.brute_force(blocks, -1, format)
    words, _ = encode_rows(blocks, -1, format)
    assert torch.equal(words[:, 0] & 0x1FFFF, expected.seeds)
    with pytest.raises(BackendError, match="'torch' takes at most 20 seed bits, not 24"):
        encode(blocks, parse_format("block-k24-c8-p3-q4-e4"))


def test_an_explicit_backend_that_cannot_run_says_why():
    with pytest.raises(BackendError, match="unknown backend 'abacus', known: auto"):
        encode(torch.ones(1, 8), PRESETS["4"], backend="abacus")


class Products(TorchFunctionMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_bound_is_as_exact_as_its_proof_wherever_torch_may_be_less(precision):
    """TF32 and bfloat16, which other precisions allow on some devices, lose more than the margin."""
    blocks, products = torch.randn(9, 8), Products()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with products:
            found = [scores for _, scores in torch_search.search(blocks, 0, parse_format("block-k8-c8-p3-q4-e4"))]
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(found) == 1
    assert products.dtypes
    assert (torch.float32 in products.dtypes) == (precision == "highest")
