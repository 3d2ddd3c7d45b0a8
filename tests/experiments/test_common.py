import pytest
from absl import flags

from experiments import generate
from experiments.shared import common, environment, flags_drafter, flags_model, naming
from specjax.errors import ConfigError
from tests.experiments import binaries


def _values(*arguments: str) -> flags.FlagValues:
    return common.parse(generate.define_flags, ["--model=m", *arguments])


@pytest.mark.parametrize(
    ("arguments", "spec"),
    [
        ([], {"kind": "none"}),
        (["--drafter=ngram"], {"kind": "ngram"}),
        (
            ["--drafter=ngram", "--ngram_max=5", "--ngram_min=1", "--draft_depth=3"],
            {"kind": "ngram", "ngram_max": 5, "ngram_min": 1, "draft_depth": 3},
        ),
        (
            ["--drafter=lm", "--draft_checkpoint=DIR"],
            {"kind": "lm", "model": "DIR"},
        ),
        (
            ["--drafter=eagle", "--draft_topk=4", "--num_nodes=9", "--draft_vocabulary_size=64"],
            {"kind": "eagle", "topk": 4, "num_nodes": 9, "vocabulary_size": 64},
        ),
        (
            ['--drafter={"kind": "lm", "model": "DIR"}', "--draft_depth=2"],
            {"kind": "lm", "model": "DIR", "draft_depth": 2},
        ),
    ],
)
def test_a_spec_is_made_of_flags(arguments, spec):
    assert flags_drafter.spec(_values(*arguments)) == spec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter=nogram"], "'nogram'.*supported"),
        (["--drafter=ngram", "--num_nodes=8"], "--num_nodes: drafter 'ngram' has no option"),
        (["--drafter=none", "--draft_depth=8"], "--draft_depth: drafter 'none' has no option"),
        (['--drafter={"kind": "ngram"'], "not valid JSON"),
        (['--drafter={"depth": 3}'], "'kind'"),
        (['--drafter={"kind": ["ngram"]}'], "'kind'"),
        (['--drafter={"kind": "ngram", "depth": 3}'], "no option 'depth'"),
        (['--drafter={"kind": "ngram", "draft_depth": 3}', "--draft_depth=4"], "draft_depth.*too"),
        (["--drafter=lm"], "needs the option 'model'"),
    ],
)
def test_a_wrong_spec_names_the_flag_or_option(arguments, message):
    with pytest.raises(ConfigError, match=message):
        flags_drafter.spec(_values(*arguments))


def test_full_spec_writes_out_defaults():
    spec = naming.full_spec({"kind": "ngram", "draft_depth": 3})
    assert spec["draft_depth"] == 3
    assert spec["ngram_max"] >= spec["ngram_min"]
    assert naming.full_spec({"kind": "lm", "model": "DIR"})["model"] == "DIR"


def test_label_shows_what_was_given():
    assert naming.label({"kind": "ngram"}) == "ngram"
    assert naming.label({"kind": "ngram", "draft_depth": 3}) == "ngram(draft_depth=3)"


def test_self_speculation_under_another_scheme_keeps_the_codes():
    self_spec = {"kind": "self", "scheme": "w4a4"}
    assert flags_model.dequantize(_values(), [{"kind": "none"}, self_spec]) == "never"
    assert flags_model.dequantize(_values(), [{"kind": "self"}, {"kind": "ngram"}]) == "auto"
    assert flags_model.dequantize(_values("--dequantize=load"), [self_spec]) == "load"
    # Its target is the model in the middle.
    nested = {"kind": "hierarchical", "model": "m", "inner": self_spec}
    assert flags_model.dequantize(_values(), [nested]) == "auto"


def test_importing_binaries_defines_no_flags():
    assert "drafter" not in flags.FLAGS


@pytest.mark.parametrize(
    "argument",
    [
        *("--dtype=float64", "--backend=cuda", "--temperature=-1", "--max_new_tokens=0"),
        *("--top_p=1.5", "--batch_size=0", "--acceptance=yes", "--no_such_flag=1", "stray"),
    ],
)
def test_unknown_flags_and_values_are_refused(argument):
    with pytest.raises(flags.Error, match=argument.strip("-").split("=")[0]):
        _values(argument)


def test_environment_names_versions_and_device():
    record = environment.record()
    assert record["jax"] and record["specjax"] and record["device_kind"] and record["command"]


def test_bad_input_is_one_line_and_exit_code_2():
    done = binaries.process("generate", "--model=no/such/model.gguf", "--prompt=x")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "no/such/model.gguf" in done.stderr


def test_a_wrong_flag_value_fails_with_its_name():
    done = binaries.process("generate", "--model=m", "--prompt=x", "--dtype=float64")
    assert done.returncode not in (0, None)
    assert "dtype" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
