"""Checkpoints converted by SpecMQuant (AI9Stars/SpecMQuant `model_convert`); Hub names end in W4A16-g128, W4A8-QQQ,
...

q, k, v are fused into `qkv_proj` and gate, up into `gate_up_proj`. W4A16: `qweight` int32 [K / 16, 2 N] in Marlin
tiles and `scales` [G, N], permuted in blocks of 64 (groups of 128) or 32 (per channel); zeros and `g_idx` were
dropped, which is right only for symmetric checkpoints with groups in input order. QQQ: the tensors of
`specjax.checkpoints.qqq`, fused. The fused QoQ conversion is read by `specjax.checkpoints.qserve`.
"""

import dataclasses
from typing import Self

import jax.numpy as jnp
import numpy as np

from specjax.checkpoints import codes, fused, marlin, qqq, tensors
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource
from specjax.quant import scheme as schemes
from specjax.quant.linear import QuantizedLinear

GROUP_SIZE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecMQuantFormat:
    """Reads the linears of a converted checkpoint.

    Attributes:
        is_qqq: QQQ tiles (W4A8), not Marlin tiles (W4A16).
        grouped: groups of 128, not per channel.
    """

    name = "specmquant"
    is_qqq: bool
    grouped: bool

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> Self | None:
        """The format's settings, or None if no fused projections in tiles are there.

        Raises:
            CheckpointError: the configuration has a setting that the conversion does not preserve; names the field.
        """
        parts = {n.rpartition(".")[2] for n in source.names() if ".qkv_proj." in n}
        # Phi-3 has a fused projection by itself, and GPTQ and AWQ keep zeros or groups beside its codes.
        if not parts & {"qweight", "B"} or parts & {"s1_scales", "qzeros", "g_idx"}:
            return None
        config = quantization_config or {}
        size = tensors.one_of(config.get("group_size"), (GROUP_SIZE, -1), "group_size")
        field = "wbits" if "wbits" in config else "bits"
        tensors.one_of(config.get(field, 4), (4,), field)
        tensors.one_of(config.get("sym", True), (True,), "sym")
        meta = config.get("meta") or {}
        if config.get("desc_act") and not config.get("static_groups", meta.get("static_groups")):
            raise CheckpointError(
                "quantization_config.desc_act=true without static_groups: the conversion dropped g_idx, so the order "
                "of the inputs is lost; convert the original GPTQ checkpoint instead, which specjax reads"
            )
        return cls(is_qqq="B" in parts, grouped=size == GROUP_SIZE)

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> QuantizedLinear | None:
        """One linear, cut out of a fused one where needed; None if it is stored dense.

        Raises:
            CheckpointError: a tensor is missing or does not fit; or a bias is expected, which conversions drop.
        """
        if tensors.is_dense(source, prefix):
            return None
        if bias:
            raise CheckpointError(
                f"{prefix}.bias: missing, because SpecMQuant conversions drop biases; use the original checkpoint"
            )
        part = "s_channel" if self.is_qqq else "scales"
        rows = fused.locate(source, prefix, part, out_features)
        qqq.check_tiles(rows.prefix, rows.total, in_features)
        schemes.check_group_size(in_features, GROUP_SIZE if self.grouped else -1, prefix)
        read = self._qqq if self.is_qqq else self._marlin
        return read(source, rows, in_features)

    def tensor(self, source: TensorSource, name: str) -> None:
        """No dense tensor is renamed or transformed."""
        return None

    def _marlin(self, source: TensorSource, rows: fused.Rows, in_features: int) -> QuantizedLinear:
        groups = in_features // GROUP_SIZE if self.grouped else 1
        words = _read_words(source, rows, "qweight", in_features)
        scales = _read_columns(source, rows, "scales", groups)
        order = marlin.SCALE_ORDER_GROUPED if self.grouped else marlin.SCALE_ORDER_CHANNEL
        _, ours = rows.tiles(marlin.TILE_N)
        nibbles = marlin.unpack_marlin(words)[ours] ^ np.uint8(8)
        scheme = schemes.lookup("w4a16")
        return QuantizedLinear(
            codes=codes.typed(nibbles, scheme),
            scales=jnp.asarray(
                np.ascontiguousarray(marlin.restore_columns(scales, order)[:, ours].T)
            ),
            scheme=scheme,
            group_size=in_features // groups,
        )

    def _qqq(self, source: TensorSource, rows: fused.Rows, in_features: int) -> QuantizedLinear:
        words = _read_words(source, rows, "B", in_features)
        s_channel = _read_columns(source, rows, "s_channel", 1)
        s_group = None
        if self.grouped:
            s_group = _read_columns(source, rows, "s_group", in_features // GROUP_SIZE)
        _, ours = rows.tiles(marlin.TILE_N)
        return qqq.unpack_linear(words, s_channel, s_group, None, ours)


def _read_words(source: TensorSource, rows: fused.Rows, part: str, in_features: int):
    """The words of the tiles that cover our outputs."""
    shape = (in_features // marlin.TILE_K, 2 * rows.total)
    words = tensors.read(source, f"{rows.prefix}.{part}", [np.int32], shape)
    tiles, _ = rows.tiles(marlin.TILE_N)
    return words[:, 2 * tiles.start : 2 * tiles.stop]


def _read_columns(source: TensorSource, rows: fused.Rows, part: str, groups: int):
    """The scales, still permuted, of the tiles that cover our outputs."""
    shape = (groups, rows.total)
    scales = tensors.read(source, f"{rows.prefix}.{part}", tensors.FLOATS, shape)
    tiles, _ = rows.tiles(marlin.TILE_N)
    return scales[:, tiles]
