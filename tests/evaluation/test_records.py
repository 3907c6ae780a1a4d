"""Records of a run: what it saw, beside its results."""

import numpy as np
import pytest

from seedlm import inspect_checkpoint
from seedlm.errors import EvaluationError
from seedlm.evaluation import prompts, records
from seedlm.evaluation import run as evaluate
from seedlm.evaluation.run import Settings
from seedlm.evaluation.text import Text
from tiny_models import STORY

CPU = {"device": "cpu"}


class TestRecords:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, folders, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        (folder / "text").write_text(STORY * 8)
        settings = Settings(context=32, prompts=("Once upon a time", "Lily"), new_tokens=5, layers=1, **CPU)
        results = evaluate.evaluate(
            str(folders[1]),
            Text.from_file(folder / "text"),
            settings,
            reference=str(folders[0]),
            out=folder / "run.json",
            tokens_out=folder / "run.npz",
        )
        return folder, results

    def test_they_hold_what_was_seen(self, run, folders):
        folder, results = run
        found = records.read_records(results, folder / "run.json")
        every = np.load(folder / "run.npz")
        for field in ("token_ids", "top1", "reference_top1"):
            assert (np.array(found["tokens"][field]) == every[field]).all()
        for field in ("nll", "kl", "reference_nll"):
            np.testing.assert_allclose(found["tokens"][field], every[field], rtol=1e-3)
        pieces = found["tokens"]["pieces"]
        assert "".join(pieces[str(token)] for token in every["token_ids"].ravel()[1:]).startswith(f" {STORY}")
        changes = every["nll"] - every["reference_nll"]
        histogram = found["distributions"]["nll_change"]
        assert sum(histogram["counts"]) == sum(found["distributions"]["kl"]["counts"]) == every["kl"].size
        assert histogram["counts"][-1] == (changes >= histogram["edges"][-2]).sum()
        errors = {row["module"]: row["weight_error"] for row in found["layers"]["linears"]}
        for tensor in inspect_checkpoint(folders[1]).tensors:
            assert errors[tensor.module] == pytest.approx(tensor.relative_error, rel=1e-4)
        assert errors["lm_head"] == 0
        assert len(found["layers"]["hidden"]) == 5
        first = found["prompts"][0]
        assert (first["prompt"], first["reference_text"]) == ("Once upon a time", ", there was a little")
        assert first["text"] != first["reference_text"]

    def test_another_file_is_refused_and_a_missing_one_is_none(self, run, tmp_path):
        folder, results = run
        assert records.read_records(results, tmp_path / "run.json") is None
        assert records.read_records({**results, "records": None}, folder / "run.json") is None
        (tmp_path / "run.records.json.gz").write_bytes(records.pack_records({}))
        with pytest.raises(EvaluationError, match=r"is not the file that .*run.json names \(its SHA-256 differs\)"):
            records.read_records(results, tmp_path / "run.json")

    def test_without_a_reference_they_say_less(self, folders, story, tmp_path):
        settings = Settings(context=32, limit=1, prompts=("Lily",), new_tokens=2, **CPU)
        results = evaluate.evaluate(str(folders[0]), story, settings, out=tmp_path / "run")
        found = records.read_records(results, tmp_path / "run")
        assert found["layers"] is None
        assert found["distributions"] == {}
        assert found["prompts"][0]["reference_text"] is None
        assert found["tokens"].keys() == {"token_ids", "top1", "nll", "pieces"}

    def test_prompts_from_a_file(self, tmp_path):
        (tmp_path / "prompts").write_text("One\n\n Two \n")
        assert prompts.read_prompts(tmp_path / "prompts") == ("One", " Two ")
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(EvaluationError, match="holds no prompts, one is expected on every line"):
            prompts.read_prompts(tmp_path / "empty")
