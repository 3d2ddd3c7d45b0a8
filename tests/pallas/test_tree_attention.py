"""Tree attention: the GPU kernels against the reference, in the Mosaic interpreter with race detection.

The interpreter lacks wgmma with its left operand in registers and mma.sync: these tests run the kernels with a jnp
product in their place (`layout.interpret`), and everything else as it is on a GPU. That the real instructions are
in the compiled kernels is checked by `experiments.aot_compile --kernels_only`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.errors import SpecjaxError
from specjax.pallas import device
from specjax.pallas.tree_attention import api, config, frame, mosaic, reference

HOPPER, AMPERE = (9, 0), (8, 0)
H200 = device.Gpu(kind="NVIDIA H200", arch=HOPPER, num_sms=132, shared_memory=232448)
A100 = device.Gpu(kind="A100", arch=AMPERE, num_sms=108, shared_memory=166912)
RTX = device.Gpu(kind="RTX 4090", arch=(8, 9), num_sms=128, shared_memory=101376)


def random_tree(rng, nodes: int) -> np.ndarray:
    """Ancestor mask [N, N] of a random tree."""
    mask = np.eye(nodes, dtype=bool)
    for node in range(1, nodes):
        mask[node] |= mask[rng.integers(0, node)]
    return mask


def arguments(
    nodes, starts, *, heads=4, kv_heads=1, channels=64, capacity=256, causal=False, **how
):
    """Random inputs; slots that nobody may see hold large values, so that looking at them shows."""
    rng = np.random.default_rng([nodes, *starts])
    batch, dtype = len(starts), how.get("dtype", jnp.bfloat16)
    shape = (batch, kv_heads, capacity, channels)
    keys, values = rng.standard_normal(shape), rng.standard_normal(shape)
    for row, start in enumerate(starts):
        keys[row, :, start + nodes :] = 30.0
        values[row, :, start + nodes :] = 1e4
    tail = np.stack([random_tree(rng, nodes) for _ in starts])
    start = jnp.asarray(starts, jnp.int32)
    return dict(
        q=jnp.asarray(rng.standard_normal((batch, nodes, heads, channels)), dtype),
        keys=jnp.asarray(keys, dtype),
        values=jnp.asarray(values, dtype),
        start=start,
        prefix=start,
        tail=None if causal else jnp.asarray(tail),
    )


def interpreted(given, arch, tiles):
    """The kernel's output; asserts that it has no races."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    try:
        out = mosaic.tree_attention(**given, arch=arch, config=tiles, interpret=interpret)
        out = jax.block_until_ready(out)
        assert not gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
    return np.asarray(out, np.float32)


def relative_error(out, given) -> float:
    wanted = np.asarray(reference.tree_attention(**given), np.float32)
    return float(np.sqrt(np.mean((out - wanted) ** 2) / np.mean(wanted**2)))


TOLERANCE = {jnp.bfloat16: 4e-3, jnp.float16: 2e-3}
# nodes, starts (lengths) around the edges of blocks of 64, further settings
TREES = [
    (1, (0,), {}),
    (1, (64, 63), dict(heads=8, kv_heads=2)),
    (7, (57,), dict(channels=128)),
    (8, (56, 128), {}),
    (9, (127,), dict(heads=9, kv_heads=3)),
    (33, (0, 65), dict(heads=2)),
    (60, (150,), dict(heads=8, kv_heads=2, channels=128, dtype=jnp.float16)),
    (64, (192, 1), dict(heads=2)),
    (70, (100,), dict(heads=1)),
]
CHAINS = [(1, (128,), {}), (33, (31, 64), dict(heads=4)), (100, (0,), dict(heads=2))]
SLOW = [
    (nodes, (start,), dict(heads=4 + 4 * (nodes % 2), channels=128 if start % 2 else 64))
    for nodes in (1, 7, 8, 9, 31, 33, 60, 64)
    for start in (0, 63, 65, 192)
]


def both_kernels():
    """The fast cases go to one kernel or the other in turn, every third to both; the rest is slow."""
    for index, case in enumerate(TREES + SLOW):
        for turn, arch in enumerate((HOPPER, AMPERE)):
            fast = index < len(TREES) and (index % 3 == 0 or index % 2 == turn)
            fast &= case[0] < 60 or arch == HOPPER
            name = f"{case[0]}-{case[1]}-sm{arch[0]}{arch[1]}"
            yield pytest.param(*case, arch, id=name, marks=() if fast else pytest.mark.slow)


def tiles(nodes: int, heads: int, arch, **changes) -> config.Config:
    wide = arch == HOPPER and nodes * heads > config.ROWS
    return config.Config(**{**dict(stages=2, splits=3, warpgroups=1 + wide), **changes})


@pytest.mark.parametrize(("nodes", "starts", "settings", "arch"), list(both_kernels()))
def test_trees(nodes, starts, settings, arch):
    given = arguments(nodes, starts, **settings)
    group = given["q"].shape[2] // given["keys"].shape[1]
    out = interpreted(given, arch, tiles(nodes, group, arch))
    assert relative_error(out, given) < TOLERANCE[given["q"].dtype.type]


@pytest.mark.parametrize("arch", [HOPPER, AMPERE], ids=["sm90", "sm80"])
@pytest.mark.parametrize(("nodes", "starts", "settings"), CHAINS)
def test_chains_and_prompt_chunks(nodes, starts, settings, arch):
    given = arguments(nodes, starts, causal=True, **settings)
    group = given["q"].shape[2] // given["keys"].shape[1]
    out = interpreted(given, arch, tiles(nodes, group, arch, block=32))
    assert relative_error(out, given) < TOLERANCE[given["q"].dtype.type]


@pytest.mark.parametrize("arch", [HOPPER, AMPERE], ids=["sm90", "sm80"])
def test_the_root_of_a_tree_sums_like_a_single_token(arch):
    """Greedy tokens must not depend on the size of the tree."""
    tree = arguments(40, (130,), heads=2)
    token = {**tree, "q": tree["q"][:, :1], "tail": jnp.ones((1, 1, 1), bool)}
    results = [interpreted(case, arch, tiles(40, 2, arch)) for case in (tree, token)]
    np.testing.assert_array_equal(results[0][:, :1], results[1])


def test_a_wrong_mask_would_be_seen():
    """The test above is as sharp as the inputs: one slot too many must show."""
    given = arguments(9, (127,))
    wrong = {**given, "prefix": given["prefix"] + 1}
    assert relative_error(np.asarray(reference.tree_attention(**wrong), np.float32), given) > 0.1


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 60, 64, 128])
def test_mask_words(nodes):
    rng = np.random.default_rng(nodes)
    tail = rng.random((2, nodes, nodes)) < 0.5
    layout = frame.Layout(nodes=nodes, group=3, width=nodes, config=config.Config())
    rows = -(-nodes * 3 // 64) * 64
    words = np.asarray(mosaic._mask_operand(layout, rows, None, jnp.asarray(tail)))
    assert words.shape == (2, -(-nodes // 32), rows)
    bits = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    bits = bits.transpose(0, 2, 1, 3).reshape(2, rows, -1)
    np.testing.assert_array_equal(bits[:, : nodes * 3, :nodes], tail.repeat(3, axis=1))
    assert not bits[:, :, nodes:].any()


@pytest.mark.parametrize("gpu", [H200, A100, RTX], ids=lambda gpu: gpu.kind)
@pytest.mark.parametrize("capacity", [16, 48, 96, 192, 4096])
def test_heuristic_tiles_fit(gpu, capacity):
    for nodes, group in ((1, 4), (60, 4), (60, 8), (256, 4)):
        found = config.heuristic(
            batch=1,
            kv_heads=8,
            rows=nodes * group,
            num_tokens=nodes,
            capacity=capacity,
            head_dim=128,
            gpu=gpu,
        )
        assert capacity % found.block == 0
        assert 1 <= found.splits <= max(1, capacity // found.block)
        rows = config.ROWS * found.warpgroups
        halves = 2 * 128 * (2 * found.stages * found.block + rows)
        assert halves + 4 * 128 * rows <= gpu.shared_memory


def test_the_split_of_a_tree_is_that_of_a_token():
    shape = dict(batch=1, kv_heads=8, capacity=4096, head_dim=128, gpu=H200)
    one = config.heuristic(rows=4, num_tokens=1, **shape)
    tree = config.heuristic(rows=240, num_tokens=60, **shape)
    assert one.splits == tree.splits == 16
    assert config.heuristic(rows=1024, num_tokens=256, **shape).splits == 2


def test_backends():
    given = arguments(4, (8,), capacity=32)
    q, keys, values = (given.pop(name) for name in ("q", "keys", "values"))
    plain = api.tree_attention(q, keys, values, **given)
    np.testing.assert_array_equal(plain, reference.tree_attention(q, keys, values, **given))
    with pytest.raises(SpecjaxError, match="no NVIDIA GPU"):
        api.tree_attention(q, keys, values, **given, backend="mosaic")
    with pytest.raises(SpecjaxError, match="triton"):
        api.tree_attention(q, keys, values, **given, backend="triton")


def test_refusals():
    given = arguments(4, (8,), capacity=32)
    q, keys, values = (given.pop(name) for name in ("q", "keys", "values"))
    assert mosaic.refuses(q, keys, values, **given) is None
    whole = q.astype(jnp.float32)
    assert "float32" in mosaic.refuses(whole, keys, values, **given)
    assert "head_dim 8" in mosaic.refuses(q[..., :8], keys[..., :8], values[..., :8], **given)
    assert "24 slots" in mosaic.refuses(q, keys[:, :, :24], values[:, :, :24], **given)
    for gpu, reason in ((H200, "32 slots; a multiple of 64"), (A100, None)):
        with device.targeting(gpu):
            refused = mosaic.refuses(q, keys, values, **given)
            assert reason in refused if reason else refused is None
            whole = jnp.concatenate([keys, keys], axis=2)
            assert mosaic.refuses(q, whole, whole, **given) is None
    wide = given | {"tail": jnp.zeros((1, 4, 129), bool)}
    assert "129" in mosaic.refuses(q, keys, values, **wide)
    other = device.Gpu(kind="RTX 5090", arch=(12, 0), num_sms=170, shared_memory=101376)
    with device.targeting(other):
        assert "sm_120" in device.unsupported()
    assert "no NVIDIA GPU" in device.unsupported()


@pytest.mark.parametrize("width", [8, None])
def test_no_block_behind_the_cache_is_read(width):
    """Where nodes are padded beyond the slots: the next block is the next head's."""
    tiles = config.Config(block=64, stages=2, splits=1)
    layout = frame.Layout(nodes=8, group=4, width=width, config=tiles)
    bounds = jnp.int32(252), jnp.int32(252)
    blocks = [
        int(frame.block_range(layout, bounds, jnp.int32(0), jnp.int32(0), capacity)[0])
        for capacity in (256, 320)
    ]
    assert blocks == [4, 5]
