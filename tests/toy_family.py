"""A small family of codes, nowhere known to the package: signed integers, a float scale for each row, one unit for the tensor.

Importing it registers it, as unpickling one of its formats does in a worker process.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from seedlm.codes import base, registry
from seedlm.codes.dequantizing import DequantizingBackend
from seedlm.errors import FormatError, TensorError


@dataclass(frozen=True)
class ToyFormat:
    bits: int = 4
    family: ClassVar[str] = "toy"
    row_step: ClassVar[int] = 4
    column_step: ClassVar[int] = 1
    transform: ClassVar[int] = 1
    spec = property(lambda self: f"toy-{self.bits}")
    scales = property(lambda self: "float32" if self.bits > 3 else "float16")
    bits_per_weight = property(lambda self: float(self.bits))

    def parts(self, out_features, in_features):
        return {
            base.CODES: base.Part("int8", (-(-out_features // 4), 4, in_features), rows_per_entry=4),
            "scales": base.Part(self.scales, (out_features,)),
            "unit": base.Part("float32", (1,), per="tensor"),
        }

    def reason_unfit(self, out_features, in_features):
        return "too narrow for the toy code" if in_features < 8 else base.reason_no_smaller(self, out_features, in_features)

    def to_dict(self):
        return {"family": self.family, "bits": self.bits}


class ToyEncoder:
    def __init__(self, format, facts):
        self.top, self.unit, self.dtype = 2 ** (format.bits - 1) - 1, facts.largest or 1.0, getattr(torch, format.scales)

    def rows(self, weight, tell):
        given, weight = weight, weight.float() / self.unit
        scales = (weight.abs().amax(1) / self.top).clamp_min(2**-14).to(self.dtype)
        codes = (weight / scales.float()[:, None]).round().clamp(-self.top, self.top)
        tell(weight.numel())
        errors = base.row_sums(((codes * scales.float()[:, None] - weight) * self.unit).double().square()).cpu()
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % 4)).to(torch.int8).view(-1, 4, weight.shape[1])
        return {base.CODES: padded, "scales": scales}, base.RowErrors(errors, base.row_sums(given.double().square()).cpu())

    def rest(self):
        return {"unit": torch.tensor([self.unit])}


class ToyFamily:
    name, since_version, searches, feedback, fused, tables = "toy", 2, (), None, True, None
    products = ("toy",)
    presets: ClassVar = {"4": ToyFormat(4), "3": ToyFormat(3)}
    mixture: ClassVar = {ToyFormat(4): 0.01, ToyFormat(3): 0.05}
    defaults: ClassVar = {"flavour": "plain"}

    def parse(self, text):
        return ToyFormat(int(text[4:])) if text in ("toy-2", "toy-3", "toy-4") else None

    def from_dict(self, data):
        return ToyFormat(data["bits"])

    def check_settings(self, settings):
        if settings.get("flavour", "plain") != "plain":
            raise FormatError(f"flavour must be plain, got {settings['flavour']!r}")

    def check(self, parts, format, shape):
        if not bool((parts["scales"] > 0).all()):
            raise TensorError("scales must be positive")

    def dequantize(self, parts, format, shape):
        codes = parts[base.CODES].flatten(0, 1)[: shape[0]].float()
        return codes * (parts["scales"].float() * parts["unit"])[:, None]

    def rows(self, parts, format, shape, indices):
        scales = parts["scales"].index_select(0, indices.flatten()).float() * parts["unit"]
        rows = parts[base.CODES].flatten(0, 1).index_select(0, indices.flatten()).float() * scales[:, None]
        return rows.reshape(*indices.shape, shape[1])

    def encoder(self, format, shape, facts, options, device):
        return ToyEncoder(format, facts)

    def reason_no_encoder(self, backend, device, format):
        return None if backend == "auto" else f"no backend {backend!r}"

    def reason_slow(self, device, format):
        return None

    def backends(self):
        return (ToyBackend(),)


class ToyBackend(DequantizingBackend):
    name = "toy"

    def reason_unavailable(self, device, format, shape):
        return None

    def prepare(self, parts, format, shape):
        return list(parts.values())

    def dequantize(self, prepared, format, shape, dtype):
        return FAMILY.dequantize(dict(zip(format.parts(*shape), prepared, strict=True)), format, shape).to(dtype)


FAMILY = ToyFamily()
registry.register(FAMILY)
