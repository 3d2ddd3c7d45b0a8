"""Which tokens end a generation, from everything that names them."""

import json

import pytest

import specjax
from specjax.errors import ConfigError
from specjax.text import special_ids, tokenizer
from tests import markov, paths, tiny
from tests.checkpoints import test_gguf as gguf_files

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


@pytest.fixture(autouse=True)
def hurry():
    with tiny.hurried_compiler():
        yield


@pytest.fixture
def chat_folder(tmp_path):
    """Says "Hi", <|im_end|>, <|im_start|>, "use" after "a"; `settings` go to tokenizer_config.json."""

    def make(settings=None, **config):
        folder = markov.write(tmp_path / "m", 303, {})
        vocab = markov.add_tokenizer(folder, SPECIALS, **(settings or {}))
        said = [vocab[token] for token in ("a", "H", "i", *SPECIALS[:2], "u", "s", "e")]
        return markov.write(folder, 303, markov.chain(*said), **config)

    return make


def say(model, **options):
    [result] = model.generate({"text": "a"}, max_new_tokens=6, **options)
    return result


def ends(folder) -> tuple[int, ...]:
    return specjax.load(folder).stop_ids


def test_names_of_ends_of_turns():
    found = special_ids.ends({"<|im_end|>": 5, "</s>": 2, "x": 1, "<end_of_turn>": 9})
    assert sorted(found) == [2, 5, 9]
    assert special_ids.ends({"<|end|>": 7}) == (7,)
    assert sorted(special_ids.ends({"<|end|>": 7, "<|return|>": 8, "<|call|>": 9})) == [8, 9]


def test_ids_beyond_the_vocabulary_are_left_out():
    assert special_ids.stop_ids((2, 900), (2, 5, -1), 10) == (2, 5)


def test_what_the_template_writes_behind_a_turn_ends_it(chat_folder):
    """Whatever the configuration says; a special token that the template does not use may mean anything."""
    assert ends(chat_folder(eos_token_id=1)) == (1,)
    assert ends(chat_folder({"chat_template": CHATML}, eos_token_id=1)) == (1, 300)


def test_the_tokenizers_eos_ends_a_generation(chat_folder):
    assert ends(chat_folder({"eos_token": "<|im_end|>"}, eos_token_id=7)) == (7, 300)


def test_ids_of_the_configuration_may_be_one_or_several(chat_folder):
    assert ends(chat_folder(eos_token_id=[1, 300])) == (1, 300)
    folder = chat_folder(eos_token_id=9)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 1]}))
    assert ends(folder) == (300, 1)


def test_a_tokenizer_may_have_no_eos(chat_folder):
    folder = chat_folder({"eos_token": None, "bos_token": None}, eos_token_id=None)
    model = specjax.load(folder)
    assert (model.stop_ids, model.bos_token_id, model.tokenizer.eos_token_id) == ((), None, None)


def test_bos_comes_from_the_tokenizer_where_the_configuration_has_none(chat_folder):
    assert specjax.load(chat_folder(bos_token_id=None)).bos_token_id == 0
    assert specjax.load(chat_folder(bos_token_id=7)).bos_token_id == 7


def test_what_ends_a_generation(chat_folder):
    model = specjax.load(chat_folder({"chat_template": CHATML}, eos_token_id=1))
    [i, u] = (model.tokenizer.encode(text, False)[0] for text in "iu")
    found = lambda result: (result.text, result.output_ids[-1], result.finish_reason)
    assert found(say(model)) == ("Hi", 300, "stop")
    assert say(model, ignore_eos=True, stop_token_ids=None, stop=None).text == "Hius"
    more = say(model, ignore_eos=True, stop_token_ids=[u, 300, 300])
    assert found(more) == ("Hi", 300, "stop")
    assert found(say(model, stop_token_ids=(i,))) == ("Hi", i, "stop")
    assert found(say(model, ignore_eos=True, stop="<|im_end|>")) == ("Hi", 300, "stop")
    options = {"ignore_eos": True, "stop": ["<|im_start|>", "zz"]}
    events = list(model.stream({"text": "a"}, max_new_tokens=6, **options))
    assert "".join(event.text for event in events) == events[-1].result.text == "Hi"
    for wrong, message in (
        ([303], "303 is no token"),
        ([-1], "-1 is no"),
        (["a"], "stop_token_ids"),
    ):
        with pytest.raises(ConfigError, match=message):
            say(model, stop_token_ids=wrong)


def gguf_metadata(names, kinds, **changes):
    """A byte-level vocabulary of control tokens and the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*names, *sorted(ByteLevel.alphabet())]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [*kinds, *[1] * 256],
        "merges": [],
        "eos_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


@pytest.mark.parametrize(
    ("kind", "warns"), [(3, False), (1, True), (4, True)], ids=["control", "normal", "user"]
)
def test_gguf_files_end_turns_by_name(kind, warns, caplog):
    metadata = gguf_metadata(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), (3, 3, kind))
    tok = tokenizer.from_gguf(metadata, "m.gguf")
    assert tok.end_ids == (0, 2)
    assert tok.encode("a<|im_end|>")[-1] == 2, "it is cut out of text"
    assert tok.decode(tok.encode("a<|im_end|>")) == "a"
    assert ("taken as control tokens" in caplog.text) == warns


def test_a_gguf_model_stops_at_the_end_of_its_turn(tmp_path):
    """Its metadata name the end of documents only."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    metadata = gguf_metadata(names, (3, 3, 3))
    at = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    said = markov.chain(*(at[token] for token in ("a", "H", "i", names[2], names[1], "u")))
    path = write_gguf(tmp_path / "m.gguf", metadata, said)
    model = specjax.load(path)
    assert model.stop_ids == (0, 2)
    [result] = model.generate({"text": "a"}, max_new_tokens=6)
    assert (result.text, result.finish_reason) == ("Hi", "stop")


def write_gguf(path, metadata, follows):
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        **{f"model.layers.0.self_attn.{n}_proj": f"blk.0.attn_{n}" for n in "qkv"},
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        **{f"model.layers.0.mlp.{n}_proj": f"blk.0.ffn_{n}" for n in ("gate", "up", "down")},
    }
    parameters = markov.tensors(len(metadata["tokenizer.ggml.tokens"]), follows)
    width = parameters["model.norm.weight"].size
    shape = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": width,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": width // 4,
    }
    tensors = {
        names[name.removesuffix(".weight")] + ".weight": ("F16", array)
        for name, array in parameters.items()
    }
    return gguf_files.write(path, {**shape, **metadata}, tensors)


def test_a_tokenizer_that_cannot_be_built_matters_only_where_text_is_needed(tmp_path, caplog):
    metadata = gguf_metadata(("<|endoftext|>", "x", "x"), (3, 1, 1))
    path = write_gguf(tmp_path / "m.gguf", metadata, markov.chain(5, 6, 7, 8))
    model = specjax.load(path)
    [result] = model.generate([5], max_new_tokens=2)
    assert (result.output_ids, result.text) == ([6, 7], None)
    assert [event.text for event in model.stream([5], max_new_tokens=2)][-1] == ""
    assert caplog.text.count("'x' stands in the vocabulary more than once") == 1
    for call in (
        lambda: model.generate({"text": "a"}),
        lambda: model.generate("a"),
        lambda: model.generate([5], stop="a"),
        lambda: model.tokenizer.encode("a"),
    ):
        with pytest.raises(specjax.CheckpointError, match="more than once"):
            call()


def test_fixtures_that_are_there_have_their_ends():
    assert tokenizer.load(paths.fixture("tiny-fp16")).end_ids == (1,)
