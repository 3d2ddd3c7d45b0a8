"""`quantization_config` of compressed-tensors: groups of modules, their weights and activations."""

import dataclasses
import re

from specjax.checkpoints import tensors
from specjax.errors import CheckpointError
from specjax.quant.scheme import ActivationSpec, Scheme, WeightSpec

LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Modules that share settings.

    Attributes:
        targets: module class `Linear`, names, or `re:` patterns.
        layout: which tensors hold the weight.
        scheme: of the linears.
        group_size: inputs per scale; -1 for all of them.
        per_tensor: one scale for the whole weight.
        needs_g_idx: the configuration promises act-order by groups.
    """

    targets: tuple[str, ...]
    layout: str
    scheme: Scheme
    group_size: int
    per_tensor: bool
    needs_g_idx: bool


def matches(pattern: str, prefix: str) -> bool:
    """Whether a module pattern names `prefix`: `re:REGEX` is matched from the start, other text as a whole path."""
    if pattern.startswith("re:"):
        tensors.pattern(pattern[3:], "config_groups or ignore")
        return re.match(pattern[3:], prefix) is not None
    return prefix == pattern


def parse_group(name: str, group: dict, default_layout: str | None) -> Group:
    """One entry of `config_groups`.

    Raises:
        CheckpointError: a setting is not supported; names the field.
    """
    field = f"config_groups.{name}"
    group = tensors.mapping(group, field)
    if group.get("output_activations"):
        raise CheckpointError(
            f"quantization_config.{field}.output_activations is not supported; supported: null"
        )
    weights = tensors.mapping(group.get("weights"), f"{field}.weights")
    kind = tensors.one_of(weights.get("type", "int"), ("int", "float"), f"{field}.weights.type")
    bits = weights.get("num_bits")
    tensors.one_of(bits, (4, 8) if kind == "int" else (8,), f"{field}.weights.num_bits")
    layout = group.get("format") or default_layout
    tensors.one_of(layout, LAYOUTS, f"{field}.format")
    strategy = weights.get("strategy")
    tensors.one_of(strategy, ("group", "channel", "tensor"), f"{field}.weights.strategy")
    size = weights.get("group_size") if strategy == "group" else -1
    tensors.group_size(size, f"{field}.weights.group_size")
    symmetric = tensors.flag(weights.get("symmetric"), f"{field}.weights.symmetric") is not False
    activations = _parse_activations(group.get("input_activations"), kind, field)
    if not symmetric and (kind == "float" or (bits == 8 and activations is not None)):
        raise CheckpointError(
            f"quantization_config.{field}.weights.symmetric=false is supported for 4-bit integers and for weight-only "
            "8-bit integers"
        )
    spec = WeightSpec(kind=kind, bits=bits, symmetric=symmetric)
    return Group(
        targets=tensors.names(group.get("targets"), f"{field}.targets"),
        layout=layout,
        scheme=Scheme(weights=spec, activations=activations),
        group_size=size,
        per_tensor=strategy == "tensor",
        needs_g_idx=weights.get("actorder") == "group" and strategy == "group",
    )


def _parse_activations(config: dict | None, kind: str, field: str) -> ActivationSpec | None:
    """Dynamic per-token symmetric activations of the weights' kind; the only ones supported."""
    field = f"{field}.input_activations"
    config = tensors.mapping(config, field)
    if not config:
        return None
    tensors.one_of(config.get("type", "int"), (kind,), f"{field}.type")
    bits = (4, 8) if kind == "int" else (8,)
    tensors.one_of(config.get("num_bits"), bits, f"{field}.num_bits")
    tensors.one_of(config.get("dynamic"), (True,), f"{field}.dynamic")
    tensors.one_of(config.get("strategy"), ("token",), f"{field}.strategy")
    tensors.one_of(config.get("symmetric", True), (True,), f"{field}.symmetric")
    # Its symmetric integer scale is amax over half the code range, (qmax - qmin) / 2 = 127.5 for 8 bits.
    return ActivationSpec(kind=kind, bits=config["num_bits"], full_range=kind == "int")
