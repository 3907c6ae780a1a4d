"""The trellis with error feedback: the same words by every way, and what feedback and importances are for."""

import pytest
import torch

from seedlm.codes import hadamard
from seedlm.codes.base import EncodeOptions, Facts
from seedlm.codes.feedback import feedback, feedback_for
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.columns import row_weights
from seedlm.codes.trellis.encode import TrellisEncoder
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.viterbi import viterbi

FORMAT = TrellisFormat(rate=3, state_bits=12, sequence_rows=64, transform=32)
ROWS, COLUMNS = 150, 70


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = random(ROWS, COLUMNS) * random(ROWS, 1, seed=1).mul(0.5).exp()
INPUTS = random(600, COLUMNS, seed=2) @ (torch.eye(COLUMNS) + 0.2 * random(COLUMNS, COLUMNS, seed=3))
HESSIAN = INPUTS.T @ INPUTS / 600
IMPORTANCE = random(ROWS, seed=4).exp()
LARGEST = float(WEIGHT.abs().max())
FACTS = {
    "plain": Facts(LARGEST),
    "feedback": Facts(LARGEST, HESSIAN, 600),
    "importance": Facts(LARGEST, HESSIAN, 600, IMPORTANCE),
}


def encode(facts, weight=WEIGHT, pieces=ROWS):
    encoder = TrellisEncoder(FORMAT, tuple(weight.shape), facts, EncodeOptions("auto", {}), weight.device)
    found = [encoder.rows(piece, lambda weights: None)[0] for piece in weight.split(pieces)]
    return {name: torch.cat([parts[name] for parts in found]) for name in found[0]} | encoder.rest()


def row_errors(parts):
    """Squared output error of each row, per input."""
    decoded = codec.dequantize(parts["words"], parts["scales"], parts["scale"], FORMAT, (ROWS, COLUMNS))
    error = (decoded - WEIGHT).double()
    return ((error @ HESSIAN.double()) * error).sum(1)


@pytest.fixture(scope="module")
def coded():
    return {name: encode(facts) for name, facts in FACTS.items()}


@pytest.mark.parametrize("name", FACTS)
def test_pieces_of_rows_make_no_difference(coded, name):
    parts = encode(FACTS[name], pieces=64)
    assert all(torch.equal(parts[key], tensor) for key, tensor in coded[name].items())


def test_feedback_lowers_output_errors_and_importance_what_they_cost(coded):
    errors = {name: row_errors(parts) for name, parts in coded.items()}
    assert errors["feedback"].sum() < 0.6 * errors["plain"].sum()
    assert (errors["importance"] * IMPORTANCE).sum() < 0.8 * (errors["feedback"] * IMPORTANCE).sum()


def test_words_are_those_of_one_search_after_another(coded):
    """Column by column through the definition, in place of panels."""
    rotated = hadamard.forward(WEIGHT, FORMAT.transform)
    parts = coded["feedback"]
    units = parts["scales"].float() * parts["scale"]
    given = feedback_for(FACTS["feedback"], FORMAT, torch.device("cpu"))
    streams = []
    for start, valid, padded in ((0, 64, 64), (64, 64, 64), (128, 22, 32)):
        rows = slice(start, start + valid)

        def column(target, first, rows=rows, valid=valid, padded=padded):
            targets = torch.zeros(1, padded)
            targets[0, :valid] = target[:, 0] / units[rows]
            words, values = viterbi(targets, valid, FORMAT)
            return words, values[0, :valid, None].float() * units[rows, None]

        streams.append(torch.cat(feedback(rotated[rows].contiguous(), given, column)[0]))
    assert torch.equal(codec.assemble(streams, FORMAT), parts["words"])


def test_no_tokens_are_no_feedback(coded):
    assert torch.equal(encode(Facts(LARGEST, torch.zeros(COLUMNS, COLUMNS), 0))["words"], coded["plain"]["words"])


def test_statistics_of_zeros_feed_nothing_back(coded):
    parts = encode(Facts(LARGEST, torch.zeros(COLUMNS, COLUMNS), 5))
    assert torch.equal(parts["words"], coded["plain"]["words"])


def test_coefficients_are_made_once_for_all_that_read_an_input():
    device = torch.device("cpu")
    first = feedback_for(FACTS["feedback"], FORMAT, device)
    assert feedback_for(Facts(1.0, HESSIAN, 600), FORMAT, device) is first
    assert feedback_for(Facts(1.0, HESSIAN.clone(), 600), FORMAT, device) is not first
    assert feedback_for(Facts(1.0, HESSIAN, 10), FORMAT, device) is not first


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_rows_of_zeros_and_any_magnitude_are_coded(scale):
    weight = WEIGHT[:40] * scale
    weight[3] = 0
    facts = Facts(float(weight.abs().max()), HESSIAN, 600, IMPORTANCE[:40])
    parts = encode(facts, weight, pieces=40)
    decoded = codec.dequantize(parts["words"], parts["scales"], parts["scale"], FORMAT, (40, COLUMNS))
    assert not decoded[3].any()
    assert ((decoded - weight).norm() / weight.norm()) < 0.35


def test_row_weights_have_the_median_one():
    units, importance = torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 0.5])
    assert row_weights(importance, units).tolist() == [0.25, 1.0, 0.0, 2.0]
    assert row_weights(torch.zeros(4), units).tolist() == [1.0] * 4
    assert row_weights(importance * 1e-30, units * 1e-10).tolist() == pytest.approx([0.25, 1.0, 0.0, 2.0])
