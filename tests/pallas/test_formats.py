"""Every registered weight format, without naming one; and a format of a few lines that is only registered here."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from specjax import errors
from specjax.pallas import matmul as folder
from specjax.pallas.matmul import mosaic, packed, reference, specs
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.formats.int4 import Int4
from specjax.pallas.matmul.formats.kernel import KernelFormat
from specjax.pallas.matmul.plan import Config
from specjax.quant import activations
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import SCHEMES, ActivationSpec, Scheme, WeightSpec
from tests.pallas import format_checks as checks
from tests.pallas import odd4

# Outputs, inputs, group size: with padding both ways, groups beyond a tile, and one scale per channel.
SHAPES = ((130, 320, 64), (64, 512, 256), (100, 200, 200))
KERNEL_FORMATS = [f for f in registry.formats() if isinstance(f, KernelFormat)]


def by_name(formats):
    return pytest.mark.parametrize("format", formats, ids=[format.name for format in formats])


def check_packing(format: KernelFormat, shape, operand_bits: int) -> None:
    for minima in (False,) if format.signed or format.two_level else (False, True):
        weight = checks.weight_of(format, *shape, minima=minima)
        if format.two_level and operand_bits == 16:
            assert "second-level" in packed.refuses(weight, operand_bits)
            continue
        checks.check_unpack_inverts_pack(weight, operand_bits)
        checks.check_packed_arithmetic(weight, operand_bits)


@by_name(registry.formats())
def test_round_trip(format):
    """Packing gives every code and table back; packed, widened and scaled they are the host's dequantization."""
    if not isinstance(format, KernelFormat):
        weight = checks.weight_of(format, *SHAPES[0])
        with pytest.raises(errors.ConfigError, match=re.escape(format.code_dtype)):
            packed.pack(weight, 16)
        assert np.isfinite(checks.numpy_of(reference.dequantize(weight))).all()
        return
    for operand_bits in (16, 8):
        checks.check_order(format, operand_bits)
        for shape in SHAPES:
            check_packing(format, shape, operand_bits)


@by_name(KERNEL_FORMATS)
def test_assembly(format):
    for operand in checks.operands(format):
        checks.check_assembly(format, operand)


@by_name(KERNEL_FORMATS)
def test_every_register_holds_its_columns(format):
    for operand in checks.operands(format):
        checks.check_registers(format, operand)


@by_name(registry.formats())
def test_names(format):
    """Ops are implemented by XLA at least; a weight finds its format; the variants can be packed."""
    for input_bits in (16, 8, 4):
        assert format.op(input_bits).startswith("matmul_")
        assert format.backends(input_bits)[-1] == "xla"
    assert registry.of(checks.weight_of(format, *SHAPES[0])) == format
    for variant in format.variants():
        assert format.op(variant.input_bits) in specs.ops()


@pytest.mark.parametrize("op", specs.ops())
def test_specs(op):
    for spec in specs.of(op).values():
        assert spec.weight().form.out_features == spec.n
    with pytest.raises(errors.ConfigError, match=op):
        specs.of("matmul_of_nothing")


def test_only_formats_name_schemes():
    """What is outside `formats/` knows no scheme: the kernels take any format."""
    levels = {format.levels for format in registry.formats()} - {"single"}
    pattern = re.compile("|".join([r"w\d+a\d+", r"fp\d", *levels, *SCHEMES]), re.IGNORECASE)
    root = Path(folder.__file__).parent
    for path in root.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if pattern.search(line)], path


@pytest.fixture
def odd(monkeypatch):
    """The format, registered."""
    (format,) = odd4.FORMATS
    others = [f for f in registry.formats() if f.name != format.name]
    monkeypatch.setattr(registry, "_REGISTERED", {})
    for other in others:
        registry.register(other)
    yield registry.register(format)
    gpu_callbacks.reset_gpu_interpret_mode_state()


def test_the_map_of_the_workspace_shows_this_file_and_one_line():
    text = Path("WORKSPACE.md").read_text(encoding="utf-8")
    lines = Path(odd4.__file__).read_text(encoding="utf-8").splitlines()
    assert "\n".join(f"+{line}" for line in lines) in text
    assert text.count('\n+    "odd4",\n') == 1


def test_a_new_format_is_covered(odd):
    for operand_bits in (16, 8):
        check_packing(odd, SHAPES[0], operand_bits)
    for operand in checks.operands(odd):
        checks.check_assembly(odd, operand)
        checks.check_registers(odd, operand)
    assert "llama3-8b/o/odd-g128" in specs.of("matmul_w4a16")
    weight = checks.weight_of(odd, *SHAPES[0])
    assert set(np.unique(checks.numpy_of(odd.runtime(weight)[0]))) == set(range(-15, 16, 2))
    with pytest.raises(errors.ConfigError, match="registered"):
        registry.register(Int4(levels="odd"))


def linear_of(odd, spec: ActivationSpec | None, group_size: int) -> QuantizedLinear:
    weight = checks.weight_of(odd, 128, 256, group_size)
    scheme = Scheme(weights=WeightSpec(bits=4, levels="odd"), activations=spec)
    return QuantizedLinear(
        codes=weight.codes, scales=weight.scales, scheme=scheme, group_size=group_size
    )


def inputs(rows: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(1).standard_normal((rows, 256)), jnp.float16)


def test_a_new_format_is_a_scheme(odd):
    linear, x = linear_of(odd, None, 64), inputs(5)
    dense = (2 * checks.numpy_of(linear.codes) + 1).astype(np.float64)
    dense *= np.repeat(checks.numpy_of(linear.scales), 64, axis=1)
    np.testing.assert_allclose(linear.dequantize(), dense, rtol=1e-6)
    wanted = checks.numpy_of(x).astype(np.float64) @ dense.T
    np.testing.assert_allclose(checks.numpy_of(linear(x)), wanted, rtol=1e-2, atol=1e-2)
    assert linear.scheme.name == "w4a16-odd"
    quantized = linear.with_activations(ActivationSpec(bits=8))(x)
    np.testing.assert_allclose(checks.numpy_of(quantized), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("arch", [(9, 0), (8, 0)])
@pytest.mark.parametrize(
    ("input_bits", "group_size"),
    [(16, 64), (8, 256), pytest.param(8, 64, marks=pytest.mark.slow)],
)
def test_a_new_format_runs_in_the_kernels(odd, arch, input_bits, group_size):
    spec = None if input_bits == 16 else ActivationSpec(bits=input_bits)
    linear, x = linear_of(odd, spec, group_size), inputs(3)
    given = {}
    if spec is not None:
        x, scale, _ = activations.quantize(x, spec)
        given = dict(x_scale=scale)
    out = mosaic.matmul(
        x,
        packed.pack(linear, input_bits),
        arch=arch,
        config=Config(tiles_per_step=1, num_stages=2, splits=1),
        interpret=plgpu.InterpretGPUParams(detect_races=True),
        **given,
    )
    assert not gpu_callbacks.get_races().races_found
    wanted = np.asarray(reference.matmul(x, linear, **given))
    if input_bits == 8 and group_size == 256:
        np.testing.assert_array_equal(out, wanted)
    tolerance = 4e-3 if input_bits == 16 else 1e-5
    np.testing.assert_allclose(np.asarray(out), wanted, rtol=tolerance, atol=tolerance)
