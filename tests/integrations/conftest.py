"""Fixtures of the tests of our own decoder."""

import pytest
import torch


@pytest.fixture
def decodes_anywhere(monkeypatch):
    """On a CPU dense models decode by our own forward too, as on a GPU. Without gradients."""
    from seedlm.integrations.transformers import decoder_reasons

    monkeypatch.setattr(decoder_reasons, "PACKED", ())
    with torch.no_grad():
        yield


@pytest.fixture
def counted(monkeypatch):
    """How many tokens went through `step`."""
    from seedlm.integrations.transformers import decoder_steps

    count = [0]

    def step(*args):
        count[0] += 1
        return original(*args)

    original = decoder_steps.step
    monkeypatch.setattr(decoder_steps, "step", step)
    return count
