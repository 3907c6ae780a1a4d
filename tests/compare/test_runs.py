"""Comparison of runs: synthetic results with known answers, as a table and as JSON."""

import json
import subprocess
import sys

import pytest

from seedlm.cli.compare import compare
from seedlm.compare import compare_runs, load_runs, to_html, to_markdown
from seedlm.errors import EvaluationError, OutputError
from synthetic_runs import EVIL, synthetic, write


class TestTable:
    def test_two_runs_and_their_original(self, two):
        lines = to_markdown(compare_runs(load_runs(two))).splitlines()
        assert lines[0].split(" | ")[-2:] == ["same top token, %", "arc\\_easy (acc\\_norm), % |"]
        assert lines[2:5] == [
            "| original | dense |  | 32.000 | 32.000 | 4.00 | 18.00 ± 0.20 |  |  | 33.3 ± 20.0 |",
            "| 4bit | SeedLM | yes | 4.000 | 4.000 | 0.50 | 20.50 ± 0.25 | 0.100 ± 0.004 | 90.0 ± 1.0 | 33.3 ± 20.0 |",
            "| 3bit | SeedLM | yes | 3.750 | 3.750 | 0.47 | 25.50 ± 0.25 | 0.600 ± 0.004 | 85.0 ± 1.0 | 33.3 ± 20.0 |",
        ]
        assert "wiki\\_test.raw: 2 windows of 6 tokens." in lines[6]

    def test_an_original_that_nobody_ran_is_told_of_by_the_others(self, two):
        comparison = compare_runs(load_runs(two[:2]))
        first = comparison["models"][0]
        assert (first["label"], first["original"], first["metrics"]["perplexity"]["mean"]) == ("original", True, 18.0)
        assert [row["parent"] for row in comparison["models"]] == [None, 0, 0]
        assert comparison["tokens"][0]["models"][0] is None

    def test_forty_runs(self, forty):
        comparison = compare_runs(load_runs(forty))
        assert [row["label"] for row in comparison["models"]] == ["original", *(f"run{number:02}" for number in range(40))]
        assert len(to_markdown(comparison).splitlines()) == 2 + 41 + 2
        assert all(len(item["models"]) == 41 for item in comparison["tokens"])

    def test_other_libraries(self, tmp_path, two):
        results, records = synthetic(1)
        results["model"] = results["reference"]
        results["run"]["baseline"] = {
            "name": "awq-4",
            "libraries": {"quants": "1.2"},
            "options": "groups of 128",
            "calibrated": True,
            "bits_per_weight": 4.25,
            "weights": 800_000,
            "relative_error": None,
        }
        path = write(tmp_path, "awq", results, records)
        strange = synthetic(2)[0]
        strange["model"]["format"] = "aqlm"
        comparison = compare_runs(load_runs([*two, path, write(tmp_path, "strange", strange)]))
        rows = {row["label"]: row for row in comparison["models"]}
        awq = rows["awq"]
        assert (awq["method"], awq["data_free"], awq["options"], awq["parent"]) == (
            "awq-4",
            False,
            "groups of 128; quants 1.2",
            0,
        )
        assert awq["bytes"] == 4_000_000 - 800_000 * (32 - 4.25) / 8
        assert rows["original"]["original"]
        place = list(rows).index("awq")
        assert comparison["layers"][place] == {"hidden": [0.1, 0.21], "weight_error": None, "output_error": None}
        assert (rows["strange"]["method"], rows["strange"]["data_free"]) == ("aqlm", None)

    def test_a_packed_model_that_has_seen_data_is_said_to_be_calibrated(self, tmp_path):
        paths = []
        for number, calibrated in enumerate((None, False, True)):
            results, _ = synthetic(number)
            results["model"]["format"] = "trellis-r4-l16-t256-h128"
            results["model"]["calibrated"] = calibrated
            paths.append(write(tmp_path, f"run{number}", results))
        rows = compare_runs(load_runs(paths))["models"]
        assert [row["data_free"] for row in rows if row["method"] == "SeedLM"] == [True, True, False]

    def test_fronts_hold_what_nothing_beats(self, tmp_path):
        """Bits, bytes, KL and tasks of four models."""
        paths = []
        for number, (bits, nbytes, kl, accuracy) in enumerate(
            [(4, 50, 0.1, 0.6), (3, 60, 0.2, 0.7), (3, 40, 0.3, 0.6), (2, 70, 0.4, 0.6)]
        ):
            results, _ = synthetic(number)
            results["model"].update(bits_per_weight=bits, bytes=nbytes)
            results["metrics"]["kl"]["mean"] = kl
            results["tasks"]["arc_easy"]["acc_norm"]["mean"] = accuracy
            paths.append(write(tmp_path, str(number), results))
        comparison = compare_runs(load_runs(paths))
        labels = [row["label"] for row in comparison["models"]]
        fronts = {
            metric: {cost: "".join(labels[place] for place in places) for cost, places in front.items()}
            for metric, front in comparison["fronts"].items()
        }
        assert fronts["kl"] == {"bits_per_weight": "310", "bytes": "20"}
        assert fronts["tasks"] == {"bits_per_weight": "31", "bytes": "21"}

    def test_names_are_no_markup(self, tmp_path, two):
        results, _ = synthetic(1)
        path = write(tmp_path, "a|b<img>`c`", results)
        assert "| a\\|b&#60;img&#62;\\`c\\` |" in to_markdown(compare_runs(load_runs([two[0], path])))

    def test_labels_are_as_long_as_they_must_be(self, tmp_path):
        paths = [write(tmp_path / folder, "run", *synthetic(n)) for n, folder in enumerate("ab")]
        assert [run.label for run in load_runs(paths)] == ["a/run", "b/run"]

    def test_a_run_that_was_renamed_keeps_its_records(self, tmp_path):
        path = write(tmp_path, "old", *synthetic(1))
        for file in tmp_path.iterdir():
            file.rename(tmp_path / file.name.replace("old", "new"))
        other = write(tmp_path, "other", *synthetic(2))
        runs = load_runs([path.with_name("new.json"), other])
        assert [run.records["layers"]["hidden"] for run in runs] == [[0.1, 0.21], [0.1, 0.22]]

    def test_notes(self, tmp_path, two):
        results, _ = synthetic(1)
        results["run"]["dtype"] = "bfloat16"
        results["environment"]["commit"] = f"{'7' * 40}-dirty"
        alone = synthetic(2)[0] | {"reference": None}
        del alone["metrics"]["kl"]
        runs = load_runs([two[0], write(tmp_path, "other", results), write(tmp_path, "alone", alone)])
        comparison = compare_runs(runs)
        assert comparison["notes"] == [
            "The runs have different dtypes: bfloat16, float32.",
            "The runs have different commits of seedlm: 777777777-dirty, c.",
            "Measured without a reference, so without KL divergence and layers: alone.",
            "No records beside the results, so no tokens, prompts, questions or layers: other, alone.",
        ]
        assert "- The runs have different dtypes: bfloat16, float32." in to_markdown(comparison)
        assert {row["label"]: row["parent"] for row in comparison["models"]}["alone"] is None


class TestBehaviour:
    def test_predictions_that_changed_most_come_first(self, two):
        """Run 5's largest is 10.0 at the first place of the second window, run 0's 5.0 at the same place."""
        comparison = compare_runs(load_runs(two))
        first = comparison["tokens"][0]
        assert (first["window"], first["place"]) == (1, 1)
        assert (first["before"], first["token"], first["after"]) == (EVIL, " the", f" cat sat{EVIL} the")
        assert first["original"] == {"top": " sat", "probability": 0.607}
        assert first["models"] == [
            {"top": " the", "probability": 0.368, "kl": None},
            {"top": " the", "probability": 0.368, "kl": 5.0},
            {"top": " the", "probability": 0.00248, "kl": 10.0},
        ]
        assert len(comparison["tokens"]) == 10

    def test_questions_lost_and_gained(self, two):
        questions = compare_runs(load_runs(two))["questions"]
        assert questions["counts"]["arc_easy"][1] == {"lost": 1, "gained": 0, "changed": 1, "questions": 3}
        assert questions["counts"]["arc_easy"][0]["lost"] == 0
        item = questions["items"][0]  # from e / (1 + e) to 1 / (1 + e)
        assert (item["id"], item["right"], item["change"]) == (0, 0, 0.4622)
        assert [answer["chosen"] for answer in item["models"]] == [0, 1, 1]
        assert [answer["id"] for answer in questions["items"]] == [0, 2]  # the second did not change

    def test_prompts(self, two):
        (item,) = compare_runs(load_runs(two))["prompts"]
        assert item["original"] == " something else"
        assert item["models"] == [" something else", f" {EVIL} 0", f" {EVIL} 5"]


def change(*path):
    """A change of one value in the results."""

    def apply(results):
        for key in path[:-2]:
            results = results[key]
        results[path[-2]] = path[-1]

    return apply


class TestRefusals:
    @pytest.mark.parametrize(
        ("apply", "message"),
        [
            (
                change("text", "sha256", "xyz"),
                "4bit.json and .*other.json cannot be compared: they scored .* and another of that name",
            ),
            (change("settings", "context", 7), "cannot be compared: context 6 and 7"),
            (change("text", "windows", 3), "cannot be compared: windows 2 and 3"),
            (change("text", "tokens", 13), "cannot be compared: tokens in the text 12 and 13"),
            (change("reference", "fingerprint", "q"), r"their references differ \(original, original\)"),
            (change("tasks", "arc_easy", "questions", 9), "arc_easy version 1.0 with 3 questions, and version 1.0 with 9"),
            (change("evaluation_version", 2), "other.json: has version 2, this package reads 1"),
        ],
        ids=["text", "context", "windows", "tokenizer", "reference", "tasks", "version"],
    )
    def test_what_cannot_be_compared(self, tmp_path, two, apply, message):
        results, _ = synthetic(1)
        apply(results)
        with pytest.raises(EvaluationError, match=message):
            load_runs([two[0], write(tmp_path, "other", results)])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "other.json: not valid JSON"),
            (b"\xff", "other.json: not valid JSON"),
            (b"[]", "is not a results file of `seedlm evaluate --out`"),
            (b'{"evaluation_version": 1}', "lacks model, and 8 more things"),
        ],
        ids=["json", "bytes", "list", "empty"],
    )
    def test_what_is_no_run(self, tmp_path, two, content, message):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(EvaluationError, match=message):
            load_runs([two[0], tmp_path / "other.json"])

    def test_a_file_that_lacks_a_number_is_named(self, tmp_path, two):
        results, _ = synthetic(1)
        del results["metrics"]["nll"], results["model"]["bytes"]
        with pytest.raises(EvaluationError, match=r"other\.json: lacks model bytes"):
            load_runs([two[0], write(tmp_path, "other", results)])

    def test_too_few(self, two, tmp_path):
        with pytest.raises(EvaluationError, match="needs at least 2 runs, got 1"):
            load_runs(two[:1])
        with pytest.raises(EvaluationError, match="a run was given twice"):
            load_runs([two[0], two[0].parent / "." / two[0].name])
        with pytest.raises(EvaluationError, match=r"none\.json: cannot be read"):
            load_runs([two[0], tmp_path / "none.json"])

    def test_records_of_another_text(self, tmp_path, two):
        results, records = synthetic(1)
        records["tokens"]["token_ids"] = [[0] * 6] * 2
        with pytest.raises(EvaluationError, match="their tokens differ"):
            compare_runs(load_runs([two[0], write(tmp_path, "other", results, records)]))
        results, records = synthetic(1)
        records["tasks"]["arc_easy"][1]["question"] = "What?"
        with pytest.raises(EvaluationError, match="question 1 of arc_easy differs"):
            compare_runs(load_runs([two[0], write(tmp_path, "another", results, records)]))

    def test_without_the_library_it_says_what_to_install(self, two, monkeypatch):
        monkeypatch.setitem(sys.modules, "vl_convert", None)
        with pytest.raises(EvaluationError, match=r"pip install '\.\[report\]' in a copy of .*; the table and --json do not"):
            to_html(compare_runs(load_runs(two)))


def test_command(two, tmp_path):
    command = [sys.executable, "-m", "seedlm", "compare", *map(str, two)]
    done = subprocess.run([*command, "--json-out", tmp_path / "c.json"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == to_markdown(compare_runs(load_runs(two)))
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(compare_runs(load_runs(two))))
    with pytest.raises(OutputError, match=r"c\.json: exists already"):
        compare(two, json_out=tmp_path / "c.json")
