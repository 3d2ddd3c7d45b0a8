"""The choice of a backend, as a name and as a policy that knows what fails on a machine."""

import json
import logging

import jax
import jax.numpy as jnp
import pytest

from specjax import errors
from specjax.models.prepare import Preparation
from specjax.pallas import device, dispatch, tuned
from specjax.pallas.matmul import backends, tiles
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quant.packed_linear import PackedLinear
from specjax.quant.scheme import lookup
from tests.quant import random_linears as draw

FAILS = dispatch.Quarantined(op="product", backend="mosaic", reason="wrong numbers")
WITHOUT = dispatch.Policy(quarantine=(FAILS,))


def implementations(*names: str) -> list[dispatch.Implementation]:
    return [dispatch.Implementation(backend=name, run=lambda name=name: name) for name in names]


def test_a_family_in_quarantine_is_passed_over_and_said_once(caplog):
    offered = implementations("mosaic", "triton", "xla")
    with caplog.at_level(logging.WARNING):
        assert [dispatch.run("product", WITHOUT, offered) for _ in range(2)] == ["triton"] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "wrong numbers" in caplog.text and "experiments.doctor" in caplog.text
    # Another op, and no policy, are not meant.
    assert dispatch.run("other", WITHOUT, offered) == "mosaic"
    assert dispatch.run("product", "auto", offered) == "mosaic"


def test_a_backend_that_is_named_is_refused_with_the_reason_and_the_way_round():
    named = dispatch.Policy(backend="mosaic", quarantine=(FAILS,))
    with pytest.raises(errors.SpecjaxError, match=r"quarantine.*wrong numbers.*--nodoctor"):
        dispatch.run("product", named, implementations("mosaic", "xla"))
    assert not dispatch.permits(named, "product", "mosaic")
    assert dispatch.permits(named, "other", "mosaic")
    assert not dispatch.permits(dispatch.Policy(backend="xla"), "other", "mosaic")
    with pytest.raises(errors.SpecjaxError, match="backend='cuda' is unknown; known: auto"):
        dispatch.Policy(backend="cuda")


def test_tiles_that_were_measured_here_go_before_the_others(tmp_path):
    """From a folder of the user into the launch, in both forms of the product, and no other backend sees them."""
    gpu, linear = tiles.typical((9, 0)), draw.make(lookup("w4a16"), 256, 1024, 128)
    rows = {"8": {"tiles_per_step": 1, "num_stages": 2}}
    text = json.dumps({"256x1024g128": {"splits": 1, "rows": rows}})
    path = tmp_path / tuned.folder_name(gpu.kind) / "matmul_w4a16.json"
    path.parent.mkdir()
    path.write_text(text)
    policy = dispatch.Policy(tuned=tuned.tables_in(tmp_path, gpu.kind))
    assert policy.table("matmul_w4a16") == text and policy.table("matmul_w8a16") is None
    with device.targeting(gpu):
        x = jnp.ones((3, 1024), jnp.float16)
        packed = {
            name: Preparation(name, "auto", jnp.float16).linear(linear) for name in (policy, "auto")
        }
        splits = [
            jax.eval_shape(lambda x, p=p: p.parts(x).sums, x).shape[0] for p in packed.values()
        ]
        assert splits[0] == 1 != splits[1]
        assert jax.eval_shape(packed[policy], x).shape == (3, 256)
        many = jnp.ones((300, 1024), jnp.float16)
        assert jax.eval_shape(
            Preparation(policy, "auto", jnp.float16).linear(linear), many
        ).shape == (300, 256)
    path.write_text("{")
    with pytest.raises(errors.ConfigError, match=r"matmul_w4a16\.json is not JSON"):
        tuned.tables_in(tmp_path, gpu.kind)


def prepared(gpu: device.Gpu, backend: dispatch.Backend, scheme: str = "w4a16"):
    linear = draw.make(lookup(scheme), 128, 256, 128)
    with device.targeting(gpu):
        return Preparation(backend, "auto", jnp.float16).linear(linear)


@pytest.mark.parametrize("arch", sorted(device.SHARED_MEMORY))
def test_no_gpu_decodes_four_bit_weights_on_every_call(arch, monkeypatch):
    """Packed where a kernel reads them, Mosaic's or Triton's; else decoded once."""
    gpu, triton = tiles.typical(arch), []
    monkeypatch.setattr(backends, "_has_triton", lambda: bool(triton))
    mosaic = arch in device.ARCHS
    quarantined = dispatch.Policy(
        quarantine=tuple(
            dispatch.Quarantined(op=op, backend="mosaic", reason="hangs")
            for op in ("matmul_w4a16", "matmul_w4a8")
        )
    )
    assert isinstance(prepared(gpu, "auto"), PackedLinear if mosaic else Linear)
    assert isinstance(prepared(gpu, quarantined), Linear)
    integers = prepared(gpu, quarantined, "w4a8")
    if mosaic:  # the kernel of int8 weights is another family
        assert integers.weight.form.format.bits == 8
    else:
        assert isinstance(integers, QuantizedLinear) and integers.codes.dtype == jnp.int8
    triton.append("installed")
    for backend in ("auto", "triton", quarantined):
        assert isinstance(prepared(gpu, backend), PackedLinear)
    assert isinstance(prepared(gpu, "xla"), QuantizedLinear)
