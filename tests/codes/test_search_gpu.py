"""The GPU search returns the brute force's bits: every block, format and rounding, and whatever the working set."""

from collections import Counter

import pytest
import torch

from seedlm.codes.block.basis import basis
from seedlm.codes.block.codec import BlockCodes, choose_exponent_bias
from seedlm.codes.block.encode import reason_no_search
from seedlm.codes.block.format import PRESETS
from seedlm.codes.block.search import torch_search
from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FORMATS = [*PRESETS, "block-k5-c4-p2-q3-e3", "block-k8-c5-p2-q4-e4", "block-k12-c8-p1-q2-e4", "block-k9-c16-p4-q8-e2"]


def hard_blocks(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(8, size, generator=generator)
    heavy = torch.distributions.StudentT(2.0).sample((8, size))
    tiny = torch.finfo(torch.float32).tiny
    return {
        "zero": torch.zeros(3, size),
        "constant": torch.full((2, size), 0.7),
        "alternating": torch.tensor([1.0, -1.0]).repeat(size)[:size].expand(2, -1) * torch.tensor([[1.0], [3.0]]),
        "one-hot": torch.eye(size)[:4] * torch.tensor([[1.0], [-1.0], [1e-3], [0.3]])[: min(4, size)],
        "denormal": normal * tiny * 2.0**-8,
        "smallest": torch.eye(size)[:2] * 2.0**-149,
        "huge": normal / normal.abs().max() * 1e30,
        "heavy-tailed": heavy,
        "mixed magnitudes": torch.cat([normal, normal * 1e-3, normal * 1e-7, torch.zeros(1, size)]),
        "integers": normal.mul(2).round(),
    }


def gpu_search(blocks: torch.Tensor, bias: int, format, rounding="best", **options):
    from seedlm.codes.block.search import triton_search

    codes, scores = zip(*triton_search.search(blocks.cuda(), bias, format, rounding, **options), strict=True)
    return BlockCodes(*(torch.cat(field) for field in zip(*codes, strict=True))), torch.cat(scores)


def assert_same(found, expected):
    for name, a, b in zip(("seeds", "exponents", "coefficients"), found[0], expected[0], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"{name} of blocks {(a != b).view(len(a), -1).any(1).nonzero()[:8, 0].tolist()}"
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("rounding", ["best", "nearest"])
@pytest.mark.parametrize("spec", FORMATS)
def test_random_blocks_equal_brute_force(spec, rounding):
    format = parse_format(spec, "block")
    blocks = torch.randn(301, format.block_size) * 0.02
    bias = choose_exponent_bias(blocks, format)
    assert_same(gpu_search(blocks, bias, format, rounding), torch_search.brute_force(blocks.cuda(), bias, format, rounding))


@pytest.mark.parametrize("kind", hard_blocks(8))
@pytest.mark.parametrize("spec", FORMATS)
def test_hard_blocks_equal_brute_force(spec, kind):
    format = parse_format(spec, "block")
    blocks = hard_blocks(format.block_size)[kind]
    for bias in {choose_exponent_bias(blocks, format), 0}:
        assert_same(gpu_search(blocks, bias, format), torch_search.brute_force(blocks.cuda(), bias, format))


@pytest.mark.parametrize("spec", FORMATS)
def test_no_tile_seems_worse_than_its_margin_allows(spec):
    """What the proof says of the bound, for every tile: its best seed would be found if it were what has to be reached."""
    from seedlm.codes.block.search.triton_round import Rounds

    format = parse_format(spec, "block")
    blocks = torch.cat(
        [torch.randn(412, format.block_size), torch.distributions.StudentT(2.0).sample((100, format.block_size))]
    )
    rounds = Rounds(format, "best", torch.device("cuda", torch.cuda.current_device()))
    _, _, least = rounds.bounds(blocks.cuda())
    unit = torch.nn.functional.normalize(blocks.cuda().double(), dim=1)
    residual = 1 - sum((unit @ columns).square() for columns in basis(format).span.cuda())
    margins = rounds.tables.margins
    for kind in rounds.tables.kinds:
        found, least = least.split([len(kind), len(least) - len(kind)])
        true = torch.stack([residual[:, tile].amin(1) for tile in kind.position.flatten(1)])
        limit = (true.clamp_min(0).sqrt() + margins.tile_root).square() + margins.tile_sum
        limit = (limit * (1 + 2.0**-7) + 2.0**-24).half().view(torch.int16).bitwise_or(15).view(torch.float16)
        assert bool((found <= limit).all())
        assert float((true - found).median()) < 5e-3


def test_open_blocks_are_redone_and_counted():
    format = parse_format("4", "block")
    blocks = torch.cat([torch.randn(300, 8), torch.zeros(70, 8), torch.randn(50, 8) * 1e-6])
    redone = Counter()
    found = gpu_search(blocks, 0, format, redone=redone)
    assert_same(found, torch_search.brute_force(blocks.cuda(), 0, format))
    assert redone[None] >= 70


def test_a_small_working_set_changes_nothing_and_is_kept():
    format = parse_format("4", "block")
    blocks = torch.randn(20_000, 8)
    everything = gpu_search(blocks, 0, format)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert_same(gpu_search(blocks, 0, format, working_set=1 << 24), everything)
    assert torch.cuda.max_memory_allocated() - before < (1 << 24) + 20_000 * 64


def test_encode_takes_this_backend_and_equals_the_cpu():
    format = parse_format("3", "block")
    weight = torch.randn(7, 130).bfloat16()
    on_gpu, gpu_error = encode(weight.cuda(), format, backend="triton")
    on_cpu, cpu_error = encode(weight, format, backend="torch")
    assert torch.equal(on_gpu.parts["words"].cpu(), on_cpu.parts["words"])
    assert gpu_error == pytest.approx(cpu_error, rel=1e-12)


def test_refused_formats_say_why():
    device = torch.device("cuda")
    assert "seed bits" in reason_no_search("triton", device, parse_format("block-k18-c8-p3-q4-e4"))
    assert reason_no_search("triton", device, parse_format("4", "block")) is None
