"""The public surface is what `__all__` says, no more and no less."""

import types

import seedlm


def test_all_is_what_is_visible():
    visible = {
        name
        for name, value in vars(seedlm).items()
        if not isinstance(value, types.ModuleType) and (not name.startswith("_") or name == "__version__")
    }
    assert set(seedlm.__all__) == visible


def test_every_public_object_says_what_it_is():
    for name in seedlm.__all__:
        if name not in ("PRESETS", "__version__"):
            assert getattr(seedlm, name).__doc__
