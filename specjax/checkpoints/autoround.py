"""auto-round checkpoints (intel/auto-round, `quant_method` "auto-round"): GPTQ or AWQ tensors, settings of its own.

| `packing_format` | tensors |
|---|---|
| auto_round:auto_gptq (auto_round:gptq) | GPTQ, zeros stored minus one (version 1) |
| auto_round, auto_round:gptqmodel, :exllamav2, :tritonv2 | GPTQ, zeros as they are (version 2) |
| auto_round:auto_awq (auto_round:awq) | AWQ, layout gemm |

There is no `g_idx`: groups are in input order. `extra_config` has other settings for single modules, by name or regular
expression (found anywhere in the name; the first that matches decides, a name before all of them). Which modules are
dense is seen from their tensors, as everywhere here.
"""

import dataclasses
import re
from typing import Any, Self

from specjax.checkpoints import tensors
from specjax.checkpoints.awq import AWQFormat
from specjax.checkpoints.gptq import GPTQFormat
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.quant.linear import QuantizedLinear

_METHODS = ("auto-round", "intel/auto-round", "auto_round")
_GPTQ_1 = ("auto_gptq", "gptq")
_GPTQ_2 = ("", "gptqmodel", "exllamav2", "tritonv2", "triton", "marlin")
_AWQ = ("auto_awq", "awq")
_DENSE_BITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoRoundFormat:
    """Reads the linears of an auto-round checkpoint.

    Attributes:
        layout: of the tensors, with the settings of most modules.
        extra: (name or pattern, settings that replace those of `layout`; None: stored dense).
    """

    name = "auto-round"
    layout: GPTQFormat | AWQFormat
    extra: tuple[tuple[str, dict[str, Any] | None], ...] = ()

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's settings, or None if the configuration is not auto-round's.

        Raises:
            CheckpointError: a setting is not supported; names the field.
        """
        config = quantization_config or {}
        if config.get("quant_method") not in _METHODS:
            return None
        tensors.one_of(config.get("data_type", "int"), ("int",), "data_type")
        _check_weight_only(config, "act_bits")
        field = "packing_format" if "packing_format" in config else "backend"
        layout = _layout(config, config.get(field, "auto_round:auto_gptq"), field)
        extra = tensors.mapping(config.get("extra_config"), "extra_config")
        parsed = tuple((name, _overrides(name, entry, layout)) for name, entry in extra.items())
        return cls(layout=layout, extra=parsed)

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        layout = self._layout_of(prefix)
        if layout is None and tensors.has(source, f"{prefix}.qweight"):
            raise CheckpointError(
                f"{prefix}.qweight: is there, but quantization_config.extra_config says that the module is dense"
            )
        shape = (out_features, in_features)
        return None if layout is None else layout.linear(source, prefix, *shape, bias)

    def tensor(self, source: TensorSource, name: str) -> None:
        """No tensor is renamed or transformed."""
        return None

    def _layout_of(self, prefix: str) -> GPTQFormat | AWQFormat | None:
        named = [entry for name, entry in self.extra if name == prefix]
        found = named or [entry for name, entry in self.extra if re.search(name, prefix)]
        if not found:
            return self.layout
        return None if found[0] is None else dataclasses.replace(self.layout, **found[0])


def _layout(config: dict, packing: Any, field: str) -> GPTQFormat | AWQFormat:
    """The tensors' layout with the settings that hold for most modules."""
    family, _, kind = str(packing).partition(":")
    kind = kind.partition(":")[0]
    if family != "auto_round" or kind not in (*_GPTQ_1, *_GPTQ_2, *_AWQ):
        raise CheckpointError(
            f"quantization_config.{field}={packing!r} is not supported; supported: auto_round, and auto_round: with "
            f"{', '.join(filter(None, (*_GPTQ_1, *_GPTQ_2, *_AWQ)))}"
        )
    group_size = tensors.group_size(config.get("group_size", 128), "group_size")
    if kind in _AWQ:
        tensors.one_of(config.get("bits"), (4,), "bits")
        return AWQFormat(group_size=group_size)
    return GPTQFormat(
        bits=tensors.one_of(config.get("bits"), (4, 8), "bits"),
        group_size=group_size,
        sym=tensors.flag(config.get("sym"), "sym"),
        desc_act=False,
        static_groups=False,
        version=1 if kind in _GPTQ_1 else 2,
    )


def _overrides(name: str, entry: Any, layout: GPTQFormat | AWQFormat) -> dict[str, Any] | None:
    """Settings of one `extra_config` entry; None where 16 bits and more say that the module is dense."""
    field = f"extra_config[{name!r}]"
    entry = tensors.mapping(entry, field)
    tensors.pattern(name, field)
    bits = entry.get("bits")
    if isinstance(bits, int) and bits >= _DENSE_BITS:
        return None
    tensors.one_of(entry.get("data_type", "int"), ("int",), f"{field}.data_type")
    _check_weight_only(entry, f"{field}.act_bits")
    kept: dict[str, Any] = {}
    if entry.get("group_size") is not None:
        kept["group_size"] = tensors.group_size(entry["group_size"], f"{field}.group_size")
    if isinstance(layout, AWQFormat):
        tensors.one_of(bits, (None, 4), f"{field}.bits")
        return kept
    if bits is not None:
        kept["bits"] = tensors.one_of(bits, (4, 8), f"{field}.bits")
    if entry.get("sym") is not None:
        kept["sym"] = tensors.flag(entry["sym"], f"{field}.sym")
    return kept


def _check_weight_only(config: dict, field: str) -> None:
    bits = config.get("act_bits")
    if bits is not None and (not isinstance(bits, int) or bits < _DENSE_BITS):
        raise CheckpointError(
            f"quantization_config.{field}={bits!r} is not supported; supported: 16 (weights only)"
        )
