"""Statistics of a model's linear layers, as error feedback needs them: measured once, kept in a file, used for any code.

For each input that one or more layers read, the mean over tokens of  t x x'  (x the input, t the token's weight); for each
layer, the mean over tokens of every output's squared gradient. Layers that read the same input (q, k and v; gate and up)
share it. A product is held as float16 correlations and float32 scales, in half: the rounding is far below the error of a mean
over some ten thousand tokens (KL at 3 bits did not change), and half the file.

The file is one safetensors file::

    inputs.NAME.scale         float32 [in]             root of the product's diagonal
    inputs.NAME.correlation   float16 [in (in + 1)/2]  lower triangle by rows, of product[i, j] / (scale[i] scale[j])
    rows.LAYER                float32 [out]            mean squared gradients of the layer's outputs
    __metadata__              statistics: JSON of the version, facts, each layer's input and each input's tokens

NAME is the first layer that reads the input. Statistics in memory are rounded as the file holds them, so fresh and loaded
ones give the same bytes.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any, Final

import torch
from torch import Tensor

from seedlm.codes.base import Facts
from seedlm.errors import SourceError
from seedlm.storage.safetensors import parse_json, read_header
from seedlm.storage.written import write_tensors
from seedlm.version import __version__

STATISTICS_VERSION: Final = 1
"""Of the file's layout."""

_KEY: Final = "statistics"
_ALIKE: Final = 16
"""Tokens. Squared gradients of one vary about tenfold, the means of a layer's rows about as much as their own size."""
_ROWS: Final = 1024
"""Of a product, rounded at a time: a float64 product of 28672 columns is 6.6 GB."""
_PRODUCTS_KEPT: Final = 2
_PRODUCTS_BYTES: Final = 1 << 30
"""In checkpoints, k, o, q and v of a layer follow one another; threads that work side by side are at several layers."""


@dataclass(frozen=True, kw_only=True)
class StatisticsFacts:
    """Where statistics come from.

    model        fingerprint of the model that the text went through
    text         hash of the text's tokens
    source       "own text", or the name of a file: then what is made with them has seen data
    sequences, length   of the text
    weighting    of tokens: "gradient" (root of the token's squared gradient) or "none"
    """

    model: str
    text: str
    source: str
    sequences: int
    length: int
    weighting: str


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What one input looks like.

    scale         float32 [in], finite, 0 or more
    correlation   float16 [in (in + 1) / 2]
    tokens        how many it is a mean of
    """

    scale: Tensor
    correlation: Tensor
    tokens: int

    @classmethod
    def of(cls, product: Tensor, tokens: int) -> "InputStatistics":
        """From a mean product, float64 or float32 [in, in] on any device, symmetric but for rounding."""
        scale = product.diagonal().double().clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        correlation, end = torch.empty(len(scale) * (len(scale) + 1) // 2, dtype=torch.float16), 0
        for first in range(0, len(scale), _ROWS):
            few = product[first : first + _ROWS].double()
            few = (few * inverse[first : first + _ROWS, None] * inverse).clamp(-1, 1).half().cpu()
            for count, row in enumerate(few, first + 1):
                correlation[end : end + count] = row[:count]
                end += count
        return cls(scale.float().cpu(), correlation, tokens)

    def product(self) -> Tensor:
        """Float32 [in, in], symmetric, on the CPU: each element rounded twice, so the same everywhere."""
        width = len(self.scale)
        full, start = torch.zeros(width, width), 0
        for i in range(width):
            full[i, : i + 1] = self.correlation[start : start + i + 1]
            start += i + 1
        full.mul_(self.scale[:, None]).mul_(self.scale)
        return full + full.tril(-1).T


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of all layers that were observed.

    inputs   name -> what it looks like
    reads    layer -> name of its input, layers by the names that a checkpoint holds them under
    rows     layer -> float32 [out], mean squared gradients; empty if there were none
    """

    facts: StatisticsFacts
    inputs: Mapping[str, InputStatistics]
    reads: Mapping[str, str]
    rows: Mapping[str, Tensor]
    _products: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, init=False, repr=False)
    _unpacking: Lock = field(default_factory=Lock, init=False, repr=False)

    def facts_of(self, layer: str, largest: float) -> Facts:
        """What an encoder may ask of a layer's weight; without statistics if it was not observed.

        Layers that read the same input get the same tensor, while it is one of the last few: encoders keep what they derive
        from it. Any thread may call this.
        """
        name = self.reads.get(layer)
        if name is None:
            return Facts(largest)
        with self._unpacking:
            product = self._products.pop(name, None)
            self._products[name] = self.inputs[name].product() if product is None else product
            while len(self._products) > _PRODUCTS_KEPT and _bytes(self._products) > _PRODUCTS_BYTES:
                self._products.popitem(last=False)
            return Facts(largest, self._products[name], self.inputs[name].tokens, self._importance(layer))

    def _importance(self, layer: str) -> Tensor | None:
        """A layer's mean squared gradients, float32 [out], drawn to their mean as if a few tokens more had found all alike.

        So rows of an expert that hardly any token reached count nearly alike, and none counts nothing. Exact sums, and then one
        rounded operation after another: the same everywhere.
        """
        rows = self.rows.get(layer)
        if rows is None:
            return None
        tokens, mean = self.inputs[self.reads[layer]].tokens, math.fsum(rows.tolist()) / max(len(rows), 1)
        return ((rows.double() * tokens + mean * _ALIKE) / (tokens + _ALIKE)).float()

    def input_of(self, layer: str) -> InputStatistics | None:
        """What a layer reads; None if it was not observed."""
        name = self.reads.get(layer)
        return None if name is None else self.inputs[name]

    def save(self, path: Path) -> None:
        """Write the file; it appears whole or not at all. Raises OutputError if it cannot be written."""
        tensors = {f"rows.{layer}": values.contiguous() for layer, values in self.rows.items()}
        for name, found in self.inputs.items():
            tensors[f"inputs.{name}.scale"] = found.scale
            tensors[f"inputs.{name}.correlation"] = found.correlation
        content = {
            "statistics_version": STATISTICS_VERSION,
            "seedlm": __version__,
            "facts": asdict(self.facts),
            "reads": dict(self.reads),
            "tokens": {name: found.tokens for name, found in self.inputs.items()},
        }
        write_tensors(path, tensors, {_KEY: json.dumps(content, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read the file. Raises SourceError for one that is not whole, of another version, or contradicts itself."""
        from safetensors import safe_open

        entries, metadata = read_header(path, SourceError)
        content = parse_json(metadata.get(_KEY, "null"), f"{path}, {_KEY}", SourceError)
        if not isinstance(content, dict) or content.get("statistics_version") != STATISTICS_VERSION:
            raise SourceError(f"{path}: does not hold statistics of version {STATISTICS_VERSION}; seedlm writes such files")
        facts, reads, tokens = _checked(content, path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in entries}
        inputs = {name: _input(name, count, tensors, path) for name, count in tokens.items()}
        rows = {name.removeprefix("rows."): tensors.pop(name) for name in list(tensors) if name.startswith("rows.")}
        if tensors:
            raise SourceError(f"{path}: holds {next(iter(tensors))!r}, which no input has")
        for layer, values in rows.items():
            if layer not in reads or values.dtype != torch.float32 or values.dim() != 1 or not _is_size(values):
                raise SourceError(
                    f"{path}: rows.{layer} must be finite float32 [out], 0 or more, of a layer that reads an input"
                )
        return cls(facts, inputs, reads, rows)


def _checked(content: dict[str, Any], path: Path) -> tuple[StatisticsFacts, dict[str, str], dict[str, int]]:
    """The metadata's parts, each of its type."""
    facts, reads, tokens = (content.get(key) for key in ("facts", "reads", "tokens"))
    kinds = {part.name: part.type for part in fields(StatisticsFacts)}
    if not isinstance(facts, dict) or {key: type(value) for key, value in facts.items()} != kinds:
        raise SourceError(f"{path}: facts must have {', '.join(kinds)}")
    if not isinstance(tokens, dict) or not all(type(count) is int and 0 <= count < 1 << 63 for count in tokens.values()):
        raise SourceError(f"{path}: tokens must map inputs to numbers of tokens")
    if not isinstance(reads, dict) or not all(isinstance(name, str) and name in tokens for name in reads.values()):
        raise SourceError(f"{path}: reads must map layers to inputs that are there")
    return StatisticsFacts(**facts), reads, tokens


def _input(name: str, tokens: int, tensors: dict[str, Tensor], path: Path) -> InputStatistics:
    """One input's statistics, taken out of the tensors."""
    scale, correlation = (tensors.pop(f"inputs.{name}.{part}", None) for part in ("scale", "correlation"))
    if scale is None or scale.dtype != torch.float32 or scale.dim() != 1 or not _is_size(scale):
        raise SourceError(f"{path}: inputs.{name}.scale must be finite float32 [in], 0 or more")
    if len(scale) and not (largest := scale.max()).square().isfinite():
        raise SourceError(f"{path}: inputs.{name}.scale must be of numbers whose squares are finite, got {largest:.3g}")
    size = len(scale) * (len(scale) + 1) // 2
    if correlation is None or correlation.dtype != torch.float16 or correlation.shape != (size,):
        raise SourceError(f"{path}: inputs.{name}.correlation must be float16 [{size}]")
    if not (correlation.abs() <= 1).all():
        raise SourceError(f"{path}: inputs.{name}.correlation must be between -1 and 1")
    own = correlation[torch.arange(1, len(scale) + 1).cumsum(0) - 1]
    if len(bad := ((own != 1) & (scale > 0)).nonzero()):
        at = int(bad[0])
        raise SourceError(f"{path}: inputs.{name}.correlation must be 1 of a feature with itself, got {own[at]:g} of {at}")
    return InputStatistics(scale, correlation, tokens)


def _is_size(values: Tensor) -> bool:
    return bool((values.isfinite() & (values >= 0)).all())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
