"""Constant tables of the CPU seed search, and the proof that its fixed-point bound holds.

`search_numba` explains the search. Its bound pass works on what is prepared here: for every position of the cycle the place of
its new bits' sign pattern and the Gram-Schmidt constants of its columns in Q15, with a bound of the error that all roundings
together can make. Positions whose bound would be loose get tiles of their own, with exact columns.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

from seedlm.codes.block.basis import KEPT_FORMATS, basis, greville
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.simd import LANES

UNIT: Final = 32700.0
"""Fixed-point image of |<w, s>| = sqrt(C) ||w||; the rounding of its tables must not carry it past 32767."""
SHARE: Final = 16
"""Energies are divided by this so that Gram-Schmidt weights up to it fit Q15; beyond are 2.8 % of the 4-bit preset's seeds."""
ENERGY_UNIT: Final = UNIT**2 / 2**15 / SHARE
"""Fixed-point image of an energy of ||w||^2."""
_MAX_MARGIN = 4e-3
"""Seeds whose proved fixed-point error may exceed this share of ||w||^2 are bounded in float32 instead."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Constant tables of one format. Positions of the cycle are cut into tiles of 32; after those tiles come a few more that
    list the positions whose fixed-point bound is too loose.

    offsets       int32 [chunks, 32 * tiles + P + 1]: where in the sign table the new bits of each position stand
    constants     int32 [32 * tiles, n]: for k = 2 .. P the combination's coefficients and weight, each a Q15 number twice
    positions     int32 [all tiles, 32]: position in the cycle, -1 for padding
    spans         float32 [all tiles, P, C, 32]: orthonormal columns, zero for padding and where another tile has the position
    margin        proved bound of the fixed-point energy's shortfall, as a share of ||w||^2
    states        int64 [N + C * P]: V - center along the cycle
    pinv          float32 [N, P, C]
    weakness      float64 [N]: ||pinv(U)||_F, ascending; no coefficients but zero give a vector shorter than its inverse
    by_weakness   int32 [N]: positions in descending order of ||pinv(U)||_F
    """

    offsets: np.ndarray
    constants: np.ndarray
    positions: np.ndarray
    spans: np.ndarray
    margin: float
    weakness: np.ndarray
    by_weakness: np.ndarray
    tiles: int
    states: np.ndarray
    seeds: np.ndarray
    seed_positions: np.ndarray
    pinv: np.ndarray
    divisor: float

    @property
    def bounds(self) -> tuple:
        """What the bound pass and the bookkeeping read, in the kernel's order."""
        return (
            self.offsets, self.constants, self.positions, self.spans, self.margin, self.weakness, self.by_weakness, self.tiles,
        )  # fmt: skip

    @property
    def exact(self) -> tuple:
        """What the exact evaluation reads, in the kernel's order."""
        return self.states, self.seeds, self.seed_positions, self.pinv, self.divisor


@lru_cache(maxsize=KEPT_FORMATS)
def plan(format: BlockFormat) -> Plan:
    size, count, total = format.block_size, format.num_coefficients, format.num_seeds
    tables = basis(format)
    tiles = -(-total // LANES)

    # The stream of new bits as +-1, wrapped round; z[m] = sum of 2^-(i+1) bit[m - i], the recurrence's own memory.
    reach = tiles * LANES + count + 1
    bits = np.resize((tables.cycle[:total].numpy() >> (format.seed_bits - 1)) & 1, reach + size * count)
    signs = 2.0 * bits - 1.0
    z = np.sum([np.resize(np.roll(signs[:total], i), len(signs)) * 2.0 ** -(i + 1) for i in range(50)], axis=0)
    rows = np.arange(reach)[:, None] + count * np.arange(size)
    chunks = np.array_split(np.arange(size), -(-size // 8))
    offsets = np.stack([(bits[rows[:, part]] << np.arange(len(part))).sum(1) + 256 * i for i, part in enumerate(chunks)])

    columns = np.stack([signs[rows[1 + k : 1 + k + total]] for k in range(1, count)] + [z[rows[1 : 1 + total]]])
    model = torch.from_numpy(np.ascontiguousarray(columns.transpose(0, 2, 1)))  # [P, C, N]
    constants, error = _constants(model, len(chunks), tables.span)
    loose = error > _MAX_MARGIN
    constants[loose] = 0
    padded = np.zeros((tiles * LANES, constants.shape[1]), np.int64)
    padded[:total] = constants

    listed = np.flatnonzero(loose)
    positions = np.full((tiles + -(-len(listed) // LANES)) * LANES, -1, np.int32)
    positions[:total] = np.where(loose, -1, np.arange(total))
    positions[tiles * LANES : tiles * LANES + len(listed)] = listed
    spans = tables.span.permute(2, 0, 1).numpy()[positions].astype(np.float32) * (positions >= 0)[:, None, None]

    weakness = (tables.pinv.double() * format.divisor).square().sum((0, 1)).sqrt().numpy()
    weakness[(tables.span == 0).all(1).any(0).numpy()] = np.inf  # dependent columns: non-zero coefficients may give nothing
    order = np.argsort(-weakness, kind="stable")
    return Plan(
        offsets=np.ascontiguousarray(offsets * LANES, dtype=np.int32),
        constants=((padded & 0xFFFF) * 0x10001).astype(np.uint32).view(np.int32).ravel(),
        positions=positions.reshape(-1, LANES),
        spans=np.ascontiguousarray(spans.reshape(-1, LANES, count, size).transpose(0, 2, 3, 1)).ravel(),
        margin=float(error[~loose].max(initial=0.0)) + 2.0 / ENERGY_UNIT,
        states=tables.cycle.numpy() - format.center,
        seeds=tables.cycle[:total].numpy(),
        seed_positions=tables.position.numpy(),
        pinv=np.ascontiguousarray(tables.pinv.permute(2, 0, 1).numpy()),
        weakness=weakness[order],
        by_weakness=order.astype(np.int32),
        tiles=tiles,
        divisor=float(format.divisor),
    )


def _constants(columns: Tensor, chunks: int, span: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gram-Schmidt constants of the fixed-point bound, and a bound of its error, for every position.

    columns   float64 [P, C, N]: s(n+2) .. s(n+P), z(n+1)
    span      float64 [P, C, N]: orthonormal basis of the exact columns
    returns   int64 [N, n] Q15 constants; float64 [N] error bound as a share of ||w||^2, inf where a constant does not fit

    With h_k = <w, column k> / sqrt(C) the energy is sum_k weight_k (h_k + sum_i<k r_ki h_i)^2. Errors counted, in units of the
    last place: the table's rounding, the recurrence's two shifts (geometric sum), each product's and constant's
    rounding, the square's and the weighting's; and the sine of the angle between these columns' span and the exact one, which
    is the norm of the difference of the two projections.
    """
    count, size, _ = columns.shape
    _, frame = greville(columns)
    r = torch.einsum("pcn,qcn->npq", frame, columns)
    inverse = torch.linalg.solve_triangular(r, torch.eye(count, dtype=torch.float64), upper=True)
    exact = span.permute(2, 1, 0)
    model = frame.permute(2, 1, 0)
    tilt = (exact - model @ (model.mT @ exact)).square().sum((1, 2)).sqrt()

    table_error = 0.5 * chunks + 0.1
    state_error = 2.0 + table_error
    error = 2.0 * tilt + 2.0 * table_error / UNIT + 1.0 / ENERGY_UNIT
    fits = torch.isfinite(inverse).flatten(1).all(1)
    constants = []
    for k in range(1, count + 1):
        pivot = inverse[:, k - 1, k - 1]
        weight = size * pivot.square()
        combination = inverse[:, : k - 1, k - 1] / pivot.unsqueeze(1)
        if k > 1 or count == 1:
            constants += [*combination.unbind(1), weight / SHARE]
            ulps = (state_error if k == count else table_error) + (combination.abs() * table_error + 1.0).sum(1)
            error += 2 * weight.sqrt() * ulps / UNIT + weight * (ulps / UNIT).square() + weight * 2.0**-16
            error += 0.5 / ENERGY_UNIT + 0.5 / ENERGY_UNIT / weight
    stacked = torch.stack(constants, 1) * 32768
    fits &= (stacked.abs() < 32767).all(1)
    error = torch.where(fits & error.isfinite(), error, torch.inf)
    return stacked.nan_to_num(0, 0, 0).clamp(-32767, 32767).round().long().numpy(), error.numpy()
