"""Rotates a Llama: the same function in a basis without outlier channels (QuaRot, arXiv
2404.00456).

Row vectors are multiplied from the right, h_rot = h Q:
norm gains go into the following linears; E <- E Q; inputs from the residual stream W <- W Q;
outputs into it W <- Q^T W; the output head (W diag(gain)) Q. Values are rotated within each head,
which o_proj undoes.
"""

import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from specjax import errors
from specjax.config import ModelConfig
from specjax.files import manifest
from specjax.models import layers as nn
from specjax.models.llama import Llama
from specjax.quant import rotation as rotations
from specjax.quant.dense_linear import Linear
from specjax.quant.rotation import RotatedInput, Rotation

_HIGHEST = jax.lax.Precision.HIGHEST


def rotate(model: Llama, rotation: Rotation) -> Llama:
    """The same function in the rotated basis, float32; unit norms, untied output head.

    Raises:
        ConfigError: the model is quantized, fused by `prepare`, or not of the rotation's shape.
    """
    _check(model, rotation)
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    table = model.model.embed_tokens.weight[...].astype(jnp.float32)
    head = table if model.lm_head is None else model.lm_head.weight[...].astype(jnp.float32)
    gain = model.model.norm.gain
    q = jnp.asarray(rotation.residual, jnp.float32)
    layers = [_rotate_layer(layer, rotation, q, config) for layer in model.model.layers]
    inner = model.model.having(
        embed_tokens=nn.Embedding(_matmul(table, q)),
        layers=layers,
        norm=_unit_norm(model.model.norm),
    )
    return Llama(config, inner, Linear(_matmul(head * gain, q)), _rotate_routers(model.depth, q))


def attach(model: Llama, rotation: Rotation) -> Llama:
    """Wraps the linears of a model, whose stored weights expect it, in the rotation's run-time
    products.
    """
    if rotation.online:
        for layer in model.model.layers:
            layer.self_attn.o_proj = _online(layer.self_attn.o_proj, rotation.heads, None)
            layer.mlp.down_proj = _online(layer.mlp.down_proj, *(rotation.ffn or (None, None)))
    return model


def attach_from(model: Llama, path: Path) -> Llama:
    """`attach` with the rotation stored in a folder that specjax wrote; other models stay as they
    are.

    Raises:
        CheckpointError: the rotation file is not the one that the manifest names.
    """
    written = manifest.read(path) if path.is_dir() else None
    file = path / rotations.FILE_NAME
    if written is None or written.get("rotation") is None or not file.is_file():
        return model
    rotation = rotations.load(file)
    if rotation.id != written["rotation"]:
        raise errors.CheckpointError(
            f"{file} holds rotation {rotation.id}, {manifest.NAME} says {written['rotation']!r}; "
            "the folder mixes two models, convert it again"
        )
    return attach(model, rotation)


def _online(linear, left, right):
    if left is None and right is None:
        return linear

    def array(values):
        return None if values is None else jnp.asarray(values, jnp.float32)

    return RotatedInput(linear=linear, left=array(left), right=array(right))


def check_architecture(config: ModelConfig) -> None:
    """Refuses models whose norms do not commute with a rotation of the residual stream.

    Raises:
        ConfigError: norms behind blocks scale single channels of what they add; LayerNorm removes a mean of channels.
    """
    if config.norm_placement != "before" or config.norm_kind != "rms":
        raise errors.ConfigError(
            f"{config.architecture} cannot be rotated: its norms (norm_placement = {config.norm_placement!r}, "
            f"norm_kind = {config.norm_kind!r}) act on single channels of the residual stream; supported are RMS norms "
            "before the blocks; drop rotate"
        )


def _check(model: Llama, rotation: Rotation) -> None:
    check_architecture(model.config)
    width, head_dim = model.config.hidden_size, model.config.head_dim
    if rotation.residual.shape != (width, width):
        raise errors.ConfigError(
            f"rotation is of order {len(rotation.residual)}, the model's hidden_size is {width}"
        )
    if rotation.head is not None and len(rotation.head) != head_dim:
        raise errors.ConfigError(
            f"rotation of heads is of order {len(rotation.head)}, the model's head_dim is {head_dim}"
        )
    if model.depth is not None and model.depth.config.code_bits is not None:
        raise errors.ConfigError(
            f"dynamic_router_bits={model.depth.config.code_bits}: routers that see codes of the hidden state cannot be "
            "rotated; drop rotate"
        )
    for layer in model.model.layers:
        parts = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj)
        if not all(isinstance(part, Linear) for part in parts):
            raise errors.ConfigError(
                "rotation needs dense linears that are not fused; rotate before quantizing"
            )


def _rotate_routers(depth, q):
    """Routers read the residual stream; None stays None."""
    if depth is None:
        return None
    rotated = copy.deepcopy(depth)
    for router in rotated.routers:
        router.up_proj.weight[...] = _matmul(router.up_proj.weight[...], q)
    if rotated.predictor is not None:
        rotated.predictor.weight[...] = _matmul(rotated.predictor.weight[...], q)
    return rotated


def _matmul(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def _unit_norm(norm: nn.RMSNorm) -> nn.RMSNorm:
    return norm.with_gain(jnp.ones(norm.weight.shape, jnp.float32))


def _rotate_layer(layer: nn.DecoderLayer, rotation: Rotation, q, config) -> nn.DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp

    def from_stream(linear, norm):
        gained = linear.weight[...].astype(jnp.float32) * norm.gain
        return Linear(_matmul(gained, q), _bias(linear))

    def into_stream(weight, linear):
        bias = _bias(linear)
        return Linear(_matmul(q.T, weight), None if bias is None else _matmul(bias, q))

    before, after = layer.input_layernorm, layer.post_attention_layernorm
    v_proj = _rotate_values(from_stream(attention.v_proj, before), rotation.head)
    over_heads = _online(attention.o_proj, rotation.heads, rotation.head)
    over_ffn = _online(mlp.down_proj, *(rotation.ffn or (None, None)))
    rotated = nn.DecoderLayer(
        nn.Attention(
            config,
            kind=attention.kind,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            o_proj=into_stream(_rotated_weight(over_heads), attention.o_proj),
            q_proj=from_stream(attention.q_proj, before),
            k_proj=from_stream(attention.k_proj, before),
            v_proj=v_proj,
        ),
        nn.MLP(
            down_proj=into_stream(_rotated_weight(over_ffn), mlp.down_proj),
            gate_proj=from_stream(mlp.gate_proj, after),
            up_proj=from_stream(mlp.up_proj, after),
            activation=mlp.activation,
        ),
        _unit_norm(before),
        _unit_norm(after),
    )
    rotated.self_attn.o_proj = _online(rotated.self_attn.o_proj, rotation.heads, None)
    rotated.mlp.down_proj = _online(rotated.mlp.down_proj, *(rotation.ffn or (None, None)))
    return rotated


def _bias(linear: Linear):
    return None if linear.bias is None else linear.bias[...].astype(jnp.float32)


def _rotate_values(linear: Linear, head) -> Linear:
    """v of each head times `head`."""
    if head is None:
        return linear
    head = jnp.asarray(head, jnp.float32)
    per_head = linear.weight[...].reshape(-1, len(head), linear.in_features)
    weight = jnp.einsum("kcd,ce->ked", per_head, head, precision=_HIGHEST)
    bias = None if linear.bias is None else _matmul(linear.bias[...].reshape(-1, len(head)), head)
    bias = None if bias is None else bias.reshape(-1)
    return Linear(weight.reshape(linear.weight.shape), bias)


def _rotated_weight(wrapped):
    """The weight over the rotated inputs, given the plain linear inside its rotation: rows W M."""
    if not isinstance(wrapped, RotatedInput):
        return wrapped.weight[...].astype(jnp.float32)
    return wrapped.rotate(wrapped.linear.weight[...].astype(jnp.float32))
