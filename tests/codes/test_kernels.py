"""The block code's backends against the definition, bit for bit."""

import os
import signal

import pytest
import torch

from random_codes import random_words
from seedlm.codes import on_cpu
from seedlm.codes.block.family import FAMILY
from seedlm.codes.block.format import PRESETS, parse_spec
from seedlm.codes.block.kernels import BACKENDS, torch_dequantize

SMALL = parse_spec("block-k8-c8-p3-q4-e4")
FORMATS = [
    PRESETS["4"],
    PRESETS["3"],
    SMALL,
    parse_spec("block-k2-c1-p1-q2-e1"),
    parse_spec("block-k16-c10-p3-q4-e4"),  # 32 bits, two lanes
    parse_spec("block-k5-c7-p2-q3-e3"),  # 14 bits, one lane
    parse_spec("block-k16-c16-p8-q4-e4"),  # 52 bits: fields over two and three words
    parse_spec("block-k15-c9-p5-q8-e8"),  # 63 bits, the widest
    parse_spec("block-k17-c8-p2-q8-e4"),  # int32 table
]
_, NUMBA, TORCH = BACKENDS


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    if reason := request.param.reason_unavailable(torch.device("cpu"), SMALL, (1, 8)):
        pytest.skip(reason)
    return request.param


def random_parts(format, out, in_features, bias=-3):
    """What is stored of a weight, with every field uniform over its range."""
    words = random_words(format, out, in_features, seed=out * in_features)
    return {"words": words, "exponent_bias": torch.tensor([bias], dtype=torch.int32)}


def dequantize(backend, parts, format, shape, dtype=torch.float32):
    return backend.dequantize(backend.prepare(parts, format, shape), format, shape, dtype)


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("in_features", [1, 7, 24, 85, 192])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_backend_dequantizes_to_the_bits_of_the_definition(backend, format, in_features):
    parts, shape = random_parts(format, 5, in_features), (5, in_features)
    assert same_bits(dequantize(backend, parts, format, shape), FAMILY.dequantize(parts, format, shape))


@pytest.mark.parametrize("bias", [-192, -140, 0, 100, 192])
def test_a_backend_follows_the_definition_into_denormals_and_infinity(backend, bias):
    parts = random_parts(SMALL, 4, 64, bias)
    assert same_bits(dequantize(backend, parts, SMALL, (4, 64)), FAMILY.dequantize(parts, SMALL, (4, 64)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_rounded_once_to_the_dtype_asked_for(backend, dtype):
    parts = random_parts(SMALL, 6, 20)
    found = dequantize(backend, parts, SMALL, (6, 20), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, FAMILY.dequantize(parts, SMALL, (6, 20)).to(dtype))


def test_a_zero_seed_reads_inside_the_tables(backend):
    """Codes are checked when they are loaded; a backend must be safe where they are not."""
    format = PRESETS["4"]
    parts = {"words": torch.zeros(3, 4, dtype=torch.int32) | 1 << 20, "exponent_bias": torch.zeros(1, dtype=torch.int32)}
    assert torch.equal(dequantize(backend, parts, format, (3, 32)), FAMILY.dequantize(parts, format, (3, 32)))


def test_words_are_read_as_they_are_stored(backend):
    parts = random_parts(SMALL, 4, 64)
    assert backend.prepare(parts, SMALL, (4, 64))[0] is parts["words"]


def test_the_registers_tables_are_shared_by_all_weights():
    first, second = (TORCH.prepare(random_parts(SMALL, rows, 64), SMALL, (rows, 64)) for rows in (2, 3))
    assert all(a is b for a, b in zip(first[2:], second[2:], strict=True))


def test_large_weights_are_formed_some_rows_at_a_time(monkeypatch):
    monkeypatch.setitem(torch_dequantize.PIECE, "cpu", 50)
    parts = random_parts(SMALL, 7, 20)
    assert torch.equal(dequantize(TORCH, parts, SMALL, (7, 20)), FAMILY.dequantize(parts, SMALL, (7, 20)))


def test_each_backend_says_where_it_cannot_run(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "works on the CPU, the codes are on cuda" in NUMBA.reason_unavailable(cuda, SMALL, (4, 64))
    assert TORCH.reason_unavailable(cuda, SMALL, (4, 64)) is None
    monkeypatch.setattr(on_cpu, "_has_numba", lambda: False)
    assert "pip install numba" in NUMBA.reason_unavailable(cpu, SMALL, (4, 64))


def test_numba_gives_the_same_bits_for_any_number_of_threads():
    pytest.importorskip("numba")
    format, shape = PRESETS["4"], (257, 2048)  # 4 tasks of at least 2^17 weights
    parts = random_parts(format, *shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(dequantize(NUMBA, parts, format, shape))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], FAMILY.dequantize(parts, format, shape))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_numba_survives_a_fork():
    pytest.importorskip("numba")
    format, shape = PRESETS["4"], (257, 2048)
    prepared = NUMBA.prepare(random_parts(format, *shape), format, shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = NUMBA.dequantize(prepared, format, shape, torch.float32).numpy()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            after = NUMBA.dequantize(prepared, format, shape, torch.float32).numpy()
            os._exit(0 if (before == after).all() else 1)  # not torch.equal: torch's own OpenMP threads hang after a fork
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_plain_torch_gives_the_definitions_bits_on_a_gpu_inside_a_graph(format):
    shape = (5, 85)
    parts = random_parts(format, *shape)
    prepared = TORCH.prepare({name: part.cuda() for name, part in parts.items()}, format, shape)
    found = torch.full(shape, torch.nan, device="cuda")
    TORCH.dequantize(prepared, format, shape, torch.float32)  # the allocator's and the kernels' first time
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.copy_(TORCH.dequantize(prepared, format, shape, torch.float32))
    graph.replay()
    assert same_bits(found.cpu(), FAMILY.dequantize(parts, format, shape))
    other = random_parts(format, *shape, bias=5)
    prepared[1].copy_(other["exponent_bias"])  # a graph reads the bias when it runs
    graph.replay()
    assert same_bits(found.cpu(), FAMILY.dequantize(other, format, shape))
