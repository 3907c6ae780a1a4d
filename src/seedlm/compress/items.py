"""What becomes of a source's tensors, and where in the output: what a plan is made of. Imports no torch."""

from dataclasses import dataclass

from seedlm.storage.metadata import PackedInfo, heading
from seedlm.storage.safetensors import TensorInfo


@dataclass(frozen=True)
class Target:
    """The compressed weight that becomes of a matrix: whose it is, and how it is packed.

    observed   the layer whose statistics it has; None for the module's own
    """

    module: str
    packed: PackedInfo
    observed: str | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor of the source, or one matrix of a stack, and what becomes of it.

    name     in the source
    stored   what it is stored as, name -> dtype and shape
    target   the weight that it becomes; None if it is copied
    """

    name: str
    stored: dict[str, TensorInfo]
    target: Target | None = None

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return next(iter(self.stored))

    @property
    def headings(self) -> dict[str, bytes]:
        """Of what is stored: stored name -> what its digest begins with."""
        packed = self.target.packed if self.target else None
        return {name: heading(name, info, packed) for name, info in self.stored.items()}

    @property
    def weights(self) -> int:
        """To be searched."""
        return self.target.packed.weights if self.target else 0


@dataclass(frozen=True)
class Destination:
    """A file to be written into, and where: stored name -> byte."""

    file: str
    offsets: dict[str, int]
