"""GPTQ: less output error than rounding to nearest, on every scheme, with all of its options."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.errors import ConfigError, SpecjaxError
from specjax.quant import scheme
from specjax.quantize import gptq, grid, rtn

N, K = 48, 256


@pytest.fixture(scope="module")
def problem():
    """A weight and correlated inputs with some strong features."""
    generator = np.random.default_rng(0)
    mix = np.eye(K) + 0.3 * generator.standard_normal((K, K))
    x = generator.standard_normal((2048, K)) @ mix
    x[:, ::41] *= 6
    weight = 0.02 * generator.standard_normal((N, K))
    return jnp.asarray(weight, jnp.float32), x.astype(np.float32)


def hessian(x):
    return 2 / len(x) * (x.astype(np.float64).T @ x.astype(np.float64))


def output_error(linear, weight, x):
    off = x @ np.asarray(linear.dequantize() - weight).T
    return float(np.sqrt(np.mean(off**2) / np.mean((x @ np.asarray(weight).T) ** 2)))


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        ("w8a8", -1),
        ("w4a16", 64),
        ("w4a16", -1),
        ("w4a16-asym", 32),
        ("w4a8-qqq", -1),
        ("w4a8-qqq", 128),
        ("w4a8-qoq", -1),
        ("w4a8-qoq", 128),
        ("w4a4", 64),
        ("fp8", -1),
        ("fp4", 32),
    ],
)
def test_beats_rounding_to_nearest(problem, name, group_size):
    weight, x = problem
    spec = scheme.lookup(name)
    plain = output_error(rtn.quantize(weight, spec, group_size), weight, x)
    factor = gptq.factorize(hessian(x), act_order=name.startswith("w4"))
    found = gptq.quantize(weight, factor, spec, group_size)
    assert output_error(found, weight, x) < 0.85 * plain
    assert found.perm is None


def test_clip_search_and_act_order_help_per_channel(problem):
    weight, x = problem
    spec = scheme.lookup("w4a16")

    def error(act_order, clip):
        factor = gptq.factorize(hessian(x), act_order=act_order)
        return output_error(gptq.quantize(weight, factor, spec, -1, clip=clip), weight, x)

    assert error(True, grid.ClipSearch()) < error(True, None) < error(False, None)


def test_without_correlation_it_is_rounding_to_nearest(problem):
    weight, _ = problem
    factor = gptq.factorize(np.eye(K))
    found = gptq.quantize(weight, factor, scheme.lookup("w4a16"), 64)
    plain = rtn.quantize(weight, scheme.lookup("w4a16"), 64)
    np.testing.assert_array_equal(found.codes, plain.codes)


def test_factor_is_the_upper_factor_of_the_inverse(problem):
    _, x = problem
    matrix = hessian(x)
    factor = gptq.factorize(matrix, damping=0.01, act_order=True)
    damped = matrix + 0.01 * np.mean(np.diag(matrix)) * np.eye(K)
    upper = factor.upper.astype(np.float64)
    assert np.all(np.tril(upper, -1) == 0)
    product = upper.T @ upper @ damped[np.ix_(factor.order, factor.order)]
    np.testing.assert_allclose(product, np.eye(K), atol=1e-4)
    assert np.all(np.diff(np.diag(matrix)[factor.order]) <= 0)


def test_matches_a_plain_column_loop(problem):
    """The published algorithm in float64, one feature after the other over the whole rest."""
    weight, x = problem
    factor = gptq.factorize(hessian(x))
    found = gptq.quantize(weight, factor, scheme.lookup("w4a16"), -1)
    scales = np.asarray(found.scales, np.float64)[:, 0]
    rest, upper = np.asarray(weight, np.float64), factor.upper.astype(np.float64)
    codes = np.zeros((N, K))
    for k in range(K):
        codes[:, k] = np.clip(np.round(rest[:, k] / scales), -8, 7)
        error = (rest[:, k] - codes[:, k] * scales) / upper[k, k]
        rest[:, k:] -= np.outer(error, upper[k, k:])
    agreement = np.mean(codes == np.asarray(found.codes.astype(jnp.int32)))
    assert agreement > 0.999  # float32 may flip a tie


def test_dead_features_get_zero_weights(problem):
    weight, x = problem
    x = x.copy()
    x[:, 5] = 0
    found = gptq.quantize(weight, gptq.factorize(hessian(x)), scheme.lookup("w4a16"), 64)
    assert np.all(np.asarray(found.dequantize())[:, 5] == 0)


def test_deterministic(problem):
    weight, x = problem
    factor = gptq.factorize(hessian(x), act_order=True)
    first, second = (
        gptq.quantize(weight, factor, scheme.lookup("w4a16"), 64, clip=grid.ClipSearch())
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.codes, second.codes)


def test_refusals(problem):
    weight, x = problem
    with pytest.raises(SpecjaxError, match=r"up_proj: the Hessian .* is not finite"):
        gptq.factorize(np.full((4, 4), np.nan), name="up_proj")
    with pytest.raises(SpecjaxError, match=r"not positive definite with damping=0\.01"):
        gptq.factorize(np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ConfigError, match="group_size=100 does not divide in_features=256"):
        gptq.quantize(weight, gptq.factorize(hessian(x)), scheme.lookup("w4a16"), 100)
