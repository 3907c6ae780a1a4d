"""Which format each weight gets, so that a given number of bits costs the model as little as possible.

The loss of a compressed model is, to first order, a sum over its weights (HIGGS, arXiv 2411.17525, Theorem 1):

    KL  ~  sum_i  sensitivity_i * nmse_i        nmse_i = ||W_i - W^_i||^2 / ||W_i||^2

The sensitivities are the model's (`sensitivity`), the errors the formats', as on normal weights (`Family.mixture`).
Choosing a format for every weight under a budget of bits is then a multiple-choice knapsack, and its greedy solution needs
no solver: start with the fewest bits everywhere, and buy upgrades in the order of what they save per bit. As long as nothing
is passed over, each state on the way is the best of its size, since one weight's upgrades save less and less per bit (on the
convex hull). What the first one that no longer fits would have saved bounds what any other choice could; among hundreds of
weights that is little. Weights that must share a format count as one.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from seedlm.codes.base import Format, stored_bits
from seedlm.codes.registry import DEFAULT, family
from seedlm.errors import FormatError


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A format for every weight: more bits where they matter, `bits` on average, or as many as a size allows.

    bits          stored bits of all compressed weights, all overhead counted, over their number: at most that
    size          instead of bits: bytes of all the model's weight files, at most (`plan.assign`)
    sensitivity   module -> KL per unit of relative squared error (`sensitivity.measure_sensitivity`); 0, of an expert that no
                  token reached, counts as the least of the others: another text may reach it
    formats       format -> its expected relative squared error
    """

    bits: float | None = None
    size: int | None = None
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    formats: Mapping[Format, float] = field(default_factory=lambda: family(DEFAULT).mixture)

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size is None):
            raise FormatError(f"a mixture has either bits or a size, got bits {self.bits} and size {self.size}")

    def extremes(self, shapes: Mapping[str, tuple[int, int]]) -> tuple[Format, Format]:
        """The formats that take the fewest and the most bits for these weights."""
        sizes = {format: sum(stored_bits(format, *shape) for shape in shapes.values()) for format in self.formats}
        return min(sizes, key=lambda format: sizes[format]), max(sizes, key=lambda format: sizes[format])

    def check_bits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise FormatError if no mixture has so many bits."""
        weights = sum(map(math.prod, shapes.values()))
        low, high = (sum(stored_bits(each, *shape) for shape in shapes.values()) / weights for each in self.extremes(shapes))
        if self.bits is not None and not low <= self.bits <= high:
            raise FormatError(f"a mixture for this model has {low:.4f} to {high:.4f} bits a weight, got {self.bits:g}")

    def check_sensitivity(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise FormatError if a weight has no sensitivity."""
        missing = [module for module in shapes if module not in self.sensitivity]
        if missing:
            raise FormatError(
                f"{missing[0]}: has no sensitivity ({len(missing)} of {len(shapes)} weights); measure this model, "
                "or --exclude what its class has no layer for"
            )

    def assign(
        self, shapes: Mapping[str, tuple[int, int]], groups: Iterable[Sequence[str]] = (), budget: int | None = None
    ) -> dict[str, Format]:
        """A format for each of the weights to be compressed, module -> (out_features, in_features).

        groups    modules that must get the same format; one in no group stands alone
        budget    stored bits of all, at least those of the smallest format; None takes `bits`
        Raises FormatError if a weight has no sensitivity, or if no mixture has so many bits.
        """
        self.check_sensitivity(shapes)
        if budget is None:
            assert self.bits is not None
            self.check_bits(shapes)
            budget = math.floor(self.bits * sum(map(math.prod, shapes.values())))
        least = min((value for value in self.sensitivity.values() if value > 0), default=1.0)
        first = {module: group[0] for group in groups for module in group}
        together: dict[str, list[str]] = {}
        for module in shapes:
            together.setdefault(first.get(module, module), []).append(module)
        choices = [
            [
                (
                    sum(stored_bits(format, *shapes[module]) for module in members),
                    sum((self.sensitivity[module] or least) * nmse for module in members),
                )
                for format, nmse in self.formats.items()
            ]
            for members in together.values()
        ]
        formats = list(self.formats)
        chosen = dict(zip(together, allocate(choices, budget), strict=True))
        leader = {module: name for name, members in together.items() for module in members}
        return {module: formats[chosen[leader[module]]] for module in shapes}


def most_common(formats: Mapping[str, Format]) -> Format:
    """The format that most modules have; of several such, the first."""
    return Counter(formats.values()).most_common(1)[0][0]


def allocate(choices: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """One choice for every weight, of least total loss within the budget.

    choices   for each weight the formats it can have: (bits that it then takes, loss that it then causes)
    budget    bits in all
    returns   for each weight the index of its choice
    Raises ValueError if the smallest choices exceed the budget.
    """
    chosen, upgrades = [], []
    for weight, options in enumerate(choices):
        hull = _hull(options)
        chosen.append(hull[0])
        for before, after in itertools.pairwise(hull):
            bits = options[after][0] - options[before][0]
            upgrades.append(((options[after][1] - options[before][1]) / bits, weight, before, after, bits))
    left = budget - sum(options[choice][0] for options, choice in zip(choices, chosen, strict=True))
    if left < 0:
        raise ValueError(f"budget {budget} is {-left} bits short of the smallest choice")
    for _, weight, before, after, bits in sorted(upgrades):
        if bits <= left and chosen[weight] == before:
            chosen[weight] = after
            left -= bits
    return chosen


def _hull(options: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the options on the lower convex hull, from the fewest bits to the least loss."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: options[index]):
        bits, loss = options[index]
        if hull and loss >= options[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (bits0, loss0), (bits1, loss1) = options[hull[-2]], options[hull[-1]]
            if (loss1 - loss0) * (bits - bits1) < (loss - loss1) * (bits1 - bits0):
                break  # the last step saves more per bit than the next: it stays
            hull.pop()
        hull.append(index)
    return hull
