"""The trellis family's backend on CPUs: products without weights in memory, compiled by numba at the first use.

By the number of tokens:

    to `_few`  `numba_product`: decoded and multiplied in registers; rotated activations as 15-bit integers with a scale for
               each 256 columns (relative error about 6e-5), or int8 ("numba-int8", below 1e-2)
    more       `numba_weights`: a tile of rows at a time is formed in the transformed basis, in x's dtype, for torch's product

Rows that are looked up come from `numba_rows`.
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import ClassVar, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor

from seedlm.codes import hadamard, on_cpu, processor
from seedlm.codes.base import CODES, Format, Gated, Normed
from seedlm.codes.on_cpu import KINDS, PIECE
from seedlm.codes.threads import Job, Jobs, Kernel, kernel
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat
from seedlm.codes.trellis.kernels import records

_TIMES: Final[Mapping[torch.dtype, int]] = {torch.bfloat16: 6, torch.float32: 64}
"""How often a weight is decoded, each time for as many tokens as share that, rather than formed for torch's product. That of
float32 is slower than the former however many tokens there are, but all their integers are in memory at once."""

_HERE: Final = "seedlm.codes.trellis.kernels"

_Origin = Literal["x", "norm", "gate"]
_Begin = Literal["nothing", "x", "norm", "gate"]
"""What the jobs of a product begin with: nothing where its inputs are there."""

_ROTATING: Final = 32
"""In how many pieces many tokens are rotated."""


class NumbaBackend:
    """Activations in 15 bits. Prepared: the words as they are stored, the scale of every row."""

    name: ClassVar[str] = "numba"
    exact: ClassVar[bool] = True
    fuses: ClassVar[tuple[torch.dtype, ...]] = tuple(KINDS)

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        return on_cpu.reason_unavailable(self.name, device)

    def prepare(self, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> list[Tensor]:
        return [parts[CODES], (parts["scales"].float() * parts["scale"]).float()]

    def empty_transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        tokens = x.numel() // in_features
        if tokens == 0:
            return []
        if tokens > _few(x.dtype):
            return [torch.empty(x.shape, dtype=x.dtype if x.dtype in KINDS else torch.float32, device=x.device)]
        return [
            torch.empty(
                _inputs(cast(TrellisFormat, format), in_features, tokens, self.exact).size, dtype=torch.uint8, device=x.device
            )
        ]

    def transform(self, x: Tensor, format: Format, in_features: int) -> list[Tensor]:
        """Activations as `numba_product` reads them; for many tokens x in the transformed basis."""
        x = x.contiguous() if x.dtype in KINDS else x.float().contiguous()
        made = self.empty_transform(x, format, in_features)
        if made:
            y, tokens = made[0], x.numel() // in_features
            few = tokens <= _few(x.dtype)
            plan = _inputs(cast(TrellisFormat, format), in_features, tokens if few else 0, self.exact)
            at, kind = x.data_ptr(), KINDS[x.dtype]
            if few:
                plan.kernel.share((tokens, *plan.numbers, at, kind, y.data_ptr()), tokens)
            else:
                pieces = min(tokens, _ROTATING)
                rows = torch.empty(pieces * in_features, dtype=torch.float32, device=x.device)
                where = (rows.data_ptr(), y.data_ptr(), KINDS[y.dtype], pieces)
                plan.kernel.share((tokens, at, kind, *plan.numbers, *where), tokens)
        return made

    def linear(
        self,
        x: Tensor,
        prepared: Sequence[Tensor],
        format: Format,
        shape: tuple[int, int],
        bias: Tensor | None,
        transformed: Sequence[Tensor] = (),
    ) -> Tensor:
        trellis = cast(TrellisFormat, format)
        if x.dtype not in KINDS:
            wide = None if bias is None else bias.float()
            return self.linear(x.float(), prepared, format, shape, wide, transformed).to(x.dtype)
        tokens = x.numel() // shape[1]
        if tokens == 0:
            return x.new_empty(*x.shape[:-1], shape[0])
        if tokens > _few(x.dtype):
            (inputs,) = transformed or self.transform(x, format, shape[1])
            return on_cpu.tiled(
                inputs,
                shape[0],
                SEGMENT_ROWS,
                lambda tile, first: _form(tile, first // SEGMENT_ROWS, prepared, trellis, shape, rotated=True),
                bias,
            )
        return self._products(x, [prepared], trellis, (shape,), [bias], transformed)[0]

    def linears(
        self,
        x: Tensor,
        prepared: Sequence[Sequence[Tensor]],
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """`linear` by several weights: x is transformed once, and threads meet once where tokens are few."""
        if x.dtype in KINDS and 0 < x.numel() // shapes[0][1] <= _few(x.dtype):
            return self._products(x, prepared, cast(TrellisFormat, format), shapes, biases)
        transformed = self.transform(x, format, shapes[0][1])
        each = zip(prepared, shapes, biases, strict=True)
        return [self.linear(x, weight, format, shape, bias, transformed) for weight, shape, bias in each]

    def fused(
        self,
        source: Tensor | Normed | Gated,
        prepared: Sequence[Sequence[Tensor]],
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """The norm, or the gate, before the transform, where the threads meet once for all of it."""
        trellis = cast(TrellisFormat, format)
        if isinstance(source, Tensor):
            return self._products(source, prepared, trellis, shapes, biases)
        if isinstance(source, Gated):
            both = source.gate.data_ptr(), source.up.data_ptr()
            return self._products(source.gate, prepared, trellis, shapes, biases, origin="gate", given=both)
        delta = 0 if source.delta is None else source.delta.data_ptr()
        given = on_cpu.bits(source.epsilon), source.h.data_ptr(), delta, source.weight.data_ptr()
        return self._products(source.h, prepared, trellis, shapes, biases, origin="norm", given=given)

    def dequantize(self, prepared: Sequence[Tensor], format: Format, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        assert isinstance(format, TrellisFormat)
        weight = torch.empty(shape, dtype=torch.float32, device=prepared[0].device)
        _form(weight, 0, prepared, format, shape, rotated=False)
        return weight.to(dtype)

    def _products(
        self,
        x: Tensor,
        prepared: Sequence[Sequence[Tensor]],
        format: TrellisFormat,
        shapes: tuple[tuple[int, int], ...],
        biases: Sequence[Tensor | None],
        transformed: Sequence[Tensor] = (),
        origin: _Origin = "x",
        given: tuple[int, ...] = (),
    ) -> list[Tensor]:
        """Products of a few tokens, which the same job transforms if nobody has.

        origin   what else it makes x of: then x is one token, contiguous, and `given` are the numbers of `numba_source`
        """
        tokens, kind, size = x.numel() // shapes[0][1], KINDS[x.dtype], x.element_size()
        begins: _Begin = "nothing" if transformed else origin
        plan = _products(format, shapes, tokens, self.exact, begins, torch.get_num_threads())
        at = transformed[0].data_ptr() if transformed else on_cpu.scratch(plan.size + plan.floats)[1]
        x, lead = x.contiguous(), x.shape[:-1]
        ys: list[Tensor] = []
        read: list[Tensor] = []  # what jobs have the addresses of
        numbers: list[tuple[int, ...]] = []
        if begins == "x":
            numbers = [(x.data_ptr(), kind, at)]
        elif begins != "nothing":
            numbers = [(*given, kind, at + plan.size), (at + plan.size, KINDS[torch.float32], at)]
        for (words, factors), (out_features, _), bias in zip(prepared, shapes, biases, strict=True):
            y = x.new_empty(*lead, out_features)
            ys.append(y)
            read.append(words := words.contiguous())
            if bias is not None:
                read.append(bias := bias.to(x.dtype).contiguous())
            where = words.data_ptr(), factors.data_ptr(), 0 if bias is None else bias.data_ptr()
            to = y.data_ptr()
            for first in range(0, tokens, plan.at_once):
                numbers.append((*where, at + first * plan.records, to + first * out_features * size, kind))
        plan.jobs.share(numbers)
        return ys


def rows(parts: Mapping[str, Tensor], format: TrellisFormat, shape: tuple[int, int], indices: Tensor) -> Tensor | None:
    """As `Family.rows`; None for parts and indices that do not lie in memory as they are stored."""
    words, scales, scale = (parts[name] for name in (CODES, "scales", "scale"))
    if (
        on_cpu.reason_unavailable("numba", indices.device)
        or indices.dtype not in (torch.int32, torch.int64)
        or torch._is_functional_tensor(indices)
        or type(indices) is not Tensor
        or not words.is_contiguous()
        or any(type(each) is not Tensor or each.device != indices.device for each in (words, scales, scale))
        or (words.dtype, scales.dtype, scale.dtype) != (torch.int32, torch.float16, torch.float32)
        or (*words.shape,) != (format.segments(shape[0]), shape[1] * format.rate)
    ):
        return None
    numbers = indices.flatten().long().contiguous()
    factors = scales.index_select(0, numbers).float() * scale  # raises IndexError
    found = torch.empty(len(numbers), shape[1], dtype=torch.float32, device=indices.device)
    kind = (len(numbers), format.segments(shape[0]), format.sequence_rows // SEGMENT_ROWS, shape[1])
    where = numbers.data_ptr(), words.data_ptr(), factors.data_ptr(), found.data_ptr()
    made = kernel(f"{_HERE}.numba_rows", "rows", format.rate, format.state_bits)
    made.share((*kind, *where, format.transform, _signs(format.transform).data_ptr()), len(numbers))
    return found.view(*indices.shape, shape[1])


class NumbaInt8Backend(NumbaBackend):
    """The same with int8 activations for a few tokens, at a price, where the processor multiplies bytes."""

    name: ClassVar[str] = "numba-int8"
    exact: ClassVar[bool] = False

    def reason_unavailable(self, device: torch.device, format: Format, shape: tuple[int, int]) -> str | None:
        if reason := super().reason_unavailable(device, format, shape):
            return reason
        if processor.byte_products() in ("pairs", "plain"):
            return f"backend {self.name!r} needs a processor that adds products of bytes (VNNI, or dot products on ARM)"
        return None


@lru_cache(maxsize=256)
def _few(dtype: torch.dtype) -> int:
    """Up to how many tokens of a dtype weights are decoded in registers."""
    return (_TIMES.get(dtype, _TIMES[torch.float32]) if records.in_pairs() else 2) * records.at_once()


class _Plan(NamedTuple):
    """A kernel, what calls of one shape have in common of its job, and the bytes of all tokens' inputs."""

    kernel: Kernel
    numbers: tuple[int, ...]
    size: int = 0


@lru_cache(maxsize=4096)
def _inputs(format: TrellisFormat, in_features: int, tokens: int, exact: bool) -> _Plan:
    """How a few tokens are transformed and rounded; 0 tokens stand for many, which are transformed."""
    few, many = (f"{_HERE}.numba_product", "rotation", exact), ("seedlm.codes.hadamard_numba", "rotation")
    numbers = (in_features, format.transform, _signs(format.transform).data_ptr())
    return _Plan(kernel(*(few if tokens else many)), numbers, tokens * records.workspace(in_features))


class _Products(NamedTuple):
    """Jobs of some weights and tokens; how many tokens one takes, and bytes: of a token's inputs, of all that are made, and of
    the floats that a source makes and works with.
    """

    jobs: Jobs
    at_once: int
    records: int
    size: int
    floats: int


@lru_cache(maxsize=4096)
def _products(
    format: TrellisFormat, shapes: tuple[tuple[int, int], ...], tokens: int, exact: bool, begins: _Begin, threads: int
) -> _Products:
    """How a few tokens are multiplied.

    A call gives the numbers of a norm or a gate if the jobs begin with it; the address of x, its kind and the address of inputs
    if they are transformed; then for each product the addresses of words, factors, bias, inputs, y, and y's kind.
    """
    at_once, plan = records.at_once(), _inputs(format, shapes[0][1], tokens, exact)
    before: list[list[Job]] = []
    jobs: list[Job] = []
    if begins == "norm":
        before.append([(kernel(f"{_HERE}.numba_source", "norm"), (shapes[0][1], None, None, None, None, None, None), 1)])
    elif begins == "gate":
        before.append([(kernel(f"{_HERE}.numba_source", "gate"), (shapes[0][1], None, None, None, None), 1)])
    if begins != "nothing":
        before.append([(plan.kernel, (tokens, *plan.numbers, None, None, None), tokens)])
    for out_features, in_features in shapes:
        cut = _cut(format.segments(out_features), in_features, threads)
        strip = format.sequence_rows // SEGMENT_ROWS
        numbers = (*cut, format.segments(out_features), strip, in_features, out_features, None, None, None, None, None, None)
        for first in range(0, tokens, at_once):
            some = format.rate, format.state_bits, exact, min(at_once, tokens - first)
            jobs.append((kernel(f"{_HERE}.numba_product", "product", *some), numbers, cut[0]))
    worked = 4 * records.floats(shapes[0][1])
    return _Products(Jobs([*before, jobs]), at_once, records.records(shapes[0][1]), plan.size, worked)


def _cut(segments: int, in_features: int, threads: int) -> tuple[int, int, int, int]:
    """Pieces, how many of them are large, segments of these, and of the others.

    Nearly all are a large piece for each thread, so that it reads its words one after another; the rest makes up for threads
    that came late.
    """
    larger, length = 15 * segments // (16 * threads), max(1, PIECE // (SEGMENT_ROWS * in_features))
    large = threads if larger > length else 0
    return large - (large * larger - segments) // length, large, larger, length


@cache
def _signs(block: int) -> Tensor:
    with torch.inference_mode(False):
        return hadamard.signs(block)


def _form(
    weight: Tensor, first: int, prepared: Sequence[Tensor], format: TrellisFormat, shape: tuple[int, int], rotated: bool
) -> None:
    """Write the rows from segment `first` on to weight [rows, in]: of `KINDS` in the transformed basis, else float32.

    rows   whole segments, or all up to the weight's end
    """
    words, factors, signs = prepared[0].contiguous(), prepared[1], _signs(format.transform)
    count = format.segments(len(weight))
    numbers = (count, first, format.segments(shape[0]), format.sequence_rows // SEGMENT_ROWS, shape[1], shape[0])
    where = (words.data_ptr(), factors.data_ptr(), weight.data_ptr(), KINDS[weight.dtype])
    block = 0 if rotated else format.transform
    form = kernel(f"{_HERE}.numba_weights", "weights", format.rate, format.state_bits)
    form.share((*numbers, *where, block, signs.data_ptr()), count)
