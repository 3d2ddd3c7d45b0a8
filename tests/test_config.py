"""Configurations: both spellings of transformers, what is refused, and rotary frequencies."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.config import ModelConfig, RopeConfig
from specjax.errors import ConfigError
from specjax.models import rotary

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(generation=None, **fields) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **fields}, generation)


def test_a_wrong_token_id_is_said_to_be_where_it_is():
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id = '5'"):
        read({"eos_token_id": "5"})


def test_both_spellings_are_the_same():
    old = read(
        torch_dtype="float16", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}
    )
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    assert old == read(dtype="float16", rope_parameters=rope)
    assert old.rope == RopeConfig(theta=5e5, kind="linear", factor=2.0)
    assert old.dtype == "float16"


def test_defaults():
    config = read()
    assert (config.head_dim, config.dtype, config.rope) == (64, "float32", RopeConfig())
    assert not (config.tie_word_embeddings or config.qkv_bias or config.o_bias or config.mlp_bias)
    assert read(num_key_value_heads=None).num_kv_heads == 4
    assert hash(config) == hash(read())


def test_explicit_head_dim_may_differ_from_hidden_over_heads():
    assert read(head_dim=32).head_dim == 32
    assert read(num_attention_heads=6, head_dim=64).head_dim == 64


@pytest.mark.parametrize(
    ("fields", "generation", "expected"),
    [
        ({"eos_token_id": 1}, None, (1,)),
        ({"eos_token_id": [1, 7]}, None, (1, 7)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": 1}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 1}, {"eos_token_id": None}, (1,)),
        ({"eos_token_id": 1}, {"temperature": 0.6}, (1,)),
        ({"eos_token_id": -1}, None, ()),
        ({"eos_token_id": [5, -1]}, None, (5,)),
    ],
)
def test_eos(fields, generation, expected):
    assert read(generation, **fields).eos_token_ids == expected


def test_biases_of_each_architecture():
    llama = read(attention_bias=True, mlp_bias=True)
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias
    qwen = read(architectures=["Qwen2ForCausalLM"], use_sliding_window=False, sliding_window=4096)
    assert qwen.qkv_bias and not qwen.o_bias and not qwen.mlp_bias
    mistral = read(architectures=["MistralForCausalLM"], sliding_window=None)
    assert not (mistral.qkv_bias or mistral.o_bias or mistral.mlp_bias)


def test_architecture_from_model_type():
    fields = {"architectures": None, "model_type": "mistral"}
    assert read(**fields).architecture == "MistralForCausalLM"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MiniCPM3ForCausalLM"]}, r"architectures.*MiniCPM3.*LlamaForCausal"),
        ({"architectures": [], "model_type": "opt"}, r"model_type = 'opt'.*gpt2"),
        ({"hidden_act": "quick_gelu"}, r"hidden_act = 'quick_gelu'.*gelu_new"),
        ({"rope_scaling": {"rope_type": "xpos"}}, r"rope_scaling.rope_type = 'xpos'.*longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, r"rope_scaling.factor = -4"),
        ({"rope_scaling": {"type": "dynamic"}}, r"rope_scaling.factor = None"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, r"short_factor = None"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling.factor = None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"low_freq_factor = None"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            r"high_freq",
        ),
        ({"rope_scaling": "linear"}, r"rope_scaling = 'linear'"),
        ({"rope_scaling": {"factor": 4.0}}, r"rope_scaling has factor = 4.0 and no rope_type"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
            r"rope_scaling.alpha = 1000.0",
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "rope_parameters": {"rope_type": "linear", "factor": 8.0},
            },
            r"rope_parameters = .* full_attention",
        ),
        ({"model_type": "gemma2"}, r"LlamaForCausalLM.*model_type = 'gemma2' are two"),
        (
            {"model_type": "granite", "residual_multiplier": 0.5},
            r"LlamaForCausalLM.*model_type = 'granite' are two",
        ),
        ({"rope_theta": -1.0}, r"rope_theta = -1.0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0.5"),
        ({"num_attention_heads": 5}, r"num_attention_heads = 5"),
        ({"num_attention_heads": 6}, r"hidden_size = 256 .* num_attention_heads = 6"),
        ({"head_dim": 63}, r"head_dim = 63"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"partial"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads = 3"),
        ({"vocab_size": None}, r"vocab_size is missing"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers = 0"),
        ({"hidden_size": "256"}, r"hidden_size = '256'"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps = 0"),
        ({"torch_dtype": "float64"}, r"dtype = 'float64'"),
        ({"eos_token_id": "</s>"}, r"eos_token_id = '</s>'"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings = 'no'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, r"sliding_window = 0"),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "sliding_window": None,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            r"no sliding_window",
        ),
    ],
)
def test_refused_by_field_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        read(**fields)


def test_names_of_two_architectures_that_are_one_model():
    """Llama and Mistral without a window compute the same from the same tensors; Yi is no name of ours."""
    fields = {"max_position_embeddings": 128, "sliding_window": None}
    assert read(model_type="mistral", **fields) == read(**fields)
    assert read(model_type="Yi") == read()


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"final_logit_softcapping": 5.0}, "final_logit_softcapping = 5.0"),
        ({"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
        ({"residual_multiplier": 1.0, "use_qk_norm": False, "attention_multiplier": None}, ""),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1.0, "other": 3}}, "other"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, ""),
    ],
)
def test_settings_that_nobody_computes_are_said(fields, warned, caplog):
    """transformers reads none of them for these models: they load, with a word."""
    plain = read()
    caplog.clear()
    assert read(**fields).rope.inv_freq(64).tolist() == plain.rope.inv_freq(64).tolist()
    assert [warned in record.getMessage() for record in caplog.records] == [True] * bool(warned)


def test_zero_mscales_say_nothing():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    zero = read(rope_scaling={**yarn, "mscale": 1.0, "mscale_all_dim": 0})
    assert zero.rope == read(rope_scaling=yarn).rope


def test_gemma3_caps_no_scores(caplog):
    """As in transformers: the field is in its configuration and no layer reads it."""
    fields = {"architectures": ["Gemma3ForCausalLM"], "final_logit_softcapping": 30.0}
    found = read(**fields, attn_logit_softcapping=50.0)
    assert (found.score_softcap, found.logit_softcap) == (None, 30.0)
    assert "attn_logit_softcapping = 50.0" in caplog.text


def test_draft_head_configuration_is_accepted():
    head = read(num_hidden_layers=1, bias=False, torch_dtype="float16", rope_theta=5e5)
    assert (head.num_layers, head.rope.theta, head.head_dim) == (1, 5e5, 64)


@pytest.mark.parametrize(
    "architecture", ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
)
@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}])
@pytest.mark.parametrize("eos", [None, 1, [1, 2]])
def test_to_hf_round_trip(architecture, rope, eos):
    config = read(architectures=[architecture], head_dim=32, eos_token_id=eos, **rope)
    fields = config.to_hf()
    assert ModelConfig.from_hf(fields) == config
    old_spelling = {k: v for k, v in fields.items() if k not in ("dtype", "rope_parameters")}
    new_spelling = {
        k: v for k, v in fields.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")
    }
    assert ModelConfig.from_hf(old_spelling) == ModelConfig.from_hf(new_spelling) == config


def test_to_hf_refuses_biases_that_the_architecture_cannot_state():
    fields = vars(read()) | {"qkv_bias": True}
    with pytest.raises(ConfigError, match="qkv_bias"):
        ModelConfig(**fields).to_hf()


def test_transformers_reads_what_we_write():
    transformers = pytest.importorskip("transformers")
    config = read(rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=5e5, head_dim=32)
    theirs = transformers.LlamaConfig(**config.to_hf())
    assert theirs.rope_parameters["rope_type"] == "llama3"
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert ModelConfig.from_hf(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]}) == config


def test_inv_freq_default_and_linear():
    plain = RopeConfig(theta=1e4).inv_freq(64)
    assert plain.dtype == np.float32 and plain.shape == (32,)
    np.testing.assert_allclose(plain, 1e4 ** (-np.arange(32) / 32), rtol=1e-6)
    scaled = RopeConfig(theta=1e4, kind="linear", factor=4.0).inv_freq(64)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


def test_inv_freq_llama3_follows_its_definition():
    """The three bands by wavelength, written out case by case."""
    rope = RopeConfig(theta=5e5, kind="llama3", **LLAMA3)
    bands = set()
    for plain, scaled in zip(RopeConfig(theta=5e5).inv_freq(128), rope.inv_freq(128), strict=True):
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4.0:
            band, expected = "short", plain
        elif wavelength > 8192 / 1.0:
            band, expected = "long", plain / 8.0
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            band, expected = "medium", (1 - smooth) * plain / 8.0 + smooth * plain
        bands.add(band)
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    assert bands == {"short", "medium", "long"}


def test_yarn_frequencies():
    """Fast frequencies stay, slow ones are divided, those between are mixed (arXiv 2309.00071)."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = read(rope_scaling=scaling).rope
    plain = RopeConfig().inv_freq(16).astype(np.float64)

    def channel(turns):
        return 16 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), 15)
    ramp = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(rope.inv_freq(16), plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert read(rope_scaling=scaling | {"attention_factor": 1.5}).rope.attention_factor == 1.5
    mscales = scaling | {"mscale": 2.0, "mscale_all_dim": 1.0}
    expected = (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    assert read(rope_scaling=mscales).rope.attention_factor == pytest.approx(expected)


@pytest.mark.parametrize("length", [5, 32, 48, 64])
def test_dynamic_frequencies_follow_the_length(length):
    """The base of NTK scaling, at the length that is known, or the position's own."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    rope = read(rope_scaling=scaling, max_position_embeddings=32).rope
    stretch = 2.0 * max(length, 32) / 32 - 1.0
    base = 1e4 * stretch ** (16 / 14)
    angles = 3 * base ** (-np.arange(0, 16, 2) / 16)
    cos, sin = rotary.rope_tables(
        rope, 16, jnp.full((1, 1), 3, jnp.int32), jnp.full((1,), length, jnp.int32)
    )
    np.testing.assert_allclose(cos[0, 0, 0, :8], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0, 0, 8:], np.sin(angles), atol=1e-6)
