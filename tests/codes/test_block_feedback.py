"""The block code with error feedback: the same words by every way, the paper's without statistics, and what it is for."""

import pytest
import torch

from seedlm.codes.base import EncodeOptions, Facts, totals
from seedlm.codes.block import codec, packing
from seedlm.codes.block.encode import SEARCHES, BlockEncoder, encode_rows, reason_no_search
from seedlm.codes.block.format import PRESETS, parse_spec
from seedlm.codes.block.search.torch_search import brute_force
from seedlm.codes.encoded import encode
from seedlm.codes.feedback import feedback_for
from seedlm.codes.registry import parse_format
from seedlm.errors import FormatError, TensorError

CPU = torch.device("cpu")
FORMATS = {
    "blocks of 8": parse_spec("block-k8-c8-p3-q4-e4"),
    "blocks of 12": parse_spec("block-k9-c12-p4-q4-e4"),
    "blocks of 1": parse_spec("block-k6-c1-p1-q3-e4"),
    "a row in one": parse_spec("block-k7-c64-p4-q4-e3"),
}
FORMAT = FORMATS["blocks of 8"]
ROWS, COLUMNS, TOKENS = 75, 60, 6000  # no multiple of a block, nor of a panel of columns


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(columns=COLUMNS, mix=0.6):
    """X'X of inputs that are correlated, and of unequal size."""
    x = random(4 * columns, columns, seed=2) @ (torch.eye(columns) + mix * random(columns, columns, seed=3) / columns**0.5)
    x = x * random(columns, seed=5).mul(0.3).exp()
    return x.T @ x / len(x)


WEIGHT = random(ROWS, COLUMNS) * random(ROWS, 1, seed=1).mul(0.5).exp()
HESSIAN = inputs()
LARGEST = float(WEIGHT.abs().max())
FACTS = Facts(LARGEST, HESSIAN, TOKENS)


def search_for(weight, format):
    """The searches leave the same words, and the compiled one takes seconds to compile for each format."""
    return "torch" if weight.device == CPU and format is not FORMAT else "auto"


def words_of(facts=FACTS, weight=WEIGHT, pieces=ROWS, format=FORMAT, backend=None, settings=None):
    options = EncodeOptions(backend or search_for(weight, format), settings or {})
    encoder = BlockEncoder(format, facts, options, weight.device)
    return torch.cat([encoder.rows(piece, lambda weights: None)[0]["words"] for piece in weight.split(pieces)])


def decoded(words, format=FORMAT, weight=WEIGHT):
    return codec.dequantize_rows(words, codec.choose_exponent_bias(weight, format), weight.shape[1], format)


def output_error(coded, weight=WEIGHT, hessian=HESSIAN):
    """tr(D H D')"""
    error = (coded - weight).double()
    return float(((error @ hessian.double()) * error).sum())


def straightforward(weight, given, bias, format):
    """Block after block of each row by itself: sums in Python's integers, and every seed scored."""
    values, shift, size = given.values.long().tolist(), int(given.shift), format.block_size
    rows = []
    for row in weight.tolist():
        _, exponent = torch.frexp(torch.tensor(max(map(abs, row)), dtype=torch.float64))
        unit = 2.0 ** (int(exponent) - 22)
        errors, codes = [], []
        for first in range(0, len(row), size):
            here = range(first, min(first + size, len(row)))
            sums = [sum(error * values[k][j] for k, error in enumerate(errors)) for j in here]
            target = torch.zeros(1, size)
            target[0, : len(here)] = torch.tensor(
                [row[j] + total * (unit * 2.0**-shift) for j, total in zip(here, sums, strict=True)], dtype=torch.float64
            ).float()
            found, _ = brute_force(target, bias, format)
            codes.append(found)
            coded = codec.dequantize(found, bias, format)[0].tolist()
            missed = [round((row[j] - coded[j - first]) / unit) for j in here]
            errors += [max(-(1 << 24), min(1 << 24, error)) for error in missed]
        rows.append(codec.BlockCodes(*(torch.stack(fields, 1) for fields in zip(*codes, strict=True))))
    return packing.pack(*(torch.cat(fields) for fields in zip(*rows, strict=True)), format)


@pytest.mark.parametrize("name", FORMATS)
def test_words_are_those_of_a_plain_loop_over_blocks(name):
    format, weight = FORMATS[name], WEIGHT[:5]
    given = feedback_for(FACTS, format, CPU)
    assert given.step == format.block_size
    expected = straightforward(weight, given, codec.choose_exponent_bias(WEIGHT, format), format)
    assert torch.equal(words_of(weight=weight, format=format), expected)


@pytest.mark.parametrize("backend", [name for name in SEARCHES if not reason_no_search(name, CPU, FORMAT)])
@pytest.mark.parametrize("rounding", ["best", "nearest"])
def test_every_search_pieces_of_rows_and_threads_leave_the_same_words(backend, rounding):
    settings = {"rounding": rounding}
    expected = words_of(backend="torch", settings=settings)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for pieces in (ROWS, 32, 7):
                assert torch.equal(words_of(pieces=pieces, backend=backend, settings=settings), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", ["4", "3"])
def test_a_gpu_leaves_the_same_words(bits):
    gpu = torch.device("cuda")
    for format in (PRESETS[bits], FORMAT):
        expected = words_of(format=format)
        facts = Facts(LARGEST, HESSIAN.to(gpu), TOKENS)
        assert torch.equal(words_of(facts, WEIGHT.to(gpu), format=format).cpu(), expected)
        assert torch.equal(words_of(facts, WEIGHT.to(gpu), pieces=31, format=format).cpu(), expected)


class TestWithoutStatistics:
    """The paper's method, to the bit: each block by itself."""

    plain = staticmethod(lambda format=FORMAT: encode_rows(WEIGHT, codec.choose_exponent_bias(WEIGHT, format), format)[0])

    def test_codes_are_those_of_each_block_by_itself(self):
        blocks = torch.nn.functional.pad(WEIGHT[:9], (0, 4)).view(-1, 8)
        codes, _ = brute_force(blocks, codec.choose_exponent_bias(WEIGHT, FORMAT), FORMAT)
        fields = (field.view(9, 8, *field.shape[1:]) for field in codes)
        assert torch.equal(words_of(Facts(LARGEST))[:9], packing.pack(*fields, FORMAT))

    def test_no_tokens_are_no_feedback(self):
        assert torch.equal(words_of(Facts(LARGEST, HESSIAN, 0)), self.plain())

    @pytest.mark.parametrize("hessian", [torch.zeros(COLUMNS, COLUMNS), torch.eye(COLUMNS)], ids=["zeros", "independent"])
    def test_statistics_that_feed_nothing_back_change_nothing(self, hessian):
        assert torch.equal(words_of(Facts(LARGEST, hessian, TOKENS)), self.plain())
        assert not torch.equal(words_of(), self.plain())

    def test_the_importance_of_rows_changes_nothing(self):
        importance = random(ROWS, seed=7).exp()
        assert torch.equal(words_of(Facts(LARGEST, HESSIAN, TOKENS, importance)), words_of())


@pytest.mark.parametrize("name", ["blocks of 8", "blocks of 12"])
def test_it_lowers_the_output_error_at_more_error_of_the_weights(name):
    weight, hessian = random(64, 192), inputs(192)
    format, backend = FORMATS[name], search_for(weight, FORMATS[name])
    (plain, weights_alone), (fed, with_feedback) = (encode(weight, format, backend=backend, hessian=h) for h in (None, hessian))
    assert output_error(fed.dequantize(), weight, hessian) < 0.8 * output_error(plain.dequantize(), weight, hessian)
    assert weights_alone < with_feedback < 2 * weights_alone


def test_few_tokens_feed_back_little():
    """They are damped: with none to speak of, codes are nearly those of the weights alone."""
    plain, few, many = (decoded(words_of(Facts(LARGEST, HESSIAN, tokens))) for tokens in (0, 2, TOKENS))
    assert 0 < float((few - plain).norm()) < 0.5 * float((many - plain).norm())


@pytest.mark.parametrize("name", FORMATS)
def test_errors_that_are_reported_are_those_of_the_decoded_weight(name):
    format = FORMATS[name]
    encoder = BlockEncoder(format, FACTS, EncodeOptions(search_for(WEIGHT, format)), CPU)
    told = []
    parts, errors = encoder.rows(WEIGHT, told.append)
    coded = decoded(parts["words"], format)
    assert coded.shape == WEIGHT.shape
    error, norm = totals([errors])
    assert error == pytest.approx(float((coded.double() - WEIGHT.double()).square().sum()), rel=1e-12)
    assert norm == pytest.approx(float(WEIGHT.double().square().sum()), rel=1e-12)
    assert sum(told) == WEIGHT.numel()
    packing.check_codes(parts["words"], format.blocks_per_row(COLUMNS), format)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_rows_of_zeros_and_any_magnitude_are_coded(scale):
    weight = WEIGHT * scale
    weight[3] = 0
    coded = decoded(words_of(Facts(float(weight.abs().max()), HESSIAN, TOKENS), weight), weight=weight)
    assert not coded[3].any()
    assert float((coded - weight).norm() / weight.norm()) < 0.5


def test_bfloat16_is_coded_as_the_float32_that_it_is():
    assert torch.equal(words_of(weight=WEIGHT.bfloat16()), words_of(weight=WEIGHT.bfloat16().float()))


def test_coefficients_are_made_once_for_each_block_size():
    first = feedback_for(FACTS, FORMAT, CPU)
    assert feedback_for(Facts(1.0, HESSIAN, TOKENS), PRESETS["4"], CPU) is first  # blocks of 8, too
    assert feedback_for(FACTS, FORMATS["blocks of 12"], CPU) is not first
    assert feedback_for(FACTS, parse_format("trellis-r4-l12-t32-h32"), CPU) is not first


def test_what_cannot_be_is_refused():
    with pytest.raises(TensorError, match=r"1e\+31 is too large for error feedback, at most 1e\+30"):
        BlockEncoder(FORMAT, Facts(1e31, HESSIAN, TOKENS), EncodeOptions(), CPU)
    BlockEncoder(FORMAT, Facts(1e31), EncodeOptions(), CPU)
    with pytest.raises(TensorError, match=r"hessian must be \[60, 60\]"):
        encode(WEIGHT, FORMAT, hessian=torch.eye(59))
    with pytest.raises(FormatError, match="leave out feedback here"):
        encode(WEIGHT, FORMAT, feedback="own text")
    with pytest.raises(FormatError, match="feedback must be a text, got 5"):
        encode(WEIGHT, FORMAT, feedback=5)
