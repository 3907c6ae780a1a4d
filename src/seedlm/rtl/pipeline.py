"""Feed-forward data paths whose values know the clock at which they are there.

Results in flight are limited at the start of the pipe (`matvec`), so nothing inside one ever waits: registers have neither
enable nor reset, operands of different ages are brought together by delays (shift-register LUTs), and a module's latency is
read off its output instead of being counted by hand.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Final

from amaranth.hdl import Cat, Const, Module, Shape, Signal, Value, signed, unsigned

PIECE: Final = 40
"""Longest addition of a wide sum in one clock: 10 CARRY4."""


class Staged:
    """A value, the clock it belongs to, and its copies at later clocks. `reset` is for flags that must start at zero."""

    def __init__(self, value: Value, time: int = 0, *, reset: bool = False):
        self.copies = [value]
        self.time = time
        self.reset = reset

    @property
    def value(self) -> Value:
        return self.copies[0]

    def part(self, start: int, stop: int) -> "StagedPart":
        return StagedPart(self, start, stop)


class StagedPart:
    """Some bits of a staged value, wanted `lag` clocks later; delays stay with the whole, so that neighbours share them."""

    def __init__(self, whole: Staged, start: int, stop: int, lag: int = 0):
        self.whole, self.start, self.stop = whole, start, stop
        self.time = whole.time + lag


Operand = Staged | StagedPart


class Pipeline:
    """Adds the registers of a data path to a module."""

    def __init__(self, m: Module):
        self.m = m

    def at(self, operand: Operand, time: int) -> Value:
        """The operand's value at a clock not before its own."""
        if isinstance(operand, StagedPart):
            return self.at(operand.whole, time)[operand.start : operand.stop]
        assert time >= operand.time
        while len(operand.copies) <= time - operand.time:
            before = operand.copies[-1]
            name = before.name if isinstance(before, Signal) else "delayed"
            after = Signal(before.shape(), name=f"{name.removesuffix('_d')}_d", reset_less=not operand.reset)
            self.m.d.sync += after.eq(before)
            operand.copies.append(after)
        return operand.copies[time - operand.time]

    def stage(self, name: str, function: Callable[..., Value], *operands: Operand, shape: Shape | None = None) -> Staged:
        """A register of `function` of the operands, taken at the first clock at which all are there."""
        time = max(operand.time for operand in operands)
        value = Value.cast(function(*(self.at(operand, time) for operand in operands)))
        register = Signal(value.shape() if shape is None else shape, name=name, reset_less=True)
        self.m.d.sync += register.eq(value)
        return Staged(register, time + 1)

    def sum(self, name: str, operands: Sequence[Operand]) -> Staged:
        """The sum by a binary tree, a register after every addition."""
        level: list[Operand] = list(operands)
        while len(level) > 1:
            pairs: list[Operand] = [
                self.stage(name, lambda a, b: a + b, *level[i : i + 2]) for i in range(0, len(level) - 1, 2)
            ]
            level = pairs + level[2 * len(pairs) :]
        only = level[0]
        return only if isinstance(only, Staged) else self.stage(name, lambda a: a, only)

    def split(self, operand: Staged, width: int) -> list[Operand]:
        """The value, sign-extended to `width` bits, in pieces of at most PIECE bits, each a clock after the one below."""
        value = operand.value
        extended = Staged(Cat(value, value[-1].replicate(width - len(value))), operand.time)
        count = -(-width // PIECE)
        cuts = [width * i // count for i in range(count + 1)]
        return [StagedPart(extended, low, high, i) for i, (low, high) in enumerate(itertools.pairwise(cuts))]

    def add_pieces(self, name: str, a: list[Operand], b: list[Operand]) -> list[Operand]:
        """Adds two numbers in pieces, modulo their width. A piece's carry is registered; the next adds it a clock later."""
        total: list[Operand] = []
        carry: Operand = Staged(Const(0, 1), a[0].time)
        for x, y in zip(a, b, strict=True):
            piece = self.stage(name, carry_add, x, y, carry)
            carry = piece.part(len(piece.value) - 1, len(piece.value))
            total.append(piece.part(0, len(piece.value) - 1))
        return total

    def sum_pieces(self, name: str, operands: Sequence[list[Operand]]) -> list[Operand]:
        """The sum of numbers in pieces by a binary tree."""
        level = list(operands)
        while len(level) > 1:
            pairs = [self.add_pieces(name, *level[i : i + 2]) for i in range(0, len(level) - 1, 2)]
            level = pairs + level[2 * len(pairs) :]
        return level[0]

    def join(self, pieces: Sequence[Operand]) -> Staged:
        """Pieces back to one signed value, when the last one is there."""
        time = pieces[-1].time
        return Staged(Cat(self.at(piece, time) for piece in pieces).as_signed(), time)

    def shift_left(self, name: str, operand: Staged, amount: Operand, largest: int) -> Staged:
        """Value of operand << amount for amount in 0 .. largest, two bits of the amount a stage (one LUT6 a bit)."""
        width = len(operand.value) + largest
        for low in range(0, largest.bit_length(), 2):
            high = min(low + 2, largest.bit_length())
            reach = min(len(operand.value) + (((1 << (high - low)) - 1) << low), width)
            operand = self.stage(
                name,
                lambda v, n, low=low, high=high: v << (n[low:high] << low),
                operand,
                amount,
                shape=Shape(reach, operand.value.shape().signed),
            )
        return operand


def carry_add(a: Value, b: Value, carry: Value) -> Value:
    """Sum a + b + carry for unsigned a and b of one width, one bit wider; one carry chain, entered by a bit below."""
    return (Cat(Const(1, 1), a) + Cat(carry, b))[1 : len(a) + 2]


def shape_of(low: int, high: int) -> Shape:
    """The smallest shape that holds low .. high."""
    if low >= 0:
        return unsigned(high.bit_length())
    return signed(max((-low - 1).bit_length(), high.bit_length()) + 1)
