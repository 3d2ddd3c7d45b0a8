"""Programs: one executable per combination of shapes, compiling counted and timed apart."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax.engine import program
from specjax.engine.program import Program
from specjax.errors import ConfigError
from tests import paths


@dataclass(frozen=True)
class Factor:
    """A static argument."""

    value: int


@pytest.fixture
def traced():
    """A program that scales, and the list of its traces."""
    traces = []

    def scale(x, factor):
        traces.append(x.shape)
        return x * factor.value

    return Program(scale, static=("factor",)), traces


def test_one_trace_and_one_executable_per_shape_dtype_and_static_value(traced):
    program, traces = traced
    calls = [
        (jnp.ones((2,)), 3),
        (jnp.zeros((2,)), 3),
        (jnp.ones((4,)), 3),
        (jnp.ones((2,), jnp.int32), 3),
        (jnp.ones((2,)), 5),
        (jnp.ones((4,)), 3),
    ]
    for x, value in calls:
        assert (program(x=x, factor=Factor(value)) == x * value).all()
    assert program.num_compilations == len(traces) == 4


def test_compile_time_is_counted_once(traced):
    program, _ = traced
    assert program.compile_ms == 0
    program(x=jnp.ones((2,)), factor=Factor(2))
    spent = program.compile_ms
    assert spent > 0
    program(x=jnp.ones((2,)), factor=Factor(2))
    assert program.compile_ms == spent


def test_compiled_gives_the_executable_without_running_it(traced):
    program, _ = traced
    executable = program.compiled(x=jax.ShapeDtypeStruct((8,), jnp.float32), factor=Factor(2))
    assert "HloModule" in executable.as_text()
    program(x=jnp.ones((8,)), factor=Factor(2))
    assert program.num_compilations == 1


def test_other_tree_structures_are_other_programs():
    program = Program(lambda pair: jax.tree.map(lambda x: x + 1, pair))
    assert program(pair={"a": jnp.zeros(3)})["a"].tolist() == [1, 1, 1]
    assert program(pair={"b": jnp.zeros(3)})["b"].tolist() == [1, 1, 1]
    assert program(pair=(jnp.zeros(3),))[0].tolist() == [1, 1, 1]
    assert program.num_compilations == 3


def test_donated_arguments_are_used_up_and_others_are_not():
    program = Program(lambda state, x: state + x, donate=("state",))
    state, x = jnp.ones((16,)), jnp.ones((16,))
    assert np.asarray(program(state=state, x=x)).tolist() == [2.0] * 16
    assert state.is_deleted()
    assert not x.is_deleted()


@pytest.mark.parametrize("command_buffers", program.COMMAND_BUFFERS)
def test_what_graphs_hold_is_something_that_xla_can_read(command_buffers):
    options = program.gpu_options(command_buffers)
    held = options["xla_gpu_enable_command_buffer"].split(",")
    assert ("WHILE" in held, "FUSION" in held) == {
        "loop": (True, True),
        "body": (False, True),
        "off": (False, False),
    }[command_buffers]
    jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(compiler_options=options)


def test_a_model_compiles_with_the_options_that_it_was_loaded_with(monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(program, "gpu_options", lambda buffers="loop": seen.append(buffers) or {})
    scaled = Program(lambda x: x * 2, command_buffers="off")
    assert scaled(x=jnp.ones(2)).tolist() == [2, 2] and seen == ["off"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"command_buffers='loops'.*loop, body, off"):
        specjax.load(paths.fixture("tiny-fp16"), command_buffers="loops")
    model = specjax.load(paths.fixture("tiny-fp16"), command_buffers="body")
    assert model.programs.decode.options == program.gpu_options("body")
