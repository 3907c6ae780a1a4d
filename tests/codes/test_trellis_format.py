"""The trellis format object: parameters, specification, sizes."""

import dataclasses

import pytest

from seedlm.codes.base import stored_bits
from seedlm.codes.trellis.format import FAST_PRESETS, PRESETS, TrellisFormat, from_dict, parse_spec
from seedlm.errors import FormatError


@pytest.mark.parametrize("format", [*PRESETS.values(), *FAST_PRESETS.values()], ids=str)
def test_specification_and_json_are_read_back(format):
    assert parse_spec(format.spec) == format
    assert from_dict(format.to_dict()) == format


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0},
        {"rate": 9},
        {"rate": 4.0},
        {"rate": True},
        {"rate": 7, "state_bits": 12},
        {"state_bits": 14},
        {"sequence_rows": 0},
        {"sequence_rows": 100},
        {"transform": 96},
        {"transform": 0},
    ],
    ids=str,
)
def test_a_parameter_out_of_range_is_refused(change):
    with pytest.raises(FormatError, match=next(iter(change))):
        TrellisFormat(**{"rate": 4, **change})


@pytest.mark.parametrize(
    "text", ["", "4", "trellis", "trellis-r4-l16-t128", "block-k16-c8-p3-q4-e4", "trellis-r4-l16-t128-h128 "]
)
def test_another_text_is_no_specification(text):
    assert parse_spec(text) is None


def test_unknown_and_missing_keys_are_refused():
    data = TrellisFormat(rate=4).to_dict()
    for bad in ({**data, "extra": 1}, {k: v for k, v in data.items() if k != "rate"}, {**data, "family": "block"}):
        with pytest.raises(FormatError):
            from_dict(bad)


def test_every_stored_bit_is_counted():
    format = TrellisFormat(rate=3, sequence_rows=64)
    shapes = {name: (part.dtype, part.shape) for name, part in format.parts(33, 5).items()}
    assert shapes == {"words": ("int32", (2, 15)), "scales": ("float16", (33,)), "scale": ("float32", (1,))}
    assert stored_bits(format, 33, 5) == 32 * 30 + 16 * 33 + 32
    assert stored_bits(format, 4096, 4096) / 4096**2 < 3.02
    assert format.strips(33) == [(0, 2)]
    assert format.strips(150) == [(0, 2), (2, 2), (4, 1)]


def test_the_format_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrellisFormat(rate=4).rate = 3
