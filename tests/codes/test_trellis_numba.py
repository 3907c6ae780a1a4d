"""The trellis' CPU backend against the definition."""

import pytest
import torch

from seedlm.codes.registry import parse_format
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.kernels.cpu import NumbaBackend

pytest.importorskip("numba")
FORMS = [f"trellis-r{rate}-l16-t64-h16" for rate in range(1, 9)] + ["trellis-r3-l12-t96-h8", "trellis-r6-l12-t32-h1"]


def parts_of(format, shape):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randint(-(2**31), 2**31, part.shape, generator=generator).int()
        if part.dtype == "int32"
        else torch.rand(part.shape, generator=generator).to(getattr(torch, part.dtype))
        for name, part in format.parts(*shape).items()
    }


@pytest.mark.parametrize("spec", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (70, 13), (224, 40)], ids=str)
def test_weights_are_those_of_the_definition_to_the_bit(spec, shape):
    format, backend = parse_format(spec), NumbaBackend()
    parts = parts_of(format, shape)
    prepared = backend.prepare(parts, format, shape)
    expected = codec.dequantize(parts["words"], parts["scales"], parts["scale"], format, shape)
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(backend.dequantize(prepared, format, shape, torch.float32), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_the_weights(dtype):
    format, backend, shape = parse_format(FORMS[2]), NumbaBackend(), (70, 45)
    prepared = backend.prepare(parts_of(format, shape), format, shape)
    x, bias = torch.randn(2, 3, 45).to(dtype), torch.randn(70).to(dtype)
    expected = x.double() @ backend.dequantize(prepared, format, shape, torch.float32).double().T + bias.double()
    found = backend.linear(x, prepared, format, shape, bias)
    assert found.dtype == dtype
    limit = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert float((found.double() - expected).norm() / expected.norm()) < limit
    assert torch.equal(backend.linear(x, prepared, format, shape, bias, backend.transform(x, format, 45)), found)
