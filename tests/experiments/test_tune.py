"""experiments.tune on tiny models: what it writes runs, and says so where it does not fit."""

import json

import pytest

from experiments import generate, tune
from experiments.shared import common, flags_drafter
from specjax.errors import ConfigError
from tests import paths


def _tune(tmp_path, *arguments):
    flags = [f"--model={paths.fixture('tiny-fp16')}", f"--output={tmp_path / 'tuned.json'}"]
    flags += [
        "--limit=2",
        "--max_new_tokens=8",
        "--repeats=2",
        f"--prompts_file={_prompts(tmp_path)}",
    ]
    tune.main(common.parse(tune.define_flags, [*flags, *arguments]))
    return json.loads((tmp_path / "tuned.json").read_text())


def _prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": f"Once {i}"}) + "\n" for i in range(3)))
    return path


@pytest.mark.parametrize(
    "drafter",
    [
        ["--drafter=ngram"],
        pytest.param(
            [f"--draft_checkpoint={paths.fixture('eagle2-tiny')}"], marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
def test_the_choice_runs(drafter, tmp_path):
    content = _tune(tmp_path, *drafter, "--sizes=2,4")
    costs = content["costs"]
    assert sorted(costs["verify_ms"]) == ["1", "2", "4"]
    assert sum(costs["acceptance"]["4"]) > 0
    assert content["drafter"]["kind"] in ("none", "ngram", "eagle")
    flags = [f"--model={paths.fixture('tiny-fp16')}", f"--tuned={tmp_path / 'tuned.json'}"]
    values = common.parse(generate.define_flags, [*flags, "--prompt=a"])
    assert flags_drafter.spec(values) == content["drafter"]
    values = common.parse(generate.define_flags, [*flags, "--prompt=a", "--num_nodes=4"])
    with pytest.raises(ConfigError, match="drop --num_nodes"):
        flags_drafter.spec(values)


def test_bad_sizes_are_refused(tmp_path):
    for sizes, message in (("1", "at least 2"), ("x", "whole numbers"), ("500", "do not fit")):
        with pytest.raises(ConfigError, match=message):
            _tune(
                tmp_path,
                f"--draft_checkpoint={paths.fixture('eagle2-tiny')}",
                f"--sizes={sizes}",
                "--draft_topk=2",
            )
    with pytest.raises(ConfigError, match="neither"):
        _tune(tmp_path, "--drafter=none")
