"""Products of float inputs and packed weights through jax-triton, where Mosaic GPU has no target.

Reads the same packed weights. Groups below 128 are scaled before the product, in the dtype of the
inputs, as the reference does it; zeros and minima are a second small product outside.
"""

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.pallas import device
from specjax.pallas.matmul import packed
from specjax.pallas.matmul.form import TILE, PackedWeight

# Rows per block that Triton's dot takes.
_ROW_TILES = (16, 32, 64)
_MAX_SPLITS = 8
# From Hopper on Triton writes a newer PTX than jaxlib's assembler and loader take; this one knows sm_121.
_PTX_VERSION, _PTX_STATED_FROM = 88, (9, 0)


def arch() -> tuple[int, int] | None:
    """Compute capability of the GPU at hand or named; of any NVIDIA GPU, unlike `device.current`."""
    gpu = device.current()
    if gpu is not None:
        return gpu.arch
    if jax.default_backend() != "gpu":
        return None
    parts = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    return (int(parts[0]), int(parts[1])) if all(part.isdecimal() for part in parts) else None


def matmul(
    x: Float[Array, "M K"],
    weight: PackedWeight,
    *,
    arch: tuple[int, int],
    bias: Float[Array, "N"] | None = None,
) -> Float[Array, "M N"]:
    """x W^T + bias in the dtype of x (float16 or bfloat16), sums in float32."""
    form = weight.form
    block = row_tile(len(x))
    rows = -(-len(x) // block) * block
    padded = jnp.pad(x, ((0, rows - len(x)), (0, form.k_tiles * TILE - x.shape[1])))
    parts = _partial_sums(padded, weight, block, arch)
    total = functools.reduce(jnp.add, [parts[i] for i in range(len(parts))])
    scales, shifts = _epilogue(weight)
    if form.per_channel:
        total = total * scales[:, 0]
    if shifts is not None:
        sums = padded.astype(jnp.float32).reshape(rows, shifts.shape[1], -1).sum(-1)
        highest = jax.lax.Precision.HIGHEST
        total = total + jnp.einsum("mq,nq->mn", sums, shifts, precision=highest)
    total = total[: len(x), : form.out_features]
    return (total if bias is None else total + bias.astype(jnp.float32)).astype(x.dtype)


def row_tile(rows: int) -> int:
    """Rows per block: all of them up to 64, padded to what Triton's dot takes."""
    return next((tile for tile in _ROW_TILES if tile >= rows), _ROW_TILES[-1])


def _partial_sums(x, weight: PackedWeight, block: int, arch) -> Float[Array, "P M N"]:
    import jax_triton

    from specjax.pallas.matmul import triton_kernel

    form = weight.form
    splits = max(1, min(_MAX_SPLITS, 256 // form.n_tiles, form.k_tiles // 4))
    decoder = importlib.import_module(form.format.triton)
    codes = weight.codes.reshape(*weight.codes.shape[:3], -1, 4)
    version = _PTX_VERSION if arch >= _PTX_STATED_FROM else None
    return jax_triton.triton_call(
        x,
        jax.lax.bitcast_convert_type(codes, jnp.int32),
        weight.scales,
        kernel=triton_kernel.matmul,
        out_shape=jax.ShapeDtypeStruct((splits, len(x), form.n_tiles * TILE), jnp.float32),
        grid=(form.n_tiles * TILE // triton_kernel.BLOCK_N, splits, len(x) // block),
        num_warps=4,
        num_stages=4,
        compute_capability=10 * arch[0] + arch[1],
        backend_options=None if version is None else dict(ptx_version=version),
        K=x.shape[1],
        K_TILES=form.k_tiles,
        N_TILES=form.n_tiles,
        ROWS=len(x),
        SPLITS=splits,
        GROUP=form.table_group,
        CODES=32 // form.format.bits,
        CODE=decoder.code,
        COLUMN=decoder.column,
        BLOCK_M=block,
    )


def _epilogue(weight: PackedWeight):
    """Scales, and what group sums of the inputs are multiplied by (or None), [outputs, entries]."""

    def flat(table):
        table = table.astype(jnp.float32).swapaxes(1, 2)
        return table.reshape(weight.form.n_tiles * TILE, -1)

    scales = flat(weight.scales)
    if weight.zeros is not None:
        return scales, flat(weight.zeros) * scales
    if weight.minima is not None:
        return scales, flat(weight.minima) + weight.form.format.half * scales
    return scales, None


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, or None."""
    found = arch()
    if found is None:
        return "no NVIDIA GPU"
    names = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if names:
        return f"{' and '.join(names)} not installed (pip install specjax[triton])"
    return None


def refuses(x, weight) -> str | None:
    """Why this backend cannot take these arguments, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if not isinstance(weight, PackedWeight):
        return packed.refuses_unpacked(weight)
    if weight.form.operand_bits != 16 or weight.form.format.triton is None:
        return "the weight is packed for other inputs"
    if x.dtype not in (jnp.float16, jnp.bfloat16):
        return f"inputs are {x.dtype}; the kernel takes float16 and bfloat16"
    return None
