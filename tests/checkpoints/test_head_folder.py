"""Settings of draft heads in all their homes, what is refused by name, and tensors against what is claimed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from specjax.checkpoints import heads
from specjax.drafters import head as opening
from specjax.errors import SpecjaxError
from tests import head_fixtures, paths, tiny

SPECULATORS, FLAT, NORMED = "eagle3-nbr-qwen3", "eagle3-deepspec-qwen3", "eagle31-llama"
PARALLEL, MTP = "peagle-qwen3", "mtp-qwen3"


def edited(name: str, folder: Path, settings: dict | None = None, tensors: dict | None = None):
    """A copy of a head with other settings ("a.b" is b of the object a; None removes) and tensors."""
    source = head_fixtures.folder(name)
    config = json.loads((source / "config.json").read_text())
    for field, value in (settings or {}).items():
        *outer, leaf = field.split(".")
        home = config
        for key in outer:
            home = home.setdefault(key, {})
        home[leaf] = value
        if value is None:
            home.pop(leaf)
    stored = safetensors.numpy.load_file(source / "model.safetensors")
    for tensor, array in (tensors or {}).items():
        stored[tensor] = array
        if array is None:
            stored.pop(tensor)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    return folder


def opened(name: str, folder: Path, settings=None, tensors=None, **options):
    target = head_fixtures.target(head_fixtures.Golden(name).facts["target"])
    path = edited(name, folder / "head", settings, tensors)
    return opening.build(target, str(path), **({"tree": "chain"} | options))


LAYER = "transformer_layer_config"
READ: dict[str, tuple[str, dict, Callable[[object], bool]]] = {
    "ids in eagle_config": (
        SPECULATORS,
        {
            "eagle_aux_hidden_state_layer_ids": None,
            "eagle_config.eagle_aux_hidden_state_layer_ids": [0, 3, 8],
        },
        lambda d: d.needs == (0, 3, 8),
    ),
    "ids under the short name": (
        SPECULATORS,
        {"eagle_aux_hidden_state_layer_ids": None, "aux_hidden_state_layer_ids": [1, 2, 3]},
        lambda d: d.needs == (1, 2, 3),
    ),
    "no ids": (
        SPECULATORS,
        {"eagle_aux_hidden_state_layer_ids": None},
        lambda d: d.needs == (2, 4, 5),
    ),
    "outputs, the embeddings and the last one": (
        FLAT,
        {"target_layer_ids": [-1, 3, 7]},
        lambda d: d.needs == (0, 4, 8),
    ),
    "outputs in dflash_config": (
        FLAT,
        {"target_layer_ids": None, "dflash_config.target_layer_ids": [0, 1, 2]},
        lambda d: d.needs == (1, 2, 3),
    ),
    "a flag in eagle_config": (
        FLAT,
        {"eagle_config.norm_output": True},
        lambda d: d.head.variant.norm_output,
    ),
    "a sliding layer": (
        SPECULATORS,
        {f"{LAYER}.sliding_window": 9},
        lambda d: d.head.config.windows == (9,) and d.head.midlayer.self_attn.kind.window == 9,
    ),
    "no layers' type: the tensors tell": (
        SPECULATORS,
        {f"{LAYER}.model_type": None},
        lambda d: d.head.config.qk_norm == "head",
    ),
    "a target's count of layers": (
        FLAT,
        {"num_hidden_layers": 8, "draft_num_hidden_layers": None, "layer_types": None},
        lambda d: d.head.num_layers == 1,
    ),
    "its length": (
        SPECULATORS,
        {"speculators_config.proposal_methods": [{"speculative_tokens": 2}]},
        lambda d: d.draft_depth == 2,
    ),
    "its length when flat": (FLAT, {"ttt_length": 3}, lambda d: d.draft_depth == 3),
    "the mask token of vLLM's other names": (
        PARALLEL,
        {"mask_token_id": None, "ptd_token_id": 7},
        lambda d: d.head.mask_token == 7,
    ),
    "the mask token under PARD's name": (
        PARALLEL,
        {"mask_token_id": None, "pard_token": 7},
        lambda d: d.head.mask_token == 7,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_settings_are_found(case, tmp_path):
    name, settings, holds = READ[case]
    assert holds(opened(name, tmp_path, settings))


REFUSED = {
    "draft_vocab_size": (SPECULATORS, {"draft_vocab_size": 64}, {}, r"d2t .*\(64,\)"),
    "layer_types": (
        *(SPECULATORS, {f"{LAYER}.layer_types": ["chunked_attention"]}, {}),
        "layer_types has .'chunked_attention'",
    ),
    "model_type": (SPECULATORS, {f"{LAYER}.model_type": "gemma3"}, {}, "model_type = 'gemma3'"),
    "another model_type": (SPECULATORS, {f"{LAYER}.model_type": "llama"}, {}, "k_norm.weight"),
    "two norms": (
        *(SPECULATORS, {"fc_norm": True, "norm_before_fc": True}, {}),
        "norm_before_fc = True beside fc_norm = True",
    ),
    "a norm that is missing": (SPECULATORS, {"fc_norm": True}, {}, "fc_norm.0.weight is missing"),
    "no flag": (SPECULATORS, {"norm_output": "yes"}, {}, "norm_output = 'yes'"),
    "a setting of ModelOpt": (
        *(FLAT, {"eagle_config.use_aux_hidden_state": False}, {}),
        "use_aux_hidden_state = False is not supported, only True",
    ),
    "both meanings": (
        *(SPECULATORS, {"target_layer_ids": [1, 3, 4]}, {}),
        "beside target_layer_ids",
    ),
    "layers that the target lacks": (
        *(FLAT, {"target_layer_ids": [1, 3, 8]}, {}),
        r"target_layer_ids = \[1, 3, 8\]",
    ),
    "fewer layers": (FLAT, {"target_layer_ids": [1, 3]}, {}, "fc.weight"),
    "another target": (SPECULATORS, {"target_hidden_size": 128}, {}, "target_hidden_size = 128"),
    "a deeper target": (FLAT, {"num_target_layers": 9}, {}, "num_target_layers = 9"),
    "a new kind": (SPECULATORS, {"speculators_model_type": "eagle9"}, {}, "says eagle9"),
    "no maps": (SPECULATORS, {}, {"d2t": None, "t2d": None}, "d2t is missing"),
    "maps that differ": (SPECULATORS, {}, {"d2t": np.arange(128)}, "d2t and t2d name different"),
    "no output head": (SPECULATORS, {}, {"lm_head.weight": None}, "lm_head.weight is missing"),
    "a tensor too many": (FLAT, {}, {"extra.weight": np.ones(3)}, "extra.weight: no part"),
    "a layer too many": (
        *(PARALLEL, {f"{LAYER}.num_hidden_layers": 1}, {}),
        "layers.1.input_layernorm.weight",
    ),
    "a layer too few": (PARALLEL, {f"{LAYER}.num_hidden_layers": 3}, {}, "layer_types"),
    "no mask": (PARALLEL, {}, {"mask_hidden": None}, "mask_hidden is missing"),
    "no mask token": (PARALLEL, {"mask_token_id": None}, {}, "mask_token_id = None"),
    "several predictors": (MTP, {"num_nextn_predict_layers": 2}, {}, "num_nextn_predict_layers"),
    "a hybrid layer": (MTP, {f"{LAYER}.model_type": "qwen3_next"}, {}, "'qwen3_next'"),
    "no length": (
        *(MTP, {"speculators_config.proposal_methods": [{"speculative_tokens": 0}]}, {}),
        "speculative_tokens = 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_draft_something_else_is_refused(case, tmp_path):
    name, settings, tensors, match = REFUSED[case]
    with pytest.raises(SpecjaxError, match=match):
        opened(name, tmp_path, settings, tensors)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tree": "bush"}, "tree='bush'"),
        ({"tree": "best-first"}, "heads of this kind draft 'topk', 'chain'"),
        ({"num_nodes": 3, "draft_depth": 4}, "num_nodes=3 with tree='chain'"),
        ({"topk": 3}, "topk=3 with tree='chain'"),
        ({"tree": "topk", "topk": 200, "num_nodes": 20}, "draft vocabulary of 128"),
        ({"window": 0}, "window=0"),
        ({"draft_depth": 1.5}, "draft_depth=1.5"),
        ({"layer_ids": [2, 4]}, "fc.weight"),
    ],
)
def test_options_that_do_not_fit(options, match, tmp_path):
    with pytest.raises(SpecjaxError, match=match):
        opened(SPECULATORS, tmp_path, **options)


def test_options_that_a_kind_does_not_have():
    target = head_fixtures.target("tiny8-llama")
    folder = str(head_fixtures.folder("pard-llama-draft"))
    with pytest.raises(SpecjaxError, match="window=8: heads of this kind have no such setting"):
        opening.build(target, folder, window=8)
    with pytest.raises(SpecjaxError, match="this head has no confidence head"):
        opening.build(target, str(head_fixtures.folder(NORMED)), confidence=0.5)


def test_tensors_tell_what_flags_do_not(tmp_path, caplog):
    """Stored norms and biases count, t2d says what d2t does, shared ends are the target's."""
    bias = np.full(96, 0.5, np.float16)
    folder = opened(
        *(NORMED, tmp_path, {"fc_norm": False}),
        {"d2t": None, "embed_tokens.weight": None},
    )
    whole = opened(NORMED, tmp_path / "whole") if (tmp_path / "whole").mkdir() is None else None
    assert folder.head.variant == whole.head.variant and folder.head.embed_tokens is None
    np.testing.assert_array_equal(folder.head.d2t[...], whole.head.d2t[...])
    assert "fc_norm.0.weight is stored" in caplog.text
    (tmp_path / "bias").mkdir()
    biased = opened(FLAT, tmp_path / "bias", {}, {"layers.0.self_attn.q_proj.bias": bias})
    assert float(biased.head.midlayer.self_attn.q_proj.bias[0]) == 0.5


def test_states_named_as_outputs(tmp_path, caplog):
    """What SGLang would read as outputs is said, and `layer_ids` overrides it."""
    with caplog.at_level(logging.WARNING):
        found = opened(SPECULATORS, tmp_path, {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]})
    assert found.needs == (1, 3, 4) and "layer_ids=[2, 4, 5]" in caplog.text
    assert opened(SPECULATORS, tmp_path, layer_ids=[2, 4, 5]).needs == (2, 4, 5)


def test_windows_reach_the_attention(tmp_path):
    """Of every kind: the user's, and the head's own where it is narrower."""
    target = head_fixtures.target("tiny8-qwen3")
    kinds = lambda head: [layer.self_attn.kind.window for layer in (head.midlayer, *head.layers)]
    made = opened(PARALLEL, tmp_path, window=12)
    assert kinds(made.head.body) == [12, 12]
    (tmp_path / "own").mkdir()
    settings = {f"{LAYER}.layer_types": ["sliding_attention", "full_attention"]}
    settings |= {f"{LAYER}.sliding_window": 7}
    assert kinds(opened(PARALLEL, tmp_path / "own", settings, window=12).head.body) == [7, 12]
    assert opened(MTP, tmp_path, window=5).head.layer.self_attn.kind.window == 5
    head = heads.load_eagle(head_fixtures.folder(FLAT), target.module, "tiny8-qwen3", 9)
    assert kinds(head) == [9]
    tiny_target = tiny.fixture_model()
    first = heads.load_eagle(paths.fixture("eagle2-tiny"), tiny_target, "tiny-fp16", 9)
    assert first.layers[0].self_attn.kind.window == 9


def test_the_drafter_eagle_opens_variants_and_names_the_other_drafter(tmp_path):
    target = head_fixtures.target("tiny8-qwen3").module
    for name in (SPECULATORS, FLAT):
        assert heads.load_eagle(head_fixtures.folder(name), target, "tiny8-qwen3").needs == (
            2,
            4,
            5,
        )
    with pytest.raises(SpecjaxError, match="the drafter 'head' opens"):
        heads.load_eagle(head_fixtures.folder(PARALLEL), target, "tiny8-qwen3")
    with pytest.raises(SpecjaxError, match="the drafter 'head' opens other kinds"):
        heads.load_eagle(head_fixtures.folder(MTP), target, "tiny8-qwen3")
