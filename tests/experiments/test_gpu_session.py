"""The session on a GPU: what hangs, dies or is missing costs its own time, and every command parses."""

import importlib
import json
import os
import re
import subprocess
import sys
import time

import pytest

from experiments import gpu_session
from experiments.shared import common, steps
from experiments.shared.steps import Step
from tests import paths

SHELL = {
    "quick": "echo known > {out}/quick.jsonl",
    "hangs": "sleep 1000 & echo before; sleep 1000",
    "dies": "kill -SEGV $$",
    "fails": "echo what; exit 3",
}


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shell(name: str, seconds: float = 30) -> Step:
    return Step(name=name, seconds=seconds, command=("bash", "-c", SHELL.get(name, name)))


def test_every_step_has_its_lines_whatever_the_others_do(tmp_path):
    told, begin = [], time.monotonic()
    session = steps.Session(folder=tmp_path, seconds=30, most_bytes=20_000, tell=told.append)
    large = Step(name="large", seconds=9, command=("bash", "-c", "head -c 60000 /dev/zero"))
    absent = Step(name="absent", seconds=9, command=("no-such-tool",))
    both = (shell("hangs", 1.0), shell("dies"))
    rows = session.run([shell("quick"), both, absent, large, shell("fails")])
    assert time.monotonic() - begin < 15
    states = {row["step"]: row["state"] for row in rows}
    assert states == {
        **{"quick": "done", "hangs": "timed out", "dies": "failed", "absent": "missing"},
        **{"large": "done", "fails": "failed"},
    }
    of = {row["step"]: row for row in rows}
    assert of["hangs"]["last_lines"] == "before\n" and 0.9 < of["hangs"]["seconds"] < 5
    assert of["dies"]["status"] == -11 and of["fails"]["status"] == 3
    assert (tmp_path / "quick.jsonl").read_text() == "known\n"
    written = rows_of(tmp_path / "session.jsonl")
    assert written == told and not (tmp_path / "large.log").exists()
    assert next(row["step"] for row in written if row["state"] == "started") == "quick"
    assert any(row["state"] == "dropped" and row["file"] == "large.log" for row in written)


def test_nothing_is_begun_when_the_time_is_up(tmp_path):
    session = steps.Session(folder=tmp_path, seconds=1.5)
    rows = session.run([shell("hangs"), shell("quick")])
    assert [row["state"] for row in rows] == ["timed out", "no time"]
    assert not (tmp_path / "quick.log").exists()


def every_step(*arguments: str, scratch) -> list[Step]:
    values = common.parse(gpu_session.define_flags, ["--output=OUT", *arguments])
    groups = gpu_session.chosen(values, scratch)
    return [step for group in groups for step in (group if isinstance(group, tuple) else (group,))]


@pytest.mark.parametrize("arguments", [(), ("--kernels=tests.doctor.fakes:stuck",)])
def test_commands_of_steps_parse(arguments, tmp_path):
    found = every_step(*arguments, scratch=tmp_path)
    assert len({step.name for step in found}) == len(found) > 10
    parsed = 0
    for step in found:
        words = [word.replace("{out}", str(tmp_path)) for word in step.command]
        modules = [word for word in words if word.startswith("experiments.")]
        if modules:
            after = words[words.index(modules[0]) + 1 :]
            common.parse(importlib.import_module(modules[0]).define_flags, after)
            parsed += 1
    assert parsed == len(found) - 1  # all but the tests
    assert all((paths.REPOSITORY / name).is_file() for name in gpu_session._TESTS)


def test_all_files_with_tests_for_gpus_are_run():
    marked = {
        path.relative_to(paths.REPOSITORY).as_posix()
        for path in (paths.REPOSITORY / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu$", path.read_text(encoding="utf-8"), re.M)
    }
    assert marked == set(gpu_session._TESTS)


def test_jax_stays_out_of_the_parent():
    code = "import sys, experiments.gpu_session; print('jax' in sys.modules or 'specjax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


def test_unknown_steps_are_refused(tmp_path):
    with pytest.raises(gpu_session.flags.ValidationError, match="'smoke' is unknown; known: versi"):
        every_step("--steps=smoke", scratch=tmp_path)


@pytest.mark.slow
def test_a_session_on_a_cpu_with_kernels_that_hang_and_die(tmp_path):
    """Stand-ins for kernels: that of int8 weights hangs, attention takes its process down, the others are right."""
    begin, seconds = time.monotonic(), 280
    chosen = "--steps=versions,doctor,loops,numerics,profile,tests"
    command = [sys.executable, "-m", "experiments.gpu_session", f"--output={tmp_path}"]
    command += [f"--seconds={seconds}", "--kernels=tests.doctor.fakes:stuck"]
    command += ["--model_shape=smollm2-135m", "--parallel=2", chosen]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=paths.REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert time.monotonic() - begin < seconds + 15
    rows = [row for row in rows_of(tmp_path / "session.jsonl") if row["state"] != "started"]
    names = [step.name for step in every_step(chosen, scratch=tmp_path)]
    assert sorted(row["step"] for row in rows) == sorted(names) and done.returncode == 1
    state = {row["step"]: row["state"] for row in rows}
    sound = ("versions", "numerics-0", "numerics-1", "numerics-2", "loop-off", "tests")
    assert all(state[name] == "done" for name in sound), rows
    assert state["doctor"] == "failed"
    families = {row["op"]: row for row in rows_of(tmp_path / "doctor.jsonl") if "op" in row}
    assert families["tree_attention"]["reason"].startswith("it was ended by SIGSEGV")
    assert "no answer in" in families["matmul_w8a16"]["reason"]
    assert families["matmul_w4a8"]["state"] == families["glue"]["state"] == "passes"
    numbers = [row for row in rows_of(tmp_path / "numerics-2.jsonl") if "op" in row]
    errors = {op: [row.get("error") for row in numbers if row["op"] == op] for op in families}
    assert "no answer in 20 s" in errors["matmul_w8a16"][0]
    assert "hung or died 2 times" in errors["matmul_w8a16"][-1]
    assert "SIGSEGV" in errors["tree_attention"][0] and set(errors["matmul_w8a8"]) == {None}
