"""The harness of the kernels on a CPU, the references standing in for them: what a first run on a GPU relies on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import bench_kernel
from experiments.shared import common, kernel_jobs, kernel_server, kernel_tuning
from experiments.shared import kernel_timing as timing
from specjax.errors import ConfigError, SpecjaxError
from specjax.pallas import device, tuned
from specjax.pallas.matmul import specs, tiles
from specjax.pallas.tree_attention import mosaic as attention
from specjax.pallas.tree_attention import reference as attention_reference

GPU = tiles.typical((9, 0))


@pytest.fixture
def small(monkeypatch):
    """Weights of 128 outputs and few inputs in place of those of models; chains of two links, run once."""
    monkeypatch.setattr(specs, "MODELS", {"llama3-8b": {"o": (128, 256)}})
    monkeypatch.setattr(specs, "UNEVEN_INPUTS", (640,))
    monkeypatch.setattr(timing, "LINKS", 2)
    monkeypatch.setattr(timing, "_REPEATS", 1)


@pytest.fixture
def stand_in(small, monkeypatch):
    """The references as kernels, on a device that passes for a GPU."""

    def kernel(names, arch, x, *weights, config=None):
        return kernel_jobs.matmul_reference(names, x, *weights)

    monkeypatch.setattr(kernel_jobs, "matmul_kernel", kernel)
    monkeypatch.setattr(attention, "tree_attention", attention_reference.tree_attention)
    monkeypatch.setattr(kernel_server.Server, "_gpu", lambda server: GPU)
    limits = {"read_bandwidth": lambda: 1e12, "matmul_rate": lambda: 1e14}
    monkeypatch.setattr(kernel_server, "LIMITS", limits)


@pytest.fixture
def instant(monkeypatch):
    """Nothing is timed: every call takes a microsecond."""
    monkeypatch.setattr(timing, "seconds_per_call", lambda *args, **kwargs: [1e-6] * 7)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("op", kernel_jobs.OPS)
def test_kernel_and_reference_agree_on_shapes(op, small, monkeypatch):
    """Every variant of every op: both take the arguments that are drawn for them, and return alike."""
    with device.targeting(GPU):
        for request in kernel_jobs.requests([op], ["llama3-8b"], [3], [61]):
            server = kernel_server.Server()
            monkeypatch.setattr(server, "_gpu", lambda: GPU)
            job = server._job(dataclasses.asdict(request))
            given = jax.eval_shape(job.draw_x, 1), *jax.eval_shape(job.draw_weights, 2)
            kernel, reference = (jax.eval_shape(run, *given) for run in (job.kernel, job.reference))
            assert (kernel.shape, kernel.dtype) == (reference.shape, reference.dtype), request


@pytest.mark.slow
@pytest.mark.parametrize("op", ["matmul_w4a8", None])
def test_every_row_is_there_correct_and_timed(op, stand_in, instant, tmp_path):
    """All variants of an op, or all that the default flags ask for; --m and --contexts only for less work."""
    output = tmp_path / "rows.jsonl"
    arguments = ["--m=3", "--contexts=61", f"--output={output}"] + [f"--ops={op}"] * bool(op)
    bench_kernel.main(common.parse(bench_kernel.define_flags, [*arguments, "--noprocesses"]))
    first, *rows = rows_of(output)
    assert first["record"] == "device" and first["read_bandwidth"] == 1e12
    assert {row["op"] for row in rows} == ({op} if op else set(bench_kernel.OPS))
    for row in rows:
        assert row.get("error") is None and row["correct"] and row["us"] >= 0, row
        assert row["roofline_us"] > 0


def test_what_a_kernel_raises_is_its_row_and_the_others_go_on(
    stand_in, instant, monkeypatch, tmp_path, capsys
):
    output, seen = tmp_path / "rows.jsonl", []

    def kernel(names, arch, x, *weights, config=None):
        seen.append(len(rows_of(output)))
        if len(x) == 1:
            raise NotImplementedError("no layout\nfor one row")
        out = kernel_jobs.matmul_reference(names, x, *weights)
        return out * jnp.nan if len(x) == 2 else out

    monkeypatch.setattr(kernel_jobs, "matmul_kernel", kernel)
    arguments = ["--ops=matmul_w8a8", "--m=1,2,3", f"--output={output}"]
    bench_kernel.main(common.parse(bench_kernel.define_flags, [*arguments, "--noprocesses"]))
    _, *rows = rows_of(output)
    assert [row["rows"] for row in rows] == [1, 2, 3] * (len(rows) // 3)
    assert rows[0]["error"] == "NotImplementedError: no layout for one row"
    assert rows[1]["correct"] is False and rows[1]["relative_error"] is None
    assert rows[2]["correct"] and {"us", "xla_us", "cublas_bf16_us"} <= set(rows[2])
    # Rows are in the file before the next kernel begins.
    assert sorted(set(seen)) == list(range(1, len(rows) + 1))
    printed = capsys.readouterr().out
    assert "NotImplementedError" in printed and "WRONG" in printed


def test_after_a_fault_of_the_device_the_others_are_named_as_not_run(
    stand_in, monkeypatch, tmp_path
):
    output = tmp_path / "rows.jsonl"

    def kernel(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_MISALIGNED_ADDRESS")

    monkeypatch.setattr(kernel_jobs, "matmul_kernel", kernel)
    monkeypatch.setattr(timing, "device_answers", lambda: False)
    arguments = ["--ops=matmul_w8a8", "--m=1,2", f"--output={output}"]
    bench_kernel.main(common.parse(bench_kernel.define_flags, [*arguments, "--noprocesses"]))
    _, first, *rest = rows_of(output)
    assert "MISALIGNED" in first["error"] and first["device_lost"]
    assert rest and all("the device was lost in matmul_w8a8" in row["error"] for row in rest)


def test_unknown_ops_and_numbers_are_refused(stand_in):
    for flag, message in (("--ops=matmul", "op='matmul' is unknown"), ("--m=x", "whole numbers")):
        with pytest.raises(ConfigError, match=message):
            bench_kernel.main(common.parse(bench_kernel.define_flags, [flag, "--noprocesses"]))


def test_the_device_answers_and_a_chain_runs_each_link():
    assert timing.device_answers()
    x, weights = jnp.ones((2, 4)), [(jnp.full((4,), i),) for i in (1.0, 2.0)]
    assert len(timing.seconds_per_call(lambda x, w: x * w, x, weights, links=3)) > 1


@pytest.mark.slow
def test_kernels_that_hang_or_take_their_process_down_cost_their_rows_only(tmp_path):
    output = tmp_path / "rows.jsonl"
    arguments = ["--ops=tree_attention,matmul_w8a16,matmul_w8a8", "--shapes=smollm2-135m", "--m=1"]
    arguments += ["--contexts=61", "--notimes", "--kernels=tests.doctor.fakes:stuck"]
    arguments += ["--kernel_seconds=8", f"--output={output}"]
    bench_kernel.main(common.parse(bench_kernel.define_flags, arguments))
    _, *rows = rows_of(output)
    of = {op: [row for row in rows if row["op"] == op] for op in bench_kernel.OPS}
    (died,) = of["tree_attention"]
    assert "SIGSEGV (the kernel, to compare)" in died["error"]
    stuck = [row["error"] for row in of["matmul_w8a16"]]
    assert all("no answer in 8 s" in error for error in stuck[:2])
    assert stuck[2:] and all("hung or died 2 times" in error for error in stuck[2:])
    assert all(row["correct"] for row in of["matmul_w8a8"]) and len(of["matmul_w8a8"]) == 4


def tune(tmp_path, seconds: float = 600):
    worker = kernel_server.Local(kernel_server.Server())
    arguments = ["matmul_w8a16"], ["llama3-8b"], [1, 8], GPU, worker
    return kernel_tuning.write_tuned(*arguments, seconds=seconds, folder=tmp_path)


@pytest.fixture
def timed(stand_in, monkeypatch):
    """Counts draws; time by configuration: more stages are faster, two tiles a step do not lower."""
    draws = []
    draw = kernel_jobs.draw_weight
    monkeypatch.setattr(
        kernel_jobs, "draw_weight", lambda spec, seed: draws.append(spec) or draw(spec, seed)
    )

    def seconds(kernel, x, weights, links):
        config = kernel.keywords["config"]
        if config.tiles_per_step == 2:
            raise NotImplementedError("no such tiles")
        return [1.0 / config.num_stages]

    monkeypatch.setattr(timing, "seconds_per_call", seconds)
    return draws


def test_tuning_writes_the_fastest_tiles_that_run(timed, tmp_path):
    ((path, names),) = tune(tmp_path).items()
    entries = tuned.parse(path.read_text(), str(path))
    assert names == list(specs.of("matmul_w8a16")) and len(entries) >= 3
    stages = {row["num_stages"] for entry in entries.values() for row in entry["rows"].values()}
    assert stages == {6}
    assert len(timed) == 2 * len(names)  # two copies of each weight, for all row tiles


def test_tuning_stops_when_time_is_up(timed, tmp_path):
    assert tune(tmp_path, seconds=-1) == {} and not list(tmp_path.rglob("*.json"))


def test_tuning_keeps_what_it_wrote_before_the_device_was_lost(timed, monkeypatch, tmp_path):
    before, lost = timing.seconds_per_call, []

    def seconds(kernel, x, weights, links):
        if x.shape[1] == 640:
            lost.append(x)
            raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR")
        return before(kernel, x, weights, links)

    monkeypatch.setattr(timing, "seconds_per_call", seconds)
    monkeypatch.setattr(timing, "device_answers", lambda: not lost)
    with pytest.raises(SpecjaxError, match="device was lost"):
        tune(tmp_path)
    (path,) = tmp_path.rglob("*.json")
    assert (
        len(tuned.parse(path.read_text(), str(path))) == 2
    )  # the weights of 256 inputs that came before
