"""Files beside a tokenizer, as transformers reads them."""

import json
import random
import shutil

import pytest

from specjax.errors import CheckpointError
from specjax.text import tokenizer
from tests import paths

SPM = paths.COPIED / "tokenizers" / "spm-tiny"
GOLDEN = json.loads((SPM / "transformers.json").read_text(encoding="utf-8"))
ATOMS = (
    *(
        "a",
        "the ",
        "The",
        " in",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\u00e9",
        "e\u0301",
        "\u0301",
        "\U0001f642",
    ),
    *(
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\u6771\u4eac",
        "\u092e\u0928\u0940",
        "\u200b",
        "123",
        " 2024",
        "'s",
    ),
    *(
        "!?",
        "\u00a0",
        "\u3000",
        "\r\n",
        "\ufb01",
        "\u0130",
        "\ufffd",
        "\x00",
        "\ud55c\uad6d",
        "<",
        "|",
        "\u2581",
        "x" * 30,
    ),
)


def strings(specials, count: int) -> list[str]:
    rng = random.Random(0)
    atoms = [*ATOMS, *list(specials) * 2]
    return ["".join(rng.choices(atoms, k=rng.randint(0, 12))) for _ in range(count)]


def folder(path, files):
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_files_beside_a_sentencepiece_model(tmp_path, case):
    shutil.copy(SPM / "tokenizer.model", tmp_path)
    tok = tokenizer.load(folder(tmp_path, case["files"]))
    # transformers forgets the model's own symbol where the settings list additional ones; SentencePiece does not.
    forgotten = "<|tool|>" if case["name"] == "additional_special_tokens" else None
    for text, ids in zip(GOLDEN["texts"], case["ids"], strict=True):
        if forgotten is None or forgotten not in text:
            assert tok.encode(text) == ids
    assert (tok.bos_token_id, tok.eos_token_id) == (case["bos_token_id"], case["eos_token_id"])


@pytest.fixture
def tiny_folder(tmp_path):
    source = paths.fixture("tiny-fp16")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    stated = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    stated.pop("backend", None)

    def make(name=None, tokenizer_json=True, **settings):
        if tokenizer_json:
            (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        else:
            merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
            (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
            (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
        settings = stated | {"tokenizer_class": name or stated["tokenizer_class"]} | settings
        return folder(
            tmp_path, {"tokenizer_config.json": settings, "config.json": {"model_type": "llama"}}
        )

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder(),
        lambda folder: folder("Qwen2Tokenizer", tokenizer_json=False),
        lambda folder: folder("GPT2Tokenizer", add_prefix_space=True),
        lambda folder: folder("PreTrainedTokenizerFast", add_prefix_space=True),
        lambda folder: folder(additional_special_tokens=["<|a|>", "<|b|>"], eos_token="<|a|>"),
    ],
    ids=["plain", "vocab and merges", "prefix space", "prefix space, another class", "more tokens"],
)
def test_ids_are_those_of_transformers(tiny_folder, make):
    from transformers import AutoTokenizer

    path = make(tiny_folder)
    tok, reference = tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    for text in strings(reference.get_added_vocab(), 2000):
        ids = reference.encode(text)
        assert tok.encode(text) == ids
        assert tok.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tok.eos_token_id == reference.eos_token_id


def test_added_tokens_may_leave_gaps(tmp_path):
    shutil.copy(SPM / "tokenizer.model", tmp_path)
    tok = tokenizer.load(folder(tmp_path, {"added_tokens.json": {"<|im_end|>": 704, "<x>": 710}}))
    ids = tok.encode("<|im_end|>in<x>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (704, 710)
    assert tok.decode(ids) == "<|im_end|> in<x>"


def test_two_numbers_of_one_token(tiny_folder, caplog):
    path = tiny_folder()
    (path / "added_tokens.json").write_text('{"<s>": 7}')
    assert tokenizer.load(path).encode("<s>a")[0] == 0
    assert "token '<s>' is number 0 by tokenizer.json, which counts, and 7" in caplog.text
    (path / "added_tokens.json").write_text('{"<new>": 1030}')
    with pytest.raises(CheckpointError, match=r"token '<new>' is number 1030 .* and 1024 behind"):
        tokenizer.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", ["<x>"], r"added_tokens\.json: not a JSON object: found list"),
        ("added_tokens.json", {"<x>": "many"}, "the added tokens are malformed"),
        ("added_tokens.json", {"<s>": 700}, "token '<s>' is number 1, and 700 among"),
        ("special_tokens_map.json", 3, r"special_tokens_map\.json: not a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"700": {}}}, "malformed"),
    ],
)
def test_malformed_files_beside_a_sentencepiece_model(tmp_path, name, content, message):
    shutil.copy(SPM / "tokenizer.model", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        tokenizer.load(folder(tmp_path, {name: content}))


def test_chat_templates_of_any_home(tiny_folder):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    named = [{"name": "tool_use", "template": "tool"}, {"name": "rag", "template": "rag"}]
    load = lambda **settings: tokenizer.load(tiny_folder(**settings))
    assert load(chat_template=template).chat_template == template
    assert load(chat_template=[{"name": "chat", "template": template}]).chat_template == template
    none = load(chat_template=named)
    with pytest.raises(Exception, match="templates tool_use, rag and none is 'default'"):
        none.render_chat([{"role": "user", "content": "Hi"}])
