"""`seedlm bench`: what the table holds and what is refused. No test says how fast anything is."""

import json

import pytest

from tiny_models import SMALL, told

FEW = ["--tokens", 3, "--prompt-tokens", 5, "--repeats", 1, "--device", "cpu"]
NUMBERS = {"tokens_per_second", "first_token_seconds", "prompt_tokens_per_second", "weight_bytes"}


class TestTable:
    @pytest.fixture(scope="class")
    @staticmethod
    def found(folders):
        from seedlm.evaluation.speed import Settings, measure_speed

        return measure_speed(str(folders[1]), Settings(tokens=3, prompt_tokens=5, repeats=1, device="cpu"))

    def test_packed_and_dense_are_rows(self, found):
        assert [row["what"] for row in found["rows"]] == ["packed", "dense"]
        assert found["left_out"] == {"nf4": "measured on CUDA devices only, this is cpu"}
        assert (found["tokens"], found["prompt_tokens"], found["device"]) == (3, 5, "cpu")

    def test_numbers_are_positive(self, found):
        for row in found["rows"]:
            assert all(row[name] > 0 for name in NUMBERS)
            assert row["peak_bytes"] is None
            assert row["unfused"] == "on a cpu transformers' own forward is as fast"

    def test_codes_take_less_memory(self, found):
        packed, dense = (row["weight_bytes"] for row in found["rows"])
        assert packed < dense

    def test_backends_of_all_layers_are_counted(self, found):
        assert sum(found["rows"][0]["backends"].values()) == 35  # 5 layers of 7

    def test_a_model_that_is_not_compressed_has_no_packed_row(self, folders, here):
        found = json.loads(here("bench", folders[0], *FEW, "--json").stdout)
        assert [row["what"] for row in found["rows"]] == ["dense"]
        assert found["left_out"]["packed"] == "the model is not compressed"


def test_summary(folders, here):
    done = here("bench", folders[1], *FEW)
    assert (done.returncode, told(done.stderr)) == (0, [])
    assert "3 tokens after 5, batch 1" in done.stdout
    starts = [line.split()[0] for line in done.stdout.splitlines()[-4:]]
    assert starts == ["tokens/s", "packed", "dense", "nf4"]


def test_a_backend_by_name_multiplies_and_one_that_is_not_there_is_refused_in_a_line(folders, here):
    found = json.loads(here("bench", folders[1], *FEW, "--backend", "torch", "--json").stdout)
    assert found["rows"][0]["backends"] == {"torch": 35}
    done = here("bench", folders[1], *FEW, "--backend", "tosch")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no packed layer has a backend 'tosch', known: auto, " in done.stderr


def test_generate_multiplies_by_a_backend_by_name(folders, here):
    asked = ["generate", folders[1], "Once", "--max-new-tokens", 3, "--device", "cpu", "--backend"]
    assert here(*asked, "torch").stdout.startswith("Once")
    done = here(*asked, "tosch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("seedlm: no packed layer has a backend 'tosch', known: auto, cuda, ")


def test_explain_tells_every_kind_of_weight_and_why(folders, here):
    kinds = json.loads(here("bench", folders[1], "--explain", "--device", "cpu", "--json").stdout)
    assert {kind["format"] for kind in kinds} == {SMALL}
    assert sum(kind["weights"] for kind in kinds) == 35
    assert len({tuple(kind["shape"]) for kind in kinds}) == len(kinds)
    lines = here("bench", folders[1], "--explain", "--device", "cpu").stdout.splitlines()
    assert lines[0].startswith(f"{SMALL} ")
    assert lines[0].endswith(f": {kinds[0]['backend']}")


def test_explain_of_a_backend_by_name(folders, here):
    kinds = json.loads(here("bench", folders[1], "--explain", "--device", "cpu", "--backend", "torch", "--json").stdout)
    assert {kind["backend"] for kind in kinds} == {"torch"}
    assert {kind["others"]["numba"] for kind in kinds} == {"works here, by --backend numba"}
    done = here("bench", folders[1], "--explain", "--device", "cpu", "--backend", "tosch")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "tosch" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", 1], "tokens must be at least 2, got 1"),
        (["--prompt-tokens", 0], "prompt_tokens must be at least 1, got 0"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--compile"], "compiles for CUDA devices only"),
        (["--prompt-tokens", 100000], "the model knows 512 positions"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
    ],
    ids=["tokens", "prompt", "dtype", "compile", "positions", "device"],
)
def test_errors_are_one_line(arguments, message, folders, here):
    done = here("bench", folders[1], "--device", "cpu", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


def test_explain_refuses_a_model_without_codes(folders, here):
    done = here("bench", folders[0], "--explain", "--device", "cpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
