"""Text as it comes: pieces join to what decoding adds to the prompt; the work per token does not grow."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax.errors import ConfigError
from specjax.text import tokenizer
from specjax.text.transcript import Transcript, stop_strings
from tests import paths

SPM = paths.COPIED / "tokenizers" / "spm-tiny"
TOKENS = json.loads((SPM / "expected.json").read_text(encoding="utf-8"))["tokens"]
SPECIAL = ("<|im_end|>", "<|im_start|>")


@pytest.fixture(scope="module")
def spm():
    return tokenizer.load(SPM)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A byte-level tokenizer with two more special tokens, 1024 and 1025."""
    source, folder = paths.fixture("tiny-fp16"), tmp_path_factory.mktemp("tokenizer")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [
        {"id": 1024 + i, "content": token, "special": True, **flags}
        for i, token in enumerate(SPECIAL)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return tokenizer.load(folder)


def added(tok, prompt, ids, **options) -> str:
    """What `decode(prompt + ids)` has behind what it shares with `decode(prompt)`."""
    before, whole = tok.decode(prompt, **options), tok.decode([*prompt, *ids], **options)
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    return whole[shared:]


def stream(tok, prompt, ids, **options) -> list[str]:
    decoder = tok.stream_decoder(prompt, **options)
    return [decoder.step(i) for i in ids] + [decoder.finish()]


# Half characters, lone and invalid bytes, runs of byte tokens, blanks, special tokens, ids beyond the vocabulary.
BYTES = [
    TOKENS.index(f"<0x{byte:02X}>")
    for byte in (0x20, 0x61, 0xE6, 0x97, 0xA5, 0xFF, 0xEF, 0xBF, 0xBD)
]
BLANKS = [TOKENS.index(token) for token in ("▁", "▁▁▁▁", "▁the", "re")]
SPM_IDS = st.one_of(st.sampled_from(BYTES), st.sampled_from(BLANKS), st.integers(0, 720))
TINY_IDS = st.one_of(st.integers(0, 300), st.integers(0, 1040))


@settings(max_examples=150, deadline=None)
@given(
    spm_ids=st.lists(SPM_IDS, max_size=60),
    tiny_ids=st.lists(TINY_IDS, max_size=60),
    cut=st.integers(0, 30),
    skip=st.booleans(),
)
def test_pieces_join_to_what_decoding_adds(spm, tiny, spm_ids, tiny_ids, cut, skip):
    for tok, ids in ((spm, spm_ids), (tiny, tiny_ids)):
        prompt, new = ids[:cut], ids[cut:]
        pieces = stream(tok, prompt, new, skip_special_tokens=skip)
        assert "".join(pieces) == added(tok, prompt, new, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=40), cut=st.integers(0, 60))
def test_any_text_cut_anywhere_comes_back(spm, tiny, text, cut):
    for tok in (spm, tiny):
        ids = tok.encode(text, add_special_tokens=False)
        transcript = Transcript(tok, ids[:cut])
        assert transcript.finish(ids[cut:]) == added(tok, ids[:cut], ids[cut:])


def test_a_completion_keeps_the_blanks_that_decoders_strip(spm):
    ids = [TOKENS.index(token) for token in ("▁▁▁▁", "re", "st")] + [2]
    prompt = spm.encode("in the\n")
    assert spm.decode(ids) == "   rest"
    assert "".join(stream(spm, prompt, ids)) == Transcript(spm, prompt).finish(ids) == "    rest"
    assert spm.piece(TOKENS.index("▁the")) == " the"


def test_a_character_that_the_prompt_began_is_whole(spm, tiny):
    for tok in (spm, tiny):
        ids = tok.encode("x\u6771", add_special_tokens=False)
        assert tok.decode(ids[:-1]).endswith("\ufffd")
        assert "".join(stream(tok, ids[:-1], ids[-1:])) == "\u6771"
    # A replacement character that was in the prompt is no part of the completion.
    prompt = tiny.encode("a\ufffd")
    assert "".join(stream(tiny, prompt, tiny.encode("b"))) == "b"


def test_the_work_per_token_does_not_grow(tiny, spm):
    class Counting:
        def __init__(self, backend):
            self.backend, self.decoded = backend, 0

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return self.backend.decode(ids, **options)

        def __getattr__(self, name):
            return getattr(self.backend, name)

    for tok in (tiny, spm):
        ids = tok.encode("Once upon a time \u6771\u4eac \U0001f642 ", False) * 40
        decoder = tok.stream_decoder(ids)
        decoder._backend = counting = Counting(decoder._backend)
        assert "".join([decoder.step(i) for i in ids]) and counting.decoded < 40 * len(ids)


def transcribe(tok, prompt, ids, stop, step=3):
    """(pieces, tokens kept) of a stream that is looked at every `step` tokens."""
    transcript, pieces = Transcript(tok, prompt, stop_strings(stop)), []
    for count in range(step, len(ids) + step, step):
        keep = transcript.read(ids[:count])
        if keep is not None:
            return [*pieces, transcript.finish(ids[:keep])], keep
        pieces.append(transcript.piece())
    return [*pieces, transcript.finish(ids)], len(ids)


def first_stop(tok, prompt, ids, stop) -> tuple[str, int]:
    """The definition: the first number of tokens after which the text has a stop string, and the text before it."""
    for count in range(len(ids) + 1):
        text = added(tok, prompt, ids[:count])
        found = [text.find(string) for string in stop if string in text]
        if found:
            return text[: min(found)], count
    return added(tok, prompt, ids), len(ids)


LETTERS = st.text(st.sampled_from("ab \u6771\u00e9"), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    prompt=LETTERS,
    text=st.text(st.sampled_from("ab \u6771\u00e9"), max_size=40),
    stop=st.lists(LETTERS, min_size=1, max_size=3),
    step=st.integers(1, 5),
)
def test_stop_strings_end_a_text_at_the_first_token_that_completes_one(
    spm, tiny, prompt, text, stop, step
):
    for tok in (spm, tiny):
        before, ids = tok.encode(prompt), tok.encode(text, add_special_tokens=False)
        pieces, kept = transcribe(tok, before, ids, stop, step)
        assert ("".join(pieces), kept) == first_stop(tok, before, ids, stop)


@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        ("<|im_end|>", "Hi", 3),
        ("i<|im_end|>", "H", 3),
        ("<|im_end|>u", "Hi", 4),
        (["zz", "<|im_end|>", "<|im_end|>"], "Hi", 3),
        ("<|im_start|>", "Hiu", 5),
        ("iu", "H", 4),
        # Part of a special token is no text, and neither is what the prompt ends with.
        ("im_end", "Hius", 6),
        ("|", "Hius", 6),
        ("aH", "Hius", 6),
        (None, "Hius", 6),
        ((), "Hius", 6),
    ],
)
def test_stop_strings_may_be_special_tokens(tiny, stop, text, kept):
    ids = [
        *tiny.encode("Hi", False),
        1024,
        *tiny.encode("u", False),
        1025,
        *tiny.encode("s", False),
    ]
    assert len(ids) == 6
    for step in (1, 4):
        pieces, count = transcribe(tiny, tiny.encode("a"), ids, stop, step)
        assert ("".join(pieces), count) == (text, kept)


def test_nothing_of_a_stop_string_is_shown(tiny):
    ids = [*tiny.encode("Hi", False), 1024, *tiny.encode("us", False)]
    transcript, shown = Transcript(tiny, [5], ("i<|im_end|>uz", "us.")), []
    for count in range(1, len(ids) + 1):
        transcript.read(ids[:count])
        shown.append(transcript.piece())
    assert shown == ["H", "", "", "i"]
    assert transcript.finish(ids) == "us"


def test_a_run_of_byte_tokens_ends_at_a_stop_string_within_it(spm):
    ids = spm.encode("\u6771\u4eac\u6771", add_special_tokens=False)[1:]
    pieces, kept = transcribe(spm, [5], ids, "\u4eac", 1)
    assert ("".join(pieces), kept) == ("\u6771", 6)


@pytest.mark.parametrize("stop", [3, [3], ["a", None], ["a", ""], "", "\ud800", {"a": 1}.values])
def test_stop_strings_that_are_none_are_refused(stop):
    with pytest.raises(ConfigError, match="stop"):
        stop_strings(stop)
