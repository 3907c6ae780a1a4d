"""Attention of one token: against float64 written out, on a CPU by numba and by torch, on a GPU by the kernel."""

import pytest
import torch

from seedlm import nvrtc
from seedlm.inference import attention

COMPILER = pytest.mark.skipif(nvrtc.reason_unavailable() is not None, reason=str(nvrtc.reason_unavailable()))
GPU = [COMPILER, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def straightforward(q, k, v, cos, sin, keys, values, position, scaling):
    """Heads one after the other, in float64; the cache is changed as it should be."""
    kv, _, width = keys.shape[1:]
    here = int(position)

    def turned(x):
        x, half = x.double(), width // 2
        turned = torch.cat((-x[half:], x[:half]))
        return x * cos.double().view(-1) + turned * sin.double().view(-1)

    for head in range(kv):
        keys[0, head, here] = turned(k.view(kv, width)[head]).to(keys.dtype)
        values[0, head, here] = v.view(kv, width)[head]
    heads = q.view(-1, width)
    share = len(heads) // kv
    out = []
    for number, head in enumerate(heads):
        known, read = (cache[0, number // share, : here + 1].double() for cache in (keys, values))
        out.append((known @ turned(head) * scaling).softmax(0) @ read)
    return torch.cat(out)


def case(kv, share, width, length, dtype, device, loud=1.0):
    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    angle = torch.rand(1, 1, width // 2, device=device) * 6
    cos, sin = (torch.cat((each, each), -1).to(dtype) for each in (angle.cos(), angle.sin()))
    q, k, v = random(1, 1, kv * share * width) * loud, random(1, 1, kv * width), random(1, 1, kv * width)
    return q, k, v, cos, sin, random(1, kv, length, width), random(1, kv, length, width)


def check(kv, share, width, length, position, dtype, device, tolerance, loud=1.0):
    torch.manual_seed(position)
    q, k, v, cos, sin, keys, values = case(kv, share, width, length, dtype, device, loud)
    keys[:, :, position + 1 :] = torch.nan  # what lies behind is never looked at
    if attention._by_kernel(q, keys, values) or attention._by_numba(q, keys, values):  # torch multiplies it by zero
        values[:, :, position + 1 :] = torch.nan
    place = torch.tensor([position], device=device)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = straightforward(q, k, v, cos, sin, expected_keys, expected_values, place, width**-0.5)
    found = attention.attend(q, k, v, cos, sin, keys, values, place, width**-0.5)
    assert found.shape == q.shape
    assert found.dtype == dtype
    assert (found.view(-1).double() - expected).abs().max() < tolerance * max(1.0, expected.abs().max().item())
    assert torch.equal(values.nan_to_num(9.0), expected_values.nan_to_num(9.0))
    near = torch.isclose(keys, expected_keys, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps, equal_nan=True)
    assert near.all()


@pytest.mark.parametrize("share", [1, 3, 4])
@pytest.mark.parametrize("position", [0, 1, 30, 39])
def test_by_torch(monkeypatch, position, share):
    monkeypatch.setattr(attention, "_by_numba", lambda *args: False)
    check(2, share, 16, 40, position, torch.float32, "cpu", 1e-5)


class TestByNumba:
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("position", [0, 1, 15, 16, 100, 255])
    @pytest.mark.parametrize(("kv", "share", "width"), [(3, 3, 64), (2, 4, 128), (1, 1, 16), (5, 2, 6)])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
    def test_every_position_type_and_shape(self, dtype, tolerance, kv, share, width, position, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            check(kv, share, width, 256, position, dtype, "cpu", tolerance)
        finally:
            torch.set_num_threads(before)

    def test_scores_that_differ_by_hundreds(self):
        check(3, 3, 64, 64, 60, torch.float32, "cpu", 1e-4, loud=40.0)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_what_is_not_finite_stays_so(self, bad):
        for place in (0, 3, 7):
            q, k, v, cos, sin, keys, values = case(2, 2, 16, 16, torch.float32, "cpu")
            (k if place == 7 else keys[0, 1, place])[..., -1] = bad
            found = attention.attend(q, k, v, cos, sin, keys, values, torch.tensor([7]), 0.25).view(2, -1)
            assert not found[1].isfinite().all()
            assert found[0].isfinite().all()

    def test_scores_as_large_as_floats_are_or_without_end_below(self):
        """A sum of scores would not be finite; what is a thousand below has no share, whatever its value."""
        q, k, v, cos, sin, keys, values = case(1, 1, 16, 16, torch.float32, "cpu")
        cos.fill_(1.0), sin.fill_(0.0), q.fill_(0.0), k.fill_(0.0), keys.fill_(0.0)
        q[..., 0], keys[..., :6, 0], k[..., 0] = 1e19, 1e19, 1e19
        keys[..., 2, 0], values[..., 2, :] = -torch.inf, 1e37
        keys[..., 3, 0], values[..., 3, :] = 1e19 - 1e17, 1e37
        place = torch.tensor([6])
        expected = straightforward(q, k, v, cos, sin, keys.clone(), values.clone(), place, 1.0)
        found = attention.attend(q, k, v, cos, sin, keys, values, place, 1.0)
        assert torch.allclose(found.view(-1).double(), expected, rtol=1e-5)

    @pytest.mark.parametrize("position", [-1, 16, 1 << 40])
    def test_a_position_outside_of_the_cache_is_refused_and_nothing_written(self, position):
        q, k, v, cos, sin, keys, values = case(2, 2, 16, 16, torch.float32, "cpu")
        before = keys.clone(), values.clone()
        with pytest.raises(IndexError, match=rf"position {position} is none of a cache of 16"):
            attention.attend(q, k, v, cos, sin, keys, values, torch.tensor([position]), 0.25)
        assert torch.equal(keys, before[0])
        assert torch.equal(values, before[1])

    def test_views_and_what_it_does_not_know_go_their_way(self):
        q, *_, keys, values = case(2, 2, 16, 16, torch.float32, "cpu")
        assert attention._by_numba(q, keys, values)
        assert not attention._by_numba(q.half(), keys.half(), values.half())
        assert not attention._by_numba(q, keys.transpose(2, 3), values)


def test_scores_that_float16_holds_only_when_scaled():
    kv, share, width = 1, 1, 96
    q, k, v, cos, sin, keys, values = case(kv, share, width, 8, torch.float16, "cpu")
    q[:], k[:], cos[:], sin[:] = 10.0, 1.0, 1.0, 0.0
    keys[:] = 100.0
    place = torch.tensor([5])
    expected = straightforward(q, k, v, cos, sin, keys.clone(), values.clone(), place, width**-0.5)
    found = attention.attend(q, k, v, cos, sin, keys, values, place, width**-0.5)
    assert (found.view(-1).double() - expected).abs().max() < 4e-3


@COMPILER
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_the_kernel_compiles_for_every_architecture_without_a_gpu(arch):
    for type, width, heads in ((0, 64, 3), (1, 128, 4), (2, 256, 9)):
        assert nvrtc.compile_only(attention.source(type, width, heads, arch), arch).startswith(b"\x7fELF")


class TestOnAGpu:
    pytestmark = GPU

    @pytest.mark.parametrize("position", [0, 1, 7, 8, 63, 64, 255, 256, 600, 1022, 1023])
    @pytest.mark.parametrize(
        ("kv", "share", "width"), [(8, 4, 128), (3, 3, 64), (2, 9, 64), (2, 8, 128), (1, 5, 256), (4, 1, 128)]
    )
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2), (torch.float32, 2e-5)])
    def test_every_position_type_and_shape(self, dtype, tolerance, kv, share, width, position):
        check(kv, share, width, 1024, position, dtype, "cuda", tolerance)

    def test_scores_that_differ_by_hundreds(self):
        check(8, 4, 128, 1024, 900, torch.float16, "cuda", 4e-3, loud=40.0)

    def test_the_same_bits_every_time(self):
        torch.manual_seed(0)
        q, k, v, cos, sin, keys, values = case(8, 4, 128, 2048, torch.float16, "cuda")
        place = torch.tensor([1999], device="cuda")
        first = attention.attend(q, k, v, cos, sin, keys, values, place, 0.1)
        for _ in range(50):
            assert torch.equal(attention.attend(q, k, v, cos, sin, keys, values, place, 0.1), first)

    @pytest.mark.parametrize("position", [-1, 64, 1 << 40])
    def test_a_position_outside_of_the_cache_is_nan_and_writes_nothing(self, position):
        q, k, v, cos, sin, keys, values = case(2, 2, 64, 64, torch.float16, "cuda")
        before = keys.clone(), values.clone()
        place = torch.tensor([position], device="cuda")
        assert attention.attend(q, k, v, cos, sin, keys, values, place, 0.1).isnan().all()
        assert torch.equal(keys, before[0])
        assert torch.equal(values, before[1])

    def test_an_unknown_width_goes_through_torch(self):
        check(2, 2, 80, 100, 50, torch.float16, "cuda", 2e-3)
