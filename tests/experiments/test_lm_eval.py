import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import specjax
from experiments import score
from specjax import scoring
from specjax.errors import CapacityError, ConfigError
from tests import paths
from tests import tiny as models

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (specjax[eval])"
)
# The harness and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def adapter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from experiments import lm_eval_adapter
    return lm_eval_adapter


@pytest.fixture
def tiny_lm(adapter, tiny):
    return adapter.SpecjaxLM(tiny, dtype="float32")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def test_likelihoods_equal_the_logits(tiny):
    model = specjax.load(tiny, dtype="float32")
    rng = np.random.default_rng(0)
    pairs = []
    for context, continuation in ((5, 3), (1, 1), (40, 20), (3, 0), (17, 1), (9, 7)):
        ids = rng.integers(2, 1000, context + continuation).tolist()
        pairs.append((ids[:context], ids[context:]))
    # One continuation that the model would have written itself.
    pairs.append((pairs[0][0], []))
    for _ in range(4):
        text = [*pairs[-1][0], *pairs[-1][1]]
        top = int(models.full_logits(model.module, text)[-1].argmax())
        pairs[-1] = (pairs[-1][0], [*pairs[-1][1], top])
    found = dict(scoring.likelihoods(model, pairs))
    assert sorted(found) == list(range(len(pairs)))
    for index, (context, continuation) in enumerate(pairs):
        logs = _log_softmax(models.full_logits(model.module, [*context, *continuation]))
        logs = logs[len(context) - 1 :]
        chosen = logs[: len(continuation)][np.arange(len(continuation)), continuation]
        assert found[index].logprob == pytest.approx(chosen.sum(), abs=1e-4)
        greedy = logs[: len(continuation)].argmax(axis=-1).tolist() == list(continuation)
        assert found[index].is_greedy == greedy
    assert found[len(pairs) - 1].is_greedy and not found[0].is_greedy


def test_impossible_pairs_are_refused(tiny):
    model = specjax.load(tiny, dtype="float32")
    for pair in (([], [3]), ([3], [1024]), ([3] * 2048, [4, 5])):
        with pytest.raises(CapacityError):
            list(scoring.likelihoods(model, [pair]))


def test_the_adapter_without_the_harness_says_what_to_install():
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    with pytest.raises(ImportError, match=r"pip install specjax\[eval\]"):
        from experiments import lm_eval_adapter  # noqa: F401


def _requests(kind: str, arguments: list[tuple]):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(arguments)
    ]


@needs_harness
def test_loglikelihoods_equal_those_of_the_score_binary(run, tiny, tiny_lm, tmp_path):
    pairs = [("The quick brown", " fox"), ("", "The dog"), ("One two ", "three four five")]
    found = tiny_lm.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        whole = tiny_lm.tok_encode(context + continuation)
        if not context:
            whole = [tiny_lm.prefix_token_id, *tiny_lm.tok_encode(continuation, False)]
        start = len(tiny_lm.tok_encode(context.rstrip())) if context else 1
        source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        safetensors.numpy.save_file({"input_ids": np.asarray([whole], np.int32)}, source)
        flags = (
            f"--model={tiny}",
            "--dtype=float32",
            f"--input_ids_file={source}",
            f"--output={output}",
        )
        assert run(score, *flags)[0] == 0
        logs = _log_softmax(safetensors.numpy.load_file(output)["logits"][0])
        rows = np.arange(start - 1, len(whole) - 1)
        assert value == pytest.approx(logs[rows, whole[start:]].sum(), abs=1e-4)
        assert is_greedy == (logs[rows].argmax(axis=-1).tolist() == whole[start:])


@needs_harness
def test_special_ids_come_from_the_tokenizer_too(tiny, adapter, tmp_path):
    """A configuration without BOS and EOS, as the harness's own back end takes it."""
    source = Path(tiny)
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((source / name).read_text())
        (tmp_path / name).unlink()
        ids = {"bos_token_id": None, "eos_token_id": None}
        (tmp_path / name).write_text(json.dumps(content | ids))
    pairs = _requests("loglikelihood", [("", "the cat")])
    lm = adapter.SpecjaxLM(tmp_path, dtype="float32")
    assert (lm.prefix_token_id, lm.eot_token_id) == (0, 1)
    expected = adapter.SpecjaxLM(tiny, dtype="float32").loglikelihood(pairs, disable_tqdm=True)
    assert lm.loglikelihood(pairs, disable_tqdm=True) == expected
    lm.model.tokenizer.bos_token_id, lm.model.tokenizer.end_ids = None, ()
    with pytest.raises(ConfigError, match="pass prefix_token_id=ID"):
        lm.loglikelihood(pairs, disable_tqdm=True)
    assert adapter.SpecjaxLM(tmp_path, prefix_token_id=7).prefix_token_id == 7
    for wrong in (5000, "x", -1):
        with pytest.raises(ConfigError, match=f"prefix_token_id: {wrong!r} is no token id"):
            adapter.SpecjaxLM(tmp_path, prefix_token_id=wrong)


@needs_harness
def test_conversations_with_parts_and_with_a_begun_answer(tiny, adapter, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>")
    lm = adapter.SpecjaxLM(tiny, chat_template=str(template))
    user = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    begun = {"role": "assistant", "content": "Well"}
    assert lm.apply_chat_template([user]) == "<user>Hi</><bot>"
    continued = lm.apply_chat_template([user, begun], add_generation_prompt=False)
    assert continued == "<user>Hi</><assistant>Well"


@needs_harness
def test_rolling_likelihoods_equal_the_perplexity(tiny, adapter):
    lm = adapter.SpecjaxLM(tiny, dtype="float32", max_length=16)
    text = "The quick brown fox jumps over the lazy dog. " * 6
    ids = lm.tok_encode(text, add_special_tokens=False)
    [found] = lm.loglikelihood_rolling(
        _requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True
    )
    # Windows of 16 tokens, each after the token before it; the first after BOS.
    total = 0.0
    for begin in range(0, len(ids), 16):
        size = min(16, len(ids) - begin)
        window = (
            [lm.prefix_token_id, *ids[:16]] if begin == 0 else ids[begin + size - 17 : begin + size]
        )
        logs = _log_softmax(scoring.logits(lm.model, np.asarray([window]))[0])
        total += logs[np.arange(16 - size, 16), window[17 - size :]].sum()
    assert found == pytest.approx(total, abs=1e-3)


@needs_harness
def test_drafters_generate_the_same_texts(tiny, adapter):
    arguments = {"until": ["zz"], "max_gen_toks": 12, "do_sample": False}
    pairs = [
        ("The quick brown fox. The quick", arguments),
        ("One two", {**arguments, "max_gen_toks": 5}),
    ]
    plain = adapter.SpecjaxLM(tiny, dtype="float32")
    drafted = adapter.SpecjaxLM(tiny, drafter="ngram", draft_depth=3, dtype="float32", batch_size=2)
    expected = plain.generate_until(_requests("generate_until", pairs), disable_tqdm=True)
    assert drafted.generate_until(_requests("generate_until", pairs), disable_tqdm=True) == expected
    [reference] = plain.model.generate({"text": pairs[1][0]}, max_new_tokens=5)
    assert expected[1] == reference.text


_TASKS = {
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "tiny_generate": """
task: tiny_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "tiny_rolling": """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """Folder with local tasks over three questions."""
    data = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"What comes after {i}?", "choices": [f"{i + 1}", "none"], "answer": 0}
        for i in range(3)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in _TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return tmp_path


@needs_harness
def test_local_tasks_run(adapter, tiny, tasks, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    results = lm_eval.simple_evaluate(
        model="specjax",
        model_args=f"pretrained={tiny},drafter=ngram,dtype=float32",
        tasks=list(_TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    found = results["results"]
    assert 0 <= found["tiny_choice"]["acc,none"] <= 1
    assert found["tiny_generate"]["exact_match,none"] == 0
    assert found["tiny_rolling"]["word_perplexity,none"] > 1
    # The choices' likelihoods are the model's.
    [sample] = [s for s in results["samples"]["tiny_choice"] if s["doc_id"] == 1]
    lm = adapter.SpecjaxLM(tiny, dtype="float32")
    pairs = [("What comes after 1?", " 2"), ("What comes after 1?", " none")]
    expected = lm.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    # The harness rounds and stringifies what it logs.
    logged = [float(response[0][0]) for response in sample["resps"]]
    assert logged == pytest.approx([value for value, _ in expected], abs=1e-3)


@needs_harness
def test_the_command_line_knows_the_model(tiny, tasks):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.lm_eval_adapter", "run", "--model", "specjax"),
            *("--model_args", f"pretrained={tiny},drafter=nogram", "--tasks", "tiny_choice"),
            *("--include_path", str(tasks)),
        ],
        cwd=paths.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nogram" in done.stderr.splitlines()[-1]


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 3}, "model_args depth: unknown"),
        ({"drafter": "ngram", "num_nodes": 4}, "no option 'num_nodes'"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
    ],
)
def test_bad_arguments_are_refused(adapter, tiny, arguments, message):
    with pytest.raises(ConfigError, match=message):
        adapter.SpecjaxLM(tiny, **arguments)


@needs_harness
def test_generation_arguments_that_are_not_supported_are_refused(tiny_lm):
    with pytest.raises(ConfigError, match="num_beams"):
        tiny_lm._options({"until": [], "num_beams": 4})
    options = tiny_lm._options({"until": "x", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert options["temperature"] == 0.7 and options["top_p"] == 0.9 and options["stop"] == ["x"]
    assert "temperature" not in tiny_lm._options({"until": [], "temperature": 0.0})
