"""Results files and the records beside them, read and found to be of one kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seedlm.errors import EvaluationError
from seedlm.evaluation.records import EVALUATION_VERSION, read_records
from seedlm.evaluation.schema import check_results
from seedlm.storage.untrusted import parse_json, printable, read_bytes

_SAME: Final = (
    ("text", ("text", "sha256")),
    ("tokens in the text", ("text", "tokens")),
    ("windows", ("text", "windows")),
    ("context", ("settings", "context")),
)
"""What must be equal for two perplexities to mean anything beside each other."""

_MAX_BYTES: Final = 1 << 26
"""Of a results file; those of an evaluation have some kilobytes."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One results file: its label is the file's name without the ending, made longer where two would be equal.

    records   None if there are none beside it
    """

    label: str
    path: Path
    results: dict[str, Any]
    records: dict[str, Any] | None

    @property
    def baseline(self) -> dict[str, Any] | None:
        """What was done to the model after loading, by another library; None if it was measured as it is."""
        found: dict[str, Any] | None = self.results["run"].get("baseline")
        return found


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read results files. Raises EvaluationError for one that is none, and for two that cannot be compared."""
    if len(paths) < 2:
        raise EvaluationError(f"a comparison needs at least 2 runs, got {len(paths)}")
    files = [Path(path) for path in paths]
    if len({file.resolve() for file in files}) < len(files):
        raise EvaluationError("a run was given twice")
    runs = []
    for file, label in zip(files, _labels(files), strict=True):
        results = _read(file)
        runs.append(Run(label=label, path=file, results=results, records=read_records(results, file)))
    for run in runs[1:]:
        _check_same(runs[0], run)
    _check_references(runs)
    _check_tasks(runs)
    return runs


def _read(path: Path) -> dict[str, Any]:
    text = read_bytes(path, _MAX_BYTES, EvaluationError, "results")
    try:
        results = parse_json(text, str(path), EvaluationError)
    except EvaluationError as reason:
        raise EvaluationError(f"{reason}; a run is a file that `seedlm evaluate --out` wrote") from None
    if not isinstance(results, dict) or "evaluation_version" not in results:
        raise EvaluationError(f"{path}: is not a results file of `seedlm evaluate --out`")
    if results["evaluation_version"] != EVALUATION_VERSION:
        found = results["evaluation_version"]
        raise EvaluationError(f"{path}: has version {found!r:.40}, this package reads {EVALUATION_VERSION}")
    check_results(results, str(path))
    return results


def _labels(files: list[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    whole = [[*file.resolve().parts[1:-1], file.name.removesuffix(".json")] for file in files]
    longest = max(map(len, whole))
    labels: list[str] = []
    for length in range(1, longest + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(labels):
            break
    return labels


def _check_same(first: Run, other: Run) -> None:
    for what, (section, key) in _SAME:
        old, new = (run.results[section][key] for run in (first, other))
        if old != new:
            if key == "sha256":  # which tells nobody anything
                what, (old, new) = "they scored different texts,", (_text_of(run) for run in (first, other))
                new = "another of that name" if new == old else new
            raise EvaluationError(f"{first.path} and {other.path} cannot be compared: {what} {old} and {new}")


def _text_of(run: Run) -> str:
    text = run.results["text"]
    form = f"; {str(text['form']).partition(' (')[0]}" if text.get("form") else ""
    return printable(f"{text['path']} ({text['tokens']:,} tokens{form})")


def _check_references(runs: list[Run]) -> None:
    """KL divergences to different models do not compare."""
    with_reference = [run for run in runs if run.results["reference"]]
    for run in with_reference[1:]:
        names = [r.results["reference"] for r in (with_reference[0], run)]
        if names[0]["fingerprint"] != names[1]["fingerprint"]:
            raise EvaluationError(
                f"{with_reference[0].path} and {run.path} cannot be compared: their references differ "
                f"({printable(names[0]['name'])}, {printable(names[1]['name'])})"
            )


def _check_tasks(runs: list[Run]) -> None:
    seen: dict[str, tuple[Run, tuple[Any, int]]] = {}
    for run in runs:
        for task, result in run.results["tasks"].items():
            found = (result["version"], result["questions"])
            other, expected = seen.setdefault(task, (run, found))
            if found != expected:
                raise EvaluationError(
                    f"{other.path} and {run.path} cannot be compared: {printable(task)} version {expected[0]!r} with "
                    f"{expected[1]} questions, and version {found[0]!r} with {found[1]}"
                )
