"""A panel of columns with error feedback between them, for many strips at once: what `codes.feedback` does, in one call.

Rows are independent once the coefficients are known, so a strip of T rows can be taken through a whole panel of columns without
looking at any other: for each column the errors of the panel's columns before it are added to the weight, the streams are
searched for, and the new error is counted. On a GPU that is one kernel, without a launch or an allocation for each column;
between panels the caller has one matrix product to do.

Everything that is summed is an integer in float64 below 2^53 (`codes.feedback` says why), so the kernel, the loop here on a
CPU and feedback column by column give the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import Trellis
from seedlm.codes.trellis.viterbi import search_backend

ERROR_LIMIT = 1 << 24


class Strips(NamedTuple):
    """N strips of T rows of any matrices of one width; all on one device.

    scale     float32 [N, T], what a row's values are multiplied by; 0 where its weights are all zero
    roots     float32 [N, T], `viterbi.cost.row_roots` of row weights; 0 for rows that pad a strip
    take      float64 [N, T], a power of two: the unit of `fed` and of errors times coefficients
    per_unit  float64 [N, T], a power of two: errors are counted in units of its inverse
    matrix    int32 [N], whose coefficients are a strip's
    """

    scale: Tensor
    roots: Tensor
    take: Tensor
    per_unit: Tensor
    matrix: Tensor


class PanelCodes(NamedTuple):
    """words int32 [N, C, T * R / 32], values int16 [N, C, T], errors float32 [N, C, T], integers of at most 2^24."""

    words: Tensor
    values: Tensor
    errors: Tensor


def encode_panel(
    weight: Tensor,
    fed: Tensor | None,
    coefficients: Tensor | None,
    strips: Strips,
    trellis: Trellis,
    overlap: int,
    backend: str = "auto",
) -> PanelCodes:
    """Code C columns of N strips, one after another.

    weight        float32 [N, C, T], the weights, transformed
    fed           float64 [N, C, T], integers in units of `take`: what earlier columns feed into these; None: nothing
    coefficients  float64 [matrices, C, C], integers: [k, j] is what column j takes of column k's error; None: nothing is fed
    overlap       as for `viterbi`: a multiple of 8, at most T / 2
    Raises BackendError as `viterbi` does.
    """
    search = search_backend(backend, weight.device)
    if hasattr(search, "encode_panel"):
        return PanelCodes(*search.encode_panel(weight, fed, coefficients, strips, trellis, overlap))
    count, columns, rows = weight.shape
    errors = torch.zeros_like(weight)
    words, values = [], []
    for column in range(columns):
        taken = torch.zeros(count, rows, dtype=torch.float64, device=weight.device) if fed is None else fed[:, column]
        if coefficients is not None and column:
            given = coefficients[strips.matrix.long(), :column, column]
            taken = taken + (errors[:, :column].double() * given.unsqueeze(-1)).sum(1)
        target = (weight[:, column].double() + taken * strips.take).float()
        target = torch.where(strips.scale > 0, target / strips.scale, 0.0)
        words.append(codec.pack(search.search(target, strips.roots, trellis, overlap), trellis.rate))
        values.append(codec.decode_streams(words[-1], trellis))
        coded = values[-1].float() * strips.scale
        missed = ((weight[:, column].double() - coded.double()) * strips.per_unit).round()
        errors[:, column] = missed.clamp(-ERROR_LIMIT, ERROR_LIMIT).float()
    return PanelCodes(torch.stack(words, 1), torch.stack(values, 1), errors)
