"""Error feedback: a column's coding error is made up for by the columns that are coded after it.

The output error of a linear layer is  tr(D H D'),  D = W - W^ the weight's error and H = X'X what its inputs look like
(Frantar et al. 2022, arXiv 2210.17323). With H = M S M', M upper triangular with ones on its diagonal, it is the sum over
columns j of S_j |D_j + sum over k < j of D_k M_kj|^2. So the code is asked, column by column from the left, for

    target_j  =  W_j + sum over k < j of D_k M_kj

and what is left is the code's own error on these targets (LDLQ, arXiv 2307.13304; the same as GPTQ's updates, without an
inverse). `step` columns that a code takes at once use the block form of M: the blocks on its diagonal are ones.

**The same bytes everywhere.** A target that differs in its last bit now and then changes a code, and from there on all of
them. Matrix products sum in an order of their own on every device, so no floating-point sum is left to them:

    errors        integers, in units of 2^-22 of the row's largest magnitude (rounded up to a power of two), at most 2^24
    coefficients  integers, in units of 2^-shift; shift is as large as keeps every possible sum below 2^53

Products and sums of these are exact in float64, whichever way they are added up, with or without fused multiply-adds. The
factorization does the same: each column by elementwise operations, the rest of the matrix by products of two 23-bit
integer parts. So results do not depend on device, threads, libraries, batching, or on how rows are split. What remains is
one rounded elementwise operation after another, which IEEE 754 fixes. Kernels may do all of it in 64-bit integers instead.
"""

import functools
import importlib.util
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seedlm.codes import hadamard
from seedlm.codes.base import Facts, Format
from seedlm.errors import TensorError

DAMPING: Final = 0.01
"""Share of the mean diagonal that is added to H's diagonal, with statistics of very many tokens. 0.01 and 0.03 are equally
good (KL of SmolLM2 at 3 bits 0.174 and 0.172 with 65,000 tokens, 0.185 and 0.188 with 16,000)."""

EncodeColumns = Callable[[Tensor, int], tuple[Any, Tensor]]
"""Targets float32 [..., out, step] and the first column's index -> codes of any kind, reconstruction [..., out, step]."""

_FEW: Final = 50
"""Tokens for each column at which damping has doubled. Best for SmolLM2 are 0.1 to 0.5 of the mean diagonal with 4,096 tokens,
0.5 to 2 with 1,024, 0.5 to 3 with 256."""
_ERROR_BITS: Final = 22
_ERROR_LIMIT: Final = 1 << (_ERROR_BITS + 2)
_SUM_BITS: Final = 53
_BOUND_BITS: Final = 16
_MOST_SHIFT: Final = 60
_PART_BITS: Final = 22
_LEAST_PIVOT: Final = 2.0**-30
_ROUNDED: Final = 2.0**-3
"""Share of the largest diagonal that one may be below zero. Statistics are kept as float16 correlations, off by 2^-12 at most,
and an input in the transformed basis adds up those of a block, 512 at most."""
PANEL: Final = 64
"""Columns between two matrix products, at most."""
_STRIPE: Final = 4096
"""Columns of a trailing update at a time, so that little of the symmetric half is computed twice."""
_known: Final[WeakIdKeyDictionary] = WeakIdKeyDictionary()
"""Hessian -> (basis, step, damping and device -> coefficients) and a lock, for the matrices that read the same input."""
_adding: Final = threading.Lock()


@dataclass(frozen=True)
class Coefficients:
    """How columns make up for those before them: the strictly upper part of M, as integers.

    values   float64 [..., in, in], integers; [k, j] is what column j takes of column k's error, in units of 2^-shift
    shift    int64 [..., 1, 1]
    step     columns that are coded at once; the blocks of `values` on the diagonal are zero
    """

    values: Tensor
    shift: Tensor
    step: int

    def to(self, device: torch.device | str) -> "Coefficients":
        return Coefficients(self.values.to(device), self.shift.to(device), self.step)


def feedback_for(facts: Facts, format: Format, device: torch.device) -> Coefficients | None:
    """What a matrix' statistics call for in a format's basis and steps; None without statistics.

    Made once for all matrices that read the same input, and kept as long as its statistics live. Any thread may call this.
    """
    hessian = facts.hessian
    if hessian is None or not facts.tokens:
        return None
    key = (format.transform, format.column_step, damping_for(facts.tokens, hessian.shape[0]), device)
    with _adding:
        known, adding = _known.setdefault(hessian, ({}, threading.Lock()))
    with adding:  # the layers that share an input wait for the first of them
        if key not in known:
            known[key] = coefficients(
                _in_basis(hessian.to(device, torch.float64), format.transform), step=format.column_step, damping=key[2]
            )
    return known[key]


def _in_basis(hessian: Tensor, transform: int) -> Tensor:
    """X'X of the inputs transformed (`codes.hadamard`)."""
    if transform == 1:
        return hessian
    return hadamard.forward(hadamard.forward(hessian, transform).mT.contiguous(), transform)


def damping_for(tokens: float, width: int, damping: float = DAMPING) -> float:
    """Damping for statistics of so many tokens: few of them say little, and none says nothing.

    damping + 1/2 width / tokens by default. Infinite without tokens.
    """
    return damping * (1 + _FEW * width / tokens) if tokens else math.inf


def coefficients(hessian: Tensor, *, step: int = 1, damping: float = DAMPING) -> Coefficients:
    """The feedback that statistics call for.

    hessian   X'X, float32 or float64 [..., in, in], symmetric, of the inputs in the code's basis, in any unit
    step      columns that are coded at once
    damping   share of the mean diagonal added to the diagonal; infinite: no feedback
    returns   on the hessian's device
    Columns without input (diagonal 0) neither give nor take. Raises TensorError for what is not finite or no X'X.
    """
    if hessian.dim() < 2 or hessian.shape[-1] != hessian.shape[-2] or not hessian.is_floating_point():
        raise TensorError(f"X'X must be a square float matrix, got {hessian.dtype} {[*hessian.shape]}")
    if not damping >= 0:
        raise TensorError(f"damping must be 0 or more, got {damping}")
    if step < 1:
        raise TensorError(f"step must be 1 or more, got {step}")
    if not hessian.isfinite().all():
        raise TensorError("X'X has NaN or Inf in it")
    matrix = hessian.double()
    matrix = (matrix + matrix.mT) * 0.5
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if (diagonal < -_ROUNDED * diagonal.amax(-1, keepdim=True)).any():
        raise TensorError("X'X has a negative diagonal")
    diagonal.clamp_(min=0)  # what rounding made of an input that is nothing
    unit = _unit_factor(matrix, damping)
    _join_columns(unit, step)
    sums = (unit.abs() * 2.0**_BOUND_BITS).ceil().sum(-2, keepdim=True).amax(-1, keepdim=True)  # of integers: exact
    shift = (_SUM_BITS - _ERROR_BITS - 3 - (_exponent(sums) - _BOUND_BITS)).clamp_max(_MOST_SHIFT)
    return Coefficients((unit * _power_of_two(shift)).round(), shift, step)


def feedback(
    weight: Tensor,
    given: Coefficients | None,
    encode_columns: EncodeColumns | None = None,
    *,
    encode_panel: "EncodePanel | None" = None,
) -> tuple[list[Any], Tensor]:
    """Code a weight, or several of one shape, column by column, feeding errors forward.

    weight          float32 [..., out, in], in the code's basis
    given           what `coefficients` made, of one matrix or of as many as there are weights; None: nothing is fed back, and
                    columns come one by one
    encode_columns  is called for columns 0, step, 2 step, ...; the last ones may be fewer
    encode_panel    in its place, codes all columns of a panel at once: a kernel that does what `encode_by_columns` does
    returns         all codes in order, and the reconstruction float32 [..., out, in]
    Rows are independent: any split of them gives the same. Raises TensorError for shapes that do not fit, NaN or Inf.
    """
    _check(weight, given)
    if encode_panel is None:
        assert encode_columns is not None
        encode_panel = functools.partial(encode_by_columns, encode_columns=encode_columns)
    width, step = weight.shape[-1], 1 if given is None else given.step
    given = given and given.to(weight.device)
    unit = error_unit(weight)
    codes: list[Any] = []
    reconstruction = torch.empty_like(weight)
    fed = None if given is None else torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    size = max(PANEL // step, 1) * step
    for start in range(0, width, size):
        stop = min(start + size, width)
        panel = Panel(weight[..., start:stop], start, step, unit)
        if given is not None and fed is not None:
            scale = unit * _power_of_two(-given.shift)
            panel = replace(panel, fed=fed[..., start:stop], values=given.values[..., start:stop, start:stop], scale=scale)
        found, coded = encode_panel(panel)
        codes += found
        reconstruction[..., start:stop] = coded
        if given is not None and fed is not None and stop < width:
            fed[..., stop:] += error_integers(panel.weight, coded, unit) @ given.values[..., start:stop, stop:]
    return codes, reconstruction


@dataclass(frozen=True)
class Panel:
    """Some columns of a weight, and what those before them have left to them.

    weight   float32 [..., out, columns]
    first    the first column's index; a multiple of step
    step     columns that are coded at once
    unit     float64 [..., out, 1], a power of two: what a row's errors are counted in
    fed      float64 [..., out, columns], integers: sums over the columns before the panel; None without feedback
    values   float64 [..., columns, columns], integers: the coefficients inside the panel
    scale    float64 [..., out, 1], a power of two: what the sums are counted in
    """

    weight: Tensor
    first: int
    step: int
    unit: Tensor
    fed: Tensor | None = None
    values: Tensor | None = None
    scale: Tensor | None = None


EncodePanel = Callable[[Panel], tuple[list[Any], Tensor]]
"""Panel -> codes in order, reconstruction float32 [..., out, columns]."""


def encode_by_columns(panel: Panel, encode_columns: EncodeColumns) -> tuple[list[Any], Tensor]:
    """The definition of coding a panel. Column j's target, with sums of integers and all else rounded step by step, is

    float32(float64(weight_j) + (fed_j + sum over k < j in the panel of errors_k values_kj) * scale)
    """
    codes: list[Any] = []
    coded = torch.empty_like(panel.weight)
    errors = torch.zeros(panel.weight.shape, dtype=torch.float64, device=panel.weight.device)
    for j in range(0, panel.weight.shape[-1], panel.step):
        here = slice(j, min(j + panel.step, panel.weight.shape[-1]))
        target = panel.weight[..., here]
        if panel.fed is not None and panel.values is not None and panel.scale is not None:
            total = panel.fed[..., here] + errors[..., :j] @ panel.values[..., :j, here]
            target = (target.double() + total * panel.scale).float()
        code, coded[..., here] = encode_columns(target.contiguous(), panel.first + j)
        codes.append(code)
        errors[..., here] = error_integers(panel.weight[..., here], coded[..., here], panel.unit)
    return codes, coded


def error_unit(weight: Tensor) -> Tensor:
    """What errors are counted in: float64 [..., out, 1] for weights [..., out, in].

    It is 2^-22 of each row's largest magnitude, rounded up to a power of two first.
    """
    return _power_of_two(_exponent(weight.abs().amax(-1, keepdim=True).double()) - _ERROR_BITS)


def error_integers(weight: Tensor, coded: Tensor, unit: Tensor) -> Tensor:
    """Errors weight - coded as integers, float64, within +-2^24; what is farther saturates."""
    return ((weight.double() - coded.double()) / unit).round().clamp(-_ERROR_LIMIT, _ERROR_LIMIT)


def _check(weight: Tensor, given: Coefficients | None) -> None:
    if weight.dim() < 2 or weight.dtype != torch.float32:
        raise TensorError(f"a weight must be float32 [..., out, in], got {weight.dtype} {[*weight.shape]}")
    if not weight.isfinite().all():
        raise TensorError("the weight has NaN or Inf in it")
    if given is not None and given.values.shape[-1] != weight.shape[-1]:
        raise TensorError(f"feedback is for {given.values.shape[-1]} columns, the weight has {weight.shape[-1]}")


def _unit_factor(matrix: Tensor, damping: float) -> Tensor:
    """M of matrix = M S M', after damping; the unit matrix where nothing can be fed back."""
    size = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    means = [math.fsum(row) / size for row in diagonal.reshape(-1, size).tolist()]
    mean = torch.tensor(means, dtype=torch.float64, device=matrix.device).reshape(*diagonal.shape[:-1], 1)
    live = (diagonal > 0) & (not math.isinf(damping))
    damped = torch.where(live, diagonal + (mean * damping if math.isfinite(damping) else 0), 1.0)
    matrix = torch.where(live[..., :, None] & live[..., None, :], matrix, 0.0)
    matrix.diagonal(dim1=-2, dim2=-1).copy_(damped)
    scale = _power_of_two(-(_exponent(damped) // 2))  # diagonals between 1/2 and 2 from here on, exactly
    matrix = matrix * scale[..., :, None] * scale[..., None, :]
    factor = _cholesky(matrix.flip(-2, -1)).flip(-2, -1) / scale[..., :, None]  # upper triangular R, with H = R R'
    return factor / factor.diagonal(dim1=-2, dim2=-1)[..., None, :]


def _join_columns(unit: Tensor, step: int) -> None:
    """The block form, in place: M[:, block] times the inverse of M[block, block], then zeros on and below the diagonal."""
    size = unit.shape[-1]
    if step == 1:
        unit.triu_(1)
        return
    for first in range(0, size, step):
        stop = min(first + step, size)
        above, block = unit[..., :first, first:stop].mT.contiguous(), unit[..., first:stop, first:stop]
        for j in range(stop - first):
            for i in range(j):
                above[..., j, :] -= above[..., i, :] * block[..., i, j, None]
        unit[..., :first, first:stop] = above.mT
        unit[..., first:, first:stop] = 0


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower triangular L with L L' = matrix, float64, the same on every device; diagonals are to be between 1/2 and 2.

    Where the matrix is singular, nearly, a pivot is tiny and its column zero.
    """
    size, rest = matrix.shape[-1], matrix.clone()
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        rest[..., start:, start:stop] = _compiled_panel(
            rest[..., start:, start:stop].mT.clone(memory_format=torch.contiguous_format)
        ).mT
        high, low = _split(rest[..., stop:, start:stop])
        ahead, astern = torch.cat([high, low], -1), torch.cat([low, high], -1)
        for left in range(0, size - stop, _STRIPE):
            right = min(left + _STRIPE, size - stop)
            trailing = rest[..., stop + left :, stop + left : stop + right]
            trailing -= (high[..., left:, :] @ high[..., left:right, :].mT) * 2.0 ** (-2 * _PART_BITS)
            trailing -= (ahead[..., left:, :] @ astern[..., left:right, :].mT) * 2.0 ** (-3 * _PART_BITS - 1)
    return rest.tril()


def _compiled_panel(columns: Tensor) -> Tensor:
    """`_factor_panel`, by compiled code on the CPU where numba is installed."""
    if importlib.util.find_spec("numba") is None:
        return _factor_panel(columns)
    from seedlm.codes.feedback_numba import factor_panel

    panel = columns.flatten(0, -3) if columns.dim() > 2 else columns.unsqueeze(0)
    panel = panel.cpu()
    factor_panel(panel.numpy(), _LEAST_PIVOT)
    return panel.view(columns.shape).to(columns.device)


def _factor_panel(columns: Tensor) -> Tensor:
    """Cholesky of the first columns of a matrix, given and returned as rows [..., panel, rest], in place; elementwise only."""
    width = columns.shape[-2]
    for i in range(width):
        pivot = columns[..., i, i, None]
        root = pivot.clamp_min(_LEAST_PIVOT).sqrt()
        column = torch.where(pivot < _LEAST_PIVOT, 0.0, columns[..., i, i + 1 :] / root)
        columns[..., i, i, None] = root
        columns[..., i, i + 1 :] = column
        columns[..., i + 1 :, i + 1 :] -= column[..., : width - i - 1, None] * column[..., None, :]
    return columns


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of values = high 2^-22 + low 2^-45 but for less than 2^-45, as integers of at most 23 bits; values are below 2.

    The products that are summed up over twice `PANEL` columns stay below 2^53.
    """
    high = (values * 2.0**_PART_BITS).round()
    low = ((values - high * 2.0**-_PART_BITS) * 2.0 ** (2 * _PART_BITS + 1)).round()
    return high, low


def _exponent(values: Tensor) -> Tensor:
    """int64 e with |value| < 2^e <= 2 |value|; 0 for 0."""
    return torch.frexp(values)[1].long()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float64, exactly, by its bits. Exponents beyond float64's normal numbers are held at their ends."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
