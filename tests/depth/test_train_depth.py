"""Training of routed depth: the loss, resuming bit for bit, the binary end to end."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from experiments import train_depth
from experiments.shared import common
from specjax.config.depth import DepthConfig
from specjax.errors import ConfigError
from specjax.scoring import logits
from specjax.training import batches, loop, text
from specjax.training.depth import adapter as adapters
from specjax.training.depth import masked, training
from tests import paths, tiny

pytestmark = pytest.mark.usefixtures("hurried")

CONFIG = DepthConfig(start_layer=1, reserved_tokens=2, router_width=16, code_bits=4)
WEIGHTS = training.Weights(rate=5.0, dropout=0.1)


def examples(count=6, length=40):
    draw = np.random.default_rng(0)
    return [
        text.Example(tokens=draw.integers(0, 16, length - i).astype(np.int32), response=i)
        for i in range(count)
    ]


def settings(total=8):
    return loop.Settings(
        total_steps=total,
        learning_rate=3e-3,
        warmup_steps=2,
        weight_decay=0.02,
        clip_norm=1.0,
        feature_noise=0.0,
        seed=1,
        save_every=4,
        final_rate=0.0,
    )


def trainer(folder, target, total=8):
    adapter = adapters.init(jax.random.key(0), target.config, CONFIG, rank=2)
    return training.Trainer(adapter, WEIGHTS, settings(total), folder)


def run(made, target, stop_at=None):
    rows = examples()
    plan = batches.plan([len(e.tokens) for e in rows], 256)

    def report(step, epoch, measured):
        if step == stop_at:
            raise KeyboardInterrupt

    made.run(target, None, rows, None, plan, report, lambda: None)


@pytest.mark.slow  # the loop is that of heads, whose interruption is tested fast
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    target = tiny.model(tiny.config(num_layers=2))
    whole = trainer(tmp_path / "whole", target)
    before = jax.tree.map(np.asarray, whole.state[0])
    run(whole, target)
    with pytest.raises(KeyboardInterrupt):
        run(trainer(tmp_path / "cut", target), target, 6)
    resumed = trainer(tmp_path / "cut", target)
    assert resumed.step == 4
    run(resumed, target)
    pairs = zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    changed = jax.tree.map(lambda x, y: bool(np.any(x != np.asarray(y))), before, whole.state[0])
    assert all(
        jax.tree.leaves(changed)
    )  # every parameter of routers and updates, and nothing else is there
    size = sum(leaf.size for leaf in jax.tree.leaves(whole.state[0]))
    assert size == (32 * 16 + 16 + 16 + 2 * 16 + 2) + 2 * 2 * (3 * 32 + 32 + 2 * 16)


def test_loss_by_hand():
    """Cross-entropy over counted rows; distance from the target rate over tokens that are present and not reserved."""
    target = tiny.model(tiny.config(num_layers=4))
    adapter = adapters.init(jax.random.key(0), target.config, CONFIG, rank=2)
    for index, router in enumerate(adapter.routers):  # layers 1 and 2 run, layer 3 does not
        router.down_proj.weight[...] = jnp.zeros_like(router.down_proj.weight[...])
        router.down_proj.bias[...] = jnp.array([1.0, 0.0]) if index == 2 else jnp.array([0.0, 1.0])
    rows = examples(2, 12)
    batch = training.load(rows, 128, [0, 1, 0])
    np.testing.assert_array_equal(batch.present.sum(1), [12, 11, 0])
    value, measured = jax.jit(training.loss)(adapter, target, batch, jnp.float32(5), None)
    assert float(measured["routed"]) == 10 + 9
    np.testing.assert_allclose(measured["executed"], 0.75 * 19)
    np.testing.assert_allclose(measured["distance"], 0.25 * 19, rtol=1e-6)
    out = jax.jit(masked.forward)(target, adapter, jnp.asarray(batch.tokens))
    logprob = np.asarray(jax.nn.log_softmax(target.logits(out.hidden)), np.float64)
    # The second example's first row predicts its response, which starts at its second token.
    total = sum(
        -logprob[row, t, rows[row].tokens[t + 1]] for row in (0, 1) for t in range(11 - row)
    )
    np.testing.assert_allclose(measured["cross_entropy"], total, rtol=1e-5)
    np.testing.assert_allclose(value, total / 21 + 5 * 0.25, rtol=1e-5)
    shown = training.summary(measured)
    assert shown["executed"] == 0.75 and shown["distance"] == 0.25
    dense = training.dense(target, batch)
    whole = np.asarray(jax.nn.log_softmax(tiny.full_logits(target, rows[0].tokens.tolist())))
    assert float(dense["counted"]) == 21
    part = -sum(whole[t, rows[0].tokens[t + 1]] for t in range(11))
    assert part < float(dense["cross_entropy"])


def test_the_rate_weight_rises_along_a_sine(tmp_path):
    target = tiny.model(tiny.config(num_layers=2))
    made = trainer(tmp_path / "t", target)
    adapter, batch = made.head(), training.load(examples(2, 12), 128, [0, 1])
    key = jax.random.key(0)
    objective = jax.jit(made.objective)

    def weight(step):
        value, measured = objective(adapter, target, None, batch, key, jnp.int32(step))
        crossed = measured["cross_entropy"] / measured["counted"]
        return float((value - crossed) * measured["routed"] / measured["distance"])

    found = [weight(step) for step in (0, 2, 4, 8)]
    expected = [5 * np.sin(np.pi / 2 * step / 8) for step in (0, 2, 4, 8)]
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [
        {"text": f"Compose an engaging story about number {i}, its friends and more."}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train(*arguments):
    train_depth.main(common.parse(train_depth.define_flags, arguments))


def test_training_reaches_its_rate_and_the_result_loads(document, tmp_path, capsys):
    """One of two layers shall be skipped; what is loaded is what was measured."""
    output = tmp_path / "routed"
    flags = [f"--model={paths.fixture('tiny-fp16')}", f"--text_file={document}", "--loss_on=all"]
    flags += [f"--output={output}", "--held_out=2", "--tokens_per_batch=256", "--max_length=40"]
    flags += ["--start_layer=1"]
    flags += ["--learning_rate=0.01", "--warmup_steps=2", "--router_width=64", "--rate_weight=20"]
    flags += ["--save_every=5", "--export_dtype=float32"]
    train(*flags, "--total_steps=10")
    facts = json.loads((output / "training.json").read_text())
    first, last = facts["curve"]
    assert (first["step"], last["step"]) == (5, 10)
    assert abs(last["held_out"]["executed"] - 0.5) < 0.05
    assert first["held_out"]["perplexity"] > last["held_out"]["perplexity"]
    assert facts["recipe"]["target_rate"] == 0.5 and facts["dense"]["perplexity"] > 1
    model = specjax.load(output, dtype="float32")
    assert model.config.depth == dataclasses.replace(
        DepthConfig(code_bits=4), start_layer=1, router_width=64
    )
    rows = text.read(document, model.tokenizer, 40)
    _, held_out = text.split(rows, 2, 0)
    total = counted = 0
    for example in held_out:
        scored = jax.nn.log_softmax(logits(model, example.tokens[None]))[0]
        total -= sum(float(scored[t, x]) for t, x in enumerate(example.tokens[1:]))
        counted += len(example.tokens) - 1
    np.testing.assert_allclose(np.exp(total / counted), last["held_out"]["perplexity"], rtol=2e-3)
    with pytest.raises(ConfigError, match="--total_steps=10, not 11"):
        train(*flags, "--total_steps=11")
    with pytest.raises(ConfigError, match="has routers already"):
        train(f"--model={output}", f"--text_file={document}", f"--output={tmp_path / 'again'}")
    capsys.readouterr()


def test_bad_input_is_named_before_training(document, tmp_path):
    name, output = f"--model={paths.fixture('tiny8-fp16')}", f"--output={tmp_path / 'x'}"
    with pytest.raises(ConfigError, match="--text_file or --prompts_file"):
        train(name, output)
    with pytest.raises(ConfigError, match="dynamic_active_target"):
        train(name, output, f"--text_file={document}", "--target_rate=1.5")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(name, output, "--text_file=nowhere.txt")
    quantized = f"--model={paths.fixture('tiny-gptq-g128')}"
    with pytest.raises(ConfigError, match="trained on a dense model"):
        train(quantized, f"--output={tmp_path / 'y'}", f"--text_file={document}", "--loss_on=all")
