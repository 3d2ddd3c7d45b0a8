import itertools
import json

import pytest

from experiments import bench_decode, benchmarks, evaluate, generate, similarity
from experiments.shared import common, flags_drafter, preset
from specjax.drafters import registry
from specjax.errors import ConfigError
from specjax.quant import scheme as schemes


def _applied(*arguments: str, binary=evaluate):
    values = common.parse(binary.define_flags, arguments)
    preset.apply(values)
    return values


# SpecMQuant's tables 5.1 and 5.2: levels, children per node, nodes.
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama3-8b-fp16-baseline", {"kind": "none"}),
        (
            "llama3-8b-w4a8-qqq-g128-eagle",
            {"kind": "eagle", "model": "HEAD", "draft_depth": 6, "topk": 10, "num_nodes": 60},
        ),
        (
            "llama3-70b-w8a8-eagle",
            {"kind": "eagle", "model": "HEAD", "draft_depth": 6, "topk": 10, "num_nodes": 48},
        ),
        (
            "llama3-70b-w4a16-eagle-tuned",
            {"kind": "eagle", "model": "HEAD", "draft_depth": 3, "topk": 10, "num_nodes": 24},
        ),
        ("llama3-70b-w4a16-spec", {"kind": "lm", "model": "HEAD", "draft_depth": 6}),
        (
            "llama3-70b-w4a16-hierspec",
            {
                "kind": "hierarchical",
                "model": "HEAD",
                "min_draft_depth": 6,
                "inner": {
                    "kind": "eagle",
                    "model": "INNER",
                    "draft_depth": 3,
                    "topk": 10,
                    "num_nodes": 30,
                },
            },
        ),
        ("qspec-demo-w4a4", {"kind": "self", "scheme": "w4a4", "draft_depth": 3}),
    ],
)
def test_published_parameters(name, spec):
    arguments = ["--model=DIR", f"--preset={name}"]
    arguments += ["--draft_checkpoint=HEAD"] if "model" in spec else []
    arguments += ["--inner_checkpoint=INNER"] if "inner" in spec else []
    assert flags_drafter.spec(_applied(*arguments)) == spec


def test_all_configurations_of_the_reference_are_there():
    names = ("fp16", "w8a8", "w4a16", "w4a8-qqq", "w4a8-qqq-g128", "w4a8-qoq", "w4a8-qoq-g128")
    methods = ("baseline", "eagle", "spec", "hierspec")
    for size, weights, method in itertools.product(("8b", "70b"), names, methods):
        assert preset.lookup(f"llama3-{size}-{weights}-{method}")["dtype"] == "float16"


@pytest.mark.parametrize("name", preset.presets())
def test_every_preset_makes_a_valid_configuration(name):
    settings = preset.lookup(name)
    binary = similarity if "candidate" in settings else evaluate
    binary = bench_decode if "drafters" in settings else binary
    known = common.parse(binary.define_flags, ["--output=x"])
    unknown = set(settings) - set(known)
    assert not unknown
    given = [] if "model" in settings else ["--model=DIR"]
    inner = settings.get("drafter") == "hierarchical"
    needs_model = settings.get("drafter") in ("lm", "hierarchical", "medusa")
    given += ["--draft_checkpoint=DIR"] if needs_model else []
    given += ["--inner_checkpoint=DIR"] if inner else []
    values = _applied(f"--preset={name}", "--output=x", *given, binary=binary)
    if binary is evaluate:
        spec = flags_drafter.spec(values)
        registry.check(spec)
        if spec.get("scheme") is not None and spec["kind"] == "self":
            schemes.lookup(spec["scheme"])
    elif binary is similarity:
        schemes.lookup(values.candidate)
    if "benchmark" in settings:
        benchmarks.lookup(values.benchmark)


def test_given_flags_win():
    values = _applied("--preset=smollm2-gsm8k-ngram", "--limit=4", "--model=other")
    assert (values.limit, values.model, values.max_new_tokens) == (4, "other", 256)
    assert values.dtype == "float32" and values.benchmark == "gsm8k"
    values = _applied("--preset=llama3-8b-fp16-eagle", "--model=m", "--num_nodes=30")
    spec = flags_drafter.spec(values)
    assert (spec["num_nodes"], spec["draft_depth"]) == (30, 6)


def test_another_drafter_drops_the_options_of_the_presets_own():
    values = _applied("--preset=llama3-8b-fp16-eagle", "--model=m", "--drafter=ngram")
    assert flags_drafter.spec(values) == {"kind": "ngram"}
    assert values.dtype == "float16"
    values = _applied("--preset=llama3-8b-fp16-hierspec", "--model=m", "--drafter=none")
    assert flags_drafter.spec(values) == {"kind": "none"}


def test_wrong_names_are_refused():
    with pytest.raises(ConfigError, match="llama3-8b-w4a16-eagle"):
        _applied("--model=m", "--preset=llama3-8b-w4a16-eagel")
    with pytest.raises(ConfigError, match="--model is needed"):
        _applied("--preset=llama3-8b-fp16-baseline")


def test_the_names_are_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        _applied("--preset=list")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out.split()
    assert printed == list(preset.presets()) and len(printed) == len(set(printed)) > 60


def test_flags_of_nested_drafters():
    def spec(*arguments):
        values = common.parse(generate.define_flags, ["--model=m", *arguments])
        return flags_drafter.spec(values)

    hierarchical = ("--drafter=hierarchical", "--draft_checkpoint=D", "--min_draft_depth=2")
    assert spec(*hierarchical, "--inner_drafter=ngram") == {
        "kind": "hierarchical",
        "model": "D",
        "min_draft_depth": 2,
        "inner": {"kind": "ngram"},
    }
    inner = json.dumps({"kind": "eagle", "num_nodes": 5})
    found = spec(*hierarchical, f"--inner_drafter={inner}", "--inner_checkpoint=X")
    assert found["inner"] == {"kind": "eagle", "num_nodes": 5, "model": "X"}
    wrong = {
        ("--drafter=ngram", "--inner_drafter=ngram"): "--inner_drafter.*no option 'inner'",
        (*hierarchical, "--inner_drafter=ngram", "--inner_checkpoint=X"): "--inner_checkpoint",
        (*hierarchical, "--inner_checkpoint=X"): "needs --inner_drafter",
        (*hierarchical, "--inner_drafter=nogram"): "nogram",
        (*hierarchical,): "needs the option 'inner'",
        ("--drafter=none", "--draft_scheme=w4a4"): "--draft_scheme",
    }
    for arguments, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            spec(*arguments)
