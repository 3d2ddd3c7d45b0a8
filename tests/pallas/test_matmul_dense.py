"""Dense products in the layouts that CPUs like: every number of rows, every dtype, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.pallas import matmul_dense


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 260])
def test_products(rows, dtype):
    keys = jax.random.split(jax.random.key(rows))
    x = jax.random.normal(keys[0], (rows, 96)).astype(dtype)
    weight = jax.random.normal(keys[1], (40, 96)).astype(dtype)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    exact = jax.jit(matmul_dense.matmul, static_argnums=2)(x, weight, jnp.float32)
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=1e-4)
    rounded = jax.jit(matmul_dense.matmul)(x, weight)
    assert rounded.dtype == dtype
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(rounded, np.float64), wanted, rtol=ulp, atol=1e-4 + ulp * 0.1
    )


def test_leading_axes():
    x = jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 1, 12)
    weight = jnp.eye(12, dtype=jnp.bfloat16)[:5]
    assert matmul_dense.matmul(x, weight).tolist() == x[..., :5].tolist()
