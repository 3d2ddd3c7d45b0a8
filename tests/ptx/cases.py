"""The reference tests of all kernel families, on their PTX: the tests' own comparisons, at shapes that are quick."""

import time
import traceback
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from specjax.aot.compile import Compiler
from specjax.pallas import device
from specjax.pallas.matmul import mosaic as matmul_mosaic
from specjax.pallas.matmul.plan import Config
from specjax.pallas.tree_attention import mosaic as attention_mosaic
from specjax.quant.scheme import lookup
from tests.pallas import test_glue, test_matmul_mosaic, test_tree_attention
from tests.ptx import kernel, machine, mutate, program
from tests.quant import random_linears as draw

Case = tuple[str, Callable[[], None]]
_RING = Config(tiles_per_step=1, num_stages=3, splits=1)
_SPLIT = Config(tiles_per_step=1, num_stages=2, splits=2)


def matmuls(arch) -> Iterator[Case]:
    """Every weight format and edge of rows, outputs and inputs; sums of groups where K has few tiles a step (H1)."""

    def floats(name, group, inputs, rows, config=test_matmul_mosaic.SMALL, outputs=64, **how):
        dtype = how.pop("dtype", jnp.float16)
        linear = draw.make(lookup(name), outputs, inputs, group, **how)
        test_matmul_mosaic.check_float(linear, rows, config, dtype, arch)

    def integers(name, group, inputs, rows, config=test_matmul_mosaic.SMALL, bits=8, **how):
        linear = draw.make(lookup(name), 64, inputs, group, **how)
        test_matmul_mosaic.check_integer(linear, rows, config, bits, arch)

    for rows in (1, 9, 33, 64):
        yield f"w4a16 g128 {rows} rows", lambda rows=rows: floats("w4a16", 128, 256, rows)
    yield (
        "w4a16 g64 192 x 576, 2 splits",
        lambda: floats("w4a16", 64, 576, 3, _SPLIT, 192, bias=True),
    )
    yield "w4a16 g128 ring of 3", lambda: floats("w4a16", 128, 640, 8, _RING)
    yield "w4a16 g32", lambda: floats("w4a16", 32, 256, 5)
    yield "w4a16 per channel", lambda: floats("w4a16", 256, 256, 8)
    bf16 = dict(dtype=jnp.bfloat16, scale_dtype=jnp.bfloat16)
    yield "w4a16 g128 bfloat16", lambda: floats("w4a16", 128, 256, 8, **bf16)
    for group, inputs, minima in (
        (64, 576, False),
        (128, 640, False),
        (64, 576, True),
        (32, 320, True),
    ):
        kind = "minima" if minima else "zeros"
        yield (
            f"w4a16 {kind} g{group} K={inputs}",
            lambda g=group, k=inputs, m=minima: floats("w4a16-asym", g, k, 3, None, minima=m),
        )
    # 11008 = 86 tiles: an even number that 4 does not divide, as 768 = 6.
    yield "w4a16 zeros g128 K=768", lambda: floats("w4a16-asym", 128, 768, 8, None)
    yield "w8a16 per channel", lambda: floats("w8a16", 256, 256, 9)
    yield "w8a16 zeros g64", lambda: floats("w8a16-asym", 64, 256, 8)
    for group in (128, 256):
        yield f"w4a8 g{group}", lambda g=group: integers("w4a8", g, 256, 3)
    yield "w4a8 zeros g64 K=576", lambda: integers("w4a8-asym", 64, 576, 3, None)
    yield "w4a8 qqq g128", lambda: integers("w4a8-qqq", 128, 256, 9)
    yield "w4a8 qqq per channel", lambda: integers("w4a8-qqq", 256, 256, 3)
    yield "w4a8 qoq per channel", lambda: integers("w4a8-qoq", 256, 256, 3, minima=True)
    for inputs in (256, 640):
        progressive = lambda k=inputs: test_matmul_mosaic.check_integer(
            draw.qoq(64, k), 3, None if k == 640 else test_matmul_mosaic.SMALL, arch=arch
        )
        yield f"w4a8 qoq g128 K={inputs}", progressive
    yield "w8a8 per channel", lambda: integers("w8a8", 256, 256, 9)
    yield "w8a8 g64 K=576, 2 splits", lambda: integers("w8a8", 64, 576, 33, _SPLIT)
    yield "w4a4 g128", lambda: integers("w4a4", 128, 256, 8, bits=16)
    if arch[0] == 8:
        yield "w4a4 qqq g128", lambda: integers("w4a4-qqq", 128, 256, 5)
        yield "w4a4 per channel, 33 rows", lambda: integers("w4a4", 256, 256, 33, bits=16)


def attentions(arch) -> Iterator[Case]:
    def check(nodes, starts, causal=False, changes=None, **settings):
        given = test_tree_attention.arguments(nodes, starts, causal=causal, **settings)
        group = given["q"].shape[2] // given["keys"].shape[1]
        tiles = test_tree_attention.tiles(nodes, group, arch, **(changes or {}))
        out = test_tree_attention.interpreted(given, arch, tiles)
        tolerance = test_tree_attention.TOLERANCE[given["q"].dtype.type]
        assert test_tree_attention.relative_error(out, given) < tolerance

    small = dict(capacity=128, changes=dict(splits=2))
    yield "attention 1 node, nothing before", lambda: check(1, (0,), **small)
    yield "attention 9 nodes, 9 heads of 3", lambda: check(9, (100,), heads=9, kv_heads=3, **small)
    yield "attention 7 nodes, 128 channels", lambda: check(7, (57,), channels=128, **small)
    yield "attention 33 nodes, batch", lambda: check(33, (0, 65), heads=2, **small)
    yield (
        "attention 60 nodes float16",
        lambda: check(60, (60,), heads=2, dtype=jnp.float16, **small),
    )
    yield "attention 70 nodes", lambda: check(70, (20,), heads=1, **small)
    # wgmma takes no fewer than 64 slots.
    chain = dict(capacity=128, changes=dict(block=32 if arch[0] == 8 else 64, splits=2))
    yield "attention chain of 33", lambda: check(33, (31,), causal=True, heads=2, **chain)


def glue(arch) -> Iterator[Case]:
    yield "residual_norm 1 row", lambda: test_glue.test_residual_norm(None, 1, 1)
    yield "residual_norm 3 rows, 4 parts", lambda: test_glue.test_residual_norm(None, 3, 4)
    for last in (29, 30):
        name = "rotate_and_write" + (" beyond the slots" if last == 30 else "")
        yield name, lambda last=last: test_glue.test_rotate_and_write(None, last)
    yield "move_rows", lambda: test_glue.test_move_rows(None)
    at_the_end = test_glue.test_no_row_is_moved_beyond_the_slots_or_from_there
    yield "move_rows at the last slot", lambda: at_the_end(None)
    yield "combine", lambda: test_glue.test_combine(None)


def on_ptx() -> None:
    """The tests' calls of Mosaic's interpreter become plain calls, which the hook emulates."""

    def matmul(*arguments, arch, **how):
        out = matmul_mosaic.matmul(*arguments, arch=arch, **how)
        return np.asarray(out.astype(jnp.float32))

    def attention(given, arch, tiles):
        return np.asarray(
            attention_mosaic.tree_attention(**given, arch=arch, config=tiles), np.float32
        )

    test_matmul_mosaic.interpreted = matmul
    test_tree_attention.interpreted = attention


# The emulator's own test is on these: one of each way to copy, widen, multiply and store, with inputs that tell places
# apart (where the last row moves onto itself, a wrong place goes unseen).
_MUTATED = (
    *("w4a16 g128 ring of 3", "w4a16 zeros g64 K=576", "w4a8 qqq g128", "w8a8 per channel"),
    *("attention 1 node, nothing before", "residual_norm 1 row", "move_rows"),
)


def _mutate(launch: kernel.Emulated, row: dict, mutations: int, seed: int) -> None:
    begin = time.perf_counter()
    outcomes, survivors = mutate.survey(launch, mutations, seed)
    row["mutations"], row["mutation_seconds"] = (
        dict(outcomes),
        round(time.perf_counter() - begin, 1),
    )
    if survivors:
        row["error"] = f"mutations survived: {'; '.join(survivors)}"[:600]


def run(compiler: Compiler, only: str = "", mutations: int = 0, seed: int = 0) -> list[dict]:
    """Entry for `specjax.aot.compile.in_process`: a row per case.

    Args:
        only: part of the names of cases.
        mutations: faults of each kind to put into the kernels of some cases.
        seed: of these.
    """
    on_ptx()
    arch, rows = compiler.target.arch, []
    with kernel.Emulator(compiler).installed() as emulator, device.targeting(compiler.target):
        for family in (matmuls, attentions, glue):
            for name, check in family(arch):
                if only not in name:
                    continue
                emulator.launches.clear()
                row = {"case": name, "target": compiler.target.kind}
                begin = time.perf_counter()
                try:
                    check()
                    assert emulator.launches, "nothing ran"
                    row["matrix"] = sum(
                        machine.check(program.parse(each.text), each.cubin)
                        for each in emulator.launches
                    )
                    if mutations and name in _MUTATED:
                        _mutate(emulator.launches[0], row, mutations, seed)
                except Exception as error:
                    traceback.print_exc()
                    row["error"] = f"{type(error).__name__}: {error}"[:600]
                row["seconds"] = round(time.perf_counter() - begin, 2)
                row["launches"] = [
                    {"kernel": each.name} | {k: round(v, 2) for k, v in each.seconds.items()}
                    for each in emulator.launches
                ]
                rows.append(row)
                print(row, flush=True)
    return rows
