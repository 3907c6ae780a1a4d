"""What results and records must look like before anything is made of them: one schema, checked once, right after reading.

They are input like any other, from people's machines by way of people's mail. All that reads them later relies on this: types,
lengths that agree, token numbers that have their text, names without a way out of the folder. Keys that nothing reads may be
there.

pydantic is what typer and much else in the environment bring along; it is imported here alone, when a comparison is made.
"""

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from seedlm.errors import EvaluationError
from seedlm.storage.untrusted import printable

_T = TypeVar("_T")
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Text = Annotated[str, Field(max_length=1 << 20)]
_List = Annotated[list[_T], Field(fail_fast=True)]
"""A list of which the first item that is wrong is told, not a million of them."""
_Rows = _List[_List[float | None]]
_SHOWN = 120


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class _Estimate(_Part):
    """None for a mean that is not finite, such as the perplexity of a model that gives a token no chance at all."""

    mean: float | None
    standard_error: float | None


class _Model(_Part):
    name: _Text
    format: _Text
    fingerprint: _Text
    bits_per_weight: Annotated[float, Field(ge=0)] | None
    model_bits_per_weight: Annotated[float, Field(ge=0)] | None
    weights: _Count | None
    bytes: _Count
    calibrated: bool | None = None


class _Settings(_Part):
    context: Annotated[int, Field(ge=2, lt=1 << 31)]


class _TextFacts(_Part):
    path: _Text
    sha256: _Text
    tokens: _Count
    windows: _Count


class _Accuracy(_Part):
    mean: float
    standard_error: float


class _Measured(_Part):
    mean: float
    standard_error: float | None


class _Task(_Part):
    version: float | _Text
    questions: _Count
    acc: _Accuracy | None = None
    acc_norm: _Accuracy | None = None
    metrics: dict[str, _Measured] | None = None

    @model_validator(mode="before")
    @classmethod
    def _not_null(cls, data: Any) -> Any:
        for name in ("acc", "acc_norm", "metrics"):
            if isinstance(data, dict) and data.get(name, ...) is None:
                raise ValueError(f"{name} must be left out or be what was measured")
        if isinstance(data, dict) and not {"acc", "metrics"} & set(data):
            raise ValueError("there must be acc or metrics")
        return data


class _Baseline(_Part):
    name: _Text
    bits_per_weight: Annotated[float, Field(ge=0)]
    weights: _Count | None = None
    libraries: dict[str, _Text] | None = None
    options: _Text | None = None
    calibrated: bool | None = None
    relative_error: float | None = None


class _Run(_Part):
    dtype: _Text | None = None
    reference_dtype: _Text | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: _Count | None = None
    baseline: _Baseline | None = None


class _Environment(_Part):
    device_name: _Text | None = None
    torch: _Text | None = None
    transformers: _Text | None = None
    commit: _Text | None = None


class _Companion(_Part):
    file: _Text
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        if name in ("", ".", "..") or not name.isprintable() or any(mark in name for mark in "/\\:"):
            raise ValueError("must be the plain name of a file")
        return name


class _Results(_Part):
    model: _Model
    reference: _Model | None
    settings: _Settings
    text: _TextFacts
    protocol: _Text
    metrics: dict[str, _Estimate]
    tasks: dict[str, _Task]
    environment: _Environment
    run: _Run
    records: _Companion | None = None

    @model_validator(mode="after")
    def _complete(self) -> "_Results":
        needed = ("nll", "perplexity") + (("reference_nll", "reference_perplexity") if self.reference else ())
        for name in needed:
            if name not in self.metrics:
                raise ValueError(f"metrics lacks {name}")
        return self


class _Tokens(_Part):
    token_ids: _List[_List[_Count]]
    nll: _Rows
    top1: _List[_List[_Count]]
    kl: _Rows | None = None
    reference_nll: _Rows | None = None
    reference_top1: _List[_List[_Count]] | None = None
    pieces: dict[str, _Text]

    @model_validator(mode="after")
    def _fit(self) -> "_Tokens":
        theirs = (self.kl, self.reference_nll, self.reference_top1)
        if None in theirs and any(theirs):
            raise ValueError("kl, reference_nll and reference_top1 come together")
        lengths = [len(row) for row in self.token_ids]
        if len(set(lengths)) > 1 or 0 in lengths:
            raise ValueError("windows have different lengths")
        for name in ("nll", "top1", "kl", "reference_nll", "reference_top1"):
            rows = getattr(self, name)
            if rows is not None and [len(row) + 1 for row in rows] != lengths:
                raise ValueError(f"{name} must have one entry less than token_ids in every window")
        used = {token for rows in (self.token_ids, self.top1, self.reference_top1 or []) for row in rows for token in row}
        if missing := {token for token in used if str(token) not in self.pieces}:
            raise ValueError(f"pieces lacks token {min(missing)}")
        return self


class _Histogram(_Part):
    edges: _List[float]
    counts: _List[_Count]

    @model_validator(mode="after")
    def _fit(self) -> "_Histogram":
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError("there must be one edge more than counts")
        return self


class _Linear(_Part):
    module: _Text
    weight_error: float | None
    output_error: float | None


class _Layers(_Part):
    linears: _List[_Linear]
    hidden: _List[float | None]


class _Prompt(_Part):
    prompt: _Text
    text: _Text
    reference_text: _Text | None


class _Question(_Part):
    id: int
    right: _Count | None
    chosen: _Count
    log_likelihoods: Annotated[_List[float | None], Field(min_length=1, max_length=1 << 16)]
    question: _Text | None = None
    choices: _List[_Text] | None = None

    @model_validator(mode="after")
    def _fit(self) -> "_Question":
        count = len(self.log_likelihoods)
        if self.chosen >= count or (self.right is not None and self.right >= count):
            raise ValueError("right and chosen must be answers that have a log likelihood")
        if ("question" in self.model_fields_set) != ("choices" in self.model_fields_set):
            raise ValueError("question and choices come together")
        if "question" in self.model_fields_set and (self.question is None or len(self.choices or ()) != count):
            raise ValueError("every choice must have a log likelihood")
        return self


class _Records(_Part):
    tokens: _Tokens | None = None
    distributions: dict[str, _Histogram] | None = None
    layers: _Layers | None = None
    prompts: _List[_Prompt] | None = None
    tasks: dict[str, _List[_Question]] | None = None


def check_results(data: Any, where: str) -> None:
    """Raise EvaluationError, with the place of the first thing that is wrong, unless these are results of an evaluation."""
    _check(_Results, data, where)


def check_records(data: Any, where: str) -> None:
    """The same for its records."""
    _check(_Records, data, where)


def _check(schema: type[BaseModel], data: Any, where: str) -> None:
    try:
        schema.model_validate(data)
    except ValidationError as reason:
        first, *others = reason.errors(include_url=False, include_context=False, include_input=False)
        place = _place(first["loc"])
        more = f", and {len(others)} more things" if others else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise EvaluationError(f"{where}: lacks {place}{more}") from None
        raise EvaluationError(f"{where}: {place}{': ' if place else ''}{message[0].lower()}{message[1:]}{more}") from None


def _place(keys: Iterable[int | str]) -> str:
    return printable(" ".join(map(str, keys))[:_SHOWN])
