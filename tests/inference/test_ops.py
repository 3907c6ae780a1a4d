"""The operators, and the numba kernel against the reference."""

import os
import signal

import pytest
import torch

from random_codes import random_words
from seedlm.codes.block import encode as search
from seedlm.codes.registry import parse_format
from seedlm.errors import BackendError, TensorError
from seedlm.inference import ops

SMALL = parse_format("block-k8-c8-p3-q4-e4")
FORMATS = [
    "4",
    "3",
    "block-k8-c8-p3-q4-e4",
    "block-k2-c1-p1-q2-e1",
    "block-k16-c10-p3-q4-e4",  # 32 bits, two lanes
    "block-k5-c7-p2-q3-e3",  # 14 bits, one lane
    "block-k16-c16-p8-q4-e4",  # 52 bits: fields over two and three words
    "block-k15-c9-p5-q8-e8",  # 63 bits, the widest
    "block-k17-c8-p2-q8-e4",  # int32 table
]


def random_parts(format, out, in_features, bias=-3):
    """What is stored of a weight, with every field uniform over its range."""
    return [random_words(format, out, in_features, seed=out * in_features), torch.tensor([bias], dtype=torch.int32)]


def reference(codes, in_features, format):
    return search.decode(codes[0], int(codes[1]), in_features, format)


@pytest.mark.parametrize("in_features", [1, 7, 24, 85, 192])
@pytest.mark.parametrize("spec", FORMATS)
def test_numba_decodes_to_the_bits_of_the_reference(spec, in_features):
    pytest.importorskip("numba")
    format = parse_format(spec)
    codes = random_parts(format, 5, in_features)
    found = torch.ops.seedlm.decode(codes, in_features, format.spec, torch.float32, "numba")
    assert torch.equal(found, reference(codes, in_features, format))


@pytest.mark.parametrize("bias", [-192, -140, 0, 100, 192])
def test_numba_follows_the_reference_into_denormals_and_infinity(bias):
    pytest.importorskip("numba")
    codes = random_parts(SMALL, 4, 64, bias)
    found = torch.ops.seedlm.decode(codes, 64, SMALL.spec, torch.float32, "numba")
    assert torch.equal(found.view(torch.int32), reference(codes, 64, SMALL).view(torch.int32))


def test_numba_gives_the_same_bits_for_any_number_of_threads():
    ops_numba = pytest.importorskip("seedlm.codes.block.kernels.numba_decode")
    format = parse_format("4")
    codes = random_parts(format, 257, 2048)  # 4 tasks of at least 2^17 weights
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops_numba.decode(codes[0], -3, 2048, format))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], reference(codes, 2048, format))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_numba_survives_a_fork():
    ops_numba = pytest.importorskip("seedlm.codes.block.kernels.numba_decode")
    format = parse_format("4")
    codes = random_parts(format, 257, 2048)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = ops_numba.decode(codes[0], -3, 2048, format).numpy()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            after = ops_numba.decode(codes[0], -3, 2048, format).numpy()
            os._exit(0 if (before == after).all() else 1)  # not torch.equal: torch's own OpenMP threads hang after a fork
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


def test_a_zero_seed_reads_inside_the_tables():
    """Codes are checked when they are loaded; the kernel must be safe where they are not."""
    ops_numba = pytest.importorskip("seedlm.codes.block.kernels.numba_decode")
    words = torch.zeros(3, 4, dtype=torch.int32) | 1 << 20
    assert torch.equal(ops_numba.decode(words, 0, 32, parse_format("4")), search.decode(words, 0, 32, parse_format("4")))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode_rounds_once_to_the_dtype_asked_for(dtype):
    codes = random_parts(SMALL, 6, 20)
    found = torch.ops.seedlm.decode(codes, 20, SMALL.spec, dtype, "auto")
    assert found.dtype == dtype
    assert torch.equal(found, reference(codes, 20, SMALL).to(dtype))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (0, 20)], ids=str)
def test_linear_is_a_product_with_the_regrown_weight(shape, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    codes, x, bias = random_parts(SMALL, 6, 20), torch.randn(shape), torch.randn(6)
    weight = reference(codes, 20, SMALL)
    for b in (None, bias):
        found = torch.ops.seedlm.linear(x, codes, 20, SMALL.spec, b, backend)
        assert torch.equal(found, torch.nn.functional.linear(x, weight, b))


def test_gradients_reach_the_input_and_the_bias():
    codes, weight = random_parts(SMALL, 6, 20, bias=-8), None
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    weight = reference(codes, 20, SMALL).double()
    upstream = torch.randn(2, 3, 6, dtype=torch.float64)
    found = torch.autograd.grad(torch.ops.seedlm.linear(x, codes, 20, SMALL.spec, bias, "auto"), (x, bias), upstream)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, bias), upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_pass_torchs_own_checks(with_bias):
    codes = random_parts(SMALL, 6, 20, bias=-8)
    x = torch.randn(3, 20, requires_grad=True)
    bias = torch.randn(6, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.seedlm.linear.default, (x, codes, 20, SMALL.spec, bias, "auto"))
    torch.library.opcheck(torch.ops.seedlm.decode.default, (codes, 20, SMALL.spec, torch.bfloat16, "auto"))


def test_fakes_give_shape_and_dtype_without_decoding():
    codes = [code.to("meta") for code in random_parts(SMALL, 6, 20)]
    x = torch.empty(2, 5, 20, dtype=torch.bfloat16, device="meta")
    assert torch.ops.seedlm.decode(codes, 20, SMALL.spec, torch.float16, "auto").shape == (6, 20)
    y = torch.ops.seedlm.linear(x, codes, 20, SMALL.spec, None, "auto")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 6), torch.bfloat16, "meta")


def bad_codes(change):
    codes = random_parts(SMALL, 6, 20)
    return change(codes)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (lambda c: [c[0].long(), c[1]], "int64"),
        (lambda c: [c[0][:, :-1], c[1]], r"\(6, 2\)"),
        (lambda c: [c[0].flatten(), c[1]], r"\(18,\)"),
        (lambda c: [c[0], c[1][0]], r"\('int32', \(\)\)"),
        (lambda c: c[:1], "stored as"),
        (lambda c: [], "stored as"),
        (lambda c: [c[0], c[1].to("meta")], "one device"),
    ],
    ids=["dtype", "words", "flat", "scalar bias", "no bias", "nothing", "devices"],
)
def test_codes_that_do_not_fit_are_refused(codes, message):
    with pytest.raises(TensorError, match=message):
        torch.ops.seedlm.decode(bad_codes(codes), 20, SMALL.spec, torch.float32, "auto")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 19), r"x must be \[..., 20\], got \[2, 19\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.zeros(2, 20, dtype=torch.int32), "floating point, got int32"),
    ],
    ids=["width", "scalar", "dtype"],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    with pytest.raises(TensorError, match=message):
        torch.ops.seedlm.linear(x, random_parts(SMALL, 6, 20), 20, SMALL.spec, None, "auto")


def test_a_backend_asked_for_by_name_gives_its_reason(monkeypatch):
    codes = random_parts(SMALL, 2, 8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ops._load.cache_clear()
    with pytest.raises(BackendError, match=r"pip install 'seedlm\[fast\]'"):
        torch.ops.seedlm.decode(codes, 8, SMALL.spec, torch.float32, "numba")
    found = torch.ops.seedlm.decode(codes, 8, SMALL.spec, torch.float32, "auto")
    ops._load.cache_clear()
    assert torch.equal(found, reference(codes, 8, SMALL))
    assert "decodes on the CPU" in ops.reason_unavailable("numba", torch.device("cuda"))
    with pytest.raises(BackendError, match="unknown backend 'fpga', known: auto, numba, torch"):
        torch.ops.seedlm.decode(codes, 8, SMALL.spec, torch.float32, "fpga")


def test_the_reference_backend_decodes_large_weights_in_pieces(monkeypatch):
    monkeypatch.setattr(ops, "_REFERENCE_WEIGHTS", 50)
    codes = random_parts(SMALL, 7, 20)
    found = torch.ops.seedlm.decode(codes, 20, SMALL.spec, torch.float32, "torch")
    assert torch.equal(found, reference(codes, 20, SMALL))
