"""Which tensors of a model are compressed, decided from names, shapes and dtypes, and from what the model says of them.

The model's word is a `Survey`, which `modeling.blueprint` makes: this file builds none, and does without where there is none.

The rule, for a tensor named ``M.weight`` of module M:

1. Only matrices [out_features, in_features] that belong to a linear layer can be compressed, and stacks of them, one for
   each expert (`stack_of`). Vectors, other parameters and embeddings cannot, whatever the patterns say.
2. By default those inside a numbered layer (``model.layers.3.mlp.up_proj``) are, except routers, vision and audio towers,
   heads, and what would not become smaller.
3. ``include`` patterns add modules that rule 2 leaves out (``lm_head``); ``exclude`` patterns take modules away, and win.
4. The same matrix of all experts of a layer is compressed, or of none.
5. What the model has no place for, what is no plain linear layer there, and what its modules share, stays as it is.

Patterns are shell globs over the whole module name (a stack's is its tensor's), in which ``*`` also matches dots. A pattern
that matches no module of the model is an error: it is nearly always a typing mistake.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from seedlm.codes.base import Format
from seedlm.codes.registry import parse_format
from seedlm.errors import FormatError, SourceError
from seedlm.storage.checkpoint import PackedInfo, Stack
from seedlm.storage.refusals import TRANSPOSED_MODELS
from seedlm.storage.safetensors import TensorInfo

_EMBEDDINGS: Final = ("*embed*", "*wte", "*wpe", "*word_embeddings*", "*relative_attention_bias")
_LEFT_DENSE: Final = {
    "a router": ("*router*", "*.gate", "*.gate.*", "*.shared_expert_gate"),
    "a weight that is read without calling its layer": (
        *("*.dt_proj", "*.x_proj", "*.mamba.out_proj", "*.mixer.out_proj"),  # Mamba
        *("*.attention.output", "*.feed_forward.value"),  # RWKV
    ),
    "a weight that is stored under a name without .weight": (
        *("*sconv.weight_proj", "*convolution.weight_proj", "*_message_gate.*"),  # Inkling 2
    ),
    "part of a vision or audio tower": ("*vision*", "*visual*", "*audio*", "*multi_modal_projector*", "*mm_projector*"),
    "an output head": ("*lm_head*", "*embed_out", "output"),
}
_ENCODABLE: Final = frozenset({"F32", "F16", "BF16"})
_STACKS: Final = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("experts.up_proj", "experts.down_proj"),
    ("input_linear.weight", "output_linear.weight"),
)
"""How stacks of experts are called: one that reads the hidden states, and the one of the same layer that writes them."""
_STACK_TRANSPOSED: Final = {
    **dict.fromkeys(("gpt_oss", "llama4", "llama4_text"), True),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "qwen3_5_moe", "qwen3_5_moe_text"), False),
}
"""Whether an architecture's stacks are [experts, in_features, out_features]: asked only where the shapes do not tell."""
_SAME_INPUT: Final = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"wi_0", "wi_1"}),
)
"""Leaves of module names whose layers get the same tensor, in transformers' architectures."""
_MEANT: Final = frozenset({"excluded", "an embedding", "a router"})
_WORTH_A_WORD: Final = 0.1
"""Share of a model's weights that may stay dense inside of layers without a line about it."""
_SHOWN: Final = 3
_EXPERT: Final = re.compile(r"(.*experts)\.\d+\.(.+)")
DENSE: Final = "dense"
"""What is said of embeddings or a head that are to stay as they are, in the place of a format."""


def format_or_dense(said: str | float | Format, code: str | None = None) -> Format | None:
    """What is said of embeddings or a head: a format, None for "dense". Raises FormatError as `parse_format`."""
    return None if said == DENSE else parse_format(said, code)


@dataclass(frozen=True)
class Wish:
    """What is wanted of the embeddings and the head.

    said      "embeddings" or "head", as far as something is said of it -> its format, None to leave it dense; of tied ones one
              option says both
    default   format of what nothing is said of, as far as it can be coded; None leaves it dense
    """

    said: Mapping[str, Format | None] = field(default_factory=dict)
    default: Format | None = None

    @classmethod
    def of(
        cls, embeddings: str | float | Format | None, head: str | float | Format | None, default: Format | None = None
    ) -> "Wish":
        """From two options, None where nothing is said. Raises FormatError as `parse_format`."""
        given = (("embeddings", embeddings), ("head", head))
        said = {option: format_or_dense(each) for option, each in given if each is not None}
        return cls(said, default)

    @property
    def formats(self) -> list[Format]:
        """All that may be given to one of them."""
        return [format for format in (*self.said.values(), self.default) if format is not None]


@dataclass(frozen=True)
class Tables:
    """The two matrices of a model that have a row for each token of its vocabulary; in its files, tensors, else modules.

    embeddings   the input embeddings; None if there are none
    head         the output head, the same name if it is tied to the embeddings
    reasons      "embeddings" or "head" -> why no code can stand for it
    layer        the layer that is the output head, whatever it multiplies by: statistics know it by this name
    absent       "embeddings" or "head", if the model has none
    """

    embeddings: str | None = None
    head: str | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    layer: str | None = None
    absent: frozenset[str] = frozenset()

    @property
    def tied(self) -> bool:
        return self.embeddings is not None and self.embeddings == self.head

    def reason(self, option: str) -> str | None:
        """Why no code can stand for the embeddings or the head; None if one can."""
        return self.reasons.get(option, None if getattr(self, option) else "nobody knows which they are")

    def choose(self, said: Mapping[str, Format | None]) -> dict[str, Format]:
        """The formats that are asked for (`Wish.said`), by name.

        Raises SourceError for a matrix that cannot be coded, FormatError if different things are said of one that is tied.
        """
        for option, format in said.items():
            if format is not None and (reason := self.reason(option)):
                raise SourceError(f"--{option}: {reason}; leave it out")
        if self.tied and len(set(said.values())) > 1:
            texts = [f"--{option} {DENSE if format is None else format.spec}" for option, format in said.items()]
            raise FormatError(
                f"the output head is tied to the embeddings, one set of codes serves both: {' and '.join(texts)} "
                "must be the same, or one of them left out"
            )
        return {f"{getattr(self, option)}": format for option, format in said.items() if format is not None}

    def unsaid(self, said: Mapping[str, Format | None]) -> list[str]:
        """Which of the two go by the default: one option alone if they are tied."""
        if self.tied:
            return [] if said else ["embeddings"]
        return [option for option in ("embeddings", "head") if option not in said and option not in self.absent]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the model that a config describes tells about a source's tensors.

    name     the model's class; None if it could not be built, and names are all there is
    dense    tensor -> why no code can take its place
    stacks   stack of experts -> how its matrices lie in it
    notes    what a user should know before the search, a line each
    tables   the tensors of the embeddings and the head
    """

    name: str | None = None
    dense: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tables: Tables = Tables()


NO_SURVEY: Final = Survey()


def select(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    format: Format,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    survey: Survey = NO_SURVEY,
) -> tuple[list[str], dict[str, str]]:
    """Split a model's tensors into what is compressed and what is not.

    returns   modules to compress, in the tensors' order, and for every other tensor the reason why not; a stack of experts
              counts as one module, named like its tensor
    Raises SourceError for a pattern without a match, a float64 weight, a tied head that was included, an architecture that
    stores its matrices transposed, a stack of experts whose rows cannot be told from its columns, experts of one layer that
    are not all treated alike, and if nothing is left to compress.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    _refuse_transposed(tensors, config)
    check_patterns(tensors, include, exclude, survey)
    chosen, left = [], {}
    for name, info in tensors.items():
        reason = _why_not(name, tensors, config, format, include, exclude, survey)
        if reason is not None:
            left[name] = reason
        elif info.dtype not in _ENCODABLE:
            raise SourceError(f"{name}: a weight must be F32, F16 or BF16, got {info}; convert the model, or --exclude it")
        elif "lm_head" in name and _is_tied(config):
            raise SourceError(f"{name}: is tied to the embeddings (tie_word_embeddings), which stay dense; do not --include it")
        else:
            chosen.append(name.removesuffix(".weight"))
    _check_experts(chosen, left)
    if not chosen:
        raise SourceError(
            f"nothing to compress: none of the {len(tensors)} tensors is the weight of a linear layer to be packed"
        )
    return chosen, left


def check_patterns(
    tensors: Mapping[str, TensorInfo], include: Iterable[str], exclude: Iterable[str], survey: Survey = NO_SURVEY
) -> None:
    """Raise SourceError for a pattern that matches no module with a weight."""
    named = (name for name, info in tensors.items() if name.endswith(".weight") or _is_stack(name, info, survey))
    modules = [name.removesuffix(".weight") for name in named]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(module, pattern) for module in modules):
                tied = "; its head is tied to the embeddings and has no weight of its own" if "head" in pattern else ""
                raise SourceError(f"no module with a weight matches --{option} {pattern!r}{tied}")


def tables_of(
    tensors: Mapping[str, TensorInfo], survey: Survey, said: Mapping[str, Format | None], exclude: Iterable[str] = ()
) -> dict[str, PackedInfo]:
    """The embeddings and the output head that are asked for (`Wish.said`), by module.

    Raises SourceError or FormatError for one that cannot be, as `Tables.choose`, and for one that is also excluded.
    """
    found = {}
    for name, format in survey.tables.choose(said).items():
        module, info = name.removesuffix(".weight"), tensors[name]
        option = "embeddings" if name == survey.tables.embeddings else "head"
        if any(fnmatchcase(module, pattern) for pattern in as_patterns(exclude)):
            raise SourceError(f"{name}: is excluded, and --{option} asks for codes of it; leave one of them out")
        if info.dtype not in _ENCODABLE:
            raise SourceError(
                f"{name}: a weight must be F32, F16 or BF16, got {info}; convert the model, or leave --{option} out"
            )
        if reason := _reason_dense(info, format):
            raise SourceError(f"{name}: {[*info.shape]} stays dense as {format.spec} ({reason}); leave --{option} out")
        found[module] = _table(info, format, option == "embeddings")
    return found


def tables_by_default(
    tensors: Mapping[str, TensorInfo], survey: Survey, wish: Wish, taken: Iterable[str] = (), exclude: Iterable[str] = ()
) -> tuple[dict[str, PackedInfo], list[str]]:
    """The embeddings and the output head that get the default, by module, and a line on those that cannot and stay dense.

    taken   modules that patterns have included, whose format is that of the layers
    """
    found: dict[str, PackedInfo] = {}
    reasons: dict[str, list[str]] = {}
    tables, exclude, format = survey.tables, as_patterns(exclude), wish.default
    if format is None:
        return {}, []
    for option in tables.unsaid(wish.said):
        reason, name = tables.reason(option), f"{getattr(tables, option)}"
        module = name.removesuffix(".weight")
        if reason is None and (module in taken or any(fnmatchcase(module, pattern) for pattern in exclude)):
            continue
        if reason is None:
            reason = _reason_dense(tensors[name], format)
        if reason is None:
            found[module] = _table(tensors[name], format, option == "embeddings")
        else:
            reasons.setdefault(reason, []).append(option)
    return found, [f"left dense: the {' and the '.join(options)} ({reason})" for reason, options in reasons.items()]


def tables_by_names(tensors: Mapping[str, TensorInfo], left: Iterable[str], format: Format) -> dict[str, PackedInfo]:
    """All that may turn out to be embeddings or a head and can have this format, by module: what else lies outside of layers.

    left   tensors that are not compressed
    """
    names = [name for name in left if name.endswith(".weight") and not is_numbered(name) and len(tensors[name].shape) == 2]
    return {
        name.removesuffix(".weight"): _table(tensors[name], format, _cannot(name, tensors[name], NO_SURVEY) is not None)
        for name in names
        if _reason_dense(tensors[name], format) is None
    }


def _reason_dense(info: TensorInfo, format: Format) -> str | None:
    """Why embeddings or a head stay dense that nothing is said of; None if they do not."""
    if info.dtype not in _ENCODABLE:
        return f"a weight must be F32, F16 or BF16, got {info}"
    return format.reason_unfit(info.shape[0], info.shape[1])


def _table(info: TensorInfo, format: Format, embedding: bool) -> PackedInfo:
    return PackedInfo(format, (info.shape[0], info.shape[1]), embedding=embedding)


def is_numbered(module: str) -> bool:
    """Whether a module, or its tensor, is inside of a numbered layer."""
    return any(part.isdigit() for part in module.split("."))


def _is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a model's head is its embeddings; a model of several parts may say so of its text part alone."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return next((part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part), False) is True


def as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Some patterns, or a single one."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def stack_of(
    name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], survey: Survey = NO_SURVEY
) -> Stack | None:
    """The stack of experts that a tensor is; None if it is none.

    Some architectures stack [out_features, in_features], some the transpose. The model tells which. Without one the stack that
    reads the hidden states does: its in_features is the config's hidden_size. If both of its sides are, the architecture must
    be known. Raises SourceError if rows cannot be told from columns.
    """
    if not _is_stack(name, tensors[name], survey):
        return None
    if survey.name is not None:
        return survey.stacks[name]
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    hidden, kind = config.get("hidden_size"), config.get("model_type")
    readers = (name.removesuffix(leaf) + reads for reads, writes in _STACKS for leaf in (reads, writes) if name.endswith(leaf))
    reader = next((tensors[reader].shape for reader in readers if reader in tensors), None)
    experts, rows, columns = tensors[name].shape
    transposed = None
    if reader is not None and hidden in reader[1:]:
        transposed = reader[2] != hidden if reader[1] != reader[2] else _STACK_TRANSPOSED.get(f"{kind}")
    if transposed is None:
        raise SourceError(
            f"{name}: cannot tell rows from columns of the experts {[*tensors[name].shape]}: model_type {kind!r}, hidden_size "
            f"{hidden}, and the stack that reads {reader and [*reader]}; --exclude {name.removesuffix('.weight')!r} leaves them"
        )
    return Stack(name, (experts, rows, columns), transposed)


def dense_linears(tensors: Mapping[str, TensorInfo], left: Mapping[str, str], survey: Survey = NO_SURVEY) -> list[str]:
    """Modules that may be linear layers and are not compressed, for ``modules_to_not_convert``.

    A tied head has no tensor but is a linear layer all the same, so ``lm_head`` is listed unless it is compressed.
    """
    names = {name.removesuffix(".weight") for name in left if _cannot(name, tensors[name], survey) is None}
    if "lm_head.weight" not in tensors:
        names.add("lm_head")
    return sorted(names)


def matrices_of(
    modules: Iterable[str], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], survey: Survey = NO_SURVEY
) -> dict[str, tuple[str, tuple[int, int], Stack | None]]:
    """The matrices of what `select` chose, each of a stack under a name of its own.

    returns   module -> the tensor that holds it, its (out_features, in_features), and the stack that it is one of, if so
    """
    chosen = set(modules)
    found: dict[str, tuple[str, tuple[int, int], Stack | None]] = {}
    for name, info in tensors.items():
        if name.removesuffix(".weight") not in chosen:
            continue
        if stack := stack_of(name, tensors, config, survey):
            found |= dict.fromkeys(stack.modules, (name, stack.matrix, stack))
        elif name.endswith(".weight"):
            found[name.removesuffix(".weight")] = (name, (info.shape[0], info.shape[1]), None)
    return found


def _why_not(
    name: str,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    format: Format,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    survey: Survey,
) -> str | None:
    """Why a tensor stays as it is; None if it is to be compressed."""
    cannot = _cannot(name, tensors[name], survey)
    if cannot is not None:
        return cannot
    module = name.removesuffix(".weight")
    if any(fnmatchcase(module, pattern) for pattern in exclude):
        return "excluded"
    included = any(fnmatchcase(module, pattern) for pattern in include)
    if not included and (left := left_by_default(module)):
        return left
    if name in survey.dense:
        return survey.dense[name]
    if included:
        return None
    stack = stack_of(name, tensors, config, survey)
    return format.reason_unfit(*(stack.matrix if stack else tensors[name].shape))


def _check_experts(chosen: Iterable[str], left: Mapping[str, str]) -> None:
    """Rule 4: what transformers merges into one tensor on loading is packed as a whole or not at all."""
    reasons: dict[tuple[str, str], dict[str | None, str]] = defaultdict(dict)
    for module, reason in [*((module, None) for module in chosen), *left.items()]:
        if match := _EXPERT.fullmatch(module.removesuffix(".weight")):
            reasons[match[1], match[2]].setdefault(reason, module)
    for found in reasons.values():
        if None in found and len(found) > 1:
            other = next(reason for reason in found if reason)
            raise SourceError(
                f"{found[other]}: stays dense ({other}) while {found[None]} is compressed; "
                f"the same matrix of all experts of a layer must be treated alike"
            )


def largest_left(tensors: Mapping[str, TensorInfo], left: Mapping[str, str]) -> list[str]:
    """A line on what is left dense against expectation: weights in numbered layers, the largest first, if they weigh much."""
    sizes = {name: math.prod(tensors[name].shape) for name in left if len(tensors[name].shape) > 1}
    inside = {name: size for name, size in sizes.items() if is_numbered(name)}
    inside = {name: size for name, size in inside.items() if left[name] not in _MEANT}
    total = sum(math.prod(info.shape) for info in tensors.values())
    if not inside or sum(inside.values()) < _WORTH_A_WORD * total:
        return []
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, size in inside.items():
        kinds[re.sub(r"(?<=\.)\d+(?=\.)", "*", name), left[name]].append(size)
    largest = sorted(kinds.items(), key=lambda item: -sum(item[1]))[:_SHOWN]
    shown = "; ".join(f"{name} ({sum(sizes) / total:.0%}: {reason})" for (name, reason), sizes in largest)
    return [f"{sum(inside.values()) / total:.0%} of the weights are left dense inside of layers, the largest {shown}"]


def groups_of(modules: Iterable[str]) -> list[list[str]]:
    """Modules that read the same input and may be multiplied as one: q, k and v of a layer, gate and up of an MLP.

    Only groups of two and more are returned, each in the order of `modules`.
    """
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        for number, names in enumerate(_SAME_INPUT):
            if leaf in names:
                groups[parent, number].append(module)
    return [group for group in groups.values() if len(group) > 1]


def left_by_default(module: str) -> str | None:
    """Rule 2: why a linear layer of this name stays as it is unless it is included; None if it is compressed."""
    module = module.replace(".vision_moe.", ".")  # Ernie 4.5 VL's experts for the tokens of images: part of no tower
    for reason, patterns in _LEFT_DENSE.items():
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return reason
    if not is_numbered(module):
        return "not in a numbered layer"
    return None


def _cannot(name: str, info: TensorInfo, survey: Survey) -> str | None:
    """Why no pattern could make a tensor compressed; None if one could."""
    if _is_stack(name, info, survey):
        return None
    if may_be_stack(name, info):
        return survey.dense.get(name, "stacked experts of an unknown kind")
    if not name.endswith(".weight"):
        return "not a weight"
    if len(info.shape) != 2 or 0 in info.shape or not re.match(r"B?F\d", info.dtype):
        return "not a matrix of floats"
    if any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in _EMBEDDINGS):
        return "an embedding"
    return None


def may_be_stack(name: str, info: TensorInfo) -> bool:
    """Whether a tensor may be a stack of experts: of three dimensions or, DBRX's, [experts * out_features, in_features]."""
    flat = len(info.shape) == 2 and not name.endswith((".weight", "bias"))
    return "expert" in name and (len(info.shape) == 3 or flat)


def _is_stack(name: str, info: TensorInfo, survey: Survey) -> bool:
    if survey.name is not None:
        return name in survey.stacks
    named = name.endswith(tuple(f".{leaf}" for pair in _STACKS for leaf in pair))
    return named and len(info.shape) == 3 and 0 not in info.shape and re.match(r"B?F\d", info.dtype) is not None


def _refuse_transposed(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    kind = next((part["model_type"] for part in parts if part.get("model_type") in TRANSPOSED_MODELS), None)
    for name, info in tensors.items():
        # The fused projection shows the orientation: [n, 3n] is Conv1D's, [3n, n] a linear layer's.
        if name.endswith("c_attn.weight") and len(info.shape) == 2 and info.shape[1] == 3 * info.shape[0]:
            kind = kind or "unknown, with Conv1D layers"
    if kind is not None:
        raise SourceError(
            f"models of type {kind!r} store their matrices as [in_features, out_features] (Conv1D); only linear layers, "
            f"[out_features, in_features], can be compressed"
        )
