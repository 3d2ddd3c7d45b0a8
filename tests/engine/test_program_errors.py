"""Errors of compilers and launches name the kernels of the program and the flags that do without."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax.engine.program import Program
from specjax.errors import ConfigError, SpecjaxError


def program(monkeypatch) -> Program:
    """One with a kernel, where JAX says that it has a GPU: there is none, so compiling fails."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2.0

    def run(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        launch = dict(grid=(1,), grid_names=("i",), kernel_name="matmul_w4a16")
        return plgpu.kernel(double, out_type=shape, **launch)(x)

    return Program(run)


def test_what_does_not_compile_names_its_kernels(monkeypatch):
    broken = program(monkeypatch)
    with pytest.raises(
        SpecjaxError, match=r"compiling .* matmul_w4a16 failed: ValueError: Only"
    ) as caught:
        broken(x=jnp.ones(8))
    for words in ("experiments.doctor", "--backend=xla", "--command_buffers=off"):
        assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_faults_of_launches_do_too_and_other_errors_stay_what_they_are(monkeypatch):
    sound = Program(lambda x: x + 1)
    assert sound(x=jnp.ones(2)).tolist() == [2.0, 2.0]
    for error in (ValueError("unrelated"), ConfigError("bad input")):
        with pytest.raises(type(error), match=str(error)), sound.explained("running"):
            raise error
    monkeypatch.setattr(sound, "kernels", lambda: {"tree_attention"})
    message = r"running .* tree_attention failed: RuntimeError: CUDA_ERROR_MISALIGNED_ADDRESS"
    with pytest.raises(SpecjaxError, match=message), sound.explained("running"):
        raise RuntimeError("CUDA_ERROR_MISALIGNED_ADDRESS")
    with pytest.raises(ConfigError, match=r"^bad input$"), sound.explained("running"):
        raise ConfigError("bad input")
