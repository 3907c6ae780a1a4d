"""Seeds in groups that share most of their span: the tables of the GPU search's bound pass.

What caps a seed is the energy of the block on the span of its P columns, P squared products with orthonormal rows. Neighbours
repeat most of that work, so seeds are put into groups of G whose spans share P - 1 rows, and only one row is a seed's own:

    energy of a group's best seed  =  sum over shared rows s of (s . w)^2  +  (max over its seeds x of |x . w|)^2

so a group costs P - 1 + G products and, per seed, one maximum: 1.125 products a seed at the 4-bit preset instead of 3.
Three ways to group are tried and the one with the fewest rows is kept:

    signs        column p of U is half of column p - 1 plus or minus 1/2, up to 2^-K, so the span is that of column 0 and
                 P - 1 sign vectors; seeds with the same ones up to order and sign share them (16 to a class at 4 bits)
    pairs        seeds next to each other in the cycle share P - 1 columns outright
    complement   the same pairs from the other side: what is orthogonal to both spans, C - P - 1 dimensions, is shared, and
                 one more row for each seed gives what it leaves of a block. Taken where it has no more rows (C - P <= P: the
                 presets of 3.5, 4.5 and 5 bits), for it is sharper: near a good seed its products are small, and so are their
                 rounding errors, where energies are near 1 and 1 less an energy inherits errors of that size.

Neither the sharing nor the rounding of the rows to float16 is exact. `slack` is what they can cost, computed for every
seed from the rounded rows themselves. Seeds whose shared rows miss their span by more than `_TOLERANCE` (sign vectors that
coincide, 0.8 % of seeds) stay alone, in groups of one.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from seedlm.codes.block.basis import KEPT_FORMATS, basis, generator
from seedlm.codes.block.format import BlockFormat

_TOLERANCE = 2e-3
_SOUND = 10.0
"""Condition number (Frobenius) up to which coefficients survive rounding: 94 % of seeds at 4 bits, 88 % at 4.5."""
_SIGN_GROUP = 16
_SIGN_BITS = 12
"""Shorter registers drop a bit that weighs more than the tolerance, and are small enough for any grouping."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of the bound for groups of one size G, float16, best conditioned first. D is P, or C - P for a complement.

    shared      float16 [groups, D-1, C]
    own         float16 [groups, G, C]: one row a seed; a seed is repeated where a group would not be full
    position    int32 [groups, G]: where the seed stands in the cycle
    sound       so many groups are well-conditioned
    slack       for unit w: energy of any seed <= what its rows give + slack;
                of a complement: the root of what its rows give <= the root of the seed's residual + slack
    """

    shared: Tensor
    own: Tensor
    position: Tensor
    sound: int
    complement: bool
    slack: float


@lru_cache(maxsize=KEPT_FORMATS)
def groups(format: BlockFormat) -> tuple[Groups, ...]:
    """The grouping of a format with the fewest rows, and groups of one for the seeds that fit in no group, if there are any.

    Kept for the life of the process.
    """
    span = basis(format).span.permute(2, 1, 0)  # [N, C, P]
    pairs = _by_pairs(format)
    if 0 < format.block_size - format.num_coefficients <= format.num_coefficients:
        return (_sorted(_complement(span, pairs), format),)
    found = [pairs] if format.seed_bits < _SIGN_BITS else [pairs, _by_signs(format)]
    members = min(found, key=lambda m: len(m) * (format.num_coefficients - 1 + m.shape[1]))
    columns = generator(members[:, 0], format)[..., 1:].double()
    if members.shape[1] == _SIGN_GROUP:
        columns = torch.where(columns >= 0, 1.0, -1.0).double()
    shared = _orthonormal(columns)

    own = _own_rows(span[members], shared)
    fits = _missing(span[members], shared, own).norm(dim=(-2, -1)) <= _TOLERANCE
    alone = members[~fits].unique()
    kept = fits.any(1)
    members, shared, own, fits = members[kept], shared[kept], own[kept], fits[kept]
    # What stays in a group is repeated over the places of those that left.
    source = torch.where(fits, torch.arange(fits.shape[1]), fits.int().argmax(1, keepdim=True))
    members = members.gather(1, source)
    own = own.gather(1, source.unsqueeze(-1).expand_as(own))
    parts = [(members, shared, own), (alone.unsqueeze(1), span[alone, :, :-1], span[alone, :, -1].unsqueeze(1))]
    return tuple(_sorted(_rounded(span, *part), format) for part in parts if len(part[0]))


def _sorted(found: Groups, format: BlockFormat) -> Groups:
    """The same groups, best conditioned first."""
    matrix = generator(torch.arange(format.num_seeds), format).double()
    condition = matrix.norm(dim=(1, 2)) * basis(format).pinv.double().permute(2, 0, 1).norm(dim=(1, 2))
    worst, order = condition[found.position.long()].amax(1).sort()
    return replace(
        found,
        shared=found.shared[order],
        own=found.own[order],
        position=found.position[order],
        sound=int((worst <= _SOUND).sum()),
    )


def _complement(span: Tensor, members: Tensor) -> Groups:
    """Pairs of positions int64 [groups, 2] by what their spans leave out."""
    size, count = span.shape[1:]
    each = span[members]  # [groups, 2, C, P]
    shared = torch.linalg.svd(torch.cat([each[:, 0], each[:, 1]], 2)).U[..., count + 1 :].unsqueeze(1)
    # What a span and the shared rows leave is a line, and so is every column of the projector on it.
    left = torch.eye(size, dtype=torch.float64) - each @ each.mT - shared @ shared.mT
    longest = left.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(-1, -1, size, 1)
    own = torch.nn.functional.normalize(left.gather(-1, longest)[..., 0], dim=-1).half()
    shared = shared.half()
    rows = torch.cat([shared.expand(-1, 2, -1, -1), own.unsqueeze(-1)], 3).mT.double()  # [groups, 2, C-P, C]
    inside, length = (torch.linalg.eigvalsh(x @ x.mT)[..., -1].max().sqrt() for x in (rows @ each, rows))
    # Of a unit vector's part inside the span, at most 1, rows give `inside`; of its part outside, at most 1, its length.
    slack = float(inside) + max(float(length) - 1.0, 0.0) + 1e-9
    return Groups(shared[:, 0].mT.contiguous(), own, members.int(), 0, True, slack)


def _rounded(span: Tensor, members: Tensor, shared: Tensor, own: Tensor) -> Groups:
    """Groups of positions int64 [groups, G] with shared rows float64 [groups, C, P-1] and own rows float64 [groups, G, C]."""
    own, shared = own.half(), shared.half()
    slack = float(torch.linalg.eigvalsh(_missing(span[members], shared.double(), own.double())).max())
    # 1e-9: the float64 bases and eigenvalues themselves, condition 5e5 included.
    return Groups(shared.mT.contiguous(), own, members.int(), 0, False, max(slack, 0.0) + 1e-9)


def _own_rows(span: Tensor, shared: Tensor) -> Tensor:
    """The unit vector of each span [..., G, C, P] that is farthest from the shared rows [..., C, P-1]: [..., G, C]."""
    outside = span
    for _ in range(2):
        outside = outside - shared.unsqueeze(-3) @ (shared.mT.unsqueeze(-3) @ outside)
    lengths = outside.norm(dim=-2)
    length, farthest = lengths.max(-1, keepdim=True)
    row = outside.take_along_dim(farthest.unsqueeze(-2), dim=-1)[..., 0]
    return torch.where(length > 1e-10, row / length, 0.0)


def _missing(span: Tensor, shared: Tensor, own: Tensor) -> Tensor:
    """What is missing, span span' - shared shared' - own own', for each seed: [..., G, C, C]."""
    return span @ span.mT - (shared @ shared.mT).unsqueeze(-3) - own.unsqueeze(-1) * own.unsqueeze(-2)


def _by_pairs(format: BlockFormat) -> Tensor:
    """Neighbours (n, n + 1): columns 1 .. P-1 of the first are columns 0 .. P-2 of the second. int64 [groups, 2]."""
    return torch.arange(format.num_seeds + format.num_seeds % 2).view(-1, 2) % format.num_seeds


def _by_signs(format: BlockFormat) -> Tensor:
    """Seeds whose sign vectors agree up to order and sign: int64 [groups, _SIGN_GROUP]."""
    signs = generator(torch.arange(format.num_seeds), format) >= 0  # [N, C, P]
    signs = signs ^ signs[:, :1]
    codes = (signs.long() << torch.arange(format.block_size).view(-1, 1)).sum(1)
    codes[:, 0] = 0  # column 0 is no sign vector
    classes, of_seed = codes.sort(1).values.unique(dim=0, return_inverse=True)
    order = of_seed.argsort(stable=True)
    counts = of_seed.bincount(minlength=len(classes))
    first = counts.cumsum(0) - counts
    per_class = -(-counts // _SIGN_GROUP)
    group_class = torch.arange(len(classes)).repeat_interleave(per_class)
    group_first = torch.arange(len(group_class)) - (per_class.cumsum(0) - per_class)[group_class]
    places = (group_first * _SIGN_GROUP).unsqueeze(1) + torch.arange(_SIGN_GROUP)
    return order[first[group_class].unsqueeze(1) + places.minimum(counts[group_class].unsqueeze(1) - 1)]


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns spanning those of float64 [..., C, P]; zero where one depends on those before it."""
    done: list[Tensor] = []
    for k in range(columns.shape[-1]):
        vector = columns[..., k] / columns[..., k].norm(dim=-1, keepdim=True).clamp_min(1e-300)
        for _ in range(2):
            for q in done:
                vector = vector - q * (q * vector).sum(-1, keepdim=True)
        length = vector.norm(dim=-1, keepdim=True)
        done.append(torch.where(length > 1e-10, vector / length, 0.0))
    return torch.stack(done, -1) if done else columns
