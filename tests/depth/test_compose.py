"""Routed depth with every drafter, with quantized weights, with files and flags."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from experiments import bench_decode, generate
from experiments.shared import common, flags_model
from specjax import verify
from specjax.checkpoints import export
from specjax.decoding import sampling as sample
from specjax.depth import predictor as predictors
from specjax.drafters.self_draft import SelfDraft
from specjax.engine import decode as decoding
from specjax.engine.engine import Programs
from specjax.errors import CheckpointError, ConfigError
from specjax.models.prepare import prepare
from specjax.quant import rotation
from specjax.quantize import quantize, recipe, rotate
from tests import ties, tiny
from tests.depth import models

PROMPTS = [np.random.default_rng(n).integers(0, 16, n).tolist() for n in (9, 5, 12, 3, 1)]
LIMITS = (12, 7, 12, 9, 12)
BIAS = -2.0
COMPARISONS = ties.Comparisons()


@pytest.fixture(autouse=True)
def hurry():
    with tiny.hurried_compiler():
        yield


@functools.cache
def target(scheme: str):
    # So few tokens run through a layer that whole trees sometimes skip it.
    canonical = models.with_depth(tiny.model(models.CONFIG), bias=BIAS)
    if scheme == "dense":
        return prepare(canonical)
    rounded = quantize.quantize(canonical, recipe.make(scheme, "rtn", group_size=16))
    return prepare(rounded, dequantize="never")


@functools.cache
def expected(scheme: str) -> list[list[int]]:
    """Greedy continuations by whole passes, in which every layer runs for all tokens."""
    texts = tiny.greedy(target(scheme), PROMPTS, max(LIMITS))
    return [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]


@functools.cache
def parts() -> tiny.Parts:
    return tiny.Parts(target("dense"))


PRODUCT = [
    (name, scheme, batch)
    for scheme in ("dense", "w4a16")
    for name in tiny.DRAFTERS
    for batch in (1, 3)
]
# Five requests in three slots: two of these are refilled.
FAST = {(name, "dense", 3) for name in ("none", "eagle", "medusa")} | {("self", "w4a16", 3)}


@pytest.mark.parametrize(
    ("name", "scheme", "batch"),
    [
        pytest.param(
            *case, marks=() if case in FAST else pytest.mark.slow, id="-".join(map(str, case))
        )
        for case in PRODUCT
    ],
)
def test_output_is_that_of_routed_autoregressive_decoding(name, scheme, batch):
    drafter = tiny.DRAFTERS[name](parts())
    if (name, scheme) == ("self", "w4a16"):
        drafter = SelfDraft(draft_depth=3, scheme="w4a8")
    done = tiny.run(tiny.engine(target(scheme), drafter), tiny.requests(PROMPTS, LIMITS), batch)
    for prompt, limit, completion, wanted in zip(
        PROMPTS, LIMITS, done, expected(scheme), strict=True
    ):
        found = completion.output_ids
        COMPARISONS.compare(target(scheme), prompt, found, wanted[:limit])
        assert completion.metrics.lossless
        runs, steps = completion.metrics.layer_runs, completion.metrics.num_spec_steps
        assert runs[0] == steps and max(runs) <= steps
    shares = [completion.metrics.executed_fraction for completion in done]
    print(f"{name}, {scheme}, batch {batch}: layers run {np.round(shares, 2).tolist()}")
    assert np.mean(shares) < (0.8 if (name, batch) == ("none", 1) else 1)
    assert min(shares) > 0.25, "nothing but the first layer runs"


def test_ties_are_rare():
    COMPARISONS.check_rare()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights with and without routers, and a predictor."""
    root = tmp_path_factory.mktemp("routed")
    plain = tiny.model(models.CONFIG)
    routed = models.with_depth(plain, bias=BIAS)
    for name, model in {"plain": plain, "routed": routed}.items():
        export.export(model, model.config, root / name, format="dense")
    predictors.save(models.predictor(), root / "predictor", {})
    return root


def decode_text(module) -> str:
    """The compiled decoding loop with an n-gram drafter."""
    drafter = tiny.DRAFTERS["ngram"](tiny.Parts(module))
    compiled = Programs().decode.compiled(
        target=module,
        drafter=drafter,
        state=decoding.init_state(module, drafter, 1, 48, 8),
        stop_ids=jnp.asarray([-1], jnp.int32),
        max_steps=jnp.int32(1),
        sampling=sample.sampling(),
        acceptor=verify.Greedy(),
    )
    return compiled.as_text()


def test_full_depth_is_the_program_of_a_model_without_routers(folders):
    plain, full = specjax.load(folders / "plain"), specjax.load(folders / "routed", depth="full")
    routed = specjax.load(folders / "routed")
    assert full.config == plain.config and full.module.depth is None
    assert len(jax.tree.leaves(full.module)) == len(jax.tree.leaves(plain.module))
    texts = [decode_text(model.module) for model in (plain, full, routed)]
    counts = [sum(" = " in line for line in text.splitlines()) for text in texts]
    conditionals = [text.count(" conditional(") for text in texts]
    print(f"instructions {counts}, conditionals {conditionals}")
    assert counts[0] == counts[1] < counts[2]
    # One is the drafter's own; with routers each of its branches has one per routed layer more.
    assert conditionals == [1, 1, 1 + 2 * 3]


def test_loading_routed_models(folders):
    model = specjax.load(folders / "routed", depth="routed")
    assert model.config.depth == models.DEPTH and model.module.depth.lossless(60)
    wanted = models.with_depth(prepare(tiny.model(models.CONFIG)), bias=BIAS)
    logits = [tiny.full_logits(module, PROMPTS[0]) for module in (model.module, wanted)]
    np.testing.assert_allclose(*logits, atol=1e-6)
    settings = {"tree_selection": "prune", "predictor": folders / "predictor"}
    pruning = specjax.load(folders / "routed", **settings).module.depth
    assert pruning.selection.survivors == 16 and pruning.kept_nodes(60) == 16
    assert specjax.load(folders / "routed", **settings, survivors=4).module.depth.kept_nodes(9) == 4
    result = specjax.load(folders / "routed").generate([PROMPTS[0]], "ngram", max_new_tokens=6)[0]
    row = result.to_dict()
    assert row["lossless"] and len(row["layer_runs"]) == 4 and 0 < row["executed_fraction"] <= 1
    assert "layer_runs" not in specjax.load(folders / "plain").generate([[1]])[0].to_dict()


def test_settings_that_make_no_sense_are_refused(folders):
    plain, routed, predictor = (folders / name for name in ("plain", "routed", "predictor"))
    wrong = [
        (plain, {"depth": "routed"}, ConfigError, "experiments.train_depth"),
        (plain, {"tree_selection": "vote", "predictor": predictor}, ConfigError, "no routers"),
        (routed, {"depth": "half"}, ConfigError, "supported are auto, full, routed"),
        (routed, {"tree_selection": "all"}, ConfigError, "supported are off, vote, prune"),
        (routed, {"tree_selection": "vote"}, ConfigError, "needs a predictor"),
        (routed, {"predictor": predictor}, ConfigError, "no effect with tree_selection='off'"),
        (routed, {"survivors": 4}, ConfigError, "survivors=4 has no effect"),
        (
            routed,
            {"depth": "full", "tree_selection": "vote", "predictor": predictor},
            ConfigError,
            "depth='full'",
        ),
        (
            routed,
            {"tree_selection": "prune", "predictor": predictor, "survivors": 0},
            ConfigError,
            "survivors=0",
        ),
        (
            routed,
            {"tree_selection": "vote", "predictor": folders / "nowhere"},
            FileNotFoundError,
            "nowhere",
        ),
    ]
    for path, settings, error, message in wrong:
        with pytest.raises(error, match=message):
            specjax.load(path, **settings)


def test_a_missing_router_is_named(folders, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folders / "plain").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_bytes((folders / "routed" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.router\.up_proj\.weight"):
        specjax.load(broken)


def test_conversion_keeps_the_routers(folders, tmp_path):
    made = specjax.convert(
        folders / "routed", tmp_path / "q", scheme="w4a16", method="rtn", group_size=16
    )
    assert made.reload_error < 1e-4
    loaded = specjax.load(tmp_path / "q", dequantize="never").module
    np.testing.assert_allclose(
        tiny.full_logits(loaded, PROMPTS[2]),
        tiny.full_logits(target("w4a16"), PROMPTS[2]),
        atol=1e-3,
    )
    with pytest.raises(ConfigError, match="method='rtn'"):
        recipe.check_model(recipe.make("w4a16", "gptq", group_size=16), loaded.config)


def test_routers_turn_with_the_residual_stream():
    model = models.with_depth(tiny.model(models.CONFIG))
    turn = rotation.random_hadamard(model.config, 0, False)
    turned = rotate.rotate(model, turn)
    logits = [tiny.full_logits(module, PROMPTS[2]) for module in (model, turned)]
    np.testing.assert_allclose(*logits, atol=1e-3)
    assert turned.depth.routers[0].up_proj is not model.depth.routers[0].up_proj
    robust = models.with_depth(
        tiny.model(models.CONFIG), dataclasses.replace(models.DEPTH, code_bits=4)
    )
    with pytest.raises(ConfigError, match="dynamic_router_bits=4"):
        rotate.rotate(robust, turn)


@pytest.mark.slow
def test_flags(folders, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": p}) + "\n" for p in PROMPTS[:2]))
    arguments = [
        *(f"--model={folders / 'routed'}", f"--prompts_file={prompts}", "--max_new_tokens=8"),
        *("--depth=routed", "--tree_selection=prune", f"--predictor={folders / 'predictor'}"),
    ]
    output = tmp_path / "bench.jsonl"
    given = [*arguments, "--survivors=2", "--drafters=ngram", "--repeats=1", f"--output={output}"]
    bench_decode.main(common.parse(bench_decode.define_flags, given))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        assert row["lossless"] == (row["drafter"] == "none")
        assert 0.2 < row["executed_fraction"] <= 1 and len(row["layer_runs"]) == 4
        assert row["config"]["depth"]["survivors"] == 2
        assert row["config"]["depth"]["tree_selection"] == "prune"
    printed = capsys.readouterr().out
    assert "layers run" in printed and "(lossy)" in printed
    with pytest.raises(ConfigError, match="no routers; drop the flags of depth"):
        values = common.parse(
            bench_decode.define_flags,
            ["--random_weights=llama3-8b", "--depth=full", "--drafters=none"],
        )
        bench_decode.main(values)
    usual = common.parse(generate.define_flags, ["--model=m"])
    assert flags_model.model_config(usual)["depth"] is None
