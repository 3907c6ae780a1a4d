"""One token's norm or gate in the kernel that rotates: products against float64, and the sum that is left in h."""

import pytest
import torch
from test_trellis_kernels_gpu import COMPILER, EXACT, GPU, INT8, exact_weight, poisoned, random_parts, relative_error
from torch.nn import functional

from seedlm import nvrtc
from seedlm.codes import hadamard
from seedlm.codes.base import Gated, Normed
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.inference import attention

FORMATS = [TrellisFormat(rate=4), TrellisFormat(rate=3, transform=512), TrellisFormat(rate=6, state_bits=12, transform=128)]
TYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}
EPSILON = 1e-5


@COMPILER
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("origin", ["norm", "gate"])
def test_it_compiles_for_every_architecture_without_a_gpu(origin, arch):
    from seedlm.codes.trellis.kernels import sources

    for width, type in ((4096, 0), (300, 2)):
        text = sources.rotate_source(256, width, type, 2, arch, False, True, origin)
        assert nvrtc.compile_only(text, arch).startswith(b"\x7fELF")


class TestOnAGpu:
    pytestmark = GPU

    @staticmethod
    def weights(format, outs, width, dtype):
        parts = [random_parts(format, out, width) for out in outs]
        prepared = [EXACT.prepare(each, format, (out, width)) for each, out in zip(parts, outs, strict=True)]
        biases = [torch.randn(out, device="cuda", dtype=dtype) if i % 2 else None for i, out in enumerate(outs)]
        exact = [exact_weight(each, format, (out, width)) for each, out in zip(parts, outs, strict=True)]
        return prepared, biases, exact

    @staticmethod
    def expected(x, exact, biases, format):
        rotated = hadamard.forward(x.double(), format.transform)
        return [rotated @ w.T + (0 if b is None else b.double()) for w, b in zip(exact, biases, strict=True)]

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("width", [24, 300, 576, 2048, 4096, 14336])
    @pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.spec)
    def test_a_norm_is_that_of_the_sum_which_stays_in_h(self, monkeypatch, format, width, dtype):
        torch.manual_seed(1)
        outs = (256, 40, 33, 8, 520)  # more than one launch takes
        prepared, biases, exact = self.weights(format, outs, width, dtype)
        weight = (torch.rand(width, device="cuda") + 0.5).to(dtype)
        for scale, outlier in ((1.0, 1.0), (1e-3, 1.0), (30.0, 100.0), (0.0, 1.0)):
            h, delta = (torch.randn(1, 1, width, device="cuda").mul(scale).to(dtype) for _ in range(2))
            h[..., width // 3] *= outlier
            total = h + delta
            exactly = total.double()
            x = exactly * torch.rsqrt(exactly.square().mean(-1, keepdim=True) + EPSILON) * weight.double()
            for more in (delta, None):
                with monkeypatch.context() as context:
                    poisoned(context)
                    found = EXACT.fused(
                        Normed(h=h, delta=more, weight=weight, epsilon=EPSILON),
                        prepared,
                        format,
                        tuple((out, width) for out in outs),
                        biases,
                    )
                assert torch.equal(h, total)  # added once, and left alone without a delta
                for y, reference in zip(found, self.expected(x, exact, biases, format), strict=True):
                    assert y.shape == (1, 1, reference.shape[-1])
                    assert relative_error(y[0], reference[0]) < TOLERANCES[dtype]

    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("width", [24, 300, 1536, 14336])
    def test_a_gate(self, monkeypatch, width, dtype):
        torch.manual_seed(2)
        format = FORMATS[0]
        prepared, biases, exact = self.weights(format, (40, 256), width, dtype)
        gate, up = (torch.randn(1, 1, width, device="cuda", dtype=dtype) * 4 for _ in range(2))
        gate[..., :8] = torch.tensor([-100.0, 100.0, 0.0, -20.0, 20.0, -1e-4, 1e-4, -6e4], device="cuda").to(dtype)
        x = functional.silu(gate.double()) * up.double()
        with monkeypatch.context() as context:
            poisoned(context)
            found = EXACT.fused(Gated(gate=gate, up=up), prepared, format, ((40, width), (256, width)), biases)
        for y, reference in zip(found, self.expected(x, exact, biases, format), strict=True):
            assert relative_error(y[0], reference[0]) < TOLERANCES[dtype]

    def test_x_as_it_is(self, monkeypatch):
        torch.manual_seed(4)
        prepared, biases, exact = self.weights(FORMATS[0], (40, 256), 4096, torch.float16)
        x = torch.randn(1, 1, 4096, device="cuda").half()
        with monkeypatch.context() as context:
            poisoned(context)
            found = EXACT.fused(x, prepared, FORMATS[0], ((40, 4096), (256, 4096)), biases)
        for y, reference in zip(found, self.expected(x, exact, biases, FORMATS[0]), strict=True):
            assert relative_error(y[0], reference[0]) < TOLERANCES[torch.float16]

    def test_a_chain_whose_kernels_begin_before_their_input_is_there(self):
        """Each product's output is the next one's input, over and over: the same bits as one at a time."""
        torch.manual_seed(5)
        width, format = 4096, FORMATS[0]
        chain = [self.weights(format, (width,), width, torch.float16)[0] for _ in range(6)]
        weight = torch.ones(width, device="cuda").half()
        start = torch.randn(1, 1, width, device="cuda").half()

        def run(alone):
            h, delta = start.clone(), start.clone()
            for prepared in chain * 5:
                source = Normed(h=h, delta=delta, weight=weight, epsilon=EPSILON)
                (delta,) = EXACT.fused(source, prepared, format, ((width, width),), [None])
                if alone:
                    torch.cuda.synchronize()
            return h, delta

        expected = run(True)
        for _ in range(20):
            for found, reference in zip(run(False), expected, strict=True):
                assert torch.equal(found, reference)

    def test_a_chain_through_attention(self):
        """A product reads what attention read of products, at one position after the other: the same bits as one at a time."""
        torch.manual_seed(6)
        heads, kv, head, width, count, format = 8, 2, 128, 2048, 30, FORMATS[0]
        outs = (heads * head, kv * head, kv * head)
        projections, _, _ = self.weights(format, outs, width, torch.float16)
        back, _, _ = self.weights(format, (width,), heads * head, torch.float16)
        weight, start = torch.ones(width, device="cuda").half(), torch.randn(1, 1, width, device="cuda").half()
        angle = torch.rand(1, 1, head // 2, device="cuda").repeat(1, 1, 2)
        cos, sin, places = angle.cos().half(), angle.sin().half(), torch.arange(count, device="cuda")

        def run(wait):
            keys, values = (torch.zeros(1, kv, count, head, device="cuda", dtype=torch.float16) for _ in range(2))
            h, delta = start.clone(), start.clone()
            for place in (each.clone() for each in places.split(1)):  # an ordinary kernel between two tokens
                source = Normed(h=h, delta=delta, weight=weight, epsilon=EPSILON)
                q, k, v = EXACT.fused(source, projections, format, tuple((out, width) for out in outs), [None] * 3)
                wait()
                read = attention.attend(q, k, v, cos, sin, keys, values, place, head**-0.5)
                wait()
                (delta,) = EXACT.fused(read, back, format, ((width, heads * head),), [None])
                wait()
            return h, delta, keys, values

        expected = run(torch.cuda.synchronize)
        assert all(each.isfinite().all() and each.any() for each in expected)
        for _ in range(20):
            assert all(map(torch.equal, run(lambda: None), expected))

    def test_a_chain_through_gates(self):
        """A product reads the gate of two products, over and over: the same bits as one at a time."""
        torch.manual_seed(7)
        width, inner, format = 2048, 4096, FORMATS[0]
        both, _, _ = self.weights(format, (inner, inner), width, torch.float16)
        down, _, _ = self.weights(format, (width,), inner, torch.float16)
        weight, start = torch.full((width,), 0.1, device="cuda").half(), torch.randn(1, 1, width, device="cuda").half()

        def run(wait):
            h, delta = start.clone(), start.clone()
            for _ in range(30):
                source = Normed(h=h, delta=delta, weight=weight, epsilon=EPSILON)
                gate, up = EXACT.fused(source, both, format, ((inner, width), (inner, width)), [None] * 2)
                wait()
                (delta,) = EXACT.fused(Gated(gate=gate, up=up), down, format, ((width, inner),), [None])
                wait()
            return h, delta

        expected = run(torch.cuda.synchronize)
        assert all(each.isfinite().all() and each.any() for each in expected)
        for _ in range(20):
            assert all(map(torch.equal, run(lambda: None), expected))

    def test_int8_is_as_near_as_its_products(self):
        torch.manual_seed(3)
        prepared, biases, exact = self.weights(FORMATS[0], (256,), 4096, torch.float16)
        h, weight = torch.randn(1, 1, 4096, device="cuda").half(), torch.ones(4096, device="cuda").half()
        source = Normed(h=h, delta=None, weight=weight, epsilon=EPSILON)
        (y,) = INT8.fused(source, prepared, FORMATS[0], ((256, 4096),), biases)
        x = h.double() * torch.rsqrt(h.double().square().mean() + EPSILON)
        assert relative_error(y[0], self.expected(x, exact, biases, FORMATS[0])[0][0]) < 2e-2

    def test_what_is_not_finite_stays_so(self):
        prepared, biases, _ = self.weights(FORMATS[0], (256,), 576, torch.float16)
        for bad in (torch.nan, torch.inf):
            h, weight = torch.randn(1, 1, 576, device="cuda").half(), torch.ones(576, device="cuda").half()
            h[..., 5] = bad
            source = Normed(h=h, delta=None, weight=weight, epsilon=EPSILON)
            assert not EXACT.fused(source, prepared, FORMATS[0], ((256, 576),), biases)[0].isfinite().any()
