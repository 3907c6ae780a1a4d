"""Statistics on their way to an encoder: each input's product once on a device, shared by the layers that read it."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from seedlm.codes.base import Facts
from seedlm.storage.statistics import Statistics

_KEPT: Final = 4
"""Products on the device at a time: the layers that share one come close together."""


class StatisticsReader:
    """The statistics of one file for one device. Several threads may ask at once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._statistics, self._device = Statistics.load(path), device
        self._products: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def facts(self, module: str, largest: float) -> Facts:
        """What an encoder may know of a matrix; without statistics of a layer that was not observed."""
        name = self._statistics.reads.get(module)
        if name is None:
            return Facts(largest)
        with self._lock:
            product = self._products.pop(name, None)
            if product is None:
                product = self._statistics.inputs[name].product().to(self._device)
            self._products[name] = product
            while len(self._products) > _KEPT:
                self._products.popitem(last=False)
        rows = self._statistics.rows.get(module)
        importance = None if rows is None else rows.to(self._device)
        return Facts(largest, product, self._statistics.inputs[name].tokens, importance)
