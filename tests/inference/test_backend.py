"""The choice of a backend."""

import pytest
import torch

import toy_family  # noqa: F401 (registers its family)
from seedlm.codes import on_cpu, registry
from seedlm.codes.block.format import parse_spec
from seedlm.errors import BackendError
from seedlm.inference import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
SMALL = parse_spec("block-k8-c8-p3-q4-e4")


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setattr(on_cpu, "_has_numba", lambda: False)


def test_auto_takes_the_first_that_can_run():
    pytest.importorskip("numba")
    assert backend.choose("auto", CPU, SMALL, (6, 20)).name == "numba"
    assert backend.choose("auto", CUDA, SMALL, (6, 20)).name == "torch"


def test_auto_falls_back_where_a_name_is_held_to(no_numba):
    assert backend.choose("auto", CPU, SMALL, (6, 20)).name == "torch"
    with pytest.raises(BackendError, match=r"backend 'numba' needs numba: pip install numba"):
        backend.choose("numba", CPU, SMALL, (6, 20))


@pytest.mark.parametrize("name", ["trellis", "block", "toy"])
def test_names_that_are_known_without_torch_are_those_of_the_backends(name):
    family = registry.family(name)
    assert [*family.products] == [each.name for each in family.backends()]


def test_every_backend_is_explained():
    found = backend.explain(CUDA, SMALL, (6, 20))
    assert "GPU" in found.pop("cuda")
    assert found == {
        "numba": "backend 'numba' works on the CPU, the codes are on cuda:1",
        "torch": None,
    }


def test_a_name_that_no_backend_has_is_refused():
    with pytest.raises(BackendError, match="unknown backend 'fpga', known for block codes: auto, cuda, numba, torch"):
        backend.choose("fpga", CPU, SMALL, (6, 20))
