"""Error feedback: its algebra against plain float64, its bytes against plain integers, and what it is for."""

import importlib.util
import math
from fractions import Fraction

import pytest
import torch

from seedlm.codes.feedback import coefficients, damping_for, error_integers, feedback
from seedlm.errors import TensorError


def products(width, tokens=None, seed=0, mix=0.6):
    """X'X of inputs that are correlated, and of unequal size."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * width, width, generator=random, dtype=torch.float64)
    x = x @ (torch.eye(width) + mix * torch.randn(width, width, generator=random) / width**0.5).double()
    x *= torch.randn(width, generator=random).double().exp()
    return x.T @ x


def weights(*shape, seed=1, sigma=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * sigma


def rounding(unit):
    """A code: numbers to the nearest multiple of a unit."""

    def encode(target, first):
        assert target.is_contiguous()
        codes = (target / unit).round()
        return codes.to(torch.int32), codes * unit

    return encode


def output_error(weight, coded, hessian):
    error = (weight - coded).double()
    return float(((error @ hessian) * error).sum())


def unit_factor(hessian, damping):
    """M of H = M S M', textbook."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return upper / upper.diagonal()


@pytest.mark.parametrize("width", [1, 2, 3, 63, 64, 65, 130, 200])
def test_coefficients_are_the_unit_triangular_factor(width):
    hessian = products(width)
    found = coefficients(hessian)
    values = found.values * 2.0 ** -found.shift.double()
    assert torch.equal(found.values, found.values.round())
    torch.testing.assert_close(values, unit_factor(hessian, 0.01).triu(1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("width", "step"), [(8, 2), (65, 8), (64, 64), (50, 7), (5, 9)])
def test_blocks_of_columns_take_the_block_form(width, step):
    """H = M S M' with S of blocks: so M' inv(H) M has no element outside of the blocks."""
    hessian = products(width)
    found = coefficients(hessian, step=step, damping=0.0)
    unit = found.values * 2.0 ** -found.shift.double() + torch.eye(width, dtype=torch.float64)
    middle = torch.linalg.solve_triangular(unit, torch.linalg.solve_triangular(unit, hessian, upper=True).T, upper=True)
    block = torch.arange(width) // step
    middle /= (middle.diagonal()[:, None] * middle.diagonal()).sqrt()
    assert middle[block[:, None] != block].abs().max() < 1e-4 if width > step else not found.values.any()


@pytest.mark.parametrize("step", [1, 3])
def test_no_sum_exceeds_what_float64_holds_exactly(step):
    found = coefficients(products(90, mix=3.0), step=step)
    assert 2**24 * float(found.values.abs().sum(0).max()) < 2**53


@pytest.mark.parametrize(("out", "width", "step"), [(5, 40, 1), (3, 130, 1), (4, 70, 3), (2, 9, 16)])
def test_targets_are_what_integers_say(out, width, step):
    """Every target, bit by bit, from Python's own integers and fractions."""
    weight = weights(out, width) * torch.tensor([1e-6, 1.0, 300.0, 1e4, 0.0])[:out, None]
    given = coefficients(products(width), step=step)
    targets = []

    def encode(target, first):
        targets.append(target)
        return rounding(0.25)(target, first)

    _, coded = feedback(weight, given, encode)
    exact = [[int(v) for v in row] for row in given.values.tolist()]
    for r in range(out):
        largest = weight[r].abs().max().item()
        unit = Fraction(2) ** (math.frexp(largest)[1] - 22)
        missed = [
            max(-(2**24), min(2**24, round((Fraction(w) - Fraction(q)) / unit)))
            for w, q in zip(weight[r].tolist(), coded[r].tolist(), strict=True)
        ]
        for j in range(width):
            taken = sum(missed[k] * exact[k][j] for k in range(j // step * step)) * unit / 2 ** int(given.shift)
            expected = torch.tensor(float(Fraction(weight[r, j].item()) + taken), dtype=torch.float64).float()
            assert torch.cat(targets, 1)[r, j] == expected


def test_rows_matrices_and_threads_make_no_difference():
    weight, hessians = weights(3, 24, 100), torch.stack([products(100, seed=s) for s in range(3)])
    given = coefficients(hessians)
    codes, together = feedback(weight, given, rounding(0.5))
    assert len(codes) == 100
    threads = torch.get_num_threads()
    for i in range(3):
        torch.set_num_threads(1 + i)
        alone = coefficients(hessians[i].clone())
        assert torch.equal(alone.values, given.values[i])
        for rows in (slice(0, 7), slice(7, 24)):
            split, part = feedback(weight[i, rows], alone, rounding(0.5))
            assert torch.equal(part, together[i, rows])
            assert all(torch.equal(c, whole[i, rows]) for c, whole in zip(split, codes, strict=True))
    torch.set_num_threads(threads)
    shared = feedback(weight, coefficients(hessians[0]), rounding(0.5))[1]
    assert torch.equal(shared[2], feedback(weight[2], coefficients(hessians[0]), rounding(0.5))[1])


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "step"), [(1, 1), (96, 1), (300, 1), (130, 8), (1536, 1)])
def test_the_gpu_makes_the_same_bytes(width, step):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight, hessian = weights(2, 65, width), torch.stack([products(width, seed=s) for s in range(2)])
    here, there = coefficients(hessian, step=step), coefficients(hessian.cuda(), step=step)
    assert torch.equal(here.values, there.values.cpu())
    assert torch.equal(here.shift, there.shift.cpu())
    mine = feedback(weight, here, rounding(0.5))
    theirs = feedback(weight.cuda(), there, rounding(0.5))
    assert torch.equal(mine[1], theirs[1].cpu())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(mine[0], theirs[0], strict=True))


@pytest.mark.parametrize("step", [1, 4])
def test_output_errors_shrink(step):
    weight, hessian = weights(64, 96), products(96, tokens=60)
    plain = feedback(weight, None, rounding(0.5))[1]
    fed = feedback(weight, coefficients(hessian, step=step), rounding(0.5))[1]
    assert torch.equal(plain, (weight / 0.5).round() * 0.5)
    assert output_error(weight, fed, hessian) < 0.5 * output_error(weight, plain, hessian)


def test_larger_steps_lose_little_by_little():
    weight, hessian = weights(200, 96), products(96)
    errors = [
        output_error(weight, feedback(weight, coefficients(hessian, step=s), rounding(0.5))[1], hessian) for s in (1, 8, 96)
    ]
    assert errors == sorted(errors)


def test_columns_without_input_neither_give_nor_take():
    hessian = products(70)
    dead = torch.zeros(70, dtype=torch.bool)
    dead[[0, 13, 69]] = True
    hessian[dead], hessian[:, dead] = 0, 0
    given = coefficients(hessian)
    assert not given.values[dead].any()
    assert not given.values[:, dead].any()
    assert given.values[~dead].any()


@pytest.mark.parametrize("hessian", [torch.zeros(9, 9), products(9), products(9).float()])
def test_infinite_damping_and_no_input_feed_nothing_back(hessian):
    damping = math.inf if hessian.any() else 0.01
    assert not coefficients(hessian, damping=damping).values.any()


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_tokens_than_columns_are_no_reason_for_nan(tokens, damping):
    hessian = products(80, tokens)
    given = coefficients(hessian, damping=damping)
    coded = feedback(weights(6, 80), given, rounding(0.5))[1]
    assert given.values.isfinite().all()
    assert coded.isfinite().all()


def test_few_tokens_are_damped_towards_no_feedback():
    assert damping_for(10_000_000, 1000) == pytest.approx(0.01, rel=0.02)
    assert damping_for(16384, 1024) == pytest.approx(0.04, rel=0.1)
    assert damping_for(10, 1000) > 5
    assert damping_for(0, 1000) == math.inf
    assert [damping_for(n, 64) for n in (1, 10, 100, 1000)] == sorted(
        (damping_for(n, 64) for n in (1, 10, 100, 1000)), reverse=True
    )
    hessian, few = products(64, 3), damping_for(3, 64)
    values, damped = (c.values * 2.0 ** -c.shift.double() for c in (coefficients(hessian), coefficients(hessian, damping=few)))
    assert damped.norm() < 0.5 * values.norm()


@pytest.mark.parametrize("sigma", [1e-30, 1e-8, 1.0, 1e4, 1e30])
def test_any_magnitude_gives_the_same_codes(sigma):
    scale = 2.0 ** round(math.log2(sigma))
    weight, given = weights(9, 66), coefficients(products(66))
    weight[3] = 0
    codes, coded = feedback(weight, given, rounding(0.5))
    scaled_codes, scaled = feedback(weight * scale, given, rounding(0.5 * scale))
    assert torch.equal(scaled, coded * scale)
    assert all(torch.equal(a, b) for a, b in zip(codes, scaled_codes, strict=True))
    assert not coded[3].any()


def test_the_unit_of_statistics_does_not_matter():
    hessian = products(40)
    assert torch.equal(coefficients(hessian).values, coefficients(hessian * 2.0**-30).values)


def test_columns_come_in_order_with_a_shorter_last_step():
    seen = []

    def encode(target, first):
        seen.append((first, target.shape[-1]))
        return None, target

    coded = feedback(weights(2, 11), coefficients(products(11), step=4), encode)[1]
    assert seen == [(0, 4), (4, 4), (8, 3)]
    assert torch.equal(coded, weights(2, 11))


def test_outliers_saturate_and_stay_finite():
    weight = weights(4, 64)
    weight[1, 5] = 1e4

    def nothing(target, first):
        return None, torch.zeros_like(target)

    assert feedback(weight, coefficients(products(64, mix=5.0)), nothing)[1].isfinite().all()


@pytest.mark.parametrize(
    ("hessian", "options", "message"),
    [
        (torch.ones(2, 3), {}, "square"),
        (torch.ones(2, 2, dtype=torch.int32), {}, "float"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), {}, "NaN or Inf"),
        (-torch.eye(2), {}, "negative diagonal"),
        (torch.eye(2), {"damping": math.nan}, "damping"),
        (torch.eye(2), {"step": 0}, "step"),
    ],
)
def test_statistics_that_are_none_are_refused(hessian, options, message):
    with pytest.raises(TensorError, match=message):
        coefficients(hessian, **options)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 4, dtype=torch.bfloat16), "float32"),
        (torch.ones(4), "float32"),
        (torch.full((2, 4), math.inf), "NaN or Inf"),
        (torch.ones(2, 5), "4 columns, the weight has 5"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight, message):
    with pytest.raises(TensorError, match=message):
        feedback(weight, coefficients(torch.eye(4)), rounding(1.0))


@pytest.mark.parametrize("step", [1, 3])
def test_a_panel_can_be_coded_by_integers_alone(step):
    """As a kernel may: 64-bit integers for sums, and the same bytes."""
    weight, given = weights(7, 150), coefficients(products(150), step=step)

    def by_integers(panel):
        values, fed = panel.values.long(), panel.fed.long()
        codes, coded = [], torch.empty_like(panel.weight)
        errors = torch.zeros(panel.weight.shape, dtype=torch.int64)
        for j in range(0, panel.weight.shape[1], panel.step):
            here = slice(j, j + panel.step)
            sums = fed[:, here] + sum(errors[:, k, None] * values[k, here] for k in range(j))
            code, coded[:, here] = rounding(0.5)((panel.weight[:, here] + sums * panel.scale).float(), panel.first + j)
            codes.append(code)
            errors[:, here] = error_integers(panel.weight[:, here], coded[:, here], panel.unit).long()
        return codes, coded

    expected, found = (feedback(weight, given, rounding(0.5), encode_panel=panel) for panel in (None, by_integers))
    assert torch.equal(expected[1], found[1])
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))


@pytest.mark.parametrize("width", [5, 64, 130])
def test_the_compiled_factorization_has_the_same_bits(width, monkeypatch):
    """Inputs of very unequal size, and two columns that are alike, whose pivot is nothing but rounding."""
    pytest.importorskip("numba")
    x = torch.randn(2, 3 * width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-3, 3, width, dtype=torch.float64)
    x[1, :, -1] = x[1, :, 0]
    compiled = coefficients(x.mT @ x, damping=0.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = coefficients(x.mT @ x, damping=0.0)
    assert torch.equal(compiled.values, plain.values)
    assert torch.equal(compiled.shift, plain.shift)


def test_a_diagonal_that_rounding_made_negative_is_an_input_that_is_nothing():
    """Statistics are kept as float16, so one that the transform leaves without input may come out below zero."""
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[3, 3] = 0
    expected = coefficients(hessian)
    hessian[3, 3] = -1e-4
    found = coefficients(hessian)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.shift, expected.shift)
