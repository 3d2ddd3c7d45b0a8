"""Training end to end on tiny models: order of batches, resuming, exports that load, bad input."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specjax
from experiments import train_eagle
from experiments.shared import common, own_text
from specjax.checkpoints import heads
from specjax.errors import ConfigError
from specjax.training import batches, features, initial, loop, losses, text, vocabulary
from tests import paths, tiny

pytestmark = pytest.mark.usefixtures("hurried")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=40),
    st.integers(128, 4096),
    st.integers(0, 5),
)
def test_every_example_once_per_epoch(lengths, tokens_per_batch, seed):
    plan = batches.plan(lengths, tokens_per_batch)
    for width, rows in plan:
        assert all(width - 128 < lengths[row] <= width for row in rows)
        assert len(rows) == max(1, tokens_per_batch // width)
    order = batches.shuffled(plan, seed, 0)
    epoch = [next(order) for _ in plan]
    assert all(number == 0 for number, _ in epoch)
    assert sorted({row for _, (_, rows) in epoch for row in rows}) == list(range(len(lengths)))
    firsts = [row for _, (_, rows) in epoch for row in dict.fromkeys(rows)]
    assert len(firsts) == len(lengths)
    later = batches.shuffled(plan, seed, len(plan) // 2)
    assert next(later)[1] == ([*epoch, (1, plan[0])])[len(plan) // 2][1] or len(plan) == 1


def _examples(count=6, length=40):
    draw = np.random.default_rng(0)
    return [
        text.Example(tokens=draw.integers(0, 16, length).astype(np.int32), response=i)
        for i in range(count)
    ]


def _store(folder, target, examples, needs="final"):
    store = features.FeatureStore(folder, examples, target.config, needs, {"of": "a test"})
    store.compute(target, 256, lambda tokens: None)
    return store


def test_features_resume_and_equal_the_target(tmp_path):
    target, examples = tiny.model(), _examples()
    seen = []
    store = features.FeatureStore(tmp_path / "f", examples, target.config, "final", {"of": "x"})
    real, calls = features._run, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    features._run = stops
    try:
        with pytest.raises(KeyboardInterrupt):
            store.compute(target, 256, seen.append)
    finally:
        features._run = real
    store = features.FeatureStore(tmp_path / "f", examples, target.config, "final", {"of": "x"})
    assert store._state["finished_batches"] == 1
    store.compute(target, 256, seen.append)
    for index, example in enumerate(examples):
        _, final, greedy = store.rows(index)
        logits = tiny.full_logits(target, example.tokens.tolist())
        np.testing.assert_array_equal(greedy, logits.argmax(-1))
        close = np.asarray(target.logits(jnp.asarray(final, jnp.float32)))
        np.testing.assert_allclose(close, logits, atol=0.02 * np.abs(logits).max())


def test_a_head_starts_as_the_best_linear_map(tmp_path):
    """Its residuals are orthogonal to the inputs, up to the regularization; nothing else is added at first."""
    target, examples = tiny.model(), _examples(count=20)
    store = _store(tmp_path / "features", target, examples)
    head = initial.eagle_head(target, jax.random.key(0))
    initial.fit_linear(head, target, examples, store)
    table = np.asarray(target.model.embed_tokens.weight[...])
    rows = [(e.tokens, store.rows(i)[1].astype(np.float32)) for i, e in enumerate(examples)]
    inputs = np.concatenate([np.concatenate([table[t[1:]], f[:-1]], 1) for t, f in rows])
    wanted = np.concatenate([f[1:] for _, f in rows])
    weight = np.asarray(head.fc.weight[...]).T
    penalty = initial._RIDGE * np.mean(inputs**2) * len(inputs)
    gradient = inputs.T @ (inputs @ weight - wanted) + penalty * weight
    assert np.abs(gradient).max() < 1e-3 * np.abs(inputs.T @ wanted).max()
    assert np.mean((inputs @ weight - wanted) ** 2) < 0.9 * np.var(wanted)

    batch = jax.tree.map(jnp.asarray, batches.load(examples, store, 128, [0]))
    [found] = losses.drafted(head, target, batch, 1)
    mapped = head.fc(jnp.concatenate([table[rows[0][0][1:]], rows[0][1][:-1]], axis=1))
    np.testing.assert_allclose(found[0, : len(mapped)], mapped, atol=1e-5)


def _trainer(folder, target, total=8):
    head = initial.eagle_head(target, jax.random.key(0))
    weights = losses.Weights(steps=2, regression=1.0, cross_entropy=0.5, decay=0.8)
    settings = loop.Settings(
        total_steps=total,
        learning_rate=3e-3,
        warmup_steps=2,
        weight_decay=0.01,
        clip_norm=0.5,
        feature_noise=0.1,
        seed=1,
        save_every=4,
    )
    return loop.Trainer(head, losses.unrolled, weights, settings, folder)


def _run(trainer, target, examples, store, plan, steps_until_stop=None):
    vocab = vocabulary.of_target(target, np.arange(target.config.vocab_size))

    def report(step, epoch, measured):
        if step == steps_until_stop:
            raise KeyboardInterrupt

    trainer.run(target, vocab, examples, store, plan, report, lambda: None)


@pytest.mark.slow
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    target, examples = tiny.model(), _examples()
    store = _store(tmp_path / "features", target, examples)
    plan = batches.plan([len(e.tokens) for e in examples], 256)
    whole = _trainer(tmp_path / "whole", target)
    _run(whole, target, examples, store, plan)
    with pytest.raises(KeyboardInterrupt):
        _run(_trainer(tmp_path / "cut", target), target, examples, store, plan, 6)
    resumed = _trainer(tmp_path / "cut", target)
    assert resumed.step == 4
    _run(resumed, target, examples, store, plan)
    for one, other in zip(
        jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match="beyond total_steps"):
        _trainer(tmp_path / "cut", target, total=6)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Text that the fixture model wrote itself."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"Tell me of {i}."} for i in range(12)]
    model = specjax.load(paths.fixture("tiny8-fp16"), dtype="float32")
    answers = model.generate(rows, max_new_tokens=24, batch_size=6, ignore_eos=True)
    lines = [{"text": row["text"] + answer.text} for row, answer in zip(rows, answers, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _train(*arguments):
    train_eagle.main(common.parse(train_eagle.define_flags, arguments))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("eagle", ["--draft_vocab_size=200", "--dtype=bfloat16"]),
        pytest.param(*("eagle3", ["--draft_vocab_size=128", "--unroll=2"]), marks=pytest.mark.slow),
        pytest.param(
            *("eagle3", ["--draft_vocab_size=128", "--unroll=1", "--head_layout=speculators"]),
            marks=pytest.mark.slow,
        ),
        pytest.param("medusa", ["--num_heads=2"], marks=pytest.mark.slow),
    ],
)
def test_heads_learn_and_load_again(kind, options, written, tmp_path, capsys):
    name = str(paths.fixture("tiny8-fp16"))
    common_flags = [f"--model={name}", f"--text_file={written}", "--held_out=2", "--max_length=96"]
    common_flags += ["--loss_on=all", "--tokens_per_batch=512", "--learning_rate=3e-3"]
    output = tmp_path / "head"
    flags = [*common_flags, f"--output={output}", f"--kind={kind}", *options]
    _train(*flags, "--total_steps=12", "--save_every=4", "--warmup_steps=2")
    facts = json.loads((output / "training.json").read_text())
    curve = facts["curve"]
    assert [row["step"] for row in curve] == [4, 8, 12]
    before, after = (sum(row["train"]["cross_entropy"]) for row in (curve[0], curve[-1]))
    assert after < before
    target = specjax.load(name, dtype="float32")
    if kind == "medusa":
        loaded, _ = heads.load_medusa(output, target.module)
        assert len(loaded.heads) == 2
        spec = {"kind": "medusa", "model": str(output)}
    else:
        spec = {"kind": "eagle", "model": str(output), "num_nodes": 8, "topk": 3, "draft_depth": 3}
    plain = target.generate([{"text": "Tell me of 3."}], max_new_tokens=16)[0]
    drafted = target.generate([{"text": "Tell me of 3."}], max_new_tokens=16, drafter=spec)[0]
    assert drafted.output_ids == plain.output_ids
    with pytest.raises(ConfigError, match="--total_steps=12, not 31"):
        _train(*flags, "--total_steps=31")


@pytest.mark.slow
def test_answers_are_made_once(written, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "text": f"Why {i}?"} for i in range(5)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--model={paths.fixture('tiny8-fp16')}", f"--prompts_file={prompts}"]
    flags += [f"--output={tmp_path / 'head'}", "--held_out=1", "--max_new_tokens=12"]
    flags += [
        "--tokens_per_batch=128",
        "--total_steps=2",
        "--batch_size=2",
        "--draft_vocab_size=64",
    ]
    _train(*flags)
    answers = tmp_path / "head.work" / "answers.jsonl"
    first = answers.read_text()
    assert len(first.splitlines()) == 5
    _train(*flags)
    assert answers.read_text() == first


@pytest.mark.slow
def test_the_target_can_write_its_own_prompts(tmp_path):
    template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    folder = tmp_path / "model"
    shutil.copytree(paths.fixture("tiny8-fp16"), folder)
    (folder / "chat_template.jinja").write_text(template)
    flags = [f"--model={folder}", "--self_prompts=4", f"--output={tmp_path / 'head'}"]
    values = common.parse(train_eagle.define_flags, [*flags, "--batch_size=2"])
    model = specjax.load(folder, dtype="float32")
    (tmp_path / "work").mkdir()
    chosen = own_text.prompts(values, model, tmp_path / "work")
    made = [
        json.loads(line) for line in (tmp_path / "work" / "prompts.jsonl").read_text().splitlines()
    ]
    assert sorted(row["id"] for row in made) == [0, 1, 2, 3]
    assert len({row["prompt"] for row in made}) > 1  # every id has its own random stream
    kept = [json.loads(line) for line in chosen.read_text().splitlines()]
    assert len(kept) == len({row["prompt"] for row in made if row["finished"] and row["prompt"]})


def test_bad_input_is_named_before_anything_is_loaded(written, tmp_path):
    name = f"--model={paths.fixture('tiny8-fp16')}"
    with pytest.raises(ConfigError, match="--self_prompts"):
        _train(name, f"--output={tmp_path / 'a'}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        _train(name, f"--output={tmp_path / 'a'}", "--text_file=nowhere.jsonl")
    flags = [f"--output={tmp_path / 'b'}", f"--text_file={written}", "--loss_on=all"]
    with pytest.raises(ConfigError, match="held_out=40"):
        _train(name, *flags, "--held_out=40")
    with pytest.raises(ConfigError, match="no document"):
        _train(name, f"--output={tmp_path / 'c'}", f"--text_file={written}", "--held_out=2")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    with pytest.raises(ConfigError, match="exists"):
        _train(name, f"--output={full}", f"--text_file={written}")
