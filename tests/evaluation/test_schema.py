"""Results and records are input: what is wrong with them is said in one line, before anything is made of them."""

import copy
import gzip
import hashlib
import json
import math

import pytest

from seedlm.compare import compare_runs, load_runs, to_markdown
from seedlm.errors import EvaluationError
from seedlm.evaluation.records import finite, pack_records, read_records
from synthetic_runs import estimate, original_run, synthetic, write


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(tree):
        for key in keys:
            tree = tree[key]
        if value is ...:
            del tree[last]
        else:
            tree[last] = value

    return change


RESULTS = [
    (put("metrics", "nll", ...), "metrics lacks nll"),
    (put("metrics", "reference_nll", ...), "metrics lacks reference_nll"),
    (put("metrics", "perplexity", "mean", "12"), "metrics perplexity mean: input should be a valid number"),
    (put("model", "bytes", True), "model bytes: input should be a valid integer"),
    (put("model", "bytes", -1), "model bytes: input should be greater than or equal to 0"),
    (put("model", "format", ["x"]), "model format: input should be a valid string"),
    (put("settings", "context", 1), "settings context: input should be greater than or equal to 2"),
    (put("tasks", "arc_easy", "acc", None), "tasks arc_easy: acc must be left out"),
    (put("tasks", "arc_easy", "acc_norm", None), "acc_norm must be left out"),
    (put("run", "baseline", {"name": "nf4"}), "lacks run baseline bits_per_weight"),
    (put("records", {"file": "../x", "sha256": "0" * 64}), "records file: must be the plain name of a file"),
    (put("records", {"file": "x", "sha256": "0"}), "records sha256: string should match"),
]

TOKENS = [
    (put("tokens", "nll", 0, [1.0]), "nll must have one entry less than token_ids in every window"),
    (put("tokens", "pieces", "3", ...), "pieces lacks token 3"),
    (put("tokens", "top1", 0, 0, 99), "pieces lacks token 99"),
    (put("tokens", "top1", 0, 0, -1), "tokens top1 0 0: input should be greater than or equal to 0"),
    (put("tokens", "kl", ...), "kl, reference_nll and reference_top1 come together"),
    (put("tokens", "token_ids", 0, [0]), "windows have different lengths"),
    (put("distributions", "kl", "counts", [1]), "one edge more than counts"),
    (put("layers", "linears", 0, "module", 5), "layers linears 0 module: input should be a valid string"),
    (put("prompts", 0, "text", None), "prompts 0 text: input should be a valid string"),
    (put("tasks", "arc_easy", 0, "chosen", 2), "right and chosen must be answers"),
    (put("tasks", "arc_easy", 0, "log_likelihoods", []), "log_likelihoods: list should have at least 1"),
    (put("tasks", "arc_easy", 0, "choices", ["one"]), "every choice must have a log likelihood"),
    (put("tasks", "arc_easy", 0, "choices", ...), "question and choices come together"),
    (put("records_version", 2), "has version 2, this package reads 1"),
]


@pytest.fixture
def other(tmp_path):
    return write(tmp_path, "original", *copy.deepcopy(original_run()))


@pytest.mark.parametrize(("change", "message"), RESULTS, ids=[message[:40] for _, message in RESULTS])
def test_results_that_are_not_are_refused(tmp_path, other, change, message):
    results, _ = copy.deepcopy(synthetic(0))
    change(results)
    path = write(tmp_path, "run", results)
    with pytest.raises(EvaluationError) as caught:
        load_runs([other, path])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("change", "message"), TOKENS, ids=[message[:40] for _, message in TOKENS])
def test_records_that_are_not_are_refused(tmp_path, other, change, message):
    results, records = copy.deepcopy(synthetic(0))
    change(records)
    path = write(tmp_path, "run", results, records)
    with pytest.raises(EvaluationError) as caught:
        load_runs([other, path])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'run.records.json.gz'}: ")


def test_a_number_that_is_not_finite_is_null_in_files_and_has_its_words_in_tables(tmp_path, other):
    results, records = copy.deepcopy(synthetic(0))
    results["metrics"]["perplexity"] = finite({"mean": math.inf, "standard_error": math.nan})
    results["metrics"]["nll"] = finite(estimate(math.nan))
    records["tokens"]["nll"][0][0] = records["tokens"]["kl"][0][0] = math.inf
    records["tasks"]["arc_easy"][0]["log_likelihoods"] = [-math.inf, -1.0]
    path = write(tmp_path, "run", results, records)
    comparison = compare_runs(load_runs([other, path]))
    json.dumps(comparison, allow_nan=False)
    assert "| not finite |" in to_markdown(comparison)
    assert comparison["tokens"][0]["models"][1]["probability"] == 0
    assert [row["label"] for row in comparison["models"]] == ["original", "run"]


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_is_refused(tmp_path, other, text):
    path = tmp_path / "run.json"
    path.write_text(other.read_text().replace("2.9", text, 1))
    with pytest.raises(EvaluationError, match="no JSON number"):
        load_runs([other, path])


def records_of(data):
    """Results that name records with these bytes."""
    return {"settings": {"context": 6}, "records": {"file": "x.gz", "sha256": hashlib.sha256(data).hexdigest()}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b" " * (1 << 24)), "would become more than 10 times its size"),
        (gzip.compress(b"{}")[:-1], "ends early"),
        (gzip.compress(b"{}") + b"x", "goes on after its end"),
        (b"x", "is damaged"),
        (gzip.compress(b"[]"), "has version None"),
        (gzip.compress(b'{"a": 1, "a": 1}'), "the key 'a' stands twice"),
    ],
    ids=["bomb", "cut", "long", "no-gzip", "list", "twice"],
)
def test_packed_records_are_bounded_and_whole(tmp_path, data, message):
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(EvaluationError, match=message):
        read_records(records_of(data), tmp_path / "x.json")


def test_records_of_a_run_are_far_from_the_bound():
    _, records = synthetic(0)
    records["tokens"]["nll"] = [[round(math.sin(n * m) ** 2 * 9, 3) for n in range(400)] for m in range(60)]
    packed = pack_records(records)
    assert len(gzip.decompress(packed)) < 8 * len(packed)
