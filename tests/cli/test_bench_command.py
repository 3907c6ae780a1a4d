"""`seedlm bench`: what the table holds and what is refused. No test says how fast anything is."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from seedlm.codes.registry import family, parse_format
from seedlm.device import peak_host_memory, resident_memory
from seedlm.errors import BackendError, EvaluationError
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
            for name in ("tokens_per_second", "first_token_seconds"):
                least, most = row[f"{name}_range"]
                assert 0 < least <= row[name] <= most
            assert row["peak_bytes"] is None
            assert row["unfused"] == "on a cpu transformers' own forward is as fast"

    def test_only_the_first_row_has_a_process_of_its_own(self, found):
        first, second = (row["process_bytes"] for row in found["rows"])
        assert second is None
        if sys.platform == "linux":
            assert found["rows"][0]["weight_bytes"] < first <= peak_host_memory()

    def test_codes_take_less_memory(self, found):
        packed, dense = (row["weight_bytes"] for row in found["rows"])
        assert packed < dense

    def test_backends_of_all_layers_are_counted(self, found):
        assert sum(found["rows"][0]["backends"].values()) == 35  # 5 layers of 7

    def test_a_model_that_is_not_compressed_has_no_packed_row(self, folders, here):
        found = json.loads(here("bench", folders[0], *FEW, "--json").stdout)
        assert [row["what"] for row in found["rows"]] == ["dense"]
        assert found["left_out"]["packed"] == "the model is not compressed"


class TestTimes:
    """By clocks of our own: what is told does not depend on how fast this machine is."""

    def test_they_are_those_at_which_tokens_arrive(self, monkeypatch):
        from seedlm.evaluation import speed

        class Writes:
            def generate(self, prompt, *, streamer, max_new_tokens, **_):
                for piece in (prompt, *max_new_tokens * [prompt[0, :1]]):
                    streamer.put(piece)
                streamer.end()

        class WritesAtOnce:
            def generate(self, prompt, *, streamer, **_):
                streamer.put(prompt)
                streamer.put(prompt[0])

        prompt, clock = torch.ones(1, 4, dtype=torch.int64), iter([10.0, 10.5, 13.0, 14.0, 15.5, 20.0, 21.0, 22.0])
        monkeypatch.setattr(speed, "perf_counter", lambda: next(clock))
        assert speed._generate(Writes(), prompt, 3, False) == (3.0, 2.5)
        with pytest.raises(EvaluationError, match="gives 1 pieces for 3 tokens"):
            speed._generate(WritesAtOnce(), prompt, 3, False)

    def test_medians_with_the_least_and_the_most(self, folders, here, monkeypatch):
        from seedlm.evaluation import speed

        asked = ["bench", folders[0], "--tokens", 2, "--prompt-tokens", 6, "--device", "cpu"]
        for options in ([], ["--json"]):
            runs = iter([(99.0, 99.0), (2.0, 0.5), (4.0, 0.25), (3.0, 1.0)])
            with monkeypatch.context() as context:
                context.setattr(speed, "_generate", lambda *_, runs=runs: next(runs))
                shown = here(*asked, *options).stdout
            if not options:
                line = next(line for line in shown.splitlines() if line.startswith("dense"))
                assert "2.0 (1.0 to 4.0)  3000.0 ms (2000.0 to 4000.0)              2.0 " in line
        (row,) = json.loads(shown)["rows"]
        assert (row["tokens_per_second"], row["tokens_per_second_range"]) == (2.0, [1.0, 4.0])
        assert (row["first_token_seconds"], row["first_token_seconds_range"]) == (3.0, [2.0, 4.0])
        assert row["prompt_tokens_per_second"] == 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="told by Linux alone")
def test_what_the_process_gave_back_is_no_memory_of_it():
    before = resident_memory()
    held = torch.ones(1 << 25)  # 134 MB
    there = resident_memory()
    del held
    assert there - before > 120_000_000
    assert there - resident_memory() > 120_000_000


@pytest.mark.parametrize("compiler", [False, True])
def test_memory_of_the_process_stands_in_the_table_and_whether_a_compiler_is_in_it(folders, here, monkeypatch, compiler):
    from seedlm.evaluation import speed

    timed = speed._time
    monkeypatch.setattr(speed, "resident_memory", lambda: 123_450_000)
    monkeypatch.setattr(speed, "_time", lambda *asked: timed(*asked) | {"compiler": compiler})
    shown = here("bench", folders[0], *FEW).stdout
    assert re.search(r"weights +process\ndense .* MB +123.45 MB\n", shown)
    assert ("process has numba and LLVM in it" in shown) == compiler


def test_where_linux_tells_nothing_there_is_no_memory_of_the_process(monkeypatch):
    def no_name(name):  # as on Windows
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr("ctypes.CDLL", no_name)
    monkeypatch.setattr(sys, "platform", "win32")
    assert resident_memory() is None


OWN_WAYS = {"num_beams": 2, "num_return_sequences": 2, "stop_strings": "e", "max_time": 1e-5}
"""Settings of a model by which there would be no greedy text of one token after the other."""


@pytest.mark.parametrize("name", OWN_WAYS)
def test_a_model_with_ways_of_its_own_is_measured_as_others_are(folders, tmp_path, here, name):
    folder = shutil.copytree(folders[0], tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 2, name: OWN_WAYS[name]}))
    (row,) = json.loads(here("bench", folder, *FEW, "--json").stdout)["rows"]
    assert row["tokens_per_second"] > 0


def test_generate_writes_one_text_whatever_the_model_itself_would(folders, tmp_path, here):
    folder = shutil.copytree(folders[0], tmp_path / "model")
    asked = ["Once upon", "--max-new-tokens", 8, "--device", "cpu"]
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 2, "num_return_sequences": 2}))
    assert here("generate", folder, *asked).stdout == here("generate", folders[0], *asked).stdout != ""


def test_summary(folders, here):
    done = here("bench", folders[1], *FEW)
    assert (done.returncode, told(done.stderr)) == (0, [])
    assert "3 tokens after 5, batch 1" in done.stdout
    starts = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert [start for start in starts if start != "process"] == ["tokens/s", "packed", "dense", "nf4"]


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


def test_explain_of_a_backend_that_some_codes_have(monkeypatch):
    """As the model would run: what a family has none of that name for stays at "auto"."""
    from seedlm.evaluation import speed

    formats = [parse_format(SMALL), parse_format("trellis-r4-l16-t256-h32")]
    packed = {str(format): SimpleNamespace(format=format, shape=(96, 64)) for format in formats}
    monkeypatch.setattr(speed.Checkpoint, "open", lambda folder: SimpleNamespace(packed=packed))
    monkeypatch.setattr(speed, "locate", lambda model: model)
    (int8,) = [each for each in family("trellis").backends() if each.name == "numba-int8"]
    monkeypatch.setattr(type(int8), "reason_unavailable", lambda *_: None)
    block, trellis = speed.explain_backends("model", "cpu", "numba-int8")
    assert (block["backend"], trellis["backend"]) == ("numba", "numba-int8")
    with pytest.raises(BackendError, match="no packed layer has a backend 'tosch'"):
        speed.explain_backends("model", "cpu", "tosch")


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
