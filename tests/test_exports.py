"""The public surface is what `__all__` says, no more and no less, however late a name is imported."""

import ast
import inspect
import types

import pytest

import seedlm


def test_all_is_what_is_visible():
    visible = {
        name
        for name, value in vars(seedlm).items()
        if not isinstance(value, types.ModuleType) and (not name.startswith("_") or name == "__version__")
    }
    assert set(seedlm.__all__) == visible | seedlm._HOMES.keys()
    assert dir(seedlm) == sorted(seedlm.__all__)


def test_every_public_object_says_what_it_is():
    for name in seedlm.__all__:
        if name not in ("PRESETS", "__version__"):
            assert getattr(seedlm, name).__doc__


def test_type_checkers_are_told_where_late_names_come_from():
    (told,) = [node.body for node in ast.parse(inspect.getsource(seedlm)).body if isinstance(node, ast.If)]
    imports = {alias.name: node.module for node in told if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imports == {name: f"seedlm.{module}" for name, module in seedlm._HOMES.items()}


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'seedlm' has no attribute 'decompress'"):
        _ = seedlm.decompress
