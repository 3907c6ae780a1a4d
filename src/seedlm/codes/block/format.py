"""The format object: which code a tensor is stored in. One frozen value, validated once, passed whole.

Glossary, symbol of the paper to name here:

    K   seed_bits          length of the shift register; a seed is one of its 2^K - 1 states
    C   block_size         consecutive weights along the input dimension that share a seed
    P   num_coefficients   coefficients of a block; U(s) has C rows and P columns
    M   bits_per_weight    (K + exponent_bits + P * coefficient_bits) / C
    s, e, q                the seed, shared exponent and coefficients of one block
    b   exponent_bias      one integer per tensor, added to every exponent of it

It is a `base.Format`: what the checkpoint, the modules and the tools above ask of it is said there.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal, get_args

from seedlm.codes.base import CODES, Part, reason_no_smaller
from seedlm.codes.block.lfsr import TAPS, period
from seedlm.errors import FormatError

Rounding = Literal["best", "nearest"]
"""How coefficients are chosen for a seed. ``nearest``: the paper's one rounding of the least-squares solution.
``best``: the best of all floor/ceil roundings at that exponent and its neighbours, 5 % less NMSE (docs/format-rationale.md)."""

ROUNDINGS: Final = get_args(Rounding)


def check_rounding(rounding: str) -> None:
    """Raise FormatError unless it is one of the two."""
    if rounding not in ROUNDINGS:
        raise FormatError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r:.80}")


WORD_BITS: Final = 32
"""Packed codes are stored as int32 words."""

EXPONENT_BIAS_RANGE: Final = (-192, 192)
"""Allowed exponent bias, both ends included: wide enough for any finite float32 tensor (docs/format-rationale.md)."""

MAX_BLOCK_BITS: Final = 63
"""Bits of a block: decoders hold one in a signed 64-bit integer."""

_LIMITS: Final = {
    "seed_bits": (min(TAPS), max(TAPS)),
    "block_size": (1, 64),
    "num_coefficients": (1, 8),
    "coefficient_bits": (2, 8),
    "exponent_bits": (1, 8),
}


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """SeedLM's block code (paper Sections 3.2 and 3.3): a seed, a shared exponent and P coefficients per C weights.

    Raises FormatError if a parameter is not an integer in its range, if P exceeds C, or if a block takes more than 63 bits.
    """

    family: ClassVar[str] = "block"

    seed_bits: int = 16
    block_size: int
    num_coefficients: int
    coefficient_bits: int = 4
    exponent_bits: int = 4

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise FormatError(f"{name} must be an integer from {low} to {high}, got {value!r:.80}")
        if self.num_coefficients > self.block_size:
            raise FormatError(f"num_coefficients must not exceed block_size ({self.block_size}), got {self.num_coefficients}")
        if self.block_bits > MAX_BLOCK_BITS:
            raise FormatError(f"a block must fit {MAX_BLOCK_BITS} bits, {self} takes {self.block_bits}")

    @property
    def num_seeds(self) -> int:
        """Seeds to choose from: the 2^K - 1 non-zero register states."""
        return period(self.seed_bits)

    @property
    def block_bits(self) -> int:
        """Bits of one block's code."""
        return self.seed_bits + self.exponent_bits + self.num_coefficients * self.coefficient_bits

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight where rows are whole blocks (M in the paper). `stored_bits` counts the rest too."""
        return self.block_bits / self.block_size

    @property
    def coefficient_range(self) -> tuple[int, int]:
        """Smallest and largest coefficient, two's complement."""
        half = 1 << (self.coefficient_bits - 1)
        return -half, half - 1

    @property
    def exponent_range(self) -> tuple[int, int]:
        """Smallest and largest stored exponent, two's complement."""
        half = 1 << (self.exponent_bits - 1)
        return -half, half - 1

    @property
    def center(self) -> int:
        """What is subtracted from a state to centre it: 2^(K-1)."""
        return 1 << (self.seed_bits - 1)

    @property
    def divisor(self) -> int:
        """What a centred state is divided by to land in [-1, 1]: 2^(K-1) - 1."""
        return self.center - 1

    @property
    def blocks_per_group(self) -> int:
        """Fewest blocks that fill whole words; a column range aligned to them is a plain slice of the packed words."""
        return WORD_BITS // math.gcd(WORD_BITS, self.block_bits)

    def blocks_per_row(self, in_features: int) -> int:
        """Blocks of one row; the last one is padded with zeros where C does not divide the row."""
        return -(-in_features // self.block_size)

    def words_per_row(self, in_features: int) -> int:
        """int32 words of one packed row."""
        return -(-self.blocks_per_row(in_features) * self.block_bits // WORD_BITS)

    @property
    def row_step(self) -> int:
        """Every row is coded by itself."""
        return 1

    @property
    def column_step(self) -> int:
        """A block: the columns that are coded together."""
        return self.block_size

    @property
    def transform(self) -> int:
        """None: blocks are of the weight itself."""
        return 1

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The tensors that a weight [out_features, in_features] is stored as: packed words, and the tensor's exponent bias."""
        return {
            CODES: Part("int32", (out_features, self.words_per_row(in_features))),
            "exponent_bias": Part("int32", (1,), per="tensor"),
        }

    def reason_unfit(self, out_features: int, in_features: int) -> str | None:
        """Any matrix can be coded; one that would become no smaller is left dense."""
        return reason_no_smaller(self, out_features, in_features)

    @property
    def spec(self) -> str:
        """The format as a short string, read back by `parse_format`: ``block-k16-c8-p3-q4-e4``."""
        return (
            f"{self.family}-k{self.seed_bits}-c{self.block_size}-p{self.num_coefficients}"
            f"-q{self.coefficient_bits}-e{self.exponent_bits}"
        )

    def __str__(self) -> str:
        return self.spec

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `format_from_dict`."""
        return {"family": self.family, **{f.name: getattr(self, f.name) for f in fields(self)}}


PRESETS: Final[Mapping[str, BlockFormat]] = {
    "5": BlockFormat(block_size=8, num_coefficients=4, coefficient_bits=5),
    "4.5": BlockFormat(block_size=8, num_coefficients=4),
    "4": BlockFormat(block_size=8, num_coefficients=3),
    "3.5": BlockFormat(seed_bits=12, block_size=8, num_coefficients=4, coefficient_bits=3),
    "3": BlockFormat(block_size=12, num_coefficients=4),
    "2.5": BlockFormat(seed_bits=14, block_size=12, num_coefficients=4, coefficient_bits=3),
    "2": BlockFormat(block_size=16, num_coefficients=4, coefficient_bits=3),
}
"""By bits per weight, as written on the command line. 4 and 3 are the paper's configurations (Table 1). The others have the
least error among formats that every search takes and that leave few seeds a block to score (docs/design.md)."""

_SPEC = re.compile(r"block-k(\d{1,2})-c(\d{1,2})-p(\d{1,2})-q(\d{1,2})-e(\d{1,2})", re.ASCII)


def parse_spec(text: str) -> BlockFormat | None:
    """The format of a text such as ``"block-k16-c8-p3-q4-e4"``; None for any other. Raises FormatError if it cannot exist."""
    match = _SPEC.fullmatch(text)
    if match is None:
        return None
    k, c, p, q, e = map(int, match.groups())
    return BlockFormat(seed_bits=k, block_size=c, num_coefficients=p, coefficient_bits=q, exponent_bits=e)


def from_dict(data: Mapping[str, Any]) -> BlockFormat:
    """A format from its JSON form. Raises FormatError if a key is missing, unknown or out of range."""
    names = {f.name for f in fields(BlockFormat)}
    found = set(data) - {"family"}
    if found != names:
        raise FormatError(f"a block format has the keys {sorted(names)}, got {sorted(map(str, found))}")
    return BlockFormat(**{name: data[name] for name in names})
