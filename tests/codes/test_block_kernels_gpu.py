"""The block code's CUDA kernels: weights bit for bit, products against float64, odd shapes, hard inputs, poisoned outputs."""

import itertools
import threading

import pytest
import torch

from random_codes import random_words
from seedlm import nvrtc
from seedlm.codes.block import lfsr, packing
from seedlm.codes.block.family import FAMILY
from seedlm.codes.block.format import PRESETS, parse_spec
from seedlm.codes.block.kernels import launch, sources, tables
from seedlm.codes.block.kernels.cuda import CudaBackend

COMPILER = pytest.mark.skipif(nvrtc.reason_unavailable() is not None, reason=str(nvrtc.reason_unavailable()))
GPU = [COMPILER, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BACKEND = CudaBackend()
TOLERANCES = [(torch.float16, 2e-3), (torch.bfloat16, 5e-3), (torch.float32, 2e-3)]
OTHER_FORMATS = [
    "block-k2-c1-p1-q2-e1",
    "block-k5-c7-p2-q3-e3",
    "block-k9-c16-p4-q8-e2",
    "block-k12-c8-p1-q2-e4",
    "block-k14-c12-p2-q4-e4",
    "block-k15-c9-p5-q8-e8",
    "block-k16-c4-p4-q4-e4",
    "block-k16-c16-p8-q4-e4",
    "block-k24-c64-p3-q8-e8",
]
FORMATS = [*PRESETS.values(), *map(parse_spec, OTHER_FORMATS)]
SHAPES = [(1, 1), (16, 40), (33, 48), (83, 1013), (130, 100), (1000, 576), (8, 4112)]


def uniform_parts(format, out, width, bias=-3):
    """Every field uniform over its range."""
    return {
        "words": random_words(format, out, width, seed=out * width).cuda(),
        "exponent_bias": torch.tensor([bias], dtype=torch.int32, device="cuda"),
    }


def even_parts(format, out, width, bias=-7):
    """Exponents as close together as a layer's are: then an error counts for what it is."""
    generator = torch.Generator().manual_seed(out + width)
    blocks = format.blocks_per_row(width)

    def field(low, high, *more):
        return torch.randint(low, high + 1, (out, blocks, *more), generator=generator)

    low, high = format.exponent_range
    exponents = field(max(low, -2), min(high, 1))
    coefficients = field(*format.coefficient_range, format.num_coefficients)
    words = packing.pack(field(1, format.num_seeds), exponents, coefficients, format)
    return {"words": words.cuda(), "exponent_bias": torch.tensor([bias], dtype=torch.int32, device="cuda")}


def poisoned(monkeypatch):
    """torch.empty gives NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def product(parts, format, shape, x, bias=None):
    return BACKEND.linear(x, BACKEND.prepare(parts, format, shape), format, shape, bias)


def reference(parts, format, shape, x, bias=None):
    weight = FAMILY.dequantize(parts, format, shape).to(x.device, torch.float64)
    return x.double() @ weight.T + (0 if bias is None else bias.double())


def relative_error(y, expected):
    """Of the worst token, relative to no less than the smallest normal number of y's dtype: below it, digits are lost."""
    error = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(y.dtype).smallest_normal)
    return torch.nan_to_num(error, nan=torch.inf).max().item()


@pytest.mark.parametrize("format", FORMATS[:7], ids=str)
def test_byte_entries_hold_the_bits_that_the_register_adds(format):
    k, p = format.seed_bits, format.num_coefficients
    entries = tables.byte_entries(format)
    for seed in (1, 2, 0b1011, (1 << k) - 1, 1 << (k - 1)):
        words = [0] * len(entries[0])
        for bit in range(k):
            if seed >> bit & 1:
                words = [a ^ b for a, b in zip(words, entries[bit], strict=True)]
        states = lfsr.states(seed, format.block_size * p, k)
        for c in range(format.block_size):
            top = [state >> (k - 1) for state in states[p * c : p * (c + 1)]]
            assert words[c // 4] >> 8 * (c % 4) & 255 == sum(bit << (8 - p + j) for j, bit in enumerate(top))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_division_fits_shared_memory_and_covers_the_matrix(format, arch):
    for shape, tokens in itertools.product([(1, 1), (4096, 4096), (57344, 8192), (8192, 28672)], [1, 8, 16]):
        for division in (
            sources.divide_vector(format, shape, arch, 132),
            sources.divide_batch(format, shape, tokens, arch, 132),
        ):
            if division is not None:
                assert division.shared <= sources.most_shared(arch)
                assert division.splits * division.warps >= sources.chunks(format, shape[1])
                assert 1 <= division.row_splits <= -(-shape[0] // sources.TILE_ROWS)
        assert sources.divide_vector(format, shape, arch, 132) is not None


def test_all_presets_have_fused_products():
    for format in PRESETS.values():
        assert sources.reason_no_vector(format) is None
        assert sources.reason_no_halves(format) is None


def test_wide_products_are_chosen_where_they_were_measured_to_be_faster():
    assert sources.wide_pays((57344, 8192), 64, 132)
    assert sources.wide_pays((57344, 8192), 256, 132)
    assert not sources.wide_pays((57344, 8192), 2048, 132)
    assert not sources.wide_pays((4096, 14336), 64, 132)
    assert not sources.wide_pays((4096, 14336), 2048, 132)


def test_formats_without_a_fast_path_say_what_they_lack():
    assert sources.reason_no_vector(parse_spec("block-k16-c16-p8-q4-e4")) == "at most 4 coefficients and 4 exponent bits"
    assert sources.reason_no_vector(parse_spec("block-k8-c8-p3-q4-e4")) == "registers of 13 to 16 bits"
    assert sources.reason_no_vector(parse_spec("block-k16-c16-p4-q8-e4")) == "sums of a block within 32 bits"
    assert (
        sources.reason_no_halves(parse_spec("block-k12-c8-p1-q4-e4"))
        == "registers of 12 to 16 bits and at least 2 coefficients"
    )


def test_other_devices_are_refused_with_a_reason():
    assert "CUDA device" in BACKEND.reason_unavailable(torch.device("cpu"), FORMATS[0], (8, 8))


@COMPILER
@pytest.mark.parametrize("arch", [80, 89, 90, 120])
def test_kernels_compile_for_every_architecture_without_a_gpu(arch):
    format = PRESETS["4"]
    texts = [
        sources.dequantize_source(format, 0),
        sources.vector_source(format, 8, True),
        sources.batch_source(format, 8, True, 8),
    ]
    for text in texts:
        assert nvrtc.compile_only(text, arch).startswith(b"\x7fELF")
    if arch == sources.WIDE_ARCHITECTURE:
        assert nvrtc.compile_only(sources.wide_source(format, True, 64), arch, specific=True).startswith(b"\x7fELF")


class TestOnADevice:
    pytestmark = GPU

    @pytest.mark.parametrize("format", FORMATS, ids=str)
    def test_weights_are_the_definitions_bits(self, format, monkeypatch):
        for shape, bias in itertools.product(SHAPES, (-192, -130, 0, 100)):
            parts = uniform_parts(format, *shape, bias)
            prepared = BACKEND.prepare(parts, format, shape)
            expected = FAMILY.dequantize(parts, format, shape)
            with monkeypatch.context() as patch:
                poisoned(patch)
                for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                    found = BACKEND.dequantize(prepared, format, shape, dtype)
                    assert found.dtype == dtype
                    assert torch.equal(found, expected.to(dtype))

    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 16, 17, 64, 100, 300])
    @pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_products_of_every_number_of_tokens(self, preset, dtype, tolerance, tokens, monkeypatch):
        format, shape = PRESETS[preset], (1000, 576)
        parts = even_parts(format, *shape)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        expected = reference(parts, format, shape, x, bias)
        poisoned(monkeypatch)
        y = product(parts, format, shape, x, bias)
        assert y.dtype == dtype
        assert relative_error(y, expected) < tolerance

    @pytest.mark.parametrize("tokens", [1, 4, 40])
    @pytest.mark.parametrize("format", FORMATS, ids=str)
    def test_products_of_every_format_and_odd_shapes(self, format, tokens, monkeypatch):
        for shape in SHAPES:
            parts = even_parts(format, *shape)
            x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
            expected = reference(parts, format, shape, x)
            with monkeypatch.context() as patch:
                poisoned(patch)
                assert relative_error(product(parts, format, shape, x), expected) < 2.5e-3

    @pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="wgmma is Hopper's alone"
    )
    @pytest.mark.parametrize("tokens", [17, 64, 65, 130, 600])
    @pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_wide_products_where_the_backend_would_not_choose_them(self, preset, dtype, tolerance, tokens, monkeypatch):
        format, index = PRESETS[preset], torch.cuda.current_device()
        for shape in ((1000, 576), (83, 1013)):
            parts = even_parts(format, *shape)
            words, exponent_bias = BACKEND.prepare(parts, format, shape)
            x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
            bias = torch.randn(shape[0], device="cuda", dtype=dtype)
            expected = reference(parts, format, shape, x, bias)
            plan = launch.wide_plan(format, shape[1], tokens, index, launch.has_vector_loads(words, format))
            assert plan is not None
            with monkeypatch.context() as patch:
                poisoned(patch)
                assert relative_error(launch.wide_product(x, words, exponent_bias, plan, bias), expected) < tolerance

    @pytest.mark.parametrize("tokens", [1, 7, 30])
    @pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
    @pytest.mark.parametrize("preset", ["4", "3", "2"])
    def test_outlier_channels_of_a_hundred_sigma(self, preset, dtype, tolerance, tokens):
        format, shape = PRESETS[preset], (512, 2304)
        parts = even_parts(format, *shape)
        x = torch.randn(tokens, shape[1], device="cuda")
        x[:, ::97] *= 100
        x = x.to(dtype)
        assert relative_error(product(parts, format, shape, x), reference(parts, format, shape, x)) < tolerance

    @pytest.mark.parametrize("tokens", [1, 7, 30])
    @pytest.mark.parametrize("preset", ["4", "3"])
    def test_zeros_large_and_subnormal_activations(self, preset, tokens):
        format, shape = PRESETS[preset], (512, 1160)
        parts = even_parts(format, *shape)
        zeros = torch.zeros(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        assert torch.equal(product(parts, format, shape, zeros), zeros.new_zeros(tokens, shape[0]))
        normal = torch.randn(tokens, shape[1], device="cuda")
        for scale, dtype in ((1e4, torch.float16), (1e30, torch.bfloat16), (1e-38, torch.float32), (3e-6, torch.float16)):
            x = (normal * scale).to(dtype)
            y, expected = product(parts, format, shape, x.to(torch.float32)), reference(parts, format, shape, x)
            assert relative_error(y * (1.0 / scale), expected / scale) < 2e-3

    @pytest.mark.parametrize("tokens", [1, 7, 30])
    def test_activations_that_are_not_finite_reach_every_output(self, tokens):
        format, shape = PRESETS["4"], (64, 256)
        parts = even_parts(format, *shape)
        for value in (torch.nan, torch.inf):
            x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
            x[0, 77] = value
            assert not product(parts, format, shape, x)[0].isfinite().any()

    @pytest.mark.parametrize("bias", [-60, 0, 20])
    def test_the_exponent_bias_is_read_on_the_device(self, bias):
        format, shape = PRESETS["3"], (100, 300)
        parts = even_parts(format, *shape, bias=bias)
        x = torch.randn(3, shape[1], device="cuda")
        for count in (1, 3):
            y, expected = product(parts, format, shape, x[:count]), reference(parts, format, shape, x[:count])
            assert relative_error(y, expected) < 2e-3

    def test_words_that_are_not_aligned(self):
        format, shape = PRESETS["4"], (64, 512)
        parts = even_parts(format, *shape)
        memory = torch.empty(parts["words"].numel() + 1, dtype=torch.int32, device="cuda")
        words = memory[1:].view_as(parts["words"]).copy_(parts["words"])
        x = torch.randn(2, shape[1], device="cuda", dtype=torch.float16)
        for count in (1, 2):
            y = product(parts | {"words": words}, format, shape, x[:count])
            assert torch.equal(y, product(parts, format, shape, x[:count]))

    def test_results_are_the_same_every_time(self):
        format, shape = PRESETS["4"], (4096, 4096)
        parts = even_parts(format, *shape)
        prepared = BACKEND.prepare(parts, format, shape)
        x = torch.randn(8, shape[1], device="cuda", dtype=torch.float16)
        for count in (1, 8):
            first = BACKEND.linear(x[:count], prepared, format, shape, None)
            for _ in range(20):
                assert torch.equal(BACKEND.linear(x[:count], prepared, format, shape, None), first)

    def test_products_are_captured_in_a_graph(self):
        format, shape = PRESETS["4"], (1024, 1024)
        prepared = BACKEND.prepare(even_parts(format, *shape), format, shape)
        for count in (1, 4, 40):
            x = torch.randn(count, shape[1], device="cuda", dtype=torch.float16)
            expected = BACKEND.linear(x, prepared, format, shape, None)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = BACKEND.linear(x, prepared, format, shape, None)
            graph.replay()
            graph.replay()
            assert torch.equal(y, expected)

    def test_streams_at_once_do_not_disturb_each_other(self):
        format, shape = PRESETS["4"], (4096, 2048)
        prepared = BACKEND.prepare(even_parts(format, *shape), format, shape)
        x = torch.randn(1, shape[1], device="cuda", dtype=torch.float16)
        expected = BACKEND.linear(x, prepared, format, shape, None)
        torch.cuda.synchronize()
        wrong = []

        def work():
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [BACKEND.linear(x, prepared, format, shape, None) for _ in range(50)]
                torch.cuda.current_stream().synchronize()
                wrong.extend(not torch.equal(y, expected) for y in results)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wrong) == 200
        assert not any(wrong)

    def test_no_tokens_and_leading_dimensions(self):
        format, shape = PRESETS["4"], (48, 64)
        parts = even_parts(format, *shape)
        x = torch.randn(2, 0, shape[1], device="cuda", dtype=torch.float16)
        assert product(parts, format, shape, x).shape == (2, 0, 48)
        x = torch.randn(2, 3, shape[1], device="cuda", dtype=torch.float16)
        assert torch.equal(product(parts, format, shape, x).view(6, 48), product(parts, format, shape, x.view(6, -1)))

    def test_counters_are_zero_after_products(self):
        assert not launch.counters(torch.cuda.current_device()).any()
