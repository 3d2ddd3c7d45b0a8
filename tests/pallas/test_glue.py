"""The kernels between two matmuls, in the Mosaic interpreter with race detection, and the layers that use them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.decoding import target as target_pass
from specjax.decoding import tree as trees
from specjax.models import cache as kv
from specjax.models import layers, llama
from specjax.pallas import device
from specjax.pallas.glue import api, kernels
from specjax.pallas.glue.parts import Parts
from specjax.pallas.tree_attention import mosaic
from specjax.quant.dense_linear import Linear
from tests import tiny

H200 = device.Gpu(kind="NVIDIA H200", arch=(9, 0), num_sms=6, shared_memory=232448)


@pytest.fixture
def interpret():
    """Parameters of the interpreter; fails the test if it saw a race."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    races = gpu_callbacks.get_races()
    try:
        assert races is not None and not races.races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def close(got, wanted, tolerance=1e-2):
    got, wanted = (np.asarray(a, np.float32) for a in (got, wanted))
    assert got.shape == wanted.shape
    assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < tolerance


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (3, 4)])
def test_residual_norm(interpret, rows, parts):
    norm = layers.RMSNorm(1 + 0.1 * normal(2, 1024, dtype=jnp.bfloat16), 1e-5)
    x = normal(0, 1, rows, 1024, dtype=jnp.bfloat16)
    sums = normal(1, parts, 8, 1152)
    added = Parts(sums=sums, shape=(1, rows, 1024), dtype=jnp.dtype(jnp.bfloat16))
    total, normed = kernels.residual_norm(
        sums, x[0], norm.weight[...], eps=1e-5, interpret=interpret
    )
    wanted = api.residual_norm(x, added, norm)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(wanted[0][0]))
    close(normed, wanted[1][0], 4e-3)


@pytest.mark.parametrize(
    "last", [29, 30]
)  # all rows fit; the last one would be the next head's first
def test_rotate_and_write(interpret, last):
    batch, nodes, heads, kv_heads, channels, capacity = 2, 3, 4, 2, 128, 32
    width = (heads + 2 * kv_heads) * channels
    sums = normal(0, 2, 8, width + 128)
    start = jnp.asarray([5, last], jnp.int32)
    caches = [normal(i, batch, kv_heads, capacity, channels, dtype=jnp.bfloat16) for i in (1, 2)]
    config = tiny.config(num_heads=heads, num_kv_heads=kv_heads, head_dim=channels)
    positions = start[:, None] + jnp.arange(nodes)
    cos, sin = layers.rope_tables(config.rope, channels, positions)
    signed = jnp.concatenate([-sin[..., :64], sin[..., 64:]], axis=-1)
    got = kernels.rotate_and_write(
        *(sums, cos[:, :, 0], signed[:, :, 0], *caches, start),
        heads=heads,
        num_rows=64,
        interpret=interpret,
    )
    added = Parts(sums=sums, shape=(batch, nodes, width), dtype=jnp.dtype(jnp.bfloat16)).value()
    split = jnp.split(added.reshape(batch, nodes, -1, channels), [heads, heads + kv_heads], axis=2)
    q, k = (layers.apply_rope(part, cos, sin) for part in split[:2])
    packed = q.reshape(batch, nodes, kv_heads, heads // kv_heads, channels)
    packed = packed.swapaxes(1, 2).reshape(batch, kv_heads, -1, channels)
    close(got[0][:, :, : packed.shape[2]], packed, 4e-3)
    assert not np.any(np.asarray(got[0][:, :, packed.shape[2] :], np.float32))
    close(got[1], written(caches[0], k, start), 4e-3)
    wanted = written(caches[1], split[2], start)
    np.testing.assert_array_equal(np.asarray(got[2]), np.asarray(wanted))


def written(cache, rows, start):
    """The cache [B, K, S, C] with rows [B, T, K, C]; those beyond its slots are dropped."""
    slots = start[:, None] + jnp.arange(rows.shape[1])
    batch = jnp.arange(len(start))[:, None]
    return cache.at[batch, :, slots].set(rows, mode="drop")


def test_no_row_is_moved_beyond_the_slots_or_from_there(interpret):
    caches = [normal(i, 1, 2, 40, 128, dtype=jnp.bfloat16) for i in range(2)]
    start, path = jnp.asarray([37], jnp.int32), jnp.asarray([[0, 2, 3, 1]], jnp.int32)
    got = kernels.move_rows(caches, start, path, interpret=interpret)
    for mine, before in zip(got, caches, strict=True):
        wanted = before.at[:, :, 38].set(before[:, :, 39])
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(wanted))


def test_move_rows(interpret):
    shape = (2, 2, 40, 128)
    caches = [normal(i, *shape, dtype=jnp.bfloat16) for i in range(6)]
    cache = kv.KVCache(keys=tuple(caches[:3]), values=tuple(caches[3:]))
    start = jnp.asarray([7, 30], jnp.int32)
    path = jnp.asarray([[0, 2, 3, 9], [0, 1, 0, 0]], jnp.int32)
    wanted = kv.compact(cache, start, path)
    got = kernels.move_rows(caches, start, path, interpret=interpret)
    for mine, theirs in zip(got, [*wanted.keys, *wanted.values], strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def test_combine(interpret):
    splits, batch, kv_heads, nodes, group = 3, 2, 2, 5, 3
    out = normal(0, splits, batch, kv_heads, 16, 128)
    top = normal(1, splits, batch, kv_heads, 64).at[0, 0, 0, 0].set(-1e30)
    total = jnp.abs(normal(2, splits, batch, kv_heads, 64))
    top = top.at[:, 1, 1, 2].set(-1e30)
    got = kernels.combine(
        *(out, top, total), nodes=nodes, group=group, dtype=jnp.bfloat16, interpret=interpret
    )
    wanted = mosaic._combine(out, top[..., :16], total[..., :16])[:, :, : nodes * group]
    wanted = wanted.reshape(batch, kv_heads, nodes, group, 128).swapaxes(1, 2)
    close(got, wanted.reshape(batch, nodes, kv_heads * group, 128), 4e-3)


@dataclasses.dataclass(frozen=True)
class SplitLinear:
    """A dense linear that offers its product in two parts, padded as the kernels pad it."""

    linear: Linear

    def __call__(self, x):
        return self.linear(x)

    def parts(self, x):
        weight = self.linear.weight[...].astype(jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        half = rows.shape[1] // 2
        sums = jnp.stack([rows[:, :half] @ weight[:, :half].T, rows[:, half:] @ weight[:, half:].T])
        sums = jnp.pad(sums, ((0, 0), (0, -len(rows) % 8), (0, 0)), constant_values=jnp.nan)
        return Parts(sums=sums, shape=(*x.shape[:-1], weight.shape[0]), dtype=x.dtype)


@pytest.mark.parametrize("is_chain", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_model_through_these_kernels(monkeypatch, is_chain):
    """Same logits and cache as through plain jnp, for a tree and for a chain that are padded to 8 rows."""
    config = tiny.config(
        hidden_size=1024, intermediate_size=64, num_heads=4, num_kv_heads=2, head_dim=128
    )
    plain = llama.build(tiny.RandomCheckpoint(config), jnp.bfloat16)
    blocks = []
    for layer in plain.model.layers:
        old = layer.self_attn
        weights = [getattr(old, f"{name}_proj").weight[...] for name in "qkv"]
        fused = Linear(jnp.concatenate(weights))
        attention = layers.Attention(
            config, qkv_proj=SplitLinear(fused), o_proj=SplitLinear(old.o_proj)
        )
        mlp = layers.MLP(
            gate_proj=layer.mlp.gate_proj,
            up_proj=layer.mlp.up_proj,
            down_proj=SplitLinear(layer.mlp.down_proj),
        )
        norms = layer.input_layernorm, layer.post_attention_layernorm
        blocks.append(layers.DecoderLayer(attention, mlp, *norms))
    model = llama.LlamaModel(plain.model.embed_tokens, blocks, plain.model.norm)
    fused_model = llama.Llama(config, model, plain.lm_head)

    tokens = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)
    parents = [[-1, 0, 1, 2, 3]] if is_chain else [[-1, 0, 0, 1, 2]]
    tree = trees.Tree(tokens=tokens, parents=jnp.asarray(parents), max_depth=4, is_chain=is_chain)
    cache = kv.init(config, 1, 64, jnp.bfloat16)
    filled = jax.tree.map(
        lambda x: x.at[:, :, :9].set(normal(5, 1, 2, 9, 128, dtype=x.dtype)), cache
    )
    lengths = jnp.asarray([9], jnp.int32)
    wanted = target_pass.forward_tree(plain, tree, filled, lengths, "final")

    for name in ("residual_norm", "rotate_and_write", "combine"):
        kernel = functools.partial(
            getattr(kernels, name), interpret=plgpu.InterpretGPUParams(detect_races=False)
        )
        kernel = dropping_interpret(kernel) if name == "combine" else kernel
        monkeypatch.setattr(kernels, name, kernel)
    planned = mosaic.plan

    def plan(*args, **kwargs):
        return planned(*args, **{**kwargs, "interpret": plgpu.InterpretGPUParams()})

    monkeypatch.setattr(mosaic, "plan", plan)
    with device.targeting(H200):
        assert target_pass.padded_nodes(5) == 8
        got = target_pass.forward_tree(fused_model, tree, filled, lengths, "final")
    close(got[0], wanted[0], 3e-2)
    close(got[1], wanted[1], 3e-2)
    for mine, theirs in zip(jax.tree.leaves(got[2]), jax.tree.leaves(wanted[2]), strict=True):
        close(mine[:, :, :14], theirs[:, :, :14], 2e-2)


def dropping_interpret(kernel):
    """`combine` gets the interpreter's parameters from its caller already."""
    return lambda *args, interpret, **kwargs: kernel(*args, **kwargs)


def test_what_is_not_for_the_kernels_runs_in_jnp():
    norm = layers.RMSNorm(jnp.ones((1024,), jnp.bfloat16), 1e-5)
    x = normal(0, 1, 2, 1024, dtype=jnp.bfloat16)
    total, normed = api.residual_norm(x, None, norm)
    np.testing.assert_array_equal(total, x)
    np.testing.assert_array_equal(normed, norm(x))
    assert (
        api.move_rows([x[None]], jnp.zeros((1,), jnp.int32), jnp.zeros((1, 2), jnp.int32)) is None
    )
    assert not api.can_rotate_and_write(x, x[None], "auto")
    assert target_pass.padded_nodes(5) == 5
