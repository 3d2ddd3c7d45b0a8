"""The cost model on made-up measurements whose best tree is known."""

import json

import pytest

from specjax.drafters import tuning
from specjax.errors import ConfigError


def _costs(verify, propose=None, acceptance=None):
    acceptance = acceptance or {2: [40, 60], 4: [40, 30, 20, 10], 8: [30, 30, 20, 20]}
    propose = propose or {
        nodes: {1: 0.5, len(found) - 1: 1.5} for nodes, found in acceptance.items()
    }
    return tuning.Costs(verify_ms=verify, propose_ms=propose, acceptance=acceptance)


def test_predictions_are_the_formula():
    costs = _costs({1: 10.0, 4: 12.0, 8: 20.0})
    found = {(p.num_nodes, p.draft_depth): p for p in tuning.predictions(costs)}
    assert set(found) == {(1, 0), (2, 1), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)}
    deep = found[4, 2]
    assert deep.acceptance_length == pytest.approx(1 + (30 * 1 + 20 * 2 + 10 * 2) / 100)
    assert deep.step_ms == pytest.approx(12.0 + 1.0)  # drafting two levels: halfway
    assert deep.speedup == pytest.approx(10 * 1.9 / 13.0)
    assert found[2, 1].step_ms == pytest.approx(10 + 2 / 3 + 1.5)  # two rows: between 1 and 4


@pytest.mark.parametrize(
    ("verify", "nodes"),
    [
        ({1: 10.0, 8: 10.0}, 8),  # rows are free: the largest tree
        ({1: 10.0, 2: 10.1, 4: 12.0, 8: 30.0}, 4),
        ({1: 10.0, 2: 10.1, 4: 30.0, 8: 60.0}, 2),
        ({1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0}, 1),  # rows cost their number: nothing pays
    ],
)
def test_the_choice_follows_the_cost_of_rows(verify, nodes):
    assert tuning.choose(_costs(verify)).num_nodes == nodes


def test_a_gain_within_the_margin_is_none():
    costs = _costs({1: 10.0, 2: 15.0}, {2: {1: 0.0}}, {2: [40, 60]})
    assert tuning.choose(costs, margin=0.05).num_nodes == 2
    assert tuning.choose(costs, margin=0.1).num_nodes == 1


def test_files_come_back_and_others_are_refused(tmp_path):
    costs, path = _costs({1: 10.0, 8: 10.0}), tmp_path / "tuned.json"
    choice, spec = tuning.choose(costs), {"kind": "eagle", "num_nodes": 8}
    tuning.write(path, spec=spec, choice=choice, costs=costs, facts={"model": "m"})
    content = tuning.read(path)
    assert content["drafter"] == spec and content["model"] == "m"
    assert content["predicted"]["num_nodes"] == 8
    assert not list(tmp_path.glob("*.partial"))
    for bad in ("{", json.dumps({"format": "other"}), json.dumps([1])):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="not a file that"):
            tuning.read(path)
    with pytest.raises(FileNotFoundError, match="make it with"):
        tuning.read(tmp_path / "nothing.json")
