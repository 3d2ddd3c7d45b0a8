"""Which backend a matmul op takes, with what reason, and the tiles it is given."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import errors
from specjax.pallas import device, tuned
from specjax.pallas.matmul import backends, mosaic, packed, tiles
from specjax.pallas.matmul.api import matmul
from specjax.pallas.matmul.form import Form
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.operand import Operand
from specjax.pallas.matmul.plan import Config, Plan
from specjax.pallas.matmul.specs import MODELS
from specjax.quant.scheme import lookup
from tests.quant import random_linears as draw

INT4, UINT4 = (registry.find(dtype, "single") for dtype in ("int4", "uint4"))
ROWS = (1, 8, 16, 24, 33, 40, 64)


def half(*shape) -> jax.Array:
    return jnp.ones(shape, jnp.float16)


def refusal(*arguments, **kwargs) -> str:
    with pytest.raises(errors.SpecjaxError) as caught:
        matmul(*arguments, backend="mosaic", **kwargs)
    return str(caught.value)


def form(n: int, k: int, **fields) -> Form:
    defaults = dict(group_size=128 if k % 128 == 0 else 64, format=INT4, operand_bits=16)
    return Form(out_features=n, in_features=k, **defaults | fields)


def test_without_a_gpu_packed_weights_run_on_xla():
    linear = draw.make(lookup("w4a16-asym"), 96, 192, 64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 192)), jnp.float32)
    wanted = matmul(x, linear)
    found = matmul(x, packed.pack(linear, 16))
    np.testing.assert_array_equal(found, wanted)
    assert "no NVIDIA GPU" in refusal(half(1, 192), packed.pack(linear, 16))


def test_reasons_of_a_refusal_on_a_gpu():
    weight = draw.make(lookup("w4a16"), 64, 128, 32)
    with device.targeting(tiles.typical((9, 0))):
        assert "not packed" in refusal(half(1, 128), weight)
        packing = packed.pack(weight, 16)
        assert "float32" in refusal(jnp.ones((1, 128)), packing)
        codes, scale = jnp.ones((1, 128), jnp.int8), jnp.ones((1, 1))
        for x in (codes, codes.astype(jnp.int4)):
            assert "group_size=32" in refusal(x, packing, x_scale=scale)
        second = packed.pack(draw.make(lookup("w4a8-qqq"), 64, 256, 128), 8)
        assert "second-level" in refusal(half(1, 256), second)
        floats = draw.make(lookup("fp4"), 64, 128, 32)
        assert "float4" in refusal(half(1, 128), floats)
    consumer = device.Gpu(
        kind="NVIDIA GeForce RTX 5090", arch=(12, 0), num_sms=170, shared_memory=101376
    )
    with device.targeting(consumer):
        assert "sm_120" in refusal(half(1, 128), packing)


def test_prompts_go_through_the_decoded_weight():
    linear = draw.make(lookup("w4a16"), 64, 128, 32)
    rows = backends.MAX_ROWS + 1
    with device.targeting(tiles.typical((9, 0))):
        found = matmul(half(rows, 128), packed.pack(linear, 16), backend="mosaic")
    wanted = matmul(half(rows, 128), linear, backend="xla")
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("arch", device.ARCHS)
@pytest.mark.parametrize(("n", "k"), [s for model in MODELS.values() for s in model.values()])
def test_tiles_of_models(n, k, arch):
    """Splits are the weight's alone; the pipeline fits in shared memory."""
    gpu = tiles.typical(arch)
    for fields in (dict(), dict(format=UINT4), dict(operand_bits=8, group_size=k)):
        weight = form(n, k, **fields)
        bits = weight.operand_bits
        configs = [
            tiles.heuristic(weight, mosaic.m_tile(rows, bits, arch), bits, gpu) for rows in ROWS
        ]
        assert len({config.splits for config in configs}) == 1
        for rows, config in zip(ROWS, configs, strict=True):
            used = config.num_stages * tiles.stage_bytes(
                weight, mosaic.m_tile(rows, bits, arch), bits, config.tiles_per_step, gpu
            )
            assert used <= gpu.shared_memory
            assert weight.split_tiles % config.tiles_per_step == 0


def test_splits_cover_every_tile_once():
    for k in (4096, 11008, 576, 1536):
        weight = form(256, k)
        for tiles_per_step in (t for t in (1, 2, 4) if weight.split_tiles % t == 0):
            for splits in range(1, weight.k_tiles // weight.split_tiles + 1):
                plan = _plan(
                    weight, Config(tiles_per_step=tiles_per_step, num_stages=2, splits=splits)
                )
                steps = [tuple(int(v) for v in plan.steps(i)) for i in range(splits)]
                ends = [0, *(first + count for first, count in steps)]
                assert [first for first, _ in steps] == ends[:-1]
                assert ends[-1] * tiles_per_step == weight.k_tiles


def _plan(weight: Form, config: Config) -> Plan:
    return Plan(
        form=weight,
        operand=Operand(dtype=jnp.dtype(jnp.float16), unit="wgmma", arch=(9, 0)),
        config=config,
        rows=8,
        m_tile=8,
        has_zeros=False,
        has_minima=False,
        out_dtype=jnp.dtype(jnp.float32),
    )


@pytest.mark.parametrize("arch", device.ARCHS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_row_tiles_hold_the_rows(arch, bits):
    for rows in range(1, 65):
        tile = mosaic.m_tile(rows, bits, arch)
        assert rows <= tile <= 64 and tile % 8 == 0
        if arch == (9, 0) and bits == 8:
            assert tile not in (40, 56)  # wgmma has no such int8 shape
    assert mosaic.m_tile(200, bits, arch) == 64


def test_tuned_tiles_are_taken(monkeypatch):
    gpu, weight = tiles.typical((9, 0)), form(4096, 4096)
    rows = {"8": {"tiles_per_step": 2, "num_stages": 5}}
    entries = {"4096x4096g128": {"splits": 8, "rows": rows}}
    text = json.dumps(entries)
    monkeypatch.setattr(tuned, "table", lambda op, kind: tuned.parse(text, "table"))
    found = tiles.lookup("matmul_w4a16", weight, 8, 16, gpu)
    assert found == Config(tiles_per_step=2, num_stages=5, splits=8)
    # A table speaks for the splits of every number of rows.
    assert tiles.lookup("matmul_w4a16", weight, 64, 16, gpu).splits == 8
    other = form(4096, 14336)
    assert tiles.lookup("matmul_w4a16", other, 8, 16, gpu) == tiles.heuristic(other, 8, 16, gpu)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"1x1g0": 3}',
        '{"1x1g0": {"splits": 0, "rows": {}}}',
        '{"1x1g0": {"splits": 1, "rows": {"8": {}}}}',
    ],
)
def test_damaged_tables_are_refused(text):
    with pytest.raises(errors.ConfigError, match=r"file\.json"):
        tuned.parse(text, "file.json")


def test_tables_in_the_package_are_sound():
    assert tuned.table("matmul_w4a16", "NVIDIA no such device") == {}
    for path in tuned.paths():
        tuned.parse(path.read_text(), str(path))
