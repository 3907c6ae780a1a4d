"""Makes packed folders known to transformers as soon as its registry of quantisation methods exists, and no sooner.

A method is added to that registry by a call, and transformers looks for no plugins (5.10 to 5.23), so it has to be imported
first. That takes seconds, which nobody should pay who asks for help or searches seeds. Hence a finder in front of Python's
own: it lets those find the registry's module, and has `hf.register` follow when the module's code has run. If the registry is
there already, it is called at once.

Only that one module's name is looked at, and the module gets the loader that it would have had, so that nothing of ours is
left in it. `hf` calls `register` itself when its own code ends: if `hf` is what imports transformers, or another thread is
still importing `hf`, there is none to call from here yet.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_REGISTRY: Final = "transformers.quantizers.auto"


def install() -> None:
    """From now on, packed folders load in this process. Calling it again does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _REGISTRY in sys.modules:
        _register()


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]  # not all others: two such finders would call each other
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in behind)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """What another loader does, then `_register`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    from seedlm.integrations.transformers import quantizer as hf

    if hasattr(hf, "register"):
        hf.register()
