"""The Triton kernel, its program run in numpy: one process after the other."""

import importlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.pallas.matmul import packed, reference
from specjax.pallas.matmul.formats.int4 import Int4
from specjax.quant.scheme import lookup
from tests.quant import random_linears as draw


class Tensor(np.ndarray):
    """An array with Triton's name for a cast."""

    def to(self, dtype):
        return self.astype(dtype)


class Pointer:
    """The start of an array, or places in it."""

    def __init__(self, array: np.ndarray, places=0):
        self.array, self.places = array.reshape(-1), places

    def __add__(self, offset):
        return Pointer(self.array, self.places + offset)


def language(program: list[int]) -> types.ModuleType:
    """What the kernel uses of triton.language; `program` holds the ids of the running process."""
    module = types.ModuleType("triton.language")
    module.constexpr, module.float32 = int, np.float32
    module.program_id = lambda axis: program[axis]
    module.arange = lambda low, high: np.arange(low, high).view(Tensor)
    module.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(Tensor)
    module.static_range = range
    module.load = lambda pointer: pointer.array[pointer.places].view(Tensor)
    module.dot = lambda a, b: a.astype(np.float32) @ b.astype(np.float32)

    def store(pointer, values):
        pointer.array[pointer.places] = values

    module.store = store
    return module


@pytest.fixture
def matmul(monkeypatch):
    """The backend's matmul over a Triton that runs in numpy."""
    program = [0, 0, 0]
    triton, caller = types.ModuleType("triton"), types.ModuleType("jax_triton")
    triton.jit, triton.language = lambda function: function, language(program)

    def triton_call(*arrays, kernel, out_shape, grid, **constants):
        for launch in ("num_warps", "num_stages", "compute_capability", "backend_options"):
            constants.pop(launch)
        out = np.full(out_shape.shape, np.nan, out_shape.dtype)
        pointers = [Pointer(np.asarray(array)) for array in (*arrays, out)]
        for ids in np.ndindex(*grid):
            program[:] = ids
            kernel(*pointers, **constants)
        return jnp.asarray(out)

    caller.triton_call = triton_call
    for module in (triton, triton.language, caller):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    backend = importlib.import_module("specjax.pallas.matmul.triton")
    _forget_kernel()
    yield backend.matmul
    _forget_kernel()


def _forget_kernel() -> None:
    """The modules of the kernel are bound to the Triton they were imported with."""
    for name in ("specjax.pallas.matmul.triton_kernel", Int4.triton):
        sys.modules.pop(name, None)
        folder, _, module = name.rpartition(".")
        vars(importlib.import_module(folder)).pop(module, None)


@pytest.mark.parametrize(
    ("name", "group_size", "minima", "rows"),
    [
        ("w4a16", 128, False, 70),
        ("w4a16-asym", 64, True, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *(("w4a16", 32, False, 1), ("w4a16", 256, False, 17), ("w4a16", 640, False, 1)),
                *(("w4a16-asym", 128, False, 33), ("w4a16-asym", 640, False, 1)),
                ("w4a16-asym", 640, True, 70),
            )
        ),
    ],
)
def test_equals_the_reference(matmul, name, group_size, minima, rows):
    inputs = 512 if group_size == 256 else 640
    linear = draw.make(lookup(name), 192, inputs, group_size, minima=minima, bias=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, inputs)), jnp.float16)
    out = matmul(x, packed.pack(linear, 16), arch=(9, 0), bias=linear.bias)
    wanted = np.asarray(
        reference.weight_only(x.astype(jnp.float32), linear, linear.bias), np.float64
    )
    assert out.shape == wanted.shape and out.dtype == jnp.float16
    error = np.asarray(out, np.float64) - wanted
    assert np.sqrt(np.mean(error**2) / np.mean(wanted**2)) < 6e-4
