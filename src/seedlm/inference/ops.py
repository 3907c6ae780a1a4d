"""torch operators over packed weights: what modules call, compilers keep whole, and kernels stand behind.

    torch.ops.seedlm.linear(x, transformed, prepared, plan, bias)   x W^T + bias
    torch.ops.seedlm.linears(x, prepared, plans, biases)            the same by weights that share x, at once (`JoiningBackend`)
    torch.ops.seedlm.dequantize(prepared, plan, dtype)              the weight [out_features, in_features]
    torch.ops.seedlm.transform(x, plan)                             what layers that share an input share (`LinearBackend`)
    torch.ops.seedlm.rows(indices, parts, code, dtype)              rows of the weight, looked up (`Family.rows`)

`prepared` are a backend's tensors. A plan says what they are: "<spec> <out>x<in> <backend>", for `transform` without the
outputs, "<spec> *x<in> <backend>", so that layers of different heights call it alike; several plans have "; " between
them. It is a text because compiled graphs
are kept on disk and run by other processes, where a number would mean something else; a call looks it up in a dictionary.
A look-up reads a few rows of the parts as they are stored, so no backend prepares it: its code is "<spec> <out>x<in>".

An operator is opaque to torch.compile; its fake gives the shape. `linear` keeps no weight for the backward pass, which
dequantizes again, and codes have no gradient. Through torch's dispatcher and back into Python a call takes 8 us besides its
kernel (on an H100's host); `linear` below, which modules call, takes 2, by leaving them out where they have nothing to do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seedlm.codes.base import Format, FusingBackend, Gated, JoiningBackend, LinearBackend, Normed
from seedlm.codes.registry import family_of, parse_format
from seedlm.errors import BackendError, TensorError
from seedlm.inference import backend as backends

_LIBRARY: Final = torch.library.Library("seedlm", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] transformed, Tensor[] prepared, str plan, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "linears(Tensor x, Tensor[] prepared, str plans, Tensor?[] biases) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.define("dequantize(Tensor[] prepared, str plan, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("transform(Tensor x, str plan) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "rows(Tensor indices, Tensor[] parts, str code, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@dataclass(frozen=True, eq=False)
class Plan:
    """A weight's format, shape (out_features, in_features) and backend, with the texts that stand for it in graphs.

    text         for `linear` and `dequantize`
    input_text   for `transform`
    """

    backend: LinearBackend
    format: Format
    shape: tuple[int, int]
    text: str
    input_text: str


_PLANS: dict[str, Plan] = {}
_CODES: dict[str, tuple[Format, tuple[int, int]]] = {}


def plan_for(format: Format, shape: tuple[int, int], device: torch.device, backend: str = backends.AUTO) -> Plan:
    """The plan of such a weight on `device`. Raises BackendError if that backend, or for "auto" any, cannot run there."""
    chosen = backends.choose(backend, device, format, shape)
    return find_plan(f"{format.spec} {shape[0]}x{shape[1]} {chosen.name}")


def find_plan(text: str) -> Plan:
    """The plan that a text stands for. Raises BackendError or FormatError for a text that no plan has."""
    plan = _PLANS.get(text)
    return plan if plan is not None else _PLANS.setdefault(text, _read_plan(text))


def _read_plan(text: str) -> Plan:
    code, _, name = text.rpartition(" ")
    format, shape = _read_code(code, text)
    return Plan(backends.by_name(name, format), format, shape, text, f"{format.spec} *x{shape[1]} {name}")


def _read_code(code: str, text: str) -> tuple[Format, tuple[int, int]]:
    try:
        spec, sizes = code.split(" ")
        out_features, in_features = sizes.split("x")
        shape = (0 if out_features == "*" else int(out_features), int(in_features))
    except ValueError:
        raise BackendError(f"a plan is '<spec> <out>x<in> <backend>', got {text!r:.80}") from None
    return parse_format(spec), shape


def linear(x: Tensor, transformed: Sequence[Tensor], prepared: Sequence[Tensor], plan: Plan, bias: Tensor | None) -> Tensor:
    """Multiply by a packed weight.

    x             floating point [..., in_features]
    transformed   `transform` of the same x, or empty
    prepared      the plan's backend's tensors for the weight
    bias          None or [out_features], of x's dtype
    returns       [..., out_features] of x's dtype
    Raises TensorError for an x that does not fit.
    """
    if not torch.compiler.is_compiling() and _plain(x, bias):
        _check(x, plan, prepared, bias)
        return plan.backend.linear(x, prepared, plan.format, plan.shape, bias, transformed)
    return _OPS.linear.default(x, transformed, prepared, plan.text, bias)


def joins(x: Tensor, plans: Sequence[Plan], biases: Sequence[Tensor | None]) -> bool:
    """Whether `linears` takes these weights: of one format and `in_features`, by a backend that gains by it.

    Not where a gradient is wanted or x is cast, which `linear` sees to.
    """
    first = plans[0]
    if not hasattr(first.backend, "linears") or _autocast() or any(plan.input_text != first.input_text for plan in plans):
        return False
    return not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *biases)))


def linears(
    x: Tensor, prepared: Sequence[Sequence[Tensor]], plans: Sequence[Plan], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`linear` by several weights that `joins` allows, in their order."""
    if not torch.compiler.is_compiling() and unobserved(x):
        for plan, weight, bias in zip(plans, prepared, biases, strict=True):
            _check(x, plan, weight, bias)
        return _joining(plans[0]).linears(x, prepared, plans[0].format, tuple(plan.shape for plan in plans), biases)
    together = [tensor for each in prepared for tensor in each]
    return _OPS.linears.default(x, together, "; ".join(plan.text for plan in plans), biases)


def fuses(x: Tensor, plans: Sequence[Plan]) -> bool:
    """Whether `fused` takes a source of x's dtype by these weights. Not where a gradient, a cast or a compiler has a say."""
    first = plans[0]
    return (
        x.dtype in getattr(first.backend, "fuses", ())
        and all(plan.input_text == first.input_text for plan in plans)
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not _autocast()
        and unobserved(x)
    )


def fused(
    source: Tensor | Normed | Gated,
    prepared: Sequence[Sequence[Tensor]],
    plans: Sequence[Plan],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    """Products, [1, 1, out_features] each, of what a source stands for by weights that `fuses` allows, in their order.

    Raises TensorError for parts of a source that do not fit each other.
    """
    x = source.h if isinstance(source, Normed) else source.gate if isinstance(source, Gated) else source
    others = [source.delta, source.weight] if isinstance(source, Normed) else [source.up] if isinstance(source, Gated) else []
    for each in others:
        if each is not None and (each.shape[-1] != x.shape[-1] or each.dtype != x.dtype):
            raise TensorError(f"{[*each.shape]} of {each.dtype} does not go with {[*x.shape]} of {x.dtype}")
    if isinstance(source, Normed) and not source.weight.is_contiguous():
        source = replace(source, weight=source.weight.contiguous())
    for plan, weight, bias in zip(plans, prepared, biases, strict=True):
        _check(x, plan, weight, bias)
    backend = cast(FusingBackend, plans[0].backend)
    return backend.fused(source, prepared, plans[0].format, tuple(plan.shape for plan in plans), biases)


def _joining(plan: Plan) -> JoiningBackend:
    return cast(JoiningBackend, plan.backend)


def dequantize(prepared: Sequence[Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] in a floating-point dtype, rounded to it once."""
    return _OPS.dequantize.default(prepared, plan.text, dtype)


def transform(x: Tensor, plan: Plan, prepared: Sequence[Tensor]) -> list[Tensor]:
    """What `linear` takes as `transformed`, for every layer whose plan has this `input_text`. It has no gradient.

    prepared   of one of these layers, for the device. Raises TensorError for an x that does not fit.
    """
    x = x.detach() if x.requires_grad else x
    _check(x, plan, prepared, None)
    if torch.compiler.is_compiling() or not _plain(x, None):
        return _OPS.transform.default(x, plan.input_text)
    return _transform(x, plan.input_text)


def rows(indices: Tensor, parts: Sequence[Tensor], code: str, dtype: torch.dtype) -> Tensor:
    """Rows of a packed weight, as an embedding looks them up; without a gradient.

    indices   int32 or int64 of any shape, rows of the weight
    parts     those of the format, in its order, as they are stored
    code      "<spec> <out>x<in>"
    returns   [*indices.shape, in_features] in a floating-point dtype, formed in float32 and rounded to it once
    Raises TensorError for indices or a dtype that are none, IndexError for an index out of range (not on a GPU).
    """
    return _OPS.rows.default(indices, parts, code, dtype)


_OPS: Final = torch.ops.seedlm
_modes: Final = torch._C._len_torch_dispatch_stack
_transforms: Final = torch._C._functorch.peek_interpreter_stack
_autocast: Final = torch._C._is_any_autocast_enabled


def _plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is nothing but its kernel."""
    return (
        unobserved(x)
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not _autocast()
    )


def unobserved(x: Tensor) -> bool:
    """Whether x is numbers in memory, and no mode (fakes, tracers, counters), transform or forward gradient looks on."""
    plain = type(x) is Tensor and not x.is_meta and not x.is_neg()
    return plain and not _modes() and _transforms() is None and forward_ad._current_level < 0


def _check(x: Tensor, plan: Plan, prepared: Sequence[Tensor], bias: Tensor | None) -> None:
    """Raise TensorError for tensors that kernels, which take addresses, must not see."""
    _check_input(x, plan)
    if x.device != prepared[0].device:
        raise TensorError(f"x is on {x.device}, the codes are on {prepared[0].device}; move one of them")
    if bias is None:
        return
    if bias.shape != (plan.shape[0],) or bias.dtype != x.dtype or bias.device != x.device:
        found = f"{bias.dtype} {[*bias.shape]} on {bias.device}"
        raise TensorError(f"bias must be {x.dtype} [{plan.shape[0]}] on {x.device}, as x and the outputs are, got {found}")


def _check_input(x: Tensor, plan: Plan) -> None:
    if not x.is_floating_point():
        raise TensorError(f"x must be floating point, got {str(x.dtype).removeprefix('torch.')}")
    if not x.dim() or x.shape[-1] != plan.shape[1]:
        raise TensorError(f"x must be [..., {plan.shape[1]}], got {[*x.shape]}")


def _linear(x: Tensor, transformed: list[Tensor], prepared: list[Tensor], text: str, bias: Tensor | None) -> Tensor:
    plan = find_plan(text)
    _check(x, plan, prepared, bias)
    return plan.backend.linear(x, prepared, plan.format, plan.shape, bias, transformed).contiguous()


def _linear_fake(x: Tensor, transformed: list[Tensor], prepared: list[Tensor], text: str, bias: Tensor | None) -> Tensor:
    plan = find_plan(text)
    _check(x, plan, prepared, bias)
    return x.new_empty(*x.shape[:-1], plan.shape[0])


def _linears(x: Tensor, prepared: list[Tensor], texts: str, biases: list[Tensor | None]) -> list[Tensor]:
    plans, weights = _apart(x, prepared, texts, biases)
    return _joining(plans[0]).linears(x, weights, plans[0].format, tuple(plan.shape for plan in plans), biases)


def _apart(x: Tensor, prepared: list[Tensor], texts: str, biases: list[Tensor | None]) -> tuple[list[Plan], list[list[Tensor]]]:
    """The plans and the tensors of each weight."""
    plans = [find_plan(text) for text in texts.split("; ")]
    count = len(prepared) // len(plans)
    weights = [prepared[at : at + count] for at in range(0, len(prepared), count)]
    for plan, weight, bias in zip(plans, weights, biases, strict=True):
        _check(x, plan, weight, bias)
    return plans, weights


def _linears_fake(x: Tensor, prepared: list[Tensor], texts: str, biases: list[Tensor | None]) -> list[Tensor]:
    plans, _ = _apart(x, prepared, texts, biases)
    return [x.new_empty(*x.shape[:-1], plan.shape[0]) for plan in plans]


def _dequantize(prepared: list[Tensor], text: str, dtype: torch.dtype) -> Tensor:
    plan = _dequantizable(text, dtype)
    return plan.backend.dequantize(prepared, plan.format, plan.shape, dtype)


def _dequantize_fake(prepared: list[Tensor], text: str, dtype: torch.dtype) -> Tensor:
    return prepared[0].new_empty(_dequantizable(text, dtype).shape, dtype=dtype)


def _dequantizable(text: str, dtype: torch.dtype) -> Plan:
    _check_dtype(dtype)
    return find_plan(text)


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TensorError(f"weights are dequantized to a floating-point dtype, got {str(dtype).removeprefix('torch.')}")


def _transform(x: Tensor, text: str) -> list[Tensor]:
    plan = find_plan(text)
    _check_input(x, plan)
    return plan.backend.transform(x, plan.format, plan.shape[1])


def _transform_fake(x: Tensor, text: str) -> list[Tensor]:
    plan = find_plan(text)
    _check_input(x, plan)
    return plan.backend.empty_transform(x, plan.format, plan.shape[1])


def _rows(indices: Tensor, parts: list[Tensor], code: str, dtype: torch.dtype) -> Tensor:
    format, shape = _looked_up(indices, code, dtype)
    named = dict(zip(format.parts(*shape), parts, strict=True))
    return family_of(format).rows(named, format, shape, indices).to(dtype)


def _rows_fake(indices: Tensor, parts: list[Tensor], code: str, dtype: torch.dtype) -> Tensor:
    _, shape = _looked_up(indices, code, dtype)
    like = parts[0] if parts[0].is_meta else indices  # as of `nn.Embedding`, whose rows are where its weight is
    return like.new_empty(*indices.shape, shape[1], dtype=dtype)


def _looked_up(indices: Tensor, code: str, dtype: torch.dtype) -> tuple[Format, tuple[int, int]]:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TensorError(f"indices must be int32 or int64, got {str(indices.dtype).removeprefix('torch.')}")
    _check_dtype(dtype)
    found = _CODES.get(code)
    return found if found is not None else _CODES.setdefault(code, _read_code(code, code))


for _name, _kernel, _fake in (
    ("rows", _rows, _rows_fake),
    ("linear", _linear, _linear_fake),
    ("linears", _linears, _linears_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("transform", _transform, _transform_fake),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"seedlm::{_name}", _fake, lib=_LIBRARY)


class _Product(torch.autograd.Function):
    """`linear` where a gradient is wanted. `count` tensors of `tensors` are the transformed input, the rest is prepared."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, text: str, count: int, *tensors: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.linear.default(x, tensors[:count], tensors[count:], text, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, ctx.text, count, *tensors = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors[count:])

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _OPS.dequantize.default(ctx.saved_tensors, ctx.text, grad.dtype)  # which compilers see
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None, *[None] * ctx.count


def _with_gradient(x: Tensor, transformed: list[Tensor], prepared: list[Tensor], text: str, bias: Tensor | None) -> Tensor:
    """What the dispatcher calls first; by hand, since `torch.library.register_autograd` takes 12 us more on an H100's host."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Product.apply(x, bias, text, len(transformed), *transformed, *prepared)
    if unobserved(x):
        return _linear(x, transformed, prepared, text, bias)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.linear.default(x, transformed, prepared, text, bias)


_LIBRARY.impl("linear", _with_gradient, "Autograd")


def _under_autocast(device: str):
    """`linear` under autocast, as torch's own: x and bias in the context's dtype, except in float64."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(x: Tensor, transformed: list[Tensor], prepared: list[Tensor], text: str, bias: Tensor | None) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if x.is_floating_point() and x.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device)
                transformed = transformed if x.dtype == dtype else []
                x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
            return _OPS.linear.default(x, transformed, prepared, text, bias)

    return run


for _device in ("cpu", "cuda"):
    _LIBRARY.impl("linear", _under_autocast(_device), f"Autocast{_device.upper()}")
