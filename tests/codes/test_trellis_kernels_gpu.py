"""The trellis code's CUDA kernels against float64 of the definition: every rate, odd shapes, hard inputs, poisoned outputs."""

import struct
import threading

import pytest
import torch

from seedlm import nvrtc
from seedlm.codes import hadamard
from seedlm.codes.registry import family_of
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.kernels import launch, sources
from seedlm.codes.trellis.kernels.cuda import CudaBackend, CudaInt8Backend

COMPILER = pytest.mark.skipif(nvrtc.reason_unavailable() is not None, reason=str(nvrtc.reason_unavailable()))
GPU = [COMPILER, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

EXACT, INT8 = CudaBackend(), CudaInt8Backend()
TOLERANCES = [(torch.float16, 2e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-4)]

FORMATS = [
    *(TrellisFormat(rate=rate) for rate in range(1, 9)),
    *(TrellisFormat(rate=rate, state_bits=12) for rate in (1, 3, 4, 6)),
    *(TrellisFormat(rate=4, sequence_rows=rows) for rows in (32, 64, 96, 128, 512, 1024)),
    *(TrellisFormat(rate=3, transform=block) for block in (8, 16, 64, 256, 512)),
]
SHAPES = [(256, 256), (33, 48), (130, 100), (1000, 576), (8, 4112), (520, 24)]


def random_parts(format, out, width):
    words = torch.randint(-(2**31), 2**31, (format.segments(out), width * format.rate), dtype=torch.int64).to(torch.int32)
    scales = (torch.rand(out) * 0.02 + 0.01).half()
    return {"words": words.cuda(), "scales": scales.cuda(), "scale": torch.tensor([0.125], device="cuda")}


def exact_weight(parts, format, shape):
    """float64 [out, in] in the transformed basis."""
    return codec.rotated_weight(parts["words"], parts["scales"], parts["scale"], format, shape).double()


def multiples_of_groups(largest, levels):
    """What int8 activations' groups count of their token's unit (quantize.cuh); largest: float64 [tokens, groups]."""
    top, groups = largest.amax(1, keepdim=True).clamp_min(1e-300), largest.shape[1]
    shares = (largest / top * 256).ceil().sum(1, keepdim=True).clamp_min(1)
    budget = int(2e9 / (510 * 256 * levels))
    many = ((budget - groups) * 256 / shares).floor().clamp(1, 16)
    return (largest / top * many * 0.99999).ceil().clamp(1, 16), many


def whole_numbers_of_groups(rotated):
    """Activations [tokens, in] in the transformed basis as int8 with a scale for each 256 columns, and back; float64."""
    levels, groups = sources.levels(rotated.shape[1]), rotated.double().split(256, 1)
    largest = torch.stack([group.abs().amax(1) for group in groups], 1)
    multiples, many = multiples_of_groups(largest, levels)
    scales = (largest.amax(1, keepdim=True) / (levels * many) * multiples).split(1, 1)
    each = zip(groups, scales, strict=True)
    return torch.cat([torch.where(scale > 0, group / scale, 0.0).round() * scale for group, scale in each], 1)


def poisoned(monkeypatch):
    """torch.empty gives NaN, and int32 memory that is not zero."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: empty(*a, **k).fill_(-1 if k.get("dtype") == torch.int32 else torch.nan)
    )


def relative_error(y, reference):
    error = (y.double() - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-300)
    return torch.nan_to_num(error, nan=torch.inf).max().item()


def forms_of_copies(cubin):
    """In which forms an ELF file's machine code has LDGSTS, which `cp.async` becomes: 7 with an address from a register alone.

    Form 6 adds a uniform register. With an L2 policy NVRTC 13.0 writes it in a way that an H200 calls an illegal instruction.
    """
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    code = [range(at, at + length, 16) for _, kind, flags, _, at, length in headers if kind == 1 and flags & 4]
    words = [struct.unpack_from("<H", cubin, at)[0] for instructions in code for at in instructions]
    return {word >> 9 & 7 for word in words if word & 0x1FF == 0x1AE}


@COMPILER
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("rate", [3, 4])
def test_kernels_compile_for_every_architecture_without_a_gpu(rate, arch):
    format = TrellisFormat(rate=rate)
    products = [
        sources.product_source(format, sources.choose(format, parts, arch), each, members, own)
        for parts, each, members, own in (
            (1, 1, 3, (4096, 0)),
            (4, 2, 1, None),
            (4, 1, 1, None),
            (8, 2, 1, (300, 2)),
            (8, 1, 1, None),
            (16, 2, 2, None),
            (16, 1, 1, (100, 1)),
        )
    ]
    for text in products:
        assert forms_of_copies(nvrtc.compile_only(text, arch)) == {7}
    texts = [
        sources.rotate_source(128, 4096, 0, 2, arch, halves, few)
        for halves, few in ((False, True), (True, True), (True, False))
    ]
    texts.append(sources.transform_source(128))
    texts += [sources.dequantize_source(format, original=True), sources.rows_source(format)]
    for text in texts:
        assert nvrtc.compile_only(text, arch).startswith(b"\x7fELF")
    if arch == 90:
        text = sources.gemm_source(format, 256, sources.gemm_stages(256, arch))
        assert nvrtc.compile_only(text, arch, specific=True).startswith(b"\x7fELF")


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("parts", [1, 4, 8, 16])
def test_every_variant_fits_shared_memory(parts, arch):
    for format in FORMATS:
        longest = next(sources.steps(n) for n in range(1 << 16, 0, -16) if sources.own_input(n, -(-parts // 2)))
        for own_steps in (0, longest):
            variant = sources.choose(format, parts, arch, own_steps=own_steps)
            assert sources.shared_bytes(format, variant, parts, own_steps) <= sources.most_shared(arch)
            assert variant.stages >= 2
            assert variant.warps >= 1


@pytest.mark.parametrize("width", [1, 4096, 33156, 33157, 53248, 1 << 20])
def test_integer_sums_cannot_overflow(width):
    assert 510 * sources.levels(width) * width < 2**31
    assert sources.levels(width) >= 1


@pytest.mark.parametrize("width", [1, 256, 4096, 14336, 28672, 33157, 53248])
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.99, 1.0])
def test_sums_of_groups_cannot_overflow(alike, width):
    levels, groups = sources.levels(width), -(-width // 256)
    largest = alike + (1 - alike) * torch.rand(50, groups, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    columns = torch.full((groups,), 256.0, dtype=torch.float64)
    columns[-1] = width - 256 * (groups - 1)
    multiples, many = multiples_of_groups(largest, levels)
    assert (510 * levels * multiples @ columns).max() < 2**31
    assert (multiples.amax(1) == many.squeeze(1)).all()
    assert (largest / largest.amax(1, keepdim=True) <= 1.0001 * multiples / many).all()


def test_other_devices_and_transforms_are_refused_with_a_reason():
    assert "CUDA device" in EXACT.reason_unavailable(torch.device("cpu"), FORMATS[0], (8, 8))


@pytest.mark.parametrize("processors", [1, 78, 114, 132])
@pytest.mark.parametrize("shape", [(1, 1), (128, 64), (4096, 4096), (4096, 14336), (28672, 4096), (57344, 8192), (128256, 256)])
@pytest.mark.parametrize("tokens", [17, 64, 256, 1000])
def test_tiles_are_divided_so_that_all_are_done(shape, tokens, processors):
    tiles, whole, splits = sources.gemm_division(*shape, tokens, processors)
    assert tiles == -(-shape[0] // 128) * -(-tokens // sources.gemm_tokens(tokens))
    assert 0 <= whole <= tiles
    assert whole % processors == 0
    assert tiles - whole < processors
    assert 1 <= splits <= -(-shape[1] // 64)
    assert splits == 1 or (tiles - whole) * splits <= processors


class TestOnADevice:
    pytestmark = GPU

    @pytest.mark.parametrize("format", FORMATS, ids=str)
    def test_weights_are_the_definitions_bits(self, format, monkeypatch):
        for shape in SHAPES:
            parts = random_parts(format, *shape)
            prepared = EXACT.prepare(parts, format, shape)
            expected = codec.dequantize(*parts.values(), format, shape)
            poisoned(monkeypatch)
            for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                assert torch.equal(EXACT.dequantize(prepared, format, shape, dtype), expected.to(dtype))
            monkeypatch.undo()

    @pytest.mark.parametrize("format", FORMATS, ids=str)
    def test_rows_are_the_weights_bits(self, format, monkeypatch):
        for shape in SHAPES:
            parts = random_parts(format, *shape)
            weight = codec.dequantize(*parts.values(), format, shape)
            for count in ((7,), (2, 3), (0,)):
                indices = torch.randint(0, shape[0], count, device="cuda")
                poisoned(monkeypatch)
                rows = family_of(format).rows(parts, format, shape, indices)
                monkeypatch.undo()
                assert torch.equal(rows, weight[indices])
                assert torch.equal(family_of(format).rows(parts, format, shape, indices.int()), weight[indices])
        wrong = family_of(format).rows(parts, format, shape, torch.tensor([-1, shape[0], 0, 1 << 40], device="cuda"))
        assert wrong.isnan().all(1).tolist() == [True, True, False, True]

    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 16, 17, 100, 300, 1023, 1024])
    @pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
    def test_products_of_every_number_of_tokens(self, tokens, dtype, tolerance, monkeypatch):
        format, shape = TrellisFormat(rate=4), (1000, 576)
        parts = random_parts(format, *shape)
        prepared = EXACT.prepare(parts, format, shape)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        poisoned(monkeypatch)
        y = EXACT.linear(x, prepared, format, shape, bias)
        reference = hadamard.forward(x.double(), format.transform) @ exact_weight(parts, format, shape).T + bias.double()
        assert y.dtype == dtype
        assert relative_error(y, reference) < tolerance

    @pytest.mark.parametrize("format", FORMATS, ids=str)
    def test_products_of_every_format_and_odd_shapes(self, format, monkeypatch):
        for shape in SHAPES:
            parts = random_parts(format, *shape)
            prepared = EXACT.prepare(parts, format, shape)
            weight = exact_weight(parts, format, shape)
            for tokens in (1, 4, 7, 40):
                x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
                poisoned(monkeypatch)
                y = EXACT.linear(x, prepared, format, shape, None)
                monkeypatch.undo()
                assert relative_error(y, hadamard.forward(x.double(), format.transform) @ weight.T) < 2e-3

    @pytest.mark.parametrize(
        ("shape", "tokens"),
        [
            ((256, 4096), 17),
            ((130, 2100), 200),
            ((1000, 8192), 256),
            ((4096, 4096), 300),
            ((19000, 512), 250),
            ((9000, 600), 1000),
        ],
    )
    def test_tiles_split_along_their_columns(self, shape, tokens):
        format = TrellisFormat(rate=3)
        assert sources.gemm_division(*shape, tokens, nvrtc.processors(0))[-1] > 1
        parts = random_parts(format, *shape)
        prepared = EXACT.prepare(parts, format, shape)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        transformed = EXACT.transform(x, format, shape[1])
        y = EXACT.linear(x, prepared, format, shape, None, transformed)
        reference = hadamard.forward(x.double(), format.transform) @ exact_weight(parts, format, shape).T
        assert relative_error(y, reference) < 2e-3
        for _ in range(3):  # from the same workspace, whose counters are clear again
            assert torch.equal(EXACT.linear(x, prepared, format, shape, None, transformed), y)

    @pytest.mark.parametrize("block", [8, 128, 512])
    @pytest.mark.parametrize("width", [1, 40, 576, 1100, 4096])
    def test_inputs_of_formed_weights_are_transformed(self, block, width):
        for dtype, tolerance in TOLERANCES:
            x = torch.randn(37, width, device="cuda", dtype=dtype)
            assert relative_error(launch.transform(x, block), hadamard.forward(x.double(), block)) < tolerance

    @pytest.mark.parametrize(("backend", "tolerance"), [(EXACT, 8e-3), (INT8, 2e-2)], ids=["exact", "int8"])
    @pytest.mark.parametrize("tokens", [1, 8, 40, 1500])
    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4, 1e30])
    def test_outlier_channels_and_extreme_magnitudes(self, scale, tokens, backend, tolerance):
        format, shape = TrellisFormat(rate=3), (300, 1024)
        parts = random_parts(format, *shape)
        x = torch.randn(tokens, shape[1], device="cuda") * scale
        x[:, ::97] *= 100
        x = x.bfloat16()
        y = backend.linear(x, backend.prepare(parts, format, shape), format, shape, None)
        reference = hadamard.forward(x.double(), format.transform) @ exact_weight(parts, format, shape).T
        assert relative_error(y, reference) < tolerance

    @pytest.mark.parametrize("backend", [EXACT, INT8], ids=["exact", "int8"])
    @pytest.mark.parametrize("width", [256, 1536])
    @pytest.mark.parametrize("tokens", [2, 40, 1500])
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_what_is_not_finite_stays_in_its_token(self, bad, tokens, width, backend):
        format, shape = TrellisFormat(rate=4), (300, width)
        parts = random_parts(format, *shape)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        x[1, 17] = bad
        y = backend.linear(x, backend.prepare(parts, format, shape), format, shape, None)
        assert not y[1].isfinite().any()
        assert y[0].isfinite().all()

    @pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16])
    @pytest.mark.parametrize("width", [100, 1024, 1100, 2304, 40000])
    @pytest.mark.parametrize("transform", [128, 512])
    def test_int8_activations_are_rounded_group_by_group_and_nothing_else(self, transform, width, tokens):
        format, shape = TrellisFormat(rate=2 if tokens % 2 else 3, transform=transform), (520, width)
        parts = random_parts(format, *shape)
        prepared, weight = INT8.prepare(parts, format, shape), exact_weight(parts, format, shape)
        columns = torch.arange(width, device="cuda")
        x = torch.randn(tokens, width, device="cuda")
        uneven = x * 10 ** (columns // 64 % 7 - 3.0)
        for some in (x, uneven, uneven.half().float(), 1e-37 * x, 0 * x):
            rounded = whole_numbers_of_groups(hadamard.forward(some, format.transform))
            reference = rounded.double() @ weight.T
            # Where float32 rounds to one side here and to the other there, a number differs by one.
            assert relative_error(INT8.linear(some, prepared, format, shape, None), reference) < 3e-3

    @pytest.mark.parametrize("backend", [EXACT, INT8], ids=["exact", "int8"])
    @pytest.mark.parametrize("tokens", [1, 2, 8])
    def test_blocks_that_have_many_panels(self, tokens, backend):
        format, shape = TrellisFormat(rate=4), (300_000, 272)
        parts = random_parts(format, *shape)
        x = torch.randn(tokens, shape[1], device="cuda")
        y = backend.linear(x, backend.prepare(parts, format, shape), format, shape, None)
        rotated = hadamard.forward(x, format.transform)
        rotated = whole_numbers_of_groups(rotated) if backend is INT8 else rotated.double()
        assert relative_error(y, rotated @ exact_weight(parts, format, shape).T) < (3e-3 if backend is INT8 else 1e-4)

    @pytest.mark.parametrize("backend", [EXACT, INT8], ids=["exact", "int8"])
    @pytest.mark.parametrize("width", [4096, 28672, 39936])
    @pytest.mark.parametrize("tokens", [1, 8])
    def test_activations_that_are_all_at_their_largest(self, tokens, width, backend):
        format, shape = TrellisFormat(rate=4), (300, width)
        parts = random_parts(format, *shape)
        x = torch.zeros(tokens, width, device="cuda")
        x[:, :: format.transform] = 1.0  # which the transform makes equal everywhere in a block
        rotated = hadamard.forward(x.double(), format.transform)
        assert (rotated[:, : width // format.transform * format.transform] > 0).all()
        y = backend.linear(x, backend.prepare(parts, format, shape), format, shape, None)
        assert relative_error(y, rotated @ exact_weight(parts, format, shape).T) < 1e-4

    @pytest.mark.parametrize("backend", [EXACT, INT8], ids=["exact", "int8"])
    @pytest.mark.parametrize("tokens", [1, 3, 7])
    def test_the_same_bits_every_time_and_however_rows_are_shared(self, tokens, backend):
        format, shape = TrellisFormat(rate=4), (4096, 2048)
        parts = random_parts(format, *shape)
        prepared = backend.prepare(parts, format, shape)
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
        first = backend.linear(x, prepared, format, shape, None)
        for _ in range(20):
            assert torch.equal(backend.linear(x, prepared, format, shape, None), first)
        some = {"words": parts["words"][:8], "scales": parts["scales"][:256], "scale": parts["scale"]}
        alone = backend.linear(x, backend.prepare(some, format, (256, shape[1])), format, (256, shape[1]), None)
        assert torch.equal(alone, first[:, :256])

    @pytest.mark.parametrize("tokens", [1, 6, 64, 1500])
    def test_a_shared_transform_gives_the_same_bits(self, tokens):
        format = TrellisFormat(rate=2)
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.float16)
        layers = [(random_parts(format, out, 512), (out, 512)) for out in (512, 128, 1024)]
        transformed = EXACT.transform(x, format, 512)
        assert (transformed == []) == sources.own_input(512, tokens)
        empty = EXACT.empty_transform(x, format, 512)
        assert [(t.shape, t.dtype) for t in transformed] == [(t.shape, t.dtype) for t in empty]
        for parts, shape in layers:
            prepared = EXACT.prepare(parts, format, shape)
            shared = EXACT.linear(x, prepared, format, shape, None, transformed)
            assert torch.equal(shared, EXACT.linear(x, prepared, format, shape, None))

    @pytest.mark.parametrize("format", FORMATS, ids=str)
    @pytest.mark.parametrize("outs", [(512, 128, 128), (33, 1000), (1, 300, 7, 2000), (8, 8, 8, 8, 8)])
    def test_several_weights_at_once_give_the_bits_of_one_after_another(self, outs, format, monkeypatch):
        weights = [random_parts(format, out, 336) for out in outs]
        shapes = tuple((out, 336) for out in outs)
        prepared = [EXACT.prepare(parts, format, shape) for parts, shape in zip(weights, shapes, strict=True)]
        biases = [None if i % 2 else torch.randn(out, device="cuda", dtype=torch.float16) for i, out in enumerate(outs)]
        for backend, tokens in ((EXACT, 1), (EXACT, 5), (INT8, 13), (EXACT, 20), (EXACT, 0)):
            x = torch.randn(tokens, 336, device="cuda", dtype=torch.float16)
            each = zip(prepared, shapes, biases, strict=True)
            expected = [backend.linear(x, weight, format, shape, bias) for weight, shape, bias in each]
            poisoned(monkeypatch)
            found = backend.linears(x, prepared, format, shapes, biases)
            monkeypatch.undo()
            assert [y.shape for y in found] == [(tokens, out) for out in outs]
            assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))

    @pytest.mark.parametrize("format", FORMATS, ids=str)
    def test_products_that_transform_x_themselves_give_the_bits_of_those_that_do_not(self, format, monkeypatch):
        for shape in ((33, 48), (1000, 1100)):
            parts = random_parts(format, *shape)
            prepared = EXACT.prepare(parts, format, shape)
            for tokens, kind in ((1, "exact"), (7, "int8")):
                x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.float16)
                x[:, ::97] *= 100
                inputs = launch.input_plan(format.transform, shape[1], tokens, x.dtype, kind, 0)
                plans = [
                    launch.product_plan(format, (shape,), tokens, x.dtype, kind, 0, own_input=own_input)
                    for own_input in (False, True)
                ]
                poisoned(monkeypatch)
                work = torch.empty(inputs.size, dtype=torch.int32, device="cuda")
                ys = [torch.empty(tokens, shape[0], device="cuda", dtype=x.dtype) for _ in range(3)]
                launch.rotate(x, inputs, work)
                launch.product([ys[0]], [prepared], plans[0], work, [None], inputs)
                launch.product([ys[1]], [prepared], plans[1], x, [None])
                launch.product([ys[2]], [prepared], plans[1], x, [None])
                monkeypatch.undo()
                assert torch.equal(ys[0], ys[1])
                assert torch.equal(ys[0], ys[2])

    @pytest.mark.parametrize("width", [512, 4096])
    def test_a_graph_of_products_writes_the_same_bits_every_time(self, width):
        """One after another, each starting while the one before ends, from memory that they leave each other."""
        format = TrellisFormat(rate=3)
        shapes = [(width, width), (3 * width, width), (130, width)]
        weights = [EXACT.prepare(random_parts(format, *shape), format, shape) for shape in shapes]
        x = torch.randn(1, width, device="cuda", dtype=torch.float16)

        def chain():
            ys, y = [], x
            for _ in range(4):
                y = EXACT.linear(y, weights[0], format, shapes[0], None)
                ys += [y, *EXACT.linears(y, weights[1:], format, tuple(shapes[1:]), [None, None])]
                y = y / y.abs().max()
            return ys

        chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        graph.replay()
        first = [y.clone() for y in captured]
        assert all(y.isfinite().all() for y in first)
        for _ in range(200):
            graph.replay()
            assert all(torch.equal(y, z) for y, z in zip(captured, first, strict=True))
        assert all(torch.equal(y, z) for y, z in zip(chain(), first, strict=True))

    @pytest.mark.parametrize("tokens", [1, 40])
    def test_graphs_streams_and_threads(self, tokens):
        format, shape = TrellisFormat(rate=4), (512, 512)
        prepared = EXACT.prepare(random_parts(format, *shape), format, shape)
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.float16)
        expected = EXACT.linear(x, prepared, format, shape, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(5):
                y = EXACT.linear(x, prepared, format, shape, None)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)
        wrong = []

        def work():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(50):
                    if not torch.equal(EXACT.linear(x, prepared, format, shape, None), expected):
                        wrong.append(1)

        torch.cuda.synchronize()
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_empty_and_strided_inputs(self):
        format, shape = TrellisFormat(rate=4), (256, 128)
        parts = random_parts(format, *shape)
        prepared = EXACT.prepare(parts, format, shape)
        assert EXACT.linear(torch.empty(0, 128, device="cuda"), prepared, format, shape, None).shape == (0, 256)
        x = torch.randn(2, 3, 256, device="cuda")[..., ::2]
        y = EXACT.linear(x, prepared, format, shape, None)
        assert y.shape == (2, 3, 256)
        assert torch.equal(y, EXACT.linear(x.contiguous(), prepared, format, shape, None))

    def test_words_are_read_where_they_are(self):
        format, shape = TrellisFormat(rate=3), (256, 128)
        parts = random_parts(format, *shape)
        assert all(a is b for a, b in zip(EXACT.prepare(parts, format, shape), parts.values(), strict=True))
        assert launch.padded(parts["words"], format, 128) is parts["words"]
