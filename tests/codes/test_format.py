"""The format object: its arithmetic, its limits, its written forms."""

import pytest

from seedlm.codes.base import stored_bits
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.registry import format_from_dict, parse_format
from seedlm.errors import FormatError


def test_presets_4_and_3_are_the_papers_configurations():
    four, three = PRESETS["4"], PRESETS["3"]
    assert (four.block_bits, four.bits_per_weight) == (32, 4.0)
    assert (three.block_bits, three.bits_per_weight) == (36, 3.0)
    assert four.num_seeds == three.num_seeds == 65535


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_bits_of_its_name_and_suits_every_search(name):
    format = PRESETS[name]
    assert format.bits_per_weight == float(name)
    assert format.seed_bits <= 16
    assert format.block_size <= 16
    assert format.num_coefficients <= 4


def test_stored_bits_count_tails_padding_and_bias():
    three = PRESETS["3"]
    assert three.blocks_per_row(100) == 9
    assert three.words_per_row(100) == 11  # 324 bits
    assert stored_bits(three, 7, 100) == 7 * 11 * 32 + 32
    assert three.blocks_per_group == 8


@pytest.mark.parametrize("spec", ["4", "3", "block-k24-c20-p5-q3-e6", "block-k2-c1-p1-q2-e1"])
def test_written_forms_read_back(spec):
    format = parse_format(spec, "block")
    assert parse_format(format.spec) == format
    assert format_from_dict(format.to_dict()) == format


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed_bits": 25}, "seed_bits must be an integer from 2 to 24, got 25"),
        ({"block_size": 0}, "block_size must be an integer from 1 to 64, got 0"),
        ({"block_size": True}, "block_size must be an integer from 1 to 64, got True"),
        ({"num_coefficients": 9}, "num_coefficients must be an integer from 1 to 8, got 9"),
        ({"num_coefficients": 4, "block_size": 3}, r"must not exceed block_size \(3\), got 4"),
        ({"seed_bits": 24, "num_coefficients": 8, "coefficient_bits": 8}, "must fit 63 bits, .* takes 92"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_formats_are_refused(change, message):
    with pytest.raises(FormatError, match=message):
        BlockFormat(**{"block_size": 8, "num_coefficients": 3, **change})


@pytest.mark.parametrize("text", ["5.5", "", "block-k16-c8-p3", "block-k16-c8-p3-q4-e4 ", "trellis-k16-c8-p3-q4-e4"])
def test_unknown_specifications_are_refused(text):
    with pytest.raises(FormatError, match=r"unknown format .* presets are 5, 4.5, 4, 3.5, 3, 2.5, 2 \(bits"):
        parse_format(text, "block")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be a JSON object, got list"),
        ({"family": "lattice"}, "unknown format family 'lattice', known: 'block'"),
        ({"family": "block", "seed_bits": 16}, "has the keys .* got"),
        ({**PRESETS["4"].to_dict(), "extra": 1}, "has the keys .* got"),
        ({**PRESETS["4"].to_dict(), "seed_bits": 16.0}, "seed_bits must be an integer"),
    ],
    ids=["list", "family", "missing", "extra", "float"],
)
def test_json_forms_are_checked(data, message):
    with pytest.raises(FormatError, match=message):
        format_from_dict(data)


@pytest.mark.parametrize("bits", ["3.5", 3.5, PRESETS["3.5"], PRESETS["3.5"].spec], ids=["text", "number", "format", "spec"])
def test_a_format_is_told_in_any_of_its_forms(bits):
    assert parse_format(bits, "block") == PRESETS["3.5"]


@pytest.mark.parametrize("wrong", [6, 3.7, float("nan"), None, ["4"], True], ids=str)
def test_what_is_no_format_is_refused(wrong):
    with pytest.raises(FormatError, match="unknown format"):
        parse_format(wrong, "block")
