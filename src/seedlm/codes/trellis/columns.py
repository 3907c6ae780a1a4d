"""Columns one after another with error feedback: the trellis' part in `seedlm.codes.feedback`.

Strips of one length are a batch, and a panel of their columns is coded in one call (`panel`). Rows may count unequally: an
error of one unit of a row makes an error of as many units at the output, and that costs what the row's importance says. The
search moves errors to rows that cost little, without a bit more. With importances from gradients the KL at 3 bits falls by
11 % (SmolLM2, docs/log/quality.md). Without feedback nothing was won, so they are used together.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seedlm.codes.feedback import Coefficients, Panel, feedback
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import SEGMENT_ROWS, TrellisFormat
from seedlm.codes.trellis.panel import Strips, encode_panel
from seedlm.codes.trellis.viterbi import OVERLAPS
from seedlm.codes.trellis.viterbi.cost import row_roots


def row_weights(importance: Tensor, units: Tensor) -> Tensor:
    """What the squared errors of a strip's rows count, in units of the values: float32 [rows], with the median 1.

    importance   float32 [rows], of squared errors of the outputs; all zero stands for all alike
    units        float32 [rows], what a value's unit is worth
    """
    weights = units.double().square() * importance.double()
    alive = weights[weights > 0]
    return (weights / alive.median()).float() if len(alive) else torch.ones_like(units)


def encode_with_feedback(
    rotated: Tensor,
    units: Tensor,
    given: Coefficients | None,
    importance: Tensor | None,
    format: TrellisFormat,
    backend: str,
    tell: Callable[[int], None],
) -> Tensor:
    """Words int32 [S, in * R] of some rows.

    rotated      float32 [rows, in], in the transformed basis
    units        float32 [rows], what a value's unit is worth in each row
    importance   float32 [rows], or None
    tell         told the weights of every panel
    """
    rows, (strips, length) = len(rotated), (format.strips(len(rotated)), format.sequence_rows)
    full = sum(count * SEGMENT_ROWS == length and first * SEGMENT_ROWS + length <= rows for first, count in strips)
    streams: list[Tensor] = []
    for begin, end, size in ((0, full * length, length), (full * length, rows, strips[-1][1] * SEGMENT_ROWS)):
        if begin == end:
            continue
        padding = -(end - begin) % size
        weight = torch.nn.functional.pad(rotated[begin:end], (0, 0, 0, padding)).unflatten(0, (-1, size))
        scale = torch.nn.functional.pad(units[begin:end], (0, padding)).unflatten(0, (-1, size))
        counted = torch.ones_like(scale) if importance is None else _by_strip(importance[begin:end], units[begin:end], size)
        roots = torch.nn.functional.pad(row_roots(counted.flatten()[: end - begin]), (0, padding)).unflatten(0, (-1, size))
        streams += _encode_strips(weight, scale, roots, given, format, backend, tell).unbind()
    return codec.assemble(streams, format)


def _by_strip(importance: Tensor, units: Tensor, size: int) -> Tensor:
    """Row weights [rows] of strips of so many rows, the last one maybe shorter."""
    return torch.cat([row_weights(*pair) for pair in zip(importance.split(size), units.split(size), strict=True)])


def _encode_strips(
    weight: Tensor,
    scale: Tensor,
    roots: Tensor,
    given: Coefficients | None,
    format: TrellisFormat,
    backend: str,
    tell: Callable[[int], None],
) -> Tensor:
    """Streams int32 [N, in, T' * R / 32] of weights [N, T', in], with scales and roots [N, T']."""
    overlap = min(OVERLAPS[format.state_bits], weight.shape[1] // 2)
    matrix = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)

    def encode(panel: Panel) -> tuple[list[Tensor], Tensor]:
        per_unit = 1 / panel.unit.squeeze(-1)
        take = torch.zeros_like(per_unit) if panel.scale is None else panel.scale.squeeze(-1)
        fed = None if panel.fed is None else panel.fed.mT.contiguous()
        values = None if panel.values is None else panel.values.unsqueeze(0).contiguous()
        strips = Strips(scale, roots, take.expand_as(scale).contiguous(), per_unit.contiguous(), matrix)
        found = encode_panel(panel.weight.mT.contiguous(), fed, values, strips, format.trellis, overlap, backend)
        tell(panel.weight.numel())
        return [found.words], (found.values.float() * scale.unsqueeze(1)).mT

    return torch.cat(feedback(weight, given, encode_panel=encode)[0], 1)
