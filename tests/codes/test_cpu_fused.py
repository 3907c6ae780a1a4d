"""One token's norm or gate in the same jobs as its products on a CPU: against float64, and the sum that is left in h."""

import pytest
import torch
from torch.nn import functional

from seedlm.codes.base import Gated, Normed
from seedlm.codes.registry import parse_format
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.kernels.cpu import NumbaBackend
from seedlm.errors import TensorError
from seedlm.inference import ops

FORMATS = [TrellisFormat(rate=4), TrellisFormat(rate=3, transform=512), parse_format("trellis-r6-l12-t256-h128")]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
BACKEND, EPSILON = NumbaBackend(), 1e-5


def weights(format, outs, width, dtype):
    """Prepared weights, biases, and the weights in float64."""
    prepared, exact = [], []
    for out in outs:
        words = torch.randint(-(2**31), 2**31, (format.segments(out), width * format.rate), dtype=torch.int64).int()
        parts = {"words": words, "scales": (torch.rand(out) * 0.02 + 0.01).half(), "scale": torch.tensor([0.125])}
        prepared.append(BACKEND.prepare(parts, format, (out, width)))
        exact.append(BACKEND.dequantize(prepared[-1], format, (out, width), torch.float32).double())
    return prepared, [torch.randn(out).to(dtype) if i % 2 else None for i, out in enumerate(outs)], exact


def near(found, x, prepared, format, exact, biases, dtype):
    """Products of x in float64; in float32 as near as the backend's own of x itself, whose 15 bits are what it loses."""
    shapes = tuple(tuple(weight.shape) for weight in exact)
    own = BACKEND.linears(x.float(), prepared, format, shapes, [None if each is None else each.float() for each in biases])
    for y, other, weight, bias in zip(found, own, exact, biases, strict=True):
        expected = x @ weight.T + (0 if bias is None else bias.double())
        assert y.dtype == dtype
        assert y.shape == expected.shape
        lost = (other.double() - expected).norm()
        assert (y.double() - expected).norm() <= 1.5 * lost + TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [5, 24, 300, 576, 2048])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.spec)
def test_a_norm_is_that_of_the_sum_which_stays_in_h(format, width, dtype):
    torch.manual_seed(1)
    outs = (256, 40, 33, 8, 70)
    prepared, biases, exact = weights(format, outs, width, dtype)
    weight = (torch.rand(width) + 0.5).to(dtype)
    for scale, outlier in ((1.0, 1.0), (1e-3, 1.0), (30.0, 100.0), (0.0, 1.0)):
        h, delta = (torch.randn(1, 1, width).mul(scale).to(dtype) for _ in range(2))
        h[..., width // 3] *= outlier
        total = h + delta
        x = total.double() * torch.rsqrt(total.double().square().mean(-1, keepdim=True) + EPSILON) * weight.double()
        for more in (delta, None):
            source = Normed(h=h, delta=more, weight=weight, epsilon=EPSILON)
            found = BACKEND.fused(source, prepared, format, tuple((out, width) for out in outs), biases)
            assert torch.equal(h, total)  # added once, and left alone without a delta
            near(found, x, prepared, format, exact, biases, dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [24, 300, 1536])
def test_a_gate(width, dtype, threads):
    torch.manual_seed(2)
    prepared, biases, exact = weights(FORMATS[0], (40, 256), width, dtype)
    gate, up = (torch.randn(1, 1, width).to(dtype) * 4 for _ in range(2))
    gate[..., :8] = torch.tensor([-100.0, 100.0, 0.0, -20.0, 20.0, -1e-4, 1e-4, -6e4]).to(dtype)
    x = functional.silu(gate.double()) * up.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            found = BACKEND.fused(Gated(gate=gate, up=up), prepared, FORMATS[0], ((40, width), (256, width)), biases)
            near(found, x, prepared, FORMATS[0], exact, biases, dtype)
    finally:
        torch.set_num_threads(before)


def test_gates_far_below_zero_are_closed():
    prepared, biases, _ = weights(FORMATS[0], (40,), 64, torch.float32)
    gate, up = torch.tensor([-1e20, -1e35, -3e38, -100.0] * 16).view(1, 1, 64), torch.full((1, 1, 64), 1e20)
    assert not BACKEND.fused(Gated(gate=gate, up=up), prepared, FORMATS[0], ((40, 64),), biases)[0].any()


def test_x_as_it_is_is_a_product():
    prepared, biases, _ = weights(FORMATS[0], (40, 256), 576, torch.float32)
    x, shapes = torch.randn(1, 1, 576), ((40, 576), (256, 576))
    found = BACKEND.fused(x, prepared, FORMATS[0], shapes, biases)
    assert all(map(torch.equal, found, BACKEND.linears(x, prepared, FORMATS[0], shapes, biases)))


def test_what_is_not_finite_stays_so():
    prepared, biases, _ = weights(FORMATS[0], (40,), 576, torch.float32)
    for bad in (torch.nan, torch.inf):
        h, weight = torch.randn(1, 1, 576), torch.ones(576)
        h[..., 5] = bad
        norm = Normed(h=h, delta=None, weight=weight, epsilon=EPSILON)
        for source in (norm, Gated(gate=h, up=weight.view(1, 1, -1)), Gated(gate=weight.view(1, 1, -1), up=h)):
            assert not BACKEND.fused(source, prepared, FORMATS[0], ((40, 576),), biases)[0].isfinite().any()


def test_parts_that_do_not_fit_are_refused_and_strides_heeded():
    prepared, _, _ = weights(FORMATS[0], (40,), 576, torch.float32)
    plan = ops.plan_for(FORMATS[0], (40, 576), torch.device("cpu"), "numba")
    x, weight = torch.randn(1, 1, 576), torch.rand(576)

    def fused(source):
        return ops.fused(source, prepared, [plan], [None])

    for bad in (torch.randn(1, 1, 200), x.bfloat16()):
        for source in (
            Gated(gate=x, up=bad),
            Normed(h=x, delta=bad, weight=weight, epsilon=EPSILON),
            Normed(h=x, delta=None, weight=bad.view(-1), epsilon=EPSILON),
        ):
            with pytest.raises(TensorError, match=r"does not go with \[1, 1, 576\] of torch.float32"):
                fused(source)
    apart = torch.stack([weight, weight * 7 - 3], 1)[:, 0]
    assert not apart.is_contiguous()
    found, expected = (fused(Normed(h=x, delta=None, weight=each, epsilon=EPSILON)) for each in (apart, weight))
    assert torch.equal(found[0], expected[0])
