"""What a generated design is: its stored code, its memory width, and every width and count that follows.

Two designs share one data path. `SeedDesign` reads the words of a SeedLM tensor as `packing` wrote them; `HalfDesign` is the
reference it is measured against and reads FP16 weights. Both cut a row into blocks, take `blocks` of them a clock, multiply
with activations held on chip as block floating point, and add exactly:

    activation   v * 2^(x - 30)          v signed 18 bits, x in 0 .. 29 shared by a block (`twin.align`)
    product sum  A = sum of s * v * 2^k  all integers: s is the decoder's sum, or the FP16 weight's mantissa; k a shift
    result       A * 2^(bias + exponent_offset) / divisor, rounded to float32 (`twin.to_float32`)

Nothing is rounded between the block floating point and the result, so the order of the additions does not matter.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from seedlm.codes.block.format import WORD_BITS, BlockFormat
from seedlm.errors import FormatError

HALF_BITS: Final = 16
MANTISSA_BITS: Final = 18
"""Bits of an on-chip activation, sign included: the narrow port of a Xilinx DSP48E1 multiplier."""
SHARED_BITS: Final = 5
"""Bits of a block's shared activation exponent."""
MAX_SHARED: Final = 29
"""Largest shared exponent: FP16 exponent fields 1 .. 30 less one."""
LARGEST_MANTISSA: Final = 2047 << 6
"""Largest |v|: an 11-bit FP16 significand with six bits below it."""
RESULT_FIFO: Final = 64
"""Results that may be in flight or waiting; more than a row can be old, so that rows of one chunk still run without a gap."""


class Command(NamedTuple):
    """One matrix-vector product, as the ``s_axis_cmd`` word. Field widths in `COMMAND_BITS`, lowest bits first.

    The two counts that take a division are the host's: `Design.command` fills them in.
    """

    rows: int
    columns: int
    chunks: int
    tail_units: int
    bias: int


COMMAND_BITS: Final = Command(rows=32, columns=32, chunks=16, tail_units=16, bias=16)


@dataclass(frozen=True, kw_only=True)
class Design(ABC):
    """Parameters of a design.

    beat_bits      width of the two input streams, a power of two of at least 128
    max_features   activations held on chip

    Raises FormatError if one is out of range.
    """

    beat_bits: int = 512
    max_features: int = 32768

    def __post_init__(self) -> None:
        if self.beat_bits < 128 or self.beat_bits & (self.beat_bits - 1):
            raise FormatError(f"beat_bits must be a power of two of at least 128, got {self.beat_bits}")
        if not self.block_size <= self.max_features <= 1 << 20:
            raise FormatError(f"max_features must be {self.block_size} .. {1 << 20}, got {self.max_features}")

    prefix: ClassVar[str]
    """Of the names of modules that differ between the designs."""

    @property
    @abstractmethod
    def block_size(self) -> int:
        """Weights of a block, which share an activation exponent."""

    @property
    @abstractmethod
    def block_bits(self) -> int:
        """Stored bits of a block."""

    @property
    @abstractmethod
    def unit_bits(self) -> int:
        """Rows are whole units of this many bits: a word of packed codes, an FP16 weight."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks taken a clock, a chunk: whole units, and no fewer bits than a beat brings."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Largest |s| of one weight."""

    @property
    @abstractmethod
    def max_weight_shift(self) -> int:
        """Largest share of the shift k that comes from the weights."""

    @property
    @abstractmethod
    def divisor_bits(self) -> int:
        """The n of the result's divisor 2^n - 1; 1 where nothing is divided."""

    @property
    @abstractmethod
    def exponent_offset(self) -> int:
        """Power of two of the result's unit, without the tensor's bias."""

    @abstractmethod
    def units_per_row(self, columns: int) -> int:
        """Units that a row of the stored matrix takes."""

    @property
    def lanes(self) -> int:
        """Weights multiplied a clock."""
        return self.blocks * self.block_size

    @property
    def chunk_units(self) -> int:
        return self.blocks * self.block_bits // self.unit_bits

    @property
    def beat_units(self) -> int:
        return self.beat_bits // self.unit_bits

    @property
    def load_blocks(self) -> int:
        """Blocks of activations converted a clock: the fewest that divide a chunk and keep up with the stream."""
        fits = [
            n for n in range(1, self.blocks + 1) if self.blocks % n == 0 and n * self.block_size * HALF_BITS >= self.beat_bits
        ]
        return fits[0] if fits else self.blocks

    @property
    def banks(self) -> int:
        """Conversions that fill one row of the activation memory."""
        return self.blocks // self.load_blocks

    @property
    def depth(self) -> int:
        """Rows of the activation memory, a chunk each."""
        return -(-self.max_features // self.lanes)

    @property
    def max_shift(self) -> int:
        return self.max_weight_shift + MAX_SHARED

    @property
    def term_bits(self) -> int:
        """Bits of a block's shifted sum, sign included."""
        return signed_bits(self.block_size * self.factor * LARGEST_MANTISSA << self.max_shift)

    @property
    def total_bits(self) -> int:
        """Bits of a row's sum, sign included."""
        return signed_bits(self.depth * self.lanes * self.factor * LARGEST_MANTISSA << self.max_shift)

    def command(self, rows: int, columns: int, bias: int = 0) -> Command:
        """The command for a [rows, columns] matrix. Raises FormatError if it does not fit this design."""
        if rows < 1 or not 1 <= columns <= self.depth * self.lanes:
            raise FormatError(
                f"a matrix must have at least 1 row and 1 .. {self.depth * self.lanes} columns, got {rows} x {columns}"
            )
        chunks = -(-columns // self.lanes)
        tail = self.units_per_row(columns) - (chunks - 1) * self.chunk_units
        return Command(rows=rows, columns=columns, chunks=chunks, tail_units=tail, bias=bias)


@dataclass(frozen=True, kw_only=True)
class SeedDesign(Design):
    """Reads rows of packed block codes (`packing`) of one format."""

    format: BlockFormat
    prefix: ClassVar[str] = "seedlm"

    @property
    def block_size(self) -> int:
        return self.format.block_size

    @property
    def block_bits(self) -> int:
        return self.format.block_bits

    @property
    def unit_bits(self) -> int:
        return WORD_BITS

    @property
    def blocks(self) -> int:
        group = self.format.blocks_per_group
        return group * -(-self.beat_bits // (group * self.block_bits))

    @property
    def factor(self) -> int:
        return self.format.num_coefficients * -self.format.coefficient_range[0] * self.format.divisor

    @property
    def max_weight_shift(self) -> int:
        low, high = self.format.exponent_range
        return high - low

    @property
    def divisor_bits(self) -> int:
        return self.format.seed_bits - 1

    @property
    def exponent_offset(self) -> int:
        return self.format.exponent_range[0] - 30

    def units_per_row(self, columns: int) -> int:
        return self.format.words_per_row(columns)


@dataclass(frozen=True, kw_only=True)
class HalfDesign(Design):
    """The reference: reads rows of FP16 weights, row after row without a gap."""

    prefix: ClassVar[str] = "fp16"

    @property
    def block_size(self) -> int:
        return 8

    @property
    def block_bits(self) -> int:
        return self.block_size * HALF_BITS

    @property
    def unit_bits(self) -> int:
        return HALF_BITS

    @property
    def blocks(self) -> int:
        return self.beat_bits // self.block_bits

    @property
    def factor(self) -> int:
        return 2047

    @property
    def max_weight_shift(self) -> int:
        return MAX_SHARED

    @property
    def divisor_bits(self) -> int:
        return 1

    @property
    def exponent_offset(self) -> int:
        return -24 - 30

    def units_per_row(self, columns: int) -> int:
        return columns


def signed_bits(largest: int) -> int:
    """Bits of a two's complement number of magnitude `largest` or less."""
    return largest.bit_length() + 1


def pack_command(command: Command) -> int:
    """The command as the integer on ``s_axis_cmd_tdata``."""
    word, shift = 0, 0
    for value, bits in zip(command, COMMAND_BITS, strict=True):
        word |= (value & ((1 << bits) - 1)) << shift
        shift += bits
    return word
