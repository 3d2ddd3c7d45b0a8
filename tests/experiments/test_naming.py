import pytest

from experiments.shared import naming

EAGLE = {"kind": "eagle", "model": "heads/a", "draft_depth": 6, "num_nodes": 60}


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (
            [{"kind": "none"}, {"kind": "ngram", "draft_depth": 7}, EAGLE],
            ["none", "ngram", "eagle"],
        ),
        ([EAGLE, EAGLE], ["eagle", "eagle"]),
        ([EAGLE, EAGLE | {"num_nodes": 8}], ["eagle(num_nodes=60)", "eagle(num_nodes=8)"]),
        ([EAGLE, EAGLE | {"model": "heads/b"}], ["eagle(model=a)", "eagle(model=b)"]),
        (
            [EAGLE, EAGLE | {"vocabulary_size": 8}],
            ["eagle", "eagle(vocabulary_size=8)"],
        ),
        (
            [{"kind": "hierarchical", "model": "x/m", "inner": EAGLE}, EAGLE],
            ["hierarchical-eagle", "eagle"],
        ),
        (
            [
                {"kind": "hierarchical", "inner": EAGLE},
                {"kind": "hierarchical", "inner": EAGLE | {"draft_depth": 3}},
            ],
            ["hierarchical-eagle(inner.draft_depth=6)", "hierarchical-eagle(inner.draft_depth=3)"],
        ),
    ],
)
def test_a_name_tells_what_tells_drafters_apart(specs, names):
    assert naming.short_names(specs) == names
