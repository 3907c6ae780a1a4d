"""What a run saw, item by item: kept beside its results so that a comparison can show what changed, and not only how much.

``NAME.records.json.gz`` belongs to ``NAME.json``, which names it with its SHA-256. It holds

    tokens    of the first windows, about 32 thousand predictions: token_ids, top1, nll, and with a reference kl, reference_nll
              and reference_top1, as lists [windows, predictions]; the pieces of text that the numbers stand for
    layers    `layers.compare_layers` on the first windows; None without a reference
    prompts   each prompt with its most likely continuation, by the model and by the reference
    tasks     task -> its questions: which answer was right and which was chosen, and the log likelihood of each; texts of the
              first 500

JSON, since it is read by people's tools too; the same run leaves the same bytes. A number that is not finite, which JSON does
not have, is null (`finite`). A file that was packed to become far larger than any of ours is not unpacked.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from seedlm.errors import EvaluationError
from seedlm.storage.untrusted import parse_json, read_bytes

EVALUATION_VERSION: Final = 1
"""Of the results' layout."""

RECORDS_VERSION: Final = 1
"""Of the records' layout."""

_MAX_BYTES: Final = 1 << 28
_MAX_RATIO, _FREE_BYTES = 10, 1 << 16
"""Records are read up to 256 MiB, and unpacked to at most 10 times their size: those of an evaluation shrink to a quarter,
tasks with their texts to an eighth."""
_BYTES_OF_A_LIST, _FREE_LISTS = 24, 200_000
"""Bytes of text that there must be for each list or object in it, but for the first: an empty one takes 64 to 184 in memory."""

PREDICTIONS: Final = 1 << 15
"""Predictions that are kept one by one: 16 windows of the papers' length, a third of a megabyte."""


def records_path(out: Path) -> Path:
    """Where the records of the results file `out` are."""
    return out.with_name(out.name.removesuffix(".json") + ".records.json.gz")


def pack_records(records: dict[str, Any]) -> bytes:
    """The file's bytes."""
    data = finite({"records_version": RECORDS_VERSION, **records})
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    packed = gzip.compress(text, mtime=0)
    return packed if len(text) <= _most(packed) else gzip.compress(text, 0, mtime=0)


def read_records(results: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The records of the results that were read from `path`; None if it has none, or they are not there.

    They are looked for beside it, under the name that they were written with, and under the one that goes with `path`'s.
    Raises EvaluationError for a file that is not the one the results name.
    """
    from seedlm.evaluation.schema import check_records

    named = results.get("records")
    places = dict.fromkeys((path.with_name(Path(named["file"]).name), records_path(path)) if named else ())
    found = {file: read_bytes(file, _MAX_BYTES, EvaluationError, "records") for file in places if os.path.isfile(file)}
    if not named or not found:
        return None
    file = next((file for file, data in found.items() if hashlib.sha256(data).hexdigest() == named["sha256"]), None)
    if file is None:
        raise EvaluationError(
            f"{next(iter(found))}: is not the file that {path} names (its SHA-256 differs); restore it, or delete it"
        )
    text = _unpack(found[file], file)
    if (lists := text.count(b"[") + text.count(b"{")) > len(text) // _BYTES_OF_A_LIST + _FREE_LISTS:
        raise EvaluationError(f"{file}: has {lists} lists in {len(text)} bytes, which no evaluation's records have")
    records = parse_json(text, str(file), EvaluationError)
    if not isinstance(records, dict) or records.get("records_version") != RECORDS_VERSION:
        version = records.get("records_version") if isinstance(records, dict) else None
        raise EvaluationError(f"{file}: has version {version!r:.40}, this package reads {RECORDS_VERSION}")
    check_records(records, str(file))
    if records.get("tokens") and any(len(row) != results["settings"]["context"] for row in records["tokens"]["token_ids"]):
        raise EvaluationError(f"{file}: its windows are not of {results['settings']['context']} tokens, as {path} says")
    return records


def _most(packed: bytes) -> int:
    """Bytes that records may become."""
    return _MAX_RATIO * len(packed) + _FREE_BYTES


def _unpack(data: bytes, file: Path) -> bytes:
    limit = _most(data)
    unpacking = zlib.decompressobj(wbits=31)
    try:
        text = unpacking.decompress(data, limit + 1)
    except zlib.error as reason:
        raise EvaluationError(f"{file}: is damaged ({reason})") from None
    if len(text) > limit:
        raise EvaluationError(f"{file}: would become more than {_MAX_RATIO} times its size, which no evaluation's records do")
    if not unpacking.eof or unpacking.unused_data:
        raise EvaluationError(f"{file}: is damaged ({'ends early' if not unpacking.eof else 'goes on after its end'})")
    return text


def finite(data: Any) -> Any:
    """JSON data with None for every number that JSON does not have."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def token_records(windows: np.ndarray, records: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    """The first predictions, and the text of every token in them.

    windows   int64 [windows, context]
    records   `perplexity.RECORD` or `PAIR_RECORD` [windows, context - 1]
    """
    count = max(1, PREDICTIONS // records.shape[1])
    ids = windows[:count]
    columns: dict[str, Any] = {"token_ids": ids.tolist()}
    for field in records.dtype.names or ():
        values = records[field][:count]
        columns[field] = values.tolist() if values.dtype.kind == "i" else [[_short(x) for x in row] for row in values.tolist()]
    tops = [records[field][:count].ravel() for field in ("top1", "reference_top1") if field in columns]
    used = np.unique(np.concatenate([ids.ravel(), *tops])).tolist()
    return {**columns, "pieces": dict(zip(map(str, used), _pieces(tokenizer, used), strict=True))}


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to a text; some tokenizers drop the space in front of a first token, so none is decoded alone."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, token])[start:] for token in ids]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
