"""A program under backend="xla" launches no kernel of this package on any GPU: the way round a broken one."""

import functools
import re
from dataclasses import replace

import jax
import pytest

from specjax import verify
from specjax.aot import programs, shapes
from specjax.engine import decode
from specjax.pallas import device, dispatch
from specjax.pallas.matmul import tiles

OF_A_MODEL = {
    "matmul_w4a16",
    "rotate_and_write",
    "tree_attention",
    "combine_splits",
    "residual_norm",
}
# Beside the target's: its int8 products, and the rows of an accepted path.
OF_A_HEAD = {"matmul_w8a16", "move_rows"}
DRAFTERS = {
    "none": {"kind": "none"},
    "eagle": {"kind": "eagle", "draft_depth": 3, "num_nodes": 8, "scheme": "w8a16"},
}


def traced(backend: dispatch.Backend, drafter: str):
    """The decoding loop of two layers of an 8B model, traced for an H100."""
    with device.targeting(tiles.typical((9, 0))):
        arguments = programs.decode_arguments(
            replace(shapes.lookup("llama3-8b"), num_layers=2),
            scheme="w4a16",
            group_size=128,
            drafter=DRAFTERS[drafter],
            dtype="bfloat16",
            backend=backend,
            capacity=256,
            batch=1,
        )
        run = functools.partial(decode.decode, acceptor=verify.Greedy())
        return jax.jit(run).trace(**arguments)


def kernels(program) -> set[str]:
    """Names of the launches of this package in a traced program."""
    return set(re.findall(r"kernel_name='(\w+)'", str(program.jaxpr)))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_no_kernel_of_ours_runs_under_xla(drafter):
    wanted = OF_A_MODEL | (OF_A_HEAD if drafter == "eagle" else set())
    assert kernels(traced("auto", drafter)) == wanted  # so they would be found below
    program = traced("xla", drafter)
    assert not kernels(program) and not re.search(r"pallas|mpmd_map|core_map", str(program.jaxpr))
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text and "mosaic" not in text and "triton" not in text


def test_families_in_quarantine_are_not_launched_and_the_others_are():
    broken = tuple(
        dispatch.Quarantined(op=op, backend="mosaic", reason="computes something else")
        for op in ("glue", "matmul_w4a16")
    )
    found = kernels(traced(dispatch.Policy(quarantine=broken), "eagle"))
    assert found == {"tree_attention", "combine_splits", "matmul_w8a16"}
