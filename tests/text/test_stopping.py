"""Stop strings: the first token that completes one, whatever the pieces in which tokens come."""

import hypothesis
import pytest
from hypothesis import strategies as st

from specjax.engine.engine import Request
from specjax.errors import ConfigError
from specjax.text.stopping import StopStrings
from tests.strategies import SETTINGS

# Tokens of one to three letters, so that stop strings begin and end within tokens.
PIECES = ("a", "b", "ab", "ba", "bab", "aa", " ")
REQUEST = Request(request_id=0, input_ids=[1], max_new_tokens=99)


def text_of(tokens) -> str:
    return "".join(PIECES[token] for token in tokens)


def first_stop(tokens, stop) -> int | None:
    """The smallest number of tokens whose text contains a stop string."""
    for count in range(len(tokens) + 1):
        if any(string in text_of(tokens[:count]) for string in stop):
            return count
    return None


@SETTINGS
@hypothesis.given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=30),
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 7),
)
def test_finds_the_first_token_that_completes_a_stop_string(tokens, stop, piece):
    stops = StopStrings(stop, text_of)
    expected = first_stop(tokens, stop)
    for end in [*range(piece, len(tokens), piece), len(tokens)]:
        found = stops(REQUEST, tokens[:end])
        if found is not None:
            break
    assert found == expected
    if expected is not None:
        cut = stops.cut(text_of(tokens[:expected]))
        assert not any(string in cut for string in stop)
        assert text_of(tokens).startswith(cut)
        assert any(text_of(tokens[:expected]).startswith(cut + string) for string in stop)


def test_requests_are_kept_apart():
    stops = StopStrings(["b"], text_of)
    other = Request(request_id=1, input_ids=[1], max_new_tokens=99)
    assert stops(REQUEST, [0, 0, 0, 0]) is None
    assert stops(other, [0, 1]) == 2
    assert stops(REQUEST, [0, 0, 0, 0, 0, 1, 1]) == 6


def test_text_is_cut_before_the_earliest_string():
    stops = StopStrings(["world", "lo"], text_of)
    assert stops.cut("hello world") == "hel"
    assert stops.cut("word") == "word"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="empty stop string"):
        StopStrings(["a", ""], text_of)
