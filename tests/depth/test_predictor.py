"""The Predictor: regression, files, and the nodes it learns from."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from experiments import train_predictor
from experiments.shared import common
from specjax.checkpoints import export
from specjax.decoding.tree import Tree
from specjax.depth import predictor
from specjax.drafters import eagle as eagle_drafter
from specjax.errors import CheckpointError, ConfigError
from specjax.models.prepare import prepare
from specjax.training.depth import adapter as adapters
from specjax.training.depth import nodes, regression
from tests import tiny
from tests.depth.test_checkpoint import trained

pytestmark = pytest.mark.usefixtures("hurried")


def sample(count, seed=0, width=6):
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(count, width)) * [1, 5, 0.1, 2, 1, 1] + 3
    chance = 1 / (1 + np.exp(-(features @ [1.2, 0, 8, -0.5, 0, 0] - 29.0)))
    return features.astype(np.float32), draw.uniform(size=count) < chance


def test_regression_finds_the_least_loss():
    """Slope zero at the solution, whatever the scales; both classes weigh the same."""
    features, labels = sample(3000)
    assert 0.02 < labels.mean() < 0.4
    weight, bias = regression.fit(features, labels, ridge=0.0)
    probability = 1 / (1 + np.exp(-(features @ weight + bias)))
    share = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    np.testing.assert_allclose(share @ (probability - labels), 0, atol=1e-6)
    np.testing.assert_allclose(features.T @ (share * (probability - labels)), 0, atol=1e-5)
    np.testing.assert_allclose(share @ probability, 0.5, atol=1e-6)
    held_out = sample(2000, seed=1)
    truth = held_out[0] @ [1.2, 0, 8, -0.5, 0, 0]
    found = regression.auc(held_out[0] @ weight, held_out[1])
    assert abs(found - regression.auc(truth, held_out[1])) < 0.01


def test_regression_survives_classes_that_separate():
    features = np.concatenate([np.full((40, 2), -1.0), np.full((10, 2), 1.0)]).astype(np.float32)
    labels = np.arange(50) >= 40
    weight, bias = regression.fit(features, labels)
    assert np.isfinite(weight).all()
    assert ((features @ weight + bias > 0) == labels).all()
    with pytest.raises(ConfigError, match="0 accepted and 50 rejected"):
        regression.fit(features, np.zeros(50, bool))


def test_auc_by_counting_pairs():
    draw = np.random.default_rng(0)
    scores, labels = draw.integers(0, 6, 60).astype(float), draw.uniform(size=60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    np.testing.assert_allclose(regression.auc(scores, labels), np.mean(pairs))
    with pytest.raises(ConfigError, match="held out"):
        regression.auc(scores, np.ones(60, bool))


def test_files_round_trip_and_are_checked(tmp_path):
    made = predictor.Predictor(jnp.arange(4.0), jnp.float32(-2.5), layer=2)
    predictor.save(made, tmp_path / "p", {"auc": 0.9})
    again = predictor.load(tmp_path / "p", hidden_size=4, num_layers=5)
    assert again.layer == 2
    x = jax.random.normal(jax.random.key(0), (2, 3, 4)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(made(x), again(x))
    expected = 1 / (1 + np.exp(-(np.asarray(x, np.float64) @ np.arange(4) - 2.5)))
    np.testing.assert_allclose(again(x), expected, rtol=1e-5)
    assert again(x).dtype == jnp.float32
    with pytest.raises(CheckpointError, match="not empty"):
        predictor.save(made, tmp_path / "p", {})
    with pytest.raises(CheckpointError, match=r"weight .*shape \[4\].*\[8\]"):
        predictor.load(tmp_path / "p", hidden_size=8, num_layers=5)
    with pytest.raises(ConfigError, match=r"layer=2.*1 to 1"):
        predictor.load(tmp_path / "p", hidden_size=4, num_layers=2)
    with pytest.raises(FileNotFoundError, match="train_predictor"):
        predictor.load(tmp_path, hidden_size=4, num_layers=5)


def test_accepted_nodes_by_hand():
    """Root 0 with children 1 and 2; 3 below 1, 4 below 2, 5 below 3, 6 unused."""
    tree = Tree(
        tokens=jnp.asarray([[9, 4, 5, 6, 6, 7, 0]]),
        parents=jnp.asarray([[-1, 0, 0, 1, 2, 3, -1]]),
        max_depth=3,
    )
    choice = np.asarray([4, 6, 6, 1, 0, 0, 0])  # of the target, after each node
    logits = jnp.asarray(np.eye(10, dtype=np.float32)[choice][None])
    found = np.asarray(nodes.accepted(tree, logits))
    # 4's token is what the target wants after 2, but 2 itself is not accepted.
    np.testing.assert_array_equal(found, [[True, True, False, True, False, False, False]])


@pytest.mark.slow
def test_nodes_of_real_decoding():
    """Accepted nodes are the tokens that decoding adds, and features the input of the layer."""
    base, adapter = trained()
    target = prepare(adapters.routed(base, adapter))
    drafter = eagle_drafter.eagle(tiny.head(base.config), draft_depth=3, topk=2, num_nodes=6)
    prompts = [[1, 2, 3, 4], [5, 6, 7]]
    collector = nodes.Collector(target, drafter, 1, (), (3, 320, 12))
    found = list(collector.nodes(prompts))
    assert {row for row, _, _ in found} == {0, 1}
    plain = tiny.run(tiny.engine(target, drafter), tiny.requests(prompts, 12))
    for row, done in enumerate(plain):
        steps = [(features, kept) for index, features, kept in found if index == row]
        assert len(steps) == done.metrics.num_spec_steps
        assert all(len(kept) == 5 for _, kept in steps)
        accepted = sum(int(kept.sum()) for _, kept in steps)
        assert accepted == done.metrics.num_accepted_draft_tokens
        assert all(features.shape == (5, 32) for features, _ in steps)


@pytest.fixture(scope="module")
def routed_folder(tmp_path_factory):
    base, adapter = trained()
    path = tmp_path_factory.mktemp("routed") / "model"
    module = adapters.routed(base, adapter)
    export.export(module, module.config, path, format="dense", source="tiny")
    return path


def test_the_binary_trains_resumes_and_its_predictor_loads(routed_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"input_ids": [i % 16, (3 * i + 1) % 16, 2]} for i in range(9)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model={routed_folder}", "--drafter=ngram", "--draft_depth=4", "--ngram_min=1"]
    flags += [f"--prompts_file={prompts}", "--layer=2", f"--output={tmp_path / 'p'}"]
    flags += ["--max_new_tokens=24", "--batch_size=4", "--held_out=0.34"]

    def run(*more):
        train_predictor.main(common.parse(train_predictor.define_flags, [*flags, *more]))
        return json.loads((tmp_path / "p" / "predictor_config.json").read_text())

    first = run()
    assert first["layer"] == 2 and 0 <= first["auc"] <= 1
    assert 0 < first["accepted"] < first["nodes"]
    work = tmp_path / "p.work"
    assert len(list(work.glob("nodes-*.npz"))) == 3
    shutil.rmtree(tmp_path / "p")
    (work / "nodes-00001.npz").unlink()
    again = run()
    assert {**again, "environment": 0} == {**first, "environment": 0}
    voting = specjax.load(
        routed_folder, dtype="float32", tree_selection="vote", predictor=tmp_path / "p"
    )
    assert voting.module.depth.predictor.layer == 2
    with pytest.raises(ConfigError, match="--layer=2"):
        run("--layer=1")
    with pytest.raises(ConfigError, match="--tree_selection"):
        run("--tree_selection=vote")
    capsys.readouterr()
