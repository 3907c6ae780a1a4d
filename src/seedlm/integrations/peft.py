"""peft: LoRA trained on packed layers.

peft chooses the adapter of a layer by the layer's class, and looks for no plugins: what is not known to it is registered with a
configuration, by `LoraConfig._register_custom_module`, which peft documents for this. `for_packed` does that:

    model = get_peft_model(packed, for_packed(LoraConfig(target_modules=["q_proj", "v_proj"])))
    model.save_pretrained(folder)                                          # the adapter alone, as ever
    model = PeftModel.from_pretrained(packed, folder, config=for_packed(folder))
    dense = model.merge_and_unload()                                       # adapted layers dense, all others still packed

Gradients flow through packed layers, not into them. There are no values to add an update to: merging makes a layer dense, and
what starts or scales an adapter by the values of the weight (DoRA, PiSSA, OLoRA, ...) is refused.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from seedlm.errors import TensorError
from seedlm.modeling.linear import SeedLinear


def for_packed(config: LoraConfig | str | Path) -> LoraConfig:
    """A configuration that adapts packed layers as well as dense ones: this one, changed in place, or that of a saved adapter.

    Raises TensorError for one of another method than LoRA, and for options that need the values of packed weights.
    """
    found = config if isinstance(config, PeftConfig) else PeftConfig.from_pretrained(str(config))
    if not isinstance(found, LoraConfig):
        raise TensorError(f"packed layers take adapters of LoRA alone, got a {type(found).__name__}")
    if found.use_dora:
        raise TensorError("DoRA scales by the norms of the weight, whose values are stored as codes: leave use_dora out")
    if found.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        raise TensorError(
            f"init_lora_weights={found.init_lora_weights!r} starts from the values of the weight, which are stored as codes"
        )
    found._register_custom_module({SeedLinear: SeedLoraLinear})
    return found


class SeedLoraLinear(Linear):
    """LoRA around a packed layer."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: codes cannot take up an update."""
        raise TensorError(
            "an adapter cannot be merged into codes in place: model.merge_and_unload() makes the adapted layers dense; "
            "save that, and compress it anew"
        )

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The packed layer again, or a dense one with the adapters added. Raises TensorError if that is not finite."""
        packed: Any = self.get_base_layer()
        names = [name for name in (check_adapters_to_merge(self, adapter_names) or ()) if name in self.lora_A] if merge else []
        if not names:
            return packed
        dtype = packed.weight.dtype
        dense: nn.Linear = packed.to_dense(torch.float32)
        with torch.no_grad():
            for name in names:
                dense.weight += self.get_delta_weight(name).to(dense.weight)
                if self.lora_bias[name]:
                    if dense.bias is None:
                        raise TensorError("lora_bias cannot be merged into a layer without a bias")
                    dense.bias.add_(self.lora_B[name].bias * self.scaling[name])
            if safe_merge and not bool(torch.isfinite(dense.weight).all()):
                raise TensorError(f"the merged weight is not finite: the adapters {', '.join(names)} are damaged")
        dense.weight.data = dense.weight.data.to(dtype)
        return dense
