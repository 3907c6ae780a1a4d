"""The trellis format: which rate, how many state bits, how long the sequences, how large the input transform.

Glossary:

    R   rate            stored bits of a weight
    L   state_bits      bits of a state: the window of the stream that a weight is computed from
    T   sequence_rows   rows of one column that share a cyclic stream; a matrix' last strip may be shorter
    B   transform       largest block of the Hadamard transform along the inputs
    S   segments        ceil(out_features / 32); a segment is 32 rows and takes R words a column

A weight [out, in] is stored as `words` int32 [S, in * R], `scales` float16 [out] and `scale` float32 [1] (`codec`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

from seedlm.codes.base import CODES, Part, reason_no_smaller
from seedlm.errors import FormatError

SEGMENT_ROWS: Final = 32
"""Rows of a segment: R bits of 32 weights are R whole words."""

STATE_BITS: Final = (12, 16)

MULTIPLIERS: Final[Mapping[int, int]] = {12: 0x5BEBA253, 16: 0x83DCD12D}
"""By state bits: the factor that spreads a state over 32 bits before its bytes are added. The best of 260 and of 40 random
odd numbers at 3 bits (docs/log/quality.md)."""

COST_SHIFTS: Final[Mapping[int, int]] = {1: 3, 2: 3, 3: 2, 4: 1, 5: 1, 6: 0, 7: -1, 8: -1}
"""By rate: how far squared errors are scaled down (by 4^shift) before they are rounded to the encoder's 16-bit costs."""


@dataclass(frozen=True, kw_only=True)
class Trellis:
    """The state machine behind a format: all that the encoder's search needs to know. Any L from R up, for tests too.

    A state s has L bits. Its successors are (s >> R) | (new << (L - R)), so the 2^R predecessors of a state are those that
    share its lower L - R bits as their upper ones: a *group*. Path costs are kept for groups.
    """

    rate: int
    state_bits: int
    multiplier: int
    cost_shift: int

    @property
    def states(self) -> int:
        return 1 << self.state_bits

    @property
    def branches(self) -> int:
        """Predecessors of a state, and successors: 2^R."""
        return 1 << self.rate

    @property
    def groups(self) -> int:
        """Sets of states with the same successors: 2^(L-R)."""
        return 1 << (self.state_bits - self.rate)


@dataclass(frozen=True, kw_only=True)
class TrellisFormat:
    """Overlapping seeds: a weight is a fixed function of an L-bit window of its column's stream, R bits on from row to row.

    Raises FormatError if a parameter is not an integer in its range. With 12 state bits the rate is at most 6, so that a
    state depends on more than one weight's bits.
    """

    family: ClassVar[str] = "trellis"

    rate: int
    state_bits: int = 16
    sequence_rows: int = 256
    transform: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int:
                raise FormatError(f"{field.name} must be an integer, got {value!r:.80}")
        if self.state_bits not in STATE_BITS:
            raise FormatError(f"state_bits must be one of {STATE_BITS}, got {self.state_bits}")
        highest = 8 if self.state_bits == 16 else 6
        if not 1 <= self.rate <= highest:
            raise FormatError(f"rate must be an integer from 1 to {highest} with {self.state_bits} state bits, got {self.rate}")
        if not SEGMENT_ROWS <= self.sequence_rows <= 4096 or self.sequence_rows % SEGMENT_ROWS:
            raise FormatError(f"sequence_rows must be a multiple of {SEGMENT_ROWS} up to 4096, got {self.sequence_rows}")
        if not 1 <= self.transform <= 4096 or self.transform & (self.transform - 1):
            raise FormatError(f"transform must be a power of two from 1 to 4096, got {self.transform}")

    @property
    def multiplier(self) -> int:
        """The constant of the state function."""
        return MULTIPLIERS[self.state_bits]

    @property
    def trellis(self) -> Trellis:
        """The state machine, for the encoder."""
        return Trellis(
            rate=self.rate,
            state_bits=self.state_bits,
            multiplier=self.multiplier,
            cost_shift=COST_SHIFTS[self.rate],
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight without its row's scale. `stored_bits` counts everything."""
        return float(self.rate)

    @property
    def row_step(self) -> int:
        """A range of rows that starts and ends at multiples of this is a slice of `words` (or ends at the last row)."""
        return self.sequence_rows

    @property
    def column_step(self) -> int:
        """Columns that can be coded alone: one, in the transformed basis."""
        return 1

    def segments(self, out_features: int) -> int:
        """Segments of 32 rows; the last one is padded with rows that do not count."""
        return -(-out_features // SEGMENT_ROWS)

    def strips(self, out_features: int) -> list[tuple[int, int]]:
        """First segment and number of segments of each strip, in order."""
        total, step = self.segments(out_features), self.sequence_rows // SEGMENT_ROWS
        return [(first, min(step, total - first)) for first in range(0, total, step)]

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The tensors that a weight [out_features, in_features] is stored as: streams, a scale for each row, the tensor's."""
        return {
            CODES: Part("int32", (self.segments(out_features), in_features * self.rate), rows_per_entry=SEGMENT_ROWS),
            "scales": Part("float16", (out_features,)),
            "scale": Part("float32", (1,), per="tensor"),
        }

    def reason_unfit(self, out_features: int, in_features: int) -> str | None:
        """Any matrix can be coded; one that would become no smaller, such as one of few rows, is left dense."""
        return reason_no_smaller(self, out_features, in_features)

    @property
    def spec(self) -> str:
        """The format as a short string, read back by `parse_spec`: ``trellis-r4-l16-t256-h128``."""
        return f"{self.family}-r{self.rate}-l{self.state_bits}-t{self.sequence_rows}-h{self.transform}"

    def __str__(self) -> str:
        return self.spec

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `from_dict`."""
        return {"family": self.family, **{f.name: getattr(self, f.name) for f in fields(self)}}


_PLAIN: Final = {str(rate): TrellisFormat(rate=rate) for rate in (2, 3, 4, 5, 6, 8)}

FAST_PRESETS: Final[Mapping[str, TrellisFormat]] = {
    f"{rate}-fast": TrellisFormat(rate=rate, state_bits=12) for rate in (2, 3, 4, 5, 6)
}
"""12-bit states: a sixteenth of the encoder's work, 6 to 12 % more error at 2 to 4 bits (docs/log/encoder.md)."""

PRESETS: Final[Mapping[str, TrellisFormat]] = {**_PLAIN, **FAST_PRESETS}
"""By bits per weight; the others have 16-bit states."""

_SPEC = re.compile(r"trellis-r(\d)-l(\d{1,2})-t(\d{1,4})-h(\d{1,4})", re.ASCII)


def parse_spec(text: str) -> TrellisFormat | None:
    """A format from its specification (``"trellis-r4-l16-t256-h128"``); None for a text that is none.

    Raises FormatError for a specification with a parameter out of range.
    """
    match = _SPEC.fullmatch(text)
    if match is None:
        return None
    rate, state_bits, sequence_rows, transform = map(int, match.groups())
    return TrellisFormat(rate=rate, state_bits=state_bits, sequence_rows=sequence_rows, transform=transform)


def from_dict(data: Mapping[str, Any]) -> TrellisFormat:
    """A format from its JSON form. Raises FormatError if a key is missing, unknown or out of range."""
    names = {f.name for f in fields(TrellisFormat)}
    found = set(data) - {"family"}
    if data.get("family") != TrellisFormat.family or found != names:
        raise FormatError(
            f"a trellis format has the family {TrellisFormat.family!r} and the keys {sorted(names)}, "
            f"got {data.get('family')!r} and {sorted(map(str, found))}"
        )
    return TrellisFormat(**{name: data[name] for name in names})
