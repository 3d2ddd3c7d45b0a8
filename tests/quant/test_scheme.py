"""Schemes are values: names and values correspond one to one, and impossible ones are refused by
name.
"""

import jax.numpy as jnp
import pytest

from specjax import errors
from specjax.quant.scheme import (
    SCHEMES,
    ActivationSpec,
    Scheme,
    WeightSpec,
    check_group_size,
    lookup,
)

# (weights in memory, largest activation code)
TABLE = {
    "w8a16": (jnp.int8, None),
    "w4a16": (jnp.int4, None),
    "w4a16-asym": (jnp.uint4, None),
    "w8a8": (jnp.int8, 127),
    "w4a8": (jnp.int4, 127),
    "w4a8-qqq": (jnp.int4, 127),
    "w4a8-qoq": (jnp.uint4, 127),
    "w4a4": (jnp.int4, 7),
    "fp8": (jnp.float8_e4m3fn, 448),
    "fp8-a16": (jnp.float8_e4m3fn, None),
    "fp4": (jnp.float4_e2m1fn, None),
    "fp4-a8": (jnp.float4_e2m1fn, 448),
    "fp4-a4": (jnp.float4_e2m1fn, 6),
}


def test_the_registry_is_the_table():
    assert set(SCHEMES) == set(TABLE)
    for name, (dtype, levels) in TABLE.items():
        scheme = SCHEMES[name]
        assert (scheme.name, str(scheme)) == (name, name)
        assert scheme.weights.code_dtype == dtype
        assert (scheme.activations and scheme.activations.levels) == levels


def test_names_and_values_correspond_one_to_one():
    extra = ["w8a4", "w8a16-asym", "w4a4-qqq", "w4a16-qoq", "w8a8-s16", "w4a8-qoq-s16", "w4a4-asym"]
    extra += ["w8a8-full", "w4a4-full-s16"]
    found = [lookup(name) for name in [*SCHEMES, *extra]]
    assert len(set(found)) == len(found)
    for scheme in found:
        rebuilt = Scheme(weights=scheme.weights, activations=scheme.activations)
        assert lookup(scheme.name) == rebuilt
        assert hash(lookup(scheme.name)) == hash(rebuilt)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(errors.ConfigError, match=r"scheme='w3a16' is unknown.*w4a8-qoq.*fp4-a4"):
        lookup("w3a16")


def test_code_ranges():
    assert SCHEMES["w4a16"].weights.code_range == (-8, 7)
    assert SCHEMES["w4a16-asym"].weights.code_range == (0, 15)
    assert SCHEMES["w8a8"].weights.code_range == (-128, 127)
    assert SCHEMES["fp8"].weights.code_range == (-448, 448)
    assert SCHEMES["fp4"].weights.code_range == (-6, 6)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (dict(bits=3), "bits=3"),
        (dict(bits=8, kind="float", symmetric=False), "symmetric=False"),
        (dict(bits=8, levels="qqq"), "levels='qqq'"),
        (dict(bits=4, levels="qoq"), "levels='qoq'"),
        (dict(bits=4, symmetric=False, levels="qqq"), "levels='qqq'"),
    ],
)
def test_impossible_weights_are_refused(arguments, field):
    with pytest.raises(errors.ConfigError, match=field):
        WeightSpec(**arguments)


def test_impossible_activations_are_refused():
    with pytest.raises(errors.ConfigError, match="bits=16"):
        ActivationSpec(bits=16)
    with pytest.raises(errors.ConfigError, match="full_range=True is for integer"):
        ActivationSpec(bits=8, kind="float", full_range=True)
    for weights, activations in [
        (WeightSpec(bits=8, symmetric=False), ActivationSpec(bits=8)),
        (WeightSpec(bits=4), ActivationSpec(bits=8, kind="float")),
        (WeightSpec(bits=8, kind="float"), ActivationSpec(bits=4, kind="float")),
    ]:
        with pytest.raises(errors.ConfigError, match="cannot be multiplied by activations"):
            Scheme(weights=weights, activations=activations)


def test_group_sizes_that_do_not_divide_are_refused_with_those_that_do():
    message = (
        r"q_proj: group_size=128 does not divide in_features=576; "
        r"group sizes that do: 32, 64, -1 \(per channel\)"
    )
    with pytest.raises(errors.ConfigError, match=message):
        check_group_size(576, 128, "q_proj")
    with pytest.raises(errors.ConfigError, match="group_size=0"):
        check_group_size(576, 0)
    assert check_group_size(576, -1) == 576
    assert check_group_size(1536, 128) == 128
