"""The encoder's search: against all streams on tiny machines, and by what must hold on real ones."""

import itertools

import numpy as np
import pytest
import torch

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import FAST_PRESETS, Trellis, TrellisFormat
from seedlm.codes.trellis.viterbi import cost, reason_no_search, reference, viterbi
from seedlm.errors import BackendError, TensorError


def machine(rate: int, state_bits: int, cost_shift: int = 3) -> Trellis:
    return Trellis(rate=rate, state_bits=state_bits, multiplier=0x83DCD12D, cost_shift=cost_shift)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * codec.VALUE_STD


def stream_cost(symbols: torch.Tensor, targets: torch.Tensor, valid: int, trellis: Trellis) -> torch.Tensor:
    """Cost int64 [M] of whole streams [M, T] for targets [T]."""
    values = codec.state_values(codec.windows(symbols, trellis.rate, trellis.state_bits), trellis.multiplier)
    one = torch.ones(1)
    return cost.branch_costs(cost.scaled_targets(targets, one, trellis), values, one, trellis)[:, :valid].long().sum(1)


@pytest.mark.parametrize("root", [0.125, 1.0, 2.375, 8.0])
@pytest.mark.parametrize("shift", [-1, 0, 3])
def test_branch_cost_is_the_half_precision_number(shift, root):
    """With one rounding for each fused product and sum, which float64 gives exactly, as a GPU does it."""
    trellis, roots = machine(2, 12, shift), torch.tensor(root)
    targets = torch.cat([normal(500) * 2, torch.tensor([0.0, -510.0, 1e30, -1e30, 0.0625])])
    values = torch.arange(-510, 511, dtype=torch.int16)
    scaled = cost.scaled_targets(targets, roots, trellis)
    with np.errstate(over="ignore"):
        difference = scaled.numpy().astype(np.float64)[:, None] - root * (values.numpy() * 2.0**-shift)
        exact = 1024 + difference.astype(np.float16).astype(np.float64) ** 2
        rounded = exact.astype(np.float16)
        expected = rounded.view(np.int16).astype(np.int32) - 0x6400
    got = cost.branch_costs(scaled[:, None], values, roots, trellis)
    assert torch.equal(got, torch.from_numpy(expected))
    assert (np.abs(got.numpy() - (exact - 1024)) <= 0.5)[rounded < 2048].all()
    assert int(got.max()) <= cost.HIGHEST_BRANCH_COST


def test_roots_are_eighths_within_their_range():
    roots = cost.row_roots(torch.tensor([0.0, 1e-9, 1.0, 1.3, 1e9]))
    assert roots.tolist() == [0.125, 0.125, 1.0, 1.125, 8.0]


@pytest.mark.parametrize(("rate", "state_bits", "rows"), [(1, 4, 12), (1, 5, 13), (2, 4, 6), (2, 6, 7), (3, 6, 4)])
def test_no_stream_through_the_chosen_seam_is_better(rate, state_bits, rows):
    trellis = machine(rate, state_bits)
    targets = normal(8, rows)
    everything = torch.tensor(list(itertools.product(range(1 << rate), repeat=rows)))
    seams = codec.windows(everything, rate, state_bits)[:, 0] % trellis.groups
    for valid in (rows, rows - 2):
        roots = (torch.arange(rows) < valid).float().expand(targets.shape)
        found = reference.search(targets, roots, trellis, rows // 2)
        for symbols, target in zip(found, targets, strict=True):
            costs = stream_cost(everything, target, valid, trellis)
            seam = codec.windows(symbols[None], rate, state_bits)[0, 0] % trellis.groups
            assert int(stream_cost(symbols[None], target, valid, trellis)) == int(costs[seams == seam].min())


@pytest.mark.parametrize("rows", [32, 64, 96])
@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5, 6])
def test_a_valid_code_encodes_to_itself(rate, rows):
    format = TrellisFormat(rate=rate, state_bits=12, sequence_rows=rows)
    generator = torch.Generator().manual_seed(rate)
    words = torch.randint(-(1 << 31), 1 << 31, (6, rows * rate // 32), generator=generator).to(torch.int32)
    values = codec.decode_streams(words, format.trellis)
    found, reached = viterbi(values.float(), rows, format)
    assert torch.equal(reached, values)
    assert torch.equal(codec.decode_streams(found, format.trellis), values)


def test_rows_that_do_not_count_change_nothing():
    format = TrellisFormat(rate=3, state_bits=12, sequence_rows=64)
    targets = normal(5, 64)
    other = targets.clone()
    other[:, 50:] = 1e6
    for a, b in zip(viterbi(targets, 50, format), viterbi(other, 50, format), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rate", [2, 4])
def test_rows_that_do_not_count_help_the_others(rate):
    format = TrellisFormat(rate=rate, state_bits=12, sequence_rows=64)
    targets = normal(16, 64)
    error = [((viterbi(targets, valid, format)[1] - targets)[:, :33] ** 2).mean() for valid in (64, 33)]
    assert error[1] < error[0]


@pytest.mark.parametrize("rate", [2, 4])
def test_rows_that_count_more_are_coded_better(rate):
    format = TrellisFormat(rate=rate, state_bits=12)
    targets = normal(16, 64)
    weights = torch.where(torch.arange(64) % 2 == 0, 4.0, 0.25)
    plain, weighted = (
        ((viterbi(targets, 64, format, row_weights=given)[1] - targets) ** 2).mean(0) for given in (None, weights)
    )
    assert (weighted * weights).mean() < 0.8 * (plain * weights).mean()
    assert weighted[::2].mean() < plain[::2].mean() < weighted[1::2].mean()


def test_equal_weights_are_no_weights():
    format = TrellisFormat(rate=3, state_bits=12)
    targets = normal(5, 64)
    for weights in (torch.ones(64), torch.ones(5, 64)):
        assert torch.equal(viterbi(targets, 64, format, row_weights=weights)[0], viterbi(targets, 64, format)[0])


@pytest.mark.parametrize("format", FAST_PRESETS.values(), ids=str)
def test_normal_weights_are_coded_near_the_bound(format):
    targets = normal(16, 128) / 1.1
    _, values = viterbi(targets, 128, format)
    error = float(((values - targets) ** 2).mean() / targets.square().mean())
    assert 4.0**-format.rate < error < 1.6 * 4.0**-format.rate + 6e-4


@pytest.mark.parametrize("rate", [1, 4, 6])
def test_any_target_gives_a_closed_stream(rate):
    """Costs saturate far from the values' range; the stream must still close, and its values be those of its words."""
    format = TrellisFormat(rate=rate, state_bits=12, sequence_rows=32)
    targets = torch.cat([torch.full((1, 32), 1e30), torch.full((1, 32), -1e30), torch.zeros(1, 32), normal(2, 32) * 1e4])
    words, values = viterbi(targets, 32, format)
    assert torch.equal(codec.decode_streams(words, format.trellis), values)
    assert values[0].float().mean() > 150
    assert values[1].float().mean() < -150


def test_a_batch_is_its_parts():
    format = TrellisFormat(rate=2, state_bits=12, sequence_rows=32)
    targets = normal(37, 32)
    words, values = viterbi(targets, 32, format)
    for part in (slice(0, 1), slice(1, 4), slice(4, 37)):
        assert torch.equal(viterbi(targets[part], 32, format)[0], words[part])
        assert torch.equal(viterbi(targets[part], 32, format)[1], values[part])


def test_no_sequences_give_no_words():
    words, values = viterbi(torch.zeros(0, 64), 64, TrellisFormat(rate=3, state_bits=12))
    assert words.shape == (0, 6)
    assert values.shape == (0, 64)


def cases():
    """Rate, state bits, sequences, rows, valid rows, factor on the targets: odd counts, short and long, far out of range.

    Every other rate with row weights.
    """
    for state_bits, rates in ((12, range(1, 7)), (16, range(1, 9))):
        for rate in rates:
            yield pytest.param(rate, state_bits, 3, 64, 64, 1.0, id=f"r{rate}-l{state_bits}")
    yield pytest.param(4, 12, 35, 96, 77, 1.0, id="padding rows, more than one vector")
    yield pytest.param(2, 12, 5, 32, 1, 1.0, id="one row counts")
    yield pytest.param(3, 12, 4, 128, 128, 30.0, id="saturated costs")
    yield pytest.param(5, 12, 1, 256, 256, 1.0, id="one long sequence")


@pytest.mark.parametrize(("rate", "state_bits", "count", "rows", "valid", "factor"), list(cases()))
@pytest.mark.parametrize("backend", ["numba", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backends_give_the_reference_bits(backend, rate, state_bits, count, rows, valid, factor):
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if reason := reason_no_search(backend, device):
        pytest.skip(reason)
    format = TrellisFormat(rate=rate, state_bits=state_bits)
    targets = normal(count, rows, seed=rate) * factor
    weights = None if rate % 2 else torch.exp(normal(count, rows, seed=9) / 100)
    expected = viterbi(targets, valid, format, row_weights=weights, backend="reference")
    given = None if weights is None else weights.to(device)
    found = viterbi(targets.to(device), valid, format, row_weights=given, backend=backend)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize(
    ("targets", "valid"),
    [(torch.zeros(2, 33), 33), (torch.zeros(2, 32, dtype=torch.float64), 32), (torch.zeros(32), 32), (torch.zeros(2, 32), 0)],
)
def test_other_inputs_are_refused(targets, valid):
    with pytest.raises(TensorError):
        viterbi(targets, valid, TrellisFormat(rate=2))


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(BackendError, match="NVIDIA"):
        viterbi(torch.zeros(2, 32), 32, TrellisFormat(rate=2), backend="cuda")
    with pytest.raises(BackendError, match="triton"):
        viterbi(torch.zeros(2, 32), 32, TrellisFormat(rate=2), backend="triton")
