"""A file of sensitivities (`calibration.sensitivity`), for any number of runs. Imports no torch."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from seedlm.errors import EvaluationError
from seedlm.storage.untrusted import read_json
from seedlm.version import __version__

SENSITIVITY_VERSION: Final = 1
"""Of the file's layout."""


def write_sensitivity(path: Path, model: str, text: Any, sensitivity: Mapping[str, float]) -> None:
    """Leave what was measured in a new JSON file. Raises EvaluationError if there is one."""
    content = {
        "sensitivity_version": SENSITIVITY_VERSION,
        "seedlm": __version__,
        "model": model,
        "text": asdict(text),
        "sensitivity": dict(sensitivity),
    }
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
    except OSError as reason:
        raise EvaluationError(f"{path}: {reason.strerror}") from None


def read_sensitivity(path: Path) -> tuple[str, dict[str, float]]:
    """From such a file: the model, as it was named to be measured, and module name -> sensitivity.

    Raises EvaluationError if it is not one.
    """
    data = read_json(path, EvaluationError)
    model, values = data.get("model"), data.get("sensitivity")
    if data.get("sensitivity_version") != SENSITIVITY_VERSION or not isinstance(model, str) or not isinstance(values, dict):
        raise EvaluationError(
            f"{path}: must have sensitivity_version {SENSITIVITY_VERSION}, model and sensitivity: seedlm sensitivity writes it"
        )
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            raise EvaluationError(f"{path}: the sensitivity of {name} must be a finite number, 0 or more, got {value!r}")
    return model, values
