"""Products on a CPU, both families, against the definition in float64."""

import ctypes
import mmap
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from seedlm.codes import on_cpu
from seedlm.codes.block import packing
from seedlm.codes.block.format import PRESETS
from seedlm.codes.registry import family_of, parse_format
from seedlm.codes.threads import Threads
from seedlm.inference import backend

pytest.importorskip("numba")

CPU = torch.device("cpu")
TRELLIS = [f"trellis-r{rate}-l16-t96-h128" for rate in range(1, 9)] + [f"trellis-r{rate}-l12-t64-h16" for rate in (1, 3, 6)]
BLOCK = [format.spec for format in PRESETS.values()] + [
    "block-k8-c5-p2-q3-e3",
    "block-k17-c8-p3-q4-e4",
    "block-k15-c7-p3-q4-e4",
]
SEVERAL = (TRELLIS[2], TRELLIS[3], TRELLIS[7], BLOCK[2], BLOCK[4])
LIMITS = {"trellis": 1e-4, "block": 1e-6}
MANY = {"trellis": 513, "block": 9}  # from so many on weights are formed, in float32
FEW_AND_MANY = (1, 3, 4, 6, 8, 9, 513)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def parts_of(format, shape, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def integers(low, high, *size):
        return torch.randint(low, high, size, generator=draw)

    kinds = format.parts(*shape)
    if format.family == "trellis":
        scales = torch.rand(shape[0], generator=draw).half()
        return {
            "words": integers(-(2**31), 2**31, *kinds["words"].shape).int(),
            "scales": scales,
            "scale": torch.tensor([0.01]),
        }
    blocks, half = format.blocks_per_row(shape[1]), 1 << format.exponent_bits - 1
    exponents = integers(-half, half, shape[0], blocks).to(torch.int8)
    low, high = format.coefficient_range
    coefficients = integers(low, high + 1, shape[0], blocks, format.num_coefficients).to(torch.int8)
    words = packing.pack(integers(1, 1 << format.seed_bits, shape[0], blocks).int(), exponents, coefficients, format)
    return {"words": words, "exponent_bias": torch.tensor([-4], dtype=torch.int32)}


class Weight:
    """A packed weight, its backend and what it stands for."""

    def __init__(self, spec, shape, name="numba"):
        self.format, self.shape = parse_format(spec), shape
        self.backend = backend.choose(name, CPU, self.format, shape)
        self.parts = parts_of(self.format, shape)
        self.prepared = self.backend.prepare(self.parts, self.format, shape)
        self.dense = family_of(self.format).dequantize(self.parts, self.format, shape).double()

    def multiply(self, x, bias=None, transformed=()):
        return self.backend.linear(x, self.prepared, self.format, self.shape, bias, transformed)

    def error(self, x, bias=None):
        """The largest relative error of a token's product."""
        found = self.multiply(x, bias).double()
        expected = x.double() @ self.dense.T + (0 if bias is None else bias.double())
        return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("spec", TRELLIS + BLOCK)
@pytest.mark.parametrize("shape", [(1, 1), (70, 13), (133, 389)], ids=str)
def test_products_are_those_of_the_definition(spec, shape):
    weight = Weight(spec, shape)
    torch.manual_seed(1)
    for tokens in FEW_AND_MANY if shape[0] == 70 and spec in SEVERAL else (1, MANY[weight.format.family]):
        x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
        assert weight.error(x) < LIMITS[weight.format.family]
        assert weight.error(x, bias) < LIMITS[weight.format.family]


@pytest.mark.parametrize("spec", [TRELLIS[2], TRELLIS[3], PRESETS["4"].spec, PRESETS["3"].spec])
def test_hard_inputs(spec):
    weight = Weight(spec, (65, 700))
    torch.manual_seed(2)
    x = torch.randn(8, 700)
    x[1, ::97] *= 100
    x[2] *= 1e4
    x[3] *= 1e-42 / 4
    x[4, 256:] = 0
    x[5] = torch.where(torch.arange(700) == 300, 3e4, 1e-20)
    x[6] *= 1e30
    x[7] = 1
    many = x[[0, 1, 2, 4, 5, 6, 7] * 2]  # torch's own product has no room below the smallest numbers
    for some in (*x.split(1), x, many):
        expected = some.double() @ weight.dense.T
        found = weight.multiply(some).double()
        tiny = 2.0**-149 * 4  # what a subnormal result is rounded to
        assert bool(((found - expected).norm(dim=-1) <= LIMITS[weight.format.family] * expected.norm(dim=-1) + 8 * tiny).all())
    assert not weight.multiply(torch.zeros(1, 700)).any()


@pytest.mark.parametrize("tokens", [8, 513])
def test_sums_are_not_infinite_before_a_weight_has_its_scale(tokens):
    weight = Weight(TRELLIS[3], (65, 700))
    assert weight.error(torch.randn(tokens, 700).clamp(-1, 1) * 1e36) < 1e-4


@pytest.mark.parametrize("spec", [TRELLIS[3], PRESETS["4"].spec])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_stays_so_in_its_token(spec, value):
    weight = Weight(spec, (40, 300))
    x = torch.randn(3, 300)
    x[1, 7] = value
    found = weight.multiply(x)
    assert found[::2].isfinite().all()
    assert not found[1].isfinite().any()


@pytest.mark.parametrize("spec", [TRELLIS[3], PRESETS["4"].spec, "block-k8-c5-p2-q3-e3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_layouts_and_shared_inputs(spec, dtype):
    weight = Weight(spec, (45, 70))
    for tokens in (2, 12, 60):
        x, bias = torch.randn(70, tokens).to(dtype).T, torch.randn(45).to(dtype)
        found = weight.multiply(x.unsqueeze(0), bias)
        assert found.dtype == dtype
        assert found.shape == (1, tokens, 45)
        assert found.is_contiguous()
        expected = x.double() @ weight.dense.T + bias.double()
        limit = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-4}[dtype]
        assert float((found[0].double() - expected).norm() / expected.norm()) < limit
        transformed = weight.backend.transform(x.unsqueeze(0), weight.format, 70)
        empty = weight.backend.empty_transform(x.unsqueeze(0), weight.format, 70)
        assert [(each.shape, each.dtype) for each in transformed] == [(each.shape, each.dtype) for each in empty]
        assert torch.equal(weight.multiply(x.unsqueeze(0), bias, transformed), found)
    assert weight.multiply(torch.empty(0, 70, dtype=dtype)).shape == (0, 45)


@pytest.mark.parametrize("spec", [TRELLIS[3], PRESETS["4"].spec])
@pytest.mark.parametrize("fast", [False, True])
def test_many_tokens_are_multiplied_in_float32_where_torch_is_slow_in_bfloat16(spec, fast, monkeypatch):
    monkeypatch.setattr(on_cpu, "has_bfloat16_products", lambda: fast)
    dtypes, linear = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (dtypes.add(args[0].dtype), linear(*args))[1])
    weight = Weight(spec, (300, 700))
    x, bias = torch.randn(600, 700).bfloat16(), torch.randn(300).bfloat16()
    found = weight.multiply(x, bias)
    assert found.dtype == torch.bfloat16
    assert dtypes == {torch.bfloat16 if fast else torch.float32}
    expected = x.double() @ weight.dense.T + bias.double()
    assert float((found.double() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("spec", [TRELLIS[3], BLOCK[2], "block-k8-c5-p2-q3-e3"])
def test_products_are_where_their_inputs_are(spec):
    """Wherever new tensors are made: memory elsewhere has no address that a kernel may write to."""
    weight = Weight(spec, (40, 300))
    for x in (torch.randn(1, 300), torch.randn(513, 300)):
        expected = weight.multiply(x)
        with torch.device("meta"):
            assert torch.equal(weight.multiply(x), expected)


@pytest.mark.parametrize("spec", [TRELLIS[2], PRESETS["3"].spec])
def test_any_number_of_threads_gives_the_same_bits(spec):
    weight, before = Weight(spec, (400, 600)), torch.get_num_threads()
    x, found = torch.randn(5, 600), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [weight.multiply(x) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_threads_that_multiply_at_once_get_their_own_products():
    from concurrent.futures import ThreadPoolExecutor

    weight = Weight(TRELLIS[3], (400, 600))
    inputs = [torch.randn(1, 600) for _ in range(40)]
    expected = [weight.multiply(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(weight.multiply, inputs), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 20, 513])
def test_several_weights_at_once_give_the_bits_of_one_after_another(tokens, dtype):
    weights = [Weight(TRELLIS[3], (out, 300)) for out in (400, 33, 130)]
    biases = [torch.randn(400).to(dtype), None, torch.randn(130).to(dtype)]
    x, before = torch.randn(1, 300, tokens).to(dtype).mT, torch.get_num_threads()
    prepared, shapes = [weight.prepared for weight in weights], tuple(weight.shape for weight in weights)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected = [weight.multiply(x, bias) for weight, bias in zip(weights, biases, strict=True)]
            for _ in range(5):
                found = weights[0].backend.linears(x, prepared, weights[0].format, shapes, biases)
                assert [(y.shape, y.dtype) for y in found] == [(y.shape, dtype) for y in expected]
                assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(before)


def test_int8_activations_are_asked_for():
    assert backend.choose("auto", CPU, parse_format("4"), (64, 256)).name == "numba"


@pytest.mark.parametrize("spec", TRELLIS)
def test_int8_activations_are_coarser(spec):
    if reason := backend.reason_no_backend("numba-int8", CPU, parse_format(spec), (64, 256)):
        pytest.skip(reason)
    for shape in ((70, 515), (256, 512)):
        weight = Weight(spec, shape, "numba-int8")
        x = torch.randn(9, shape[1])
        assert 1e-3 < weight.error(x) < 2e-2
        few = weight.multiply(x)
        for tokens in (1, 2, 3):  # sums are exact, so as many tokens as there may be give the same
            assert torch.equal(weight.multiply(x[:tokens]), few[:tokens])


def at_a_wall(words, end=True):
    """The same words at the end, or at the beginning, of what may be read (on Linux)."""
    if sys.platform != "linux":
        return words
    page = mmap.PAGESIZE
    size = -(-words.nbytes // page) * page
    pages = mmap.mmap(-1, size + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for wall in (first, first + page + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    start = page + (size - words.nbytes if end else 0)
    placed = torch.frombuffer(pages, dtype=torch.int32, offset=start, count=words.numel()).view_as(words)
    return placed.copy_(words)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for a page that may not be read")
@pytest.mark.parametrize("width", [131, 257])
@pytest.mark.parametrize(
    ("spec", "name"),
    [(spec, "numba") for spec in (*TRELLIS, *BLOCK[:7])] + [(spec, "numba-int8") for spec in TRELLIS],
)
def test_nothing_is_read_but_the_words(spec, name, width):
    if reason := backend.reason_no_backend(name, CPU, parse_format(spec), (64, width)):
        pytest.skip(reason)
    weight = Weight(spec, (64, width), name)
    inputs = [torch.randn(tokens, width) for tokens in ((1, 8, 513) if name == "numba" else (1, 8))]
    expected, words = [weight.multiply(x) for x in inputs], weight.prepared[0]
    for end in (True, False):
        weight.prepared[0] = at_a_wall(words, end)
        assert all(torch.equal(weight.multiply(x), y) for x, y in zip(inputs, expected, strict=True))


X86 = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16"
AVX2 = f"{X86},+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt"
PRODUCTS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_cpu_products import products
from seedlm.codes import processor
print(processor.byte_products())
torch.save(products(sys.argv[3:]), sys.argv[2])
"""


def products(specs):
    """Of a token with a weight of each format, at the end of what may be read."""
    x = torch.randn(1, 257, generator=torch.Generator().manual_seed(0))
    weights = [Weight(spec, (133, 257)) for spec in specs]
    for weight in weights:
        weight.prepared[0] = at_a_wall(weight.prepared[0])
    return [weight.multiply(x) for weight in weights]


def products_there(file, specs, **environment):
    """The way that bytes are multiplied in, and products, in a process of its own."""
    command = [sys.executable, "-c", PRODUCTS, os.path.dirname(__file__), str(file), *specs]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), torch.load(file)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="features of x86-64")
@pytest.mark.parametrize(("way", "features"), [("pairs", AVX2), ("plain", "+sse,+sse2")])
def test_other_processors_give_the_same_bits(tmp_path, way, features):
    """The trellis code's sums are integers. The block code's are floats, fused or not."""
    specs = [TRELLIS[2], TRELLIS[3], PRESETS["4"].spec]
    here = products(specs)
    found, there = products_there(tmp_path / "products.pt", specs, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=features)
    assert found == way
    assert torch.equal(there[0], here[0])
    assert torch.equal(there[1], here[1])
    assert float((there[2] - here[2]).norm() / here[2].norm()) < 1e-6


def test_what_numba_does_not_compile_for_is_not_emitted(monkeypatch):
    """LLVM ends the process over an instruction that it was told not to use."""
    from numba.core import config

    from seedlm.codes import compiled

    monkeypatch.setattr(config, "CPU_FEATURES", None)
    monkeypatch.setattr(config, "ENABLE_AVX", 0)
    assert b"+avx" not in compiled.feature_list()


def test_without_a_folder_to_keep_it_in_code_is_compiled_anew(monkeypatch):
    """Numba raises where it is asked to keep a function and may not write, as in many a container."""
    from numba.core import caching

    from seedlm.codes import compiled

    assert compiled.KEPT
    monkeypatch.setattr(caching.FunctionCache._impl_class, "_locator_classes", [])
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert not compiled.can_be_kept()


def test_where_numba_must_not_compile_another_backend_is_chosen(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not backend.choose("auto", CPU, parse_format("4"), (64, 256)).name.startswith("numba")


@pytest.fixture
def job():
    """A kernel's address and a job of eight pieces, each of which adds 1 to one number."""
    from numba import carray, cfunc, types

    from seedlm.codes.vectors import as_pointer, job_address, take

    @cfunc(types.void(types.CPointer(types.int64)))
    def count(numbers):
        while True:
            piece = take(job_address(numbers))
            if piece >= 8:
                break
            done = carray(as_pointer(numbers[1]), (8,), np.int64)
            done[piece] += 1

    done = np.zeros(8, np.int64)

    def made():
        done[:] = 0
        return count.address, struct.pack("2q", 0, done.ctypes.data)

    made.done, made.kept = done, count
    return made


def test_our_own_helpers_are_as_many_as_were_ever_asked_for_and_no_more(job):
    from seedlm.codes.team import Team

    team, before = Team(), threading.active_count()
    for helpers in (7, 1, 4, 2, 7, 3, 7):
        for _ in range(20):
            team.run(*job(), helpers)
            assert job.done.tolist() == [1] * 8
        assert threading.active_count() == before + 7


@pytest.mark.skipif(sys.platform != "linux", reason="torch has other threads there")
def test_torchs_threads_do_every_piece_once(job):
    from seedlm.codes.openmp import Region

    region = Region.find()
    assert region is not None
    for threads in (1, 2, 2, 3):
        late = region.run(*job(), threads)
        assert job.done.tolist() == [1] * 8
        assert 0 <= late < 60e9


def test_late_threads_are_left_alone_for_longer_and_longer(monkeypatch):
    asked, late, now = [], [], [5 * 10**9]

    class Way:
        def __init__(self, name):
            self.name = name

        def run(self, kernel, job, count):
            asked.append(self.name)
            now[0] += 10**6
            return late.pop(0) if self.name == "torch" else None

    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    threads = Threads(Way("torch"), Way("own"))
    late += [0, 10**7, 10**7, 10**7, 0, 10**7, 10**7]
    pauses = [0, 2, 4, 8, 0, 2, 4]
    for _ in range(len(pauses) + sum(pauses)):
        threads.run(0, b"", 1)
    assert asked == [name for pause in pauses for name in ["torch"] + ["own"] * pause]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_multiplies_with_threads_of_its_own():
    """Torch's threads do not survive a fork, and whoever asks for them waits for ever."""
    weight, x, before = Weight(TRELLIS[3], (400, 600)), torch.randn(1, 600), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = weight.multiply(x).numpy()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if (weight.multiply(x).numpy() == expected).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spec", ["4-fast", "block-k16-c8-p3-q4-e4"])
def test_no_tokens_in_another_dtype_than_the_bias(spec):
    weight = Weight(spec, (64, 64))
    empty = weight.multiply(torch.empty(0, 64, dtype=torch.bfloat16), torch.zeros(64))
    assert (empty.shape, empty.dtype) == ((0, 64), torch.bfloat16)
