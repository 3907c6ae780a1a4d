"""What a family of codes is to the rest of the package: a further family implements this file and is named in `registry`.

    Format          which code a matrix is stored in: one frozen value, without torch, passed whole
    Part            one tensor that a matrix is stored as, and how it lies along the matrix's rows
    Family          one object for all formats of a kind: parsing, checking, the definition of dequantizing, encoders, backends
    Encoder         codes of one matrix, some rows at a time
    LinearBackend   products with packed weights: tables and repacking once, then nothing that waits for a device

The way of a weight: `Encoder.rows` (codes) -> the checkpoint (files) -> `LinearBackend.prepare` and `.linear` (products), or
`Family.dequantize`, which is the definition that every kernel is held against.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, runtime_checkable

from seedlm.progress import Tell

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPE_BITS: Final[Mapping[str, int]] = {"int32": 32, "float32": 32, "float16": 16, "int16": 16, "int8": 8, "uint8": 8}
"""Dtypes that parts can have, by torch's name."""

CODES: Final = "words"
"""The part every format has: the packed codes. A checkpoint stores them under the weight's own name (`storage.checkpoint`)."""


@dataclass(frozen=True)
class Part:
    """One of the tensors that a matrix is stored as.

    dtype   torch's name, one of `DTYPE_BITS`
    shape   of the tensor
    per     what a slice of the matrix's rows slices: "row" parts have one entry of their first dimension for every so many rows
            (`rows_per_entry`), "tensor" parts belong to the whole matrix
    rows_per_entry   1, or more where rows share codes
    """

    dtype: str
    shape: tuple[int, ...]
    per: Literal["row", "tensor"] = "row"
    rows_per_entry: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@runtime_checkable
class Format(Protocol):
    """A code for matrices [out_features, in_features]; frozen and hashable.

    family            name of its `Family`
    spec              short text, read back by `Family.parse`
    bits_per_weight   where nothing is padded and parts per row and tensor do not count; `stored_bits` counts everything
    row_step          rows that are coded together: a matrix can be coded, and its codes sliced, at multiples of it
    column_step       columns that are coded together: error feedback goes from one step to the next
    transform         largest block of the Hadamard transform along the inputs (`codes.hadamard`), in whose basis weights are
                      coded and errors fed back; 1 is none
    """

    family: ClassVar[str]

    @property
    def spec(self) -> str: ...
    @property
    def bits_per_weight(self) -> float: ...
    @property
    def row_step(self) -> int: ...
    @property
    def column_step(self) -> int: ...
    @property
    def transform(self) -> int: ...

    def parts(self, out_features: int, in_features: int) -> dict[str, Part]:
        """The tensors that such a matrix is stored as, by name, `CODES` first."""
        ...

    def reason_unfit(self, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape is better left dense; None if it is not."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON form with a key ``family``, read back by `Family.from_dict`."""
        ...


def stored_bits(format: Format, out_features: int, in_features: int) -> int:
    """Every bit stored for such a matrix: codes, scales, padding."""
    return 8 * sum(part.nbytes for part in format.parts(out_features, in_features).values())


def reason_no_smaller(format: Format, out_features: int, in_features: int) -> str | None:
    """The rule of formats that fit every shape: a matrix stays dense if codes take no fewer bits than 16 a weight."""
    smaller = stored_bits(format, out_features, in_features) < 16 * out_features * in_features
    return None if smaller else "no smaller as codes"


@dataclass(frozen=True, eq=False)
class Facts:
    """What an encoder may ask of a matrix before it sees the first row.

    largest      magnitude, finite
    hessian      float32 or float64 [in_features, in_features]: mean of x x' over the inputs, for error feedback; None without.
                 Matrices that read the same input share the tensor: what is derived from it is kept as long as it lives
    tokens       how many inputs it is a mean of
    importance   float32 [out_features], 0 or more: what a squared error of each output counts, in any unit; None for all alike
    """

    largest: float
    hessian: "Tensor | None" = None
    tokens: int = 0
    importance: "Tensor | None" = None


@dataclass(frozen=True, eq=False)
class RowErrors:
    """Of some rows, float64 [rows] on the CPU, the same bits from every device: ||w - w^||^2 and ||w||^2."""

    errors: "Tensor"
    squares: "Tensor"


def totals(pieces: Sequence[RowErrors]) -> tuple[float, float]:
    """Squared error and squared norm of a matrix from all its rows, in whatever order and pieces: sums rounded once."""
    error = math.fsum(x for piece in pieces for x in piece.errors.tolist())
    return max(error, 0.0), math.fsum(x for piece in pieces for x in piece.squares.tolist())


def row_sums(x: "Tensor") -> "Tensor":
    """Sums of the rows of float64 [rows, n], which is overwritten: halves are added until one column is left.

    An order of additions that is written out is the same everywhere, which `Tensor.sum` does not promise of any two devices.
    """
    while x.shape[1] > 1:
        few = x.shape[1] // 2
        x[:, :few] += x[:, -few:]
        x = x[:, : x.shape[1] - few]
    return x.sum(1)


def relative_error(error: float, norm: float) -> float:
    """||W - W^||_F / ||W||_F from the squares of both; 0 for a weight of zeros."""
    return (error / norm) ** 0.5 if norm else 0.0


class Encoder(Protocol):
    """Codes of one matrix. Rows come in pieces, in order, each but the last a multiple of the format's `row_step`."""

    def rows(self, weight: "Tensor", tell: Tell) -> tuple[dict[str, "Tensor"], RowErrors]:
        """Encode the next rows, finite [rows, in_features] of a floating dtype.

        returns   their slices of the parts that belong to rows, on the CPU or the weight's device, and their errors
        """
        ...

    def rest(self) -> dict[str, "Tensor"]:
        """The parts that belong to the tensor, once all rows are encoded."""
        ...


class LinearBackend(Protocol):
    """One way of multiplying by packed weights. Instances have no state.

    A backend's tensors are made once after loading by `prepare`; from then on no call waits for the device, reads a value of it
    on the host or parses a text, so that CUDA graphs and compilers can hold the calls.

    Layers that read the same tensor (q, k, v; gate, up) should not each rotate and quantise it. What a backend does to x that
    depends on nothing but x, the format and `in_features` is its `transform`: where layers are known to share their input, it
    runs once, as an operator of its own, and each layer's `linear` is given the result besides x. Tables that it needs are
    made by `prepare` and kept by device. A backend that reads x as it is returns [] (`dequantizing.DequantizingBackend`).
    One that gains by multiplying by all of them at once is a `JoiningBackend`.
    """

    name: ClassVar[str]

    def reason_unavailable(self, device: "torch.device", format: Format, shape: tuple[int, int]) -> str | None:
        """Why it cannot serve such a weight there; None if it can. Pure: asks no device for memory or time."""
        ...

    def prepare(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> "list[Tensor]":
        """What `linear` and `dequantize` want: the parts themselves where they are read as stored, tables, repacked codes.

        Parts are to be returned as the same objects, not as views of them: then they are not held twice and move with a layer.
        """
        ...

    def empty_transform(self, x: "Tensor", format: Format, in_features: int) -> "list[Tensor]":
        """Tensors without contents of the shapes and dtypes that `transform` returns; [] if x is read as it is.

        x may have no contents itself (a fake, in a compiler): its shape, dtype and device are all that counts.
        """
        ...

    def transform(self, x: "Tensor", format: Format, in_features: int) -> "list[Tensor]":
        """What `linear` wants of x [..., in_features] that every layer with this format and `in_features` can share."""
        ...

    def linear(
        self,
        x: "Tensor",
        prepared: "Sequence[Tensor]",
        format: Format,
        shape: tuple[int, int],
        bias: "Tensor | None",
        transformed: "Sequence[Tensor]" = (),
    ) -> "Tensor":
        """The product x W^T of x [..., in_features], plus bias [out_features]; contiguous, in x's dtype.

        transformed   `transform` of the same x, or empty: then the backend does it itself, as part of the product
        """
        ...

    def dequantize(
        self, prepared: "Sequence[Tensor]", format: Format, shape: tuple[int, int], dtype: "torch.dtype"
    ) -> "Tensor":
        """The weight [out_features, in_features], formed in float32 and rounded to `dtype` once. A new tensor."""
        ...


class JoiningBackend(LinearBackend, Protocol):
    """A backend that multiplies by several weights at once: fewer kernels, and fewer of them small."""

    def linears(
        self,
        x: "Tensor",
        prepared: "Sequence[Sequence[Tensor]]",
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: "Sequence[Tensor | None]",
    ) -> "list[Tensor]":
        """`linear` of x [..., in_features], as it is, by weights of one format and `in_features`, in their order."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Normed:
    """The RMS norm of h + delta; the sum is left in h.

    h, delta   [1, 1, in_features], contiguous, of one dtype; without delta h is left as it is
    weight     [in_features] of that dtype; not written by a kernel that lets its successor begin, since it is read before
    """

    h: "Tensor"
    delta: "Tensor | None"
    weight: "Tensor"
    epsilon: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated:
    """silu(gate) * up: [1, 1, in_features], contiguous, of one dtype."""

    gate: "Tensor"
    up: "Tensor"


class FusingBackend(JoiningBackend, Protocol):
    """A backend that makes one token's input itself from what comes before it in a decoder layer, kernel after kernel.

    fuses   the dtypes in which it does
    """

    fuses: "ClassVar[tuple[torch.dtype, ...]]"

    def fused(
        self,
        source: "Tensor | Normed | Gated",
        prepared: "Sequence[Sequence[Tensor]]",
        format: Format,
        shapes: tuple[tuple[int, int], ...],
        biases: "Sequence[Tensor | None]",
    ) -> "list[Tensor]":
        """The products of that input by weights of one format and `in_features`."""
        ...


class Family(Protocol):
    """All formats of one kind. One object each, made known to `registry`.

    name            as in `Format.family`
    since_version   the first version of checkpoints that can hold it
    presets         bits as written on the command line -> format
    searches        encoding backends by name, fastest first; "auto" stands for one of them
    products        names of `backends`, in their order, for which no torch is imported
    defaults        settings of encoding and their default values, such as ``{"rounding": "best"}``; all are text
    mixture         formats that mixed precision chooses from -> ||W - W^||^2 / ||W||^2 that they leave on normal weights
    feedback        what "auto" is for error feedback: "own", a text that the model writes, or "none", which a user may have
                    otherwise. None if its encoders do not use `Facts.hessian`
    fused           whether modules that read the same input are multiplied as one, and so have to share a format
    tables          format that embeddings and head get beside layers of no more bits, unless something is said of them; None
                    leaves them as they are
    """

    name: str
    since_version: int
    presets: Mapping[str, Format]
    searches: Sequence[str]
    products: Sequence[str]
    defaults: Mapping[str, str]
    mixture: Mapping[Format, float]
    feedback: Literal["own", "none"] | None
    fused: bool
    tables: Format | None

    def parse(self, text: str) -> Format | None:
        """The format that a specification stands for, None if it is none of this family's. Raises FormatError if impossible."""
        ...

    def from_dict(self, data: Mapping[str, Any]) -> Format:
        """The format of a JSON form. Raises FormatError."""
        ...

    def check_settings(self, settings: Mapping[str, str]) -> None:
        """Raise FormatError for a value that a setting of `defaults` cannot have."""
        ...

    def check(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> None:
        """Raise TensorError if a stored value is out of its range; dtypes and shapes are right already."""
        ...

    def dequantize(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int]) -> "Tensor":
        """float32 [out_features, in_features] in plain torch: the definition."""
        ...

    def rows(self, parts: "Mapping[str, Tensor]", format: Format, shape: tuple[int, int], indices: "Tensor") -> "Tensor":
        """Rows of `dequantize`, bit for bit, float32 [*indices.shape, in_features]: what an embedding looks up.

        indices   int32 or int64 of any shape, 0 .. out_features - 1, on the parts' device
        It reads the parts as they are stored and decodes no other row. On a GPU nothing waits for the device. Raises
        IndexError for an index out of range; on a GPU, where it would come too late, such a row is NaN or torch's own error.
        """
        ...

    def encoder(
        self, format: Format, shape: tuple[int, int], facts: Facts, options: "EncodeOptions", device: "torch.device"
    ) -> Encoder:
        """An encoder of one matrix, whose rows will be on `device`: the first of a format may take seconds, for its tables.

        Raises BackendError if it cannot run there.
        """
        ...

    def reason_no_encoder(self, backend: str, device: "torch.device", format: Format) -> str | None:
        """Why an encoding backend, "auto" or one by name, cannot run there; None if it can."""
        ...

    def reason_slow(self, device: "torch.device", format: Format) -> str | None:
        """Why the search that "auto" runs there takes many times as long as it could, and the remedy; None if not."""
        ...

    def backends(self) -> Sequence[LinearBackend]:
        """Products with its codes, fastest first; the last serves every device and format."""
        ...


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode. None of it is needed to decode.

    backend    "auto", or one that the family knows by name: all leave the same codes
    settings   values of a family's `defaults` that are to differ
    """

    backend: str = "auto"
    settings: Mapping[str, str] = field(default_factory=dict)
