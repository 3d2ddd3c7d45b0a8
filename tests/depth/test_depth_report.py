"""The report on routed depth: its measures by hand, its rows end to end."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import depth_report
from experiments.shared import common
from specjax.checkpoints import export
from specjax.depth import predictor
from specjax.errors import ConfigError
from specjax.models import prepare
from specjax.training.depth import adapter as adapters
from tests.depth.test_checkpoint import trained

pytestmark = pytest.mark.usefixtures("hurried")


def test_agreement_by_hand():
    found = depth_report.agreement([[1, 2, 3], [4, 9, 6, 7]], [[1, 2, 3], [4, 5, 6]])
    # Of 3 + 4 positions 3 + 2 agree, and 3 + 1 come before a difference; a longer output differs behind the other.
    assert found == {
        "agreement": round(5 / 7, 4),
        "agreeing_prefix": round(4 / 7, 4),
        "outputs_equal": 1,
        "prompts": 2,
    }


def test_bytes_by_hand():
    module = adapters.routed(*trained())
    sizes = [prepare.weight_bytes(layer) for layer in module.model.layers]
    assert sizes == [4 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32 + 64)] * 3
    found = depth_report.bytes_read(module, np.array([1.0, 0.5, 0.25]))
    routers = 2 * 4 * (24 * 32 + 24 + 24 + 2 * 24 + 2)
    rest = 4 * (16 * 32 + 32)
    assert found == {
        "weight_bytes_per_pass": round(1.75 * sizes[0]) + rest + routers,
        "weight_bytes_of_all_layers": 3 * sizes[0] + rest,
        "router_bytes": routers,
    }


class Report:
    """The binary on a tiny routed model, its base and a predictor, in a folder."""

    def __init__(self, folder):
        base, adapter = trained()
        module = adapters.routed(base, adapter)
        export.export(module, module.config, folder / "routed", format="dense")
        export.export(base, base.config, folder / "base", format="dense")
        scorer = predictor.Predictor(jnp.linspace(-1, 1, 32), jnp.float32(0), layer=2)
        predictor.save(scorer, folder / "scorer", {})
        prompts = folder / "prompts.jsonl"
        rows = [{"input_ids": [i, 3, 2 * i]} for i in range(3)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.output = folder / "report.jsonl"
        self.flags = [f"--model={folder / 'routed'}", "--label=tiny", "--drafter=ngram"]
        self.flags += ["--draft_depth=3", "--ngram_min=1", "--max_new_tokens=16"]
        self.flags += [f"--prompts_file={prompts}", f"--output={self.output}"]

    def run(self, *more):
        """The rows by id, in order."""
        values = common.parse(depth_report.define_flags, [*self.flags, *more])
        depth_report.main(values)
        return {row["id"]: row for row in map(json.loads, self.output.read_text().splitlines())}


def test_rows_and_resuming(tmp_path, capsys):
    report = Report(tmp_path)
    found = report.run()
    assert list(found) == ["tiny: token by token", "tiny: off"]
    plain, off = found.values()
    assert plain["steps"] == 3 * 15 and plain["acceptance_length"] == 1
    assert off["agreement"] == plain["agreement"] == 1 and off["outputs_equal"] == 3
    assert off["lossless"] and off["nodes"] == 4
    assert 0.34 < plain["executed_fraction"] < off["executed_fraction"]
    assert plain["layer_runs_per_pass"][0] == 1
    before = report.output.read_text()
    report.run()
    assert report.output.read_text() == before
    with pytest.raises(ConfigError, match=r"max_new_tokens; give another --label"):
        report.run("--max_new_tokens=17")
    with pytest.raises(ConfigError, match="has no routers"):
        report.run(f"--model={tmp_path / 'base'}", "--label=base")
    capsys.readouterr()


@pytest.mark.slow
def test_all_ways_to_decode_and_perplexity(tmp_path, capsys):
    report = Report(tmp_path)
    flags = [f"--predictor={tmp_path / 'scorer'}", "--survivors=2"]
    found = report.run(*flags, f"--reference={tmp_path / 'base'}")
    modes = ["token by token", "off", "vote", "prune", "perplexity"]
    assert list(found) == [f"tiny: {mode}" for mode in modes]
    pruned, scored = found["tiny: prune"], found["tiny: perplexity"]
    assert (pruned["nodes"], pruned["drafted_nodes"], pruned["lossless"]) == (2, 4, False)
    assert scored["tokens"] == 48 and scored["references"]["base"] > 1
    table = report.output.with_suffix(".md").read_text()
    assert table.count("| tiny |") == 5 and "prune (lossy)" in table
    capsys.readouterr()
