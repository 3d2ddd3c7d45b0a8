"""`--help` of every binary: each flag once, under a heading; and what is said about flags that do not exist."""

import re

import pytest
from absl import flags

from experiments import generate
from experiments.shared import flag_groups, flags_sampling
from tests.experiments import binaries


def _help(name: str) -> tuple[flags.FlagValues, str]:
    binary = binaries.load(name)
    values = binaries.flags_of(binary)
    return values, flag_groups.help_text(values, set(values), binary)


@pytest.mark.parametrize("name", binaries.with_flags())
def test_every_flag_is_listed_once_under_one_heading(name):
    values, text = _help(name)
    groups = flag_groups.grouped(values)
    headed = [flag.name for found in groups.values() for flag in found]
    assert sorted(headed) == sorted(values)
    printed = re.findall(r"^  --(?:\[no\])?(\w+)", text, re.M)
    assert printed == headed
    headings = re.findall(r"^(\w+):\n  --", text, re.M)
    assert headings == list(groups) == [h for h in flag_groups.HEADINGS if h in groups]


@pytest.mark.parametrize("name", binaries.with_flags())
def test_help_begins_with_what_the_binary_is_for_and_one_example(name):
    _, text = _help(name)
    summary, example, first = text.split("\n\n")[:3]
    assert " ".join(summary.split()) in " ".join(binaries.load(name).__doc__.split())
    assert f"python -m experiments.{name}" in example
    assert first.partition(":")[0] in flag_groups.HEADINGS
    assert max(map(len, text.split("\n"))) <= flag_groups.WIDTH


def test_defaults_choices_and_needs_are_shown():
    _, text = _help("train_eagle")
    shown = " ".join(text.split())
    for line in (
        "--model=TEXT The target: checkpoint folder, .gguf file, model name or hub id. (required)",
        "--total_steps=INTEGER Optimizer steps. (default: 2000)",
        "--temperature=NUMBER Of the answers. (default: 0.7)",
        "--loss_on=all|response Which tokens count. (default: response)",
        "--[no]overwrite Replace --output of another run. (default: off)",
        "--text_file=TEXT Text to train on (.jsonl, .json, .txt); may be repeated.",
        "--num_heads=INTEGER Medusa heads. (default: 4)",
    ):
        assert line in shown
    _, text = _help("report")
    assert "--formats=A,B,... Of the figures. (default: png,svg)" in " ".join(text.split())


def test_a_flag_without_a_heading_comes_last():
    values = binaries.flags_of(generate)
    values["late"] = flags.BooleanFlag("late", False, "Added by somebody in a hurry.")
    text = flag_groups.help_text(values, set(values), generate)
    assert text.index("Other:\n  --[no]late") > text.index("Execution:")


def test_flags_of_an_inner_heading_stay_there_and_an_unknown_one_is_refused():
    plain, nested = flags.FlagValues(), flags.FlagValues()
    flags_sampling.define(plain)
    with flag_groups.heading(nested, "Training"):
        flags_sampling.define(nested)
    names = lambda values: {h: [f.name for f in g] for h, g in flag_groups.grouped(values).items()}
    assert names(nested) == names(plain)
    with pytest.raises(ValueError, match="'Trainin'"), flag_groups.heading(nested, "Trainin"):
        pass


def test_the_process_prints_help_and_refuses_unknown_flags():
    helped = binaries.process("report", "-h")
    assert helped.returncode == 0
    assert helped.stdout.startswith("Tables and figures from result files")
    assert "--inputs=A,B,..." in helped.stdout and "--verbosity" not in helped.stdout
    wrong = binaries.process("report", "--ouput=x")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1
    assert "Did you mean: inputs, output" in wrong.stderr
    full = binaries.process("report", "--helpfull")
    assert "--verbosity" in full.stdout and "--inputs" in full.stdout


def test_a_flag_that_takes_over_a_short_name_is_no_flag_of_a_binary():
    assert not {"h", "help", "helpshort"} & set(binaries.flags_of(generate))
