import json
import shutil
import subprocess
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.errors import CheckpointError, ConfigError
from specjax.text import sentencepiece, tokenizer, vocabulary
from tests import paths

SPM = paths.COPIED / "tokenizers" / "spm-tiny"
EXPECTED = json.loads((SPM / "expected.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "Hi"}]
BOS, EOS, UNK = "<s>", "</s>", "<unk>"


def spm_metadata(**changes):
    fields = {
        "model": "llama",
        "tokens": EXPECTED["tokens"],
        "scores": EXPECTED["scores"],
        "token_type": EXPECTED["token_type"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}


def bytes_metadata(pre, tokens=(), merges=(), **changes):
    """A byte-level vocabulary: two control tokens, the 256 bytes, then `tokens`."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [BOS, EOS, *sorted(ByteLevel.alphabet()), *tokens]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": list(merges),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}


@pytest.fixture(scope="module")
def smollm2():
    from specjax.checkpoints import gguf

    path = paths.smollm2()
    return tokenizer.load(path, gguf.open_file(path))


@pytest.fixture(scope="module")
def spm():
    return tokenizer.from_gguf(spm_metadata(), "spm.gguf")


@pytest.fixture(scope="module")
def tiny():
    return tokenizer.load(paths.fixture("tiny-fp16"))


@pytest.fixture
def tiny_folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths.fixture("tiny-fp16") / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stream(tok, ids, **options):
    decoder = tok.stream_decoder(**options)
    return [decoder.step(i) for i in ids] + [decoder.finish()]


def smollm2_goldens():
    text = paths.golden("smollm2_hf_fp32.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_smollm2_prompts_give_the_golden_ids(smollm2):
    rows = smollm2_goldens()
    for row in rows:
        message = {"role": "user", "content": row["prompt"]}
        assert smollm2.apply_chat_template([message]) == row["input_ids"], row["question_id"]
    assert len(rows) >= 10


def test_smollm2_golden_ids_give_the_text(smollm2):
    for row in smollm2_goldens():
        ids = row["greedy_ids"]
        assert smollm2.decode(ids, skip_special_tokens=False) == row["text"]
        assert smollm2.decode(ids) == row["text"].removesuffix("<|im_end|>")
        assert "".join(stream(smollm2, ids)) == smollm2.decode(ids)


def test_smollm2_properties(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_id) == (49152, 1, 2)
    assert smollm2.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert smollm2.encode("") == []
    system = {"role": "system", "content": "Be brief."}
    text = smollm2.decode(smollm2.apply_chat_template([system, *USER]), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "text", ["héllo 🙂 東京 ok", "  two  spaces\n\n\tand tabs ", "👩‍👩‍👧 family"]
)
def test_streams_hold_no_half_characters(smollm2, spm, text):
    for tok in (smollm2, spm):
        pieces = stream(tok, tok.encode(text, add_special_tokens=False))
        assert "".join(pieces) == text
        assert not any("�" in piece for piece in pieces)


def test_stream_of_words_arrives_word_by_word(smollm2):
    ids = smollm2.encode("The capital of France is Paris")
    assert stream(smollm2, ids) == ["The", " capital", " of", " France", " is", " Paris", ""]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 699), max_size=12), skip=st.booleans())
def test_streams_join_to_the_decoded_text(spm, tiny, ids, skip):
    for tok in (spm, tiny):
        pieces = stream(tok, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tok.decode(ids, skip_special_tokens=skip)


def test_ids_beyond_the_vocabulary_have_no_text(tiny):
    word = tiny.encode("word", add_special_tokens=False)
    assert tiny.decode([5000, *word]) == "".join(stream(tiny, [5000, *word])) == "word"


@pytest.mark.parametrize("origin", ["gguf", "tokenizer.model"])
def test_sentencepiece_ids_are_those_of_sentencepiece(spm, origin):
    tok = spm if origin == "gguf" else tokenizer.load(SPM)
    assert tok.vocab_size == 700
    assert (tok.bos_token_id, tok.eos_token_id) == (1, 2)
    for case in EXPECTED["cases"]:
        assert tok.decode(case["ids"]) == case["decoded"]
        if "<|tool|>" not in case["text"]:
            assert tok.encode(case["text"], add_special_tokens=False) == case["ids"]
            assert tok.encode(case["text"]) == [1, *case["ids"]]


def test_text_behind_a_cut_out_token_begins_with_a_space_again(spm):
    """llama.cpp's and Llama 2's rule; SentencePiece itself does not do so behind user symbols."""
    ids = spm.encode("a<|tool|>a", add_special_tokens=False)
    assert ids == [
        *spm.encode("a", False),
        EXPECTED["tokens"].index("<|tool|>"),
        *spm.encode("a", False),
    ]


def test_sentencepiece_without_space_prefix():
    tok = tokenizer.from_gguf(spm_metadata(add_space_prefix=False, add_bos_token=False), "m")
    assert tok.decode(tok.encode(" a b")) == " a b"
    assert tok.encode("a")[0] == EXPECTED["tokens"].index("a")


def test_special_tokens_in_text_become_ids(spm):
    assert spm.encode("<s>a</s>", add_special_tokens=False) == [1, *spm.encode("a", False), 2]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "It's 2024  ok", ["It", "'s", "Ġ", "2", "0", "2", "4", "Ġ", "Ġok"]),
        ("gpt-2", "It's 2024  ok", ["It", "'s", "Ġ2024", "Ġ", "Ġok"]),
        ("llama-bpe", "IT'S 12345\n\nok", ["IT", "'S", "Ġ", "123", "45", "ĊĊ", "ok"]),
        ("qwen2", "IT'S 12\n\nok", ["IT", "'S", "Ġ", "1", "2", "ĊĊ", "ok"]),
        ("tekken", "helloWorld 12", ["hello", "World", "Ġ", "1", "2"]),
        ("default", "a+b 1234", ["a", "+", "b", "Ġ", "123", "4"]),
        ("deepseek-coder", "a b\n12", ["a", "Ġb", "Ċ", "1", "2"]),
    ],
)
def test_text_is_cut_as_the_pre_tokenizer_says(pre, text, pieces):
    backend, _ = vocabulary.from_gguf(bytes_metadata(pre), "m.gguf")
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_llama3_takes_whole_tokens_before_merging():
    tokens, merges = ["ab", "bc", "abc"], ["b c", "a b"]
    whole = tokenizer.from_gguf(bytes_metadata("llama-bpe", tokens, merges), "m")
    merged = tokenizer.from_gguf(bytes_metadata("gpt-2", tokens, merges), "m")
    assert whole.encode("abc") == [0, 260]
    assert merged.encode("abc") == [merged.encode("a")[0], 259]


def test_qwen2_composes_characters():
    tok = tokenizer.from_gguf(bytes_metadata("qwen2"), "m")
    assert tok.encode("e\u0301") == tok.encode("\u00e9")


def test_gguf_says_which_ends_are_added():
    both = tokenizer.from_gguf(bytes_metadata("gpt-2", add_bos_token=True, add_eos_token=True), "m")
    ids = both.encode("a")
    assert (ids[0], ids[-1], len(ids)) == (0, 1, 3)
    none = tokenizer.from_gguf(bytes_metadata("llama-bpe", add_bos_token=False), "m")
    assert len(none.encode("a")) == 1


def test_gguf_without_token_types_takes_the_named_tokens_as_special():
    metadata = bytes_metadata("gpt-2")
    del metadata["tokenizer.ggml.token_type"]
    tok = tokenizer.from_gguf(metadata, "m")
    assert tok.encode("<s>a")[0] == 0
    assert tok.decode(tok.encode("<s>a")) == "a"


def test_gguf_without_pre_tokenizer_warns(caplog):
    metadata = bytes_metadata("default")
    del metadata["tokenizer.ggml.pre"]
    tok = tokenizer.from_gguf(metadata, "old.gguf")
    assert "old.gguf: no tokenizer.ggml.pre" in caplog.text
    assert tok.decode(tok.encode("a+b")) == "a+b"


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (
            bytes_metadata("viking"),
            ConfigError,
            r"m\.gguf: tokenizer\.ggml\.pre = 'viking'.*smollm",
        ),
        (spm_metadata(model="t5"), ConfigError, r"tokenizer\.ggml\.model = 't5'.*input_ids"),
        (spm_metadata(tokens=None), CheckpointError, r"tokenizer\.ggml\.tokens is missing"),
        (spm_metadata(scores=None), CheckpointError, r"tokenizer\.ggml\.scores is missing"),
        (spm_metadata(scores=[0.0]), CheckpointError, r"700 tokens, but 1 scores"),
        (bytes_metadata("gpt-2", merges=["a q", "a zz"]), CheckpointError, r"inconsistent"),
        (bytes_metadata("gpt-2", merges=["az"]), CheckpointError, r"inconsistent"),
        (bytes_metadata("gpt-2", tokens=["a"]), CheckpointError, r"token 'a'.*more than once"),
        (
            bytes_metadata("gpt-2", token_type=[1]),
            CheckpointError,
            r"258 tokens, but 1 token types",
        ),
        (bytes_metadata("gpt-2", bos_token_id=9999), CheckpointError, r"bos_token_id = 9999"),
    ],
)
def test_bad_gguf_vocabularies_are_refused(metadata, error, message):
    with pytest.raises(error, match=message):
        tokenizer.from_gguf(metadata, "m.gguf")


def test_chat_template_of_gguf_and_override():
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    metadata = spm_metadata() | {"tokenizer.chat_template": own}
    tok = tokenizer.from_gguf(metadata, "m")
    assert tok.decode(tok.apply_chat_template(USER)) == "[Hi]"
    other = "{{ bos_token }}USER: {{ messages[0]['content'] }}{% if add_generation_prompt %} A:{% endif %}"
    tok = tokenizer.from_gguf(metadata, "m", other)
    ids = tok.apply_chat_template(USER)
    assert ids.count(1) == 1, "the template's BOS, and no second one"
    assert tok.decode(ids) == "USER: Hi A:"


def test_messages_without_a_template_name_the_flag(tiny):
    with pytest.raises(ConfigError, match=r"tiny-fp16 has no chat template.*--chat_template=FILE"):
        tiny.apply_chat_template(USER)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", USER, "roles must alternate"),
        ("{% for m in %}", USER, "chat template of .* failed"),
        ("{{ messages[0]['content'] + 1 }}", USER, "chat template of .* failed"),
        ("{{ messages }}", [], "messages is empty"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", USER, "unsafe"),
    ],
)
def test_failing_templates(tiny_folder, template, messages, message):
    tok = tokenizer.load(tiny_folder, chat_template=template)
    with pytest.raises(ConfigError, match=message):
        tok.apply_chat_template(messages)


def test_templates_of_directories(tiny_folder):
    config = tiny_folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "named"}]
    change_json(config, chat_template=named)
    assert tokenizer.load(tiny_folder).chat_template == "named"
    change_json(config, chat_template="in the settings")
    assert tokenizer.load(tiny_folder).chat_template == "in the settings"
    (tiny_folder / "chat_template.jinja").write_text("of its own file")
    assert tokenizer.load(tiny_folder).chat_template == "of its own file"
    assert tokenizer.load(tiny_folder, chat_template="override").chat_template == "override"


def test_settings_beside_a_sentencepiece_model(tmp_path):
    shutil.copy(SPM / "tokenizer.model", tmp_path)
    settings = {"add_bos_token": False, "chat_template": "{{ bos_token }}x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = tokenizer.load(tmp_path)
    assert tok.encode("a")[0] != 1
    assert tok.apply_chat_template(USER)[0] == 1
    assert tok.source == str(tmp_path)


def test_prompts_are_never_truncated_or_padded(tiny_folder):
    limits = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    whole = tokenizer.load(tiny_folder).encode("one two three four five six")
    change_json(tiny_folder / "tokenizer.json", truncation=limits, padding=padding)
    assert tokenizer.load(tiny_folder).encode("one two three four five six") == whole
    assert len(whole) > 4


def test_directory_without_tokenizer(tmp_path):
    assert tokenizer.load(tmp_path) is None
    with pytest.raises(
        ConfigError, match=r"has no tokenizer \(tokenizer\.json or tokenizer\.model"
    ):
        tokenizer.load(tmp_path, chat_template="x")


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "new"}}'])
def test_broken_tokenizer_json_names_the_directory(tiny_folder, content):
    (tiny_folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{tiny_folder.name}: the tokenizer cannot be read"):
        tokenizer.load(tiny_folder)


def test_broken_settings_name_the_directory(tiny_folder, tmp_path):
    (tiny_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        tokenizer.load(tiny_folder)
    (tiny_folder / "tokenizer.json").unlink()
    shutil.copy(SPM / "tokenizer.model", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        tokenizer.load(tmp_path)


def test_broken_sentencepiece_models(tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes((SPM / "tokenizer.model").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*truncated"):
        tokenizer.load(tmp_path)
    model.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no pieces"):
        tokenizer.load(tmp_path)


def test_other_sentencepiece_models_are_refused(tmp_path, monkeypatch):
    proto = types.SimpleNamespace(
        trainer_spec=types.SimpleNamespace(model_type=1),
        normalizer_spec=types.SimpleNamespace(name="nmt_nfkc", precompiled_charsmap=b"x"),
    )
    monkeypatch.setattr(sentencepiece, "_proto", lambda path: proto)
    with pytest.raises(
        ConfigError, match=r"model_type = 1, normalization 'nmt_nfkc'.*tokenizer\.json"
    ):
        sentencepiece.read(tmp_path / "tokenizer.model")


def test_digest_is_about_ids_and_tokens(spm, tiny):
    assert spm.digest() == tokenizer.load(SPM).digest()
    assert tiny.digest() == tokenizer.load(paths.fixture("tiny-gptq-g128")).digest()
    swapped = [*EXPECTED["tokens"]]
    swapped[600], swapped[601] = swapped[601], swapped[600]
    other = tokenizer.from_gguf(spm_metadata(tokens=swapped), "m")
    assert len({spm.digest(), tiny.digest(), other.digest()}) == 3


def test_loading_says_nothing():
    code = f"from pathlib import Path; from specjax import tokenizer; tokenizer.load(Path({str(SPM)!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""
