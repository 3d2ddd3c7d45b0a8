from experiments.shared import traces
from specjax.engine.trace import Step


def _step(**changes) -> Step:
    """A root with children 5 and 6, of which 6 has children 5 and 7; 6 and its 5 are accepted."""
    values = {
        "drafted": (5, 6, 5, 7),
        "parents": (-1, -1, 1, 1),
        "accepted": (6, 5),
        "token": 9,
        "kind": "bonus",
    }
    return Step(**values | changes)


def test_accepted_nodes_are_found_by_their_place_in_the_tree():
    assert traces.accepted_drafts(_step()) == [1, 2]
    assert traces.accepted_drafts(_step(accepted=())) == []


def test_a_step_as_a_line():
    line = traces.describe_step(3, _step())
    assert line.plain == "   3 5 6 5 7 [bonus: 9]"
    green = [
        line.plain[span.start : span.end].strip() for span in line.spans if span.style == "green"
    ]
    assert green == ["6", "5"]
    named = _step(drafted_text=("a", "b\n", "c", "d"), token_text=" e", kind="resampled")
    assert traces.describe_step(0, named).plain == "   0 a b\\n c d [resampled:  e]"
