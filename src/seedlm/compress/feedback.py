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

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from seedlm.errors import TensorError

DAMPING: Final = 0.01
"""Share of the mean diagonal that is added to H's diagonal. 0.003 to 0.03 are equally good with 16,000 tokens."""

EncodeColumns = Callable[[Tensor, int], tuple[Any, Tensor]]
"""Targets float32 [..., out, step] and the first column's index -> codes of any kind, reconstruction [..., out, step]."""

_FEW: Final = 10
"""Tokens for each column below which damping grows."""
_ERROR_BITS: Final = 22
_ERROR_LIMIT: Final = 1 << (_ERROR_BITS + 2)
_SUM_BITS: Final = 53
_BOUND_BITS: Final = 16
_MOST_SHIFT: Final = 60
_PART_BITS: Final = 22
_LEAST_PIVOT: Final = 2.0**-30
_PANEL: Final = 64
_STRIPE: Final = 4096
"""Columns of a trailing update at a time, so that little of the symmetric half is computed twice."""


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


def damping_for(tokens: float, width: int, damping: float = DAMPING) -> float:
    """Damping for statistics of so many tokens: few of them say little, and none says nothing.

    It grows as the inverse of tokens per column, below ten of them; at a token for a hundred columns next to nothing is fed
    back. Infinite without tokens.
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
    if (matrix.diagonal(dim1=-2, dim2=-1) < 0).any():
        raise TensorError("X'X has a negative diagonal")
    unit = _unit_factor(matrix, damping)
    _join_columns(unit, step)
    sums = (unit.abs() * 2.0**_BOUND_BITS).ceil().sum(-2, keepdim=True).amax(-1, keepdim=True)  # of integers: exact
    shift = (_SUM_BITS - _ERROR_BITS - 3 - (_exponent(sums) - _BOUND_BITS)).clamp_max(_MOST_SHIFT)
    return Coefficients((unit * _power_of_two(shift)).round(), shift, step)


def feedback(
    weight: Tensor, given: Coefficients | None, encode_columns: EncodeColumns, *, step: int = 1
) -> tuple[list[Any], Tensor]:
    """Code a weight, or several of one shape, column by column, feeding errors forward.

    weight          float32 [..., out, in], in the code's basis
    given           what `coefficients` made, of one matrix or of as many as there are weights; None: nothing is fed back
    encode_columns  is called for columns 0, step, 2 step, ...; the last ones may be fewer
    step            must be that of the coefficients
    returns         all codes in order, and the reconstruction float32 [..., out, in]
    Rows are independent: any split of them gives the same. Raises TensorError for shapes that do not fit, NaN or Inf.
    """
    width = weight.shape[-1]
    _check(weight, given, step)
    given = given and given.to(weight.device)
    unit = _power_of_two(_exponent(weight.abs().amax(-1, keepdim=True).double()) - _ERROR_BITS)
    codes: list[Any] = []
    reconstruction = torch.empty_like(weight)
    fed = None if given is None else torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    panel = max(_PANEL // step, 1) * step
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        errors = torch.zeros(*weight.shape[:-1], stop - start, dtype=torch.float64, device=weight.device)
        for first in range(start, stop, step):
            here = slice(first, min(first + step, stop))
            target = weight[..., here]
            if fed is not None and given is not None:
                inside = errors[..., : first - start] @ given.values[..., start:first, here]
                taken = (fed[..., here] + inside) * (unit * _power_of_two(-given.shift))
                target = (target.double() + taken).float()
            code, coded = encode_columns(target.contiguous(), first)
            codes.append(code)
            reconstruction[..., here] = coded
            missed = (weight[..., here].double() - coded.double()) / unit
            errors[..., first - start : here.stop - start] = missed.round().clamp(-_ERROR_LIMIT, _ERROR_LIMIT)
        if fed is not None and given is not None and stop < width:
            fed[..., stop:] += errors @ given.values[..., start:stop, stop:]
    return codes, reconstruction


def _check(weight: Tensor, given: Coefficients | None, step: int) -> None:
    if weight.dim() < 2 or weight.dtype != torch.float32:
        raise TensorError(f"a weight must be float32 [..., out, in], got {weight.dtype} {[*weight.shape]}")
    if not weight.isfinite().all():
        raise TensorError("the weight has NaN or Inf in it")
    if given is not None and (given.step != step or given.values.shape[-1] != weight.shape[-1]):
        raise TensorError(
            f"feedback is for {given.values.shape[-1]} columns by {given.step}, the weight has {weight.shape[-1]} by {step}"
        )


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
        for j in range(first, stop):
            for i in range(first, j):
                unit[..., :first, j] -= unit[..., :first, i] * unit[..., i, j, None]
        unit[..., first:, first:stop] = 0


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower triangular L with L L' = matrix, float64, the same on every device; diagonals are to be between 1/2 and 2.

    Where the matrix is singular, nearly, a pivot is tiny and its column zero.
    """
    size, rest = matrix.shape[-1], matrix.clone()
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        rest[..., start:, start:stop] = _factor_panel(rest[..., start:, start:stop].mT.contiguous()).mT
        high, low = _split(rest[..., stop:, start:stop])
        ahead, astern = torch.cat([high, low], -1), torch.cat([low, high], -1)
        for left in range(0, size - stop, _STRIPE):
            right = min(left + _STRIPE, size - stop)
            trailing = rest[..., stop + left :, stop + left : stop + right]
            trailing -= (high[..., left:, :] @ high[..., left:right, :].mT) * 2.0 ** (-2 * _PART_BITS)
            trailing -= (ahead[..., left:, :] @ astern[..., left:right, :].mT) * 2.0 ** (-3 * _PART_BITS - 1)
    return rest.tril()


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

    The products that are summed up over twice `_PANEL` columns stay below 2^53.
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
