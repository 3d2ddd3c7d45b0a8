"""Families that do not compile, compute wrong numbers, hang and die: verdicts, quarantine, and what runs then."""

import concurrent.futures
import dataclasses
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import doctor
from specjax.doctor import cases, verdicts
from specjax.pallas import device, dispatch
from specjax.pallas.matmul import backends, tiles
from specjax.pallas.matmul.api import matmul
from specjax.quant.scheme import lookup
from tests import paths
from tests.quant import random_linears

FAKES = "tests.doctor.fakes:checker"


def fake(op: str) -> doctor.Family:
    return doctor.Family(op=op, entry=FAKES, arguments={"op": op})


@pytest.fixture(scope="module")
def found() -> doctor.Verdicts:
    """One run for all assertions; only where something hangs is there little time."""
    told = []
    ops = ("matmul_w8a16", "matmul_w4a16", "tree_attention", "matmul_w8a8")
    others = [fake(op) for op in ops]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hurried = doctor.Limits(case_seconds=3, parallel=1)
        hanging = pool.submit(doctor.check, [fake("glue")], hurried)
        rest = doctor.check(others, doctor.Limits(parallel=2), told.append)
        both = rest.families + hanging.result().families
    assert {verdict.op for verdict in told} == {family.op for family in others}
    return dataclasses.replace(rest, families=both)


def test_every_way_of_failing_has_its_verdict(found):
    of = {verdict.op: verdict for verdict in found.families}
    for op, words in {
        "matmul_w8a16": ("NotImplementedError: no such layout for these registers",),
        "matmul_w4a16": ("four ones: wrong numbers", "5.0e-01"),
        "glue": ("no answer in 3 s", "compiling four ones"),
        "tree_attention": ("ended by SIGSEGV", "compiling four ones"),
    }.items():
        assert of[op].state == "fails" and all(word in of[op].reason for word in words), of[op]
    assert of["matmul_w8a8"].state == "passes" and of["matmul_w8a8"].cases == 2
    assert {entry.op for entry in found.policy().quarantine} == set(of) - {"matmul_w8a8"}
    assert found.command_buffers() == "loop"


@pytest.mark.slow
def test_what_says_nothing_about_a_family_does_not_forbid_it():
    families = [
        fake("matmul_w4a4"),
        doctor.Family(op="absent", entry="tests.doctor.fakes:absent", arguments={}),
        doctor.Family(op="unwell", entry="tests.doctor.fakes:unwell", arguments={}),
    ]
    made = doctor.check(families, doctor.Limits(parallel=2))
    in_graphs, absent, unwell = made.families
    assert in_graphs.state == "passes"
    assert "SIGKILL (running a loop of 2)" in in_graphs.graphs["loop"]
    assert absent.state == "unavailable" and absent.reason == "no such GPU"
    assert unwell.state == "unchecked" and "SYSTEM_NOT_READY" in unwell.reason
    assert not made.policy().quarantine and made.command_buffers() == "body"
    late = doctor.check(families, doctor.Limits(total_seconds=0))
    assert {verdict.state for verdict in late.families} == {"unchecked"}
    assert "time" in late.families[0].reason


def test_verdicts_are_kept_until_something_changes(found, tmp_path, caplog):
    path = verdicts.write(tmp_path / "new", found)
    known = verdicts.read(path.parent, found.identity)
    assert known.families == found.families and known.policy() == found.policy()
    assert known.complete([("glue", "mosaic")]) and not known.complete([("glue", "triton")])
    later = dataclasses.replace(found.families[0], state="unchecked")
    verdicts.write(tmp_path, dataclasses.replace(found, families=(later,)))
    assert verdicts.read(tmp_path, found.identity).families == ()
    # Nothing is started where everything is known.
    families = [doctor.Family(op=v.op, entry="no.such:module") for v in found.families]
    assert doctor.known_or_checked(path.parent, families).families == found.families
    other = dict(found.identity) | {"driver": "another"}
    assert verdicts.read(path.parent, other) is None
    for text in ("{", "[]", json.dumps({"identity": found.identity, "families": [{"op": 1}]})):
        path.write_text(text)
        with caplog.at_level(logging.WARNING):
            assert verdicts.read(path.parent, found.identity) is None
        assert "damaged" in caplog.text
        caplog.clear()


def test_a_folder_that_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        made = doctor.known_or_checked(tmp_path / "file" / "below", [])
    assert made.families == () and "cannot be kept" in caplog.text


@pytest.mark.slow
def test_a_hung_process_ends_with_its_parent():
    """The parent of the doctor may be ended too: nothing may go on holding the GPU."""
    code = (
        "import os, threading, time\n"
        "from specjax.doctor.workers import Worker\n"
        "worker = Worker('tests.doctor.fakes:sleeper')\n"
        "threading.Thread(target=lambda: worker.ask({}, 1000), daemon=True).start()\n"
        "while worker._stage != 'asleep': time.sleep(0.1)\n"
        "print(worker._process.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=paths.REPOSITORY, stdout=subprocess.PIPE) as parent:
        place = Path("/proc", parent.stdout.readline().decode().strip(), "stat")
        assert place.exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while place.exists() and place.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def kernels(monkeypatch):
    """Backends for a machine with kernels: Mosaic's computes nonsense, Triton's is right. Their calls are counted."""
    calls = []

    def run(name, factor):
        def product(x, weight, **kwargs):
            calls.append(name)
            result = backends._run_xla(x, weight, **kwargs)
            return result * jnp.asarray(factor, result.dtype)

        return dispatch.Implementation(backend=name, run=product)

    fake = {"mosaic": run("mosaic", np.nan), "triton": run("triton", 1)}
    monkeypatch.setattr(backends, "_IMPLEMENTATIONS", backends._IMPLEMENTATIONS | fake)
    backends.implementations.cache_clear()
    yield calls
    backends.implementations.cache_clear()


def test_generation_goes_on_with_the_next_backend(found, kernels, hurried, caplog):
    load = lambda backend: specjax.load(
        paths.fixture("tiny-gptq-g128"), backend=backend, dequantize="never"
    )
    generate = lambda model: model.generate([[3, 5, 8]], max_new_tokens=4)[0]
    right = generate(load("xla"))
    assert not kernels and right.metrics.quarantine == ()
    with caplog.at_level(logging.WARNING):
        result = generate(load(found.policy()))
    assert set(kernels) == {"triton"} and result.output_ids == right.output_ids
    (said,) = [r.message for r in caplog.records if "matmul_w4a16" in r.message]
    assert "backend auto runs triton" in said and "wrong numbers" in said
    noted = result.metrics.to_dict()["quarantine"]
    assert any(line.startswith("matmul_w4a16 mosaic: four ones: wrong") for line in noted)
    # Without the doctor the nonsense would have run.
    linear = random_linears.make(lookup("w4a16"), 64, 128, 128)
    assert np.isnan(np.asarray(matmul(jnp.ones((1, 128)), linear))).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", doctor.FAMILIES, ids=lambda family: "-".join(family.name))
def test_cases_are_right_where_the_reference_is_the_kernel(family, hurried):
    checker = cases.checker(*family.name, kernels="specjax.doctor.cases:reference_itself")
    assert 5 <= len(checker.cases) <= 10
    listed = checker({"list": True}, lambda stage: None)
    assert len(set(listed["cases"])) == len(checker.cases)
    assert checker({"buffers": "loop"}, lambda stage: None) == {"reason": None}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [(9, 0), (8, 6), (10, 0)])
def test_every_case_launches_a_kernel(arch):
    """None of them is the reference by a refusal that nobody sees."""
    with device.targeting(tiles.typical(arch)):
        for family in doctor.FAMILIES:
            if family.backend == "mosaic":
                for case in cases.checker(*family.name).cases:
                    traced = str(jax.make_jaxpr(case.kernel)(*case.arguments))
                    assert "kernel_name=" in traced, case.name
