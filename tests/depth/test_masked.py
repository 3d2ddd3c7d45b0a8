"""The training form of routed layers: hard masks, gradients, updates that merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specjax.config.depth import DepthConfig
from specjax.depth import router as routing
from specjax.errors import ConfigError
from specjax.models import llama
from specjax.models.prepare import prepare
from specjax.training.depth import adapter as adapters
from specjax.training.depth import masked
from tests import tiny

LAYERS, LENGTH = 4, 11
pytestmark = pytest.mark.usefixtures("hurried")

forward = jax.jit(masked.forward, static_argnames=("eviction",))


def model():
    return tiny.model(tiny.config(num_layers=LAYERS))


def mild():
    """The model with flat attention: its random one puts all weight on single tokens, evicted ones among them."""
    target = model()
    for layer in target.model.layers:
        for name in ("q_proj", "k_proj"):
            linear = getattr(layer.self_attn, name)
            linear.weight[...] = 0.3 * linear.weight[...]
    return target


def trained(code_bits=None, seed=0, start_layer=2, reserved_tokens=2):
    """An adapter whose updates are not zero and whose routers execute about half of the time."""
    config = DepthConfig(
        start_layer=start_layer,
        reserved_tokens=reserved_tokens,
        router_width=24,
        code_bits=code_bits,
    )
    adapter = adapters.init(jax.random.key(seed), model().config, config, rank=3)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    for layer in adapter.layers:
        for name in adapters.PROJECTIONS:
            lora = getattr(layer, name)
            lora.b[...] = 0.2 * jax.random.normal(next(keys), lora.b.shape)
    for router in adapter.routers:
        router.up_proj.weight[...] = jax.random.normal(next(keys), router.up_proj.weight.shape)
        router.down_proj.weight[...] = jax.random.normal(next(keys), router.down_proj.weight.shape)
        router.down_proj.bias[...] = jnp.zeros(2)
    return adapter


def tokens(seed=5):
    return jax.random.randint(jax.random.key(seed), (2, LENGTH), 0, 16)


def test_without_adapter_it_is_the_model():
    target = model()
    out = forward(target, None, tokens())
    np.testing.assert_allclose(
        target.logits(out.hidden), llama.full_logits(target, tokens()), rtol=0, atol=2e-5
    )
    np.testing.assert_array_equal(out.executed, 1)


@pytest.mark.parametrize("code_bits", [None, 4, 8])
def test_both_forms_of_eviction_agree(code_bits):
    target, adapter = mild(), trained(code_bits)
    kept, dropped = (
        forward(target, adapter, tokens(), eviction=form) for form in ("mask", "renormalise")
    )
    np.testing.assert_array_equal(kept.executed, dropped.executed)
    routed = np.asarray(kept.executed)[:, 2:, 2:]
    assert 0.1 < routed.mean() < 0.9
    np.testing.assert_array_equal(np.asarray(kept.executed)[:, :, :2], 1)
    np.testing.assert_array_equal(np.asarray(kept.executed)[:, :2], 1)
    np.testing.assert_allclose(kept.hidden, dropped.hidden, rtol=0, atol=1e-5)
    # Eviction matters: with all keys the result is another one.
    everything = forward(target, trained(code_bits, start_layer=LAYERS - 1), tokens())
    assert np.abs(np.asarray(everything.hidden - kept.hidden)).max() > 1e-2


def test_forms_of_eviction_differ_by_the_constant_in_the_denominator():
    """Where little weight is left on keys that are seen, the 1e-6 counts: by 1e-6 / (what is left), no more."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (3 * jax.random.normal(key, (1, 40, 2, 8)) for key in keys[:3])
    weight = jax.random.bernoulli(keys[3], 0.4, (1, 40)).astype(jnp.float32).at[:, :2].set(1)
    kept, dropped = (masked._attend(q, k, v, weight, form) for form in ("mask", "renormalise"))
    scores = jnp.einsum("bthc,bshc->bhts", q, k) / jnp.sqrt(8.0)
    causal = jnp.where(jnp.tril(jnp.ones((40, 40), bool)), scores, -jnp.inf)
    left = jnp.sum(jax.nn.softmax(causal) * weight[:, None, None], axis=-1)
    expected = kept[:, :, :, 0] * (left / (left + 1e-6)).transpose(0, 2, 1)[..., None]
    executes = np.asarray(weight[0], bool)
    found = dropped[:, :, :, 0]
    np.testing.assert_allclose(found[:, executes], expected[:, executes], rtol=1e-4, atol=1e-5)
    assert float(left.min()) < 1e-3


def test_a_skipped_token_shows_no_key():
    """What a token is makes no difference to later ones in a layer that it skips: only its own residual changes."""
    target, adapter = model(), trained(start_layer=1)
    for router in adapter.routers:
        router.down_proj.weight[...] = jnp.zeros_like(router.down_proj.weight[...])
        router.down_proj.bias[...] = jnp.array([1.0, 0.0])
    first = forward(target, adapter, tokens())
    np.testing.assert_array_equal(np.asarray(first.executed)[:, 2:, 1:], 0)
    # All later layers are the identity for tokens that are not reserved, whatever their parameters are.
    shallow = llama.Llama(
        target.config,
        llama.LlamaModel(
            target.model.embed_tokens, list(target.model.layers)[:1], target.model.norm
        ),
    )
    one = forward(adapters.merge(shallow, [adapter.layers[0]]), None, tokens())
    np.testing.assert_allclose(first.hidden[:, 2:], one.hidden[:, 2:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("code_bits", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_gradients_reach_routers_and_updates(code_bits):
    target, adapter = model(), trained(code_bits)
    graph, parameters, rest = nnx.split(adapter, nnx.Param, ...)

    def loss(parameters):
        joined = nnx.merge(graph, parameters, rest)
        noise = masked.Noise(key=jax.random.key(7), dropout=0.05)
        out = forward(target, joined, tokens(), noise=noise, eviction="renormalise")
        assert out.executed.shape == (2, LENGTH, LAYERS)
        return jnp.sum(jnp.sin(target.logits(out.hidden))), out.executed

    gradients, executed = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    assert set(np.unique(executed)) == {0.0, 1.0}
    found = nnx.merge(graph, gradients, rest)
    for router in found.routers:
        assert float(jnp.abs(router.down_proj.weight[...]).max()) > 0
        assert float(jnp.abs(router.up_proj.weight[...]).max()) > 0
    for layer in found.layers:
        for name in adapters.PROJECTIONS:
            assert float(jnp.abs(getattr(layer, name).a[...]).max()) > 0


def test_straight_through_draws_with_the_routers_probabilities():
    logits = jnp.broadcast_to(jnp.array([0.3, 1.1]), (20_000, 2))
    draws = masked.straight_through(jax.random.key(0), logits)
    assert set(np.unique(draws)) == {0.0, 1.0}
    expected = float(jax.nn.softmax(logits[0])[routing.EXECUTE])
    assert abs(float(draws.mean()) - expected) < 0.015
    slope = jax.grad(lambda x: jnp.sum(masked.straight_through(jax.random.key(0), x)))(logits)
    assert float(slope[:, routing.EXECUTE].min()) > 0
    np.testing.assert_allclose(slope.sum(-1), 0, atol=1e-6)


def test_noise_makes_training_differ_and_is_absent_at_inference():
    target, adapter = model(), trained()
    one, other = (
        forward(target, adapter, tokens(), noise=masked.Noise(key=jax.random.key(i), dropout=0.5))
        for i in (0, 1)
    )
    assert np.any(np.asarray(one.executed) != np.asarray(other.executed))
    again = [forward(target, adapter, tokens()).hidden for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_merged_updates_compute_the_same():
    target, adapter = model(), trained(code_bits=4)
    before = forward(target, adapter, tokens())
    merged = adapters.merge(target, adapter.layers)
    for layer in adapter.layers:
        for name in adapters.PROJECTIONS:
            getattr(layer, name).b[...] = jnp.zeros_like(getattr(layer, name).b[...])
    after = forward(merged, adapter, tokens())
    np.testing.assert_array_equal(before.executed, after.executed)
    np.testing.assert_allclose(
        target.logits(before.hidden), merged.logits(after.hidden), rtol=0, atol=1e-4
    )


def test_a_new_adapter_changes_nothing():
    """B is zero and the routers lean towards executing: their bias decides before they are trained."""
    target = model()
    config = DepthConfig(router_width=16)
    adapter = adapters.init(jax.random.key(0), target.config, config, rank=8)
    spread = float(jnp.std(adapter.layers[0].q_proj.a[...]))
    assert 0.09 < spread < 0.16  # 1 / 8
    plain, new = forward(target, None, tokens()), forward(target, adapter, tokens())
    assert float(new.executed.mean()) > 0.9
    for router in adapter.routers:
        router.down_proj.weight[...] = jnp.zeros_like(router.down_proj.weight[...])
    new = forward(target, adapter, tokens())
    np.testing.assert_array_equal(new.executed, 1)
    np.testing.assert_array_equal(new.hidden, plain.hidden)


def test_bases_that_cannot_be_trained_are_named():
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj is fused"):
        adapters.check_base(prepare(model()))
    with pytest.raises(ConfigError, match="dynamic_start_layer=4"):
        adapters.init(jax.random.key(0), model().config, DepthConfig(start_layer=4), rank=2)
