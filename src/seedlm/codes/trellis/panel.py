"""A panel of columns with error feedback between them, for many strips at once: what `codes.feedback` does, in one call.

Rows are independent once the coefficients are known, so a strip of T rows can be taken through a whole panel of columns without
looking at any other: for each column the errors of the panel's columns before it are added to the weight, the streams are
searched for, and the new error is counted. On a GPU that is one kernel, without a launch or an allocation for each column;
between panels the caller has one matrix product to do.

On a processor 32 strips take as long as one. So threads that code small matrices at the same time have their panels searched
together (`codes.together`).

Everything that is summed is an integer in float64 below 2^53 (`codes.feedback` says why), so the kernel, the loop here on a
CPU and feedback column by column give the same bits.
"""

from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from seedlm.codes.together import Together
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import Trellis
from seedlm.codes.trellis.viterbi import search_backend

ERROR_LIMIT = 1 << 24

_TOGETHER: Final = 32
"""Strips of several threads that a processor searches at once: the lanes of a vector (`viterbi.numba`)."""
_together: Final = Together(_TOGETHER)


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
    own = None if coefficients is None else coefficients[strips.matrix.long()]
    panel = _Columns(weight, fed, own, strips)
    key = (*weight.shape[1:], fed is None, own is None, trellis, overlap, search.__name__, weight.device)

    def run(panels: list[_Columns]) -> list[PanelCodes]:
        return _encode(panels, search, trellis, overlap)

    return _together.do(key, panel, len(weight), run, max(1, torch.get_num_threads()))


class _Columns(NamedTuple):
    """The columns of some strips: as for `encode_panel`, coefficients float64 [N, C, C] of every strip."""

    weight: Tensor
    fed: Tensor | None
    given: Tensor | None
    strips: Strips


def _encode(panels: list[_Columns], search: ModuleType, trellis: Trellis, overlap: int) -> list[PanelCodes]:
    """Several panels of one kind, one column of all of them after another."""
    weight = torch.cat([panel.weight for panel in panels])
    strips = Strips(*(torch.cat(parts) for parts in zip(*(panel.strips for panel in panels), strict=True)))
    fed, given = (
        None if getattr(panels[0], name) is None else torch.cat([getattr(panel, name) for panel in panels])
        for name in ("fed", "given")
    )
    count, columns, rows = weight.shape
    errors = torch.zeros(count, columns, rows, dtype=torch.float64, device=weight.device)
    words, values = [], []
    for column in range(columns):
        taken = torch.zeros(count, rows, dtype=torch.float64, device=weight.device) if fed is None else fed[:, column]
        if given is not None and column:
            taken = taken + torch.bmm(given[:, None, :column, column], errors[:, :column]).squeeze(1)
        target = (weight[:, column].double() + taken * strips.take).float()
        target = torch.where(strips.scale > 0, target / strips.scale, 0.0)
        words.append(codec.pack(search.search(target, strips.roots, trellis, overlap), trellis.rate))
        values.append(codec.decode_streams(words[-1], trellis))
        coded = values[-1].float() * strips.scale
        missed = ((weight[:, column].double() - coded.double()) * strips.per_unit).round()
        errors[:, column] = missed.clamp(-ERROR_LIMIT, ERROR_LIMIT)
    found = (torch.stack(words, 1), torch.stack(values, 1), errors.float())
    sizes = [len(panel.weight) for panel in panels]
    return [PanelCodes(*parts) for parts in zip(*(part.split(sizes) for part in found), strict=True)]
