"""tools/gpu_report.py without a GPU: nothing that a case does may be lost or pass for a success."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gpu_pool
import gpu_report

TESTS = """
import os, signal, time
import pytest

@pytest.fixture
def bad_end():
    yield
    raise OSError("in the end")

def test_passes(record_property): record_property("difference", 0.5)
def test_fails(): assert 1 == 2, "as it must"
def test_is_skipped(): pytest.skip("not here")
def test_ends_badly(bad_end): pass
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.slow
def test_hangs(): time.sleep(600)
@pytest.mark.parametrize("i", range(3))
def test_after(i): pass
@pytest.mark.slow
def test_exits(): os._exit(0)
def test_last(): pass
"""
SANITIZER = """#!/bin/sh
shift 2
"$@"
echo "========= $SAID"
"""


@pytest.fixture
def runner(tmp_path: Path) -> gpu_pool.Runner:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: it is\n")
    (tmp_path / "work").mkdir()
    return gpu_pool.Runner(tmp_path, tmp_path / "work")


def outcomes(cases: list[dict[str, Any]]) -> dict[str, str]:
    return {c["test"].split("::test_")[1]: c["outcome"] for c in cases}


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_case_has_its_outcome(runner: gpu_pool.Runner, jobs: int) -> None:
    found = gpu_pool.collect(runner, ["test_it.py"])
    assert not found["uncollected"]
    cases, _ = gpu_pool.run(runner, "it", found["ids"], jobs, case_limit=5)
    assert [c["test"] for c in cases] == found["ids"]
    assert outcomes(cases) == {
        "passes": "passed",
        "fails": "failed",
        "is_skipped": "skipped",
        "ends_badly": "failed",
        "crashes": "failed",
        "hangs": "failed",
        "after[0]": "passed",
        "after[1]": "passed",
        "after[2]": "passed",
        "exits": "failed",  # with code 0, and without an outcome
        "last": "passed",
    }
    assert cases[0]["measured"] == {"difference": 0.5}
    assert all("measured" not in c for c in cases[1:])
    why = {c["test"].split("::test_")[1]: c.get("why", "") for c in cases}
    assert "as it must" in why["fails"]
    assert why["is_skipped"] == "not here"
    assert "in the end" in why["ends_badly"]
    assert "by SIGSEGV" in why["crashes"]
    assert "still running after 5 s" in why["hangs"]
    assert "with exit code 0" in why["exits"]


def test_what_the_time_did_not_suffice_for_is_told(runner: gpu_pool.Runner) -> None:
    ids = ["test_it.py::test_passes", "test_it.py::test_hangs", "test_it.py::test_last"]
    started = time.monotonic()
    cases, _ = gpu_pool.run(runner, "it", ids, deadline=started + 3)
    assert time.monotonic() - started < 30
    assert [c["outcome"] for c in cases][1:] == ["not_run", "not_run"]
    assert cases[2]["why"] == "no time was left"


def test_a_module_that_cannot_be_read_is_a_failure(runner: gpu_pool.Runner) -> None:
    (runner.root / "test_it.py").write_text("import absent_module_of_nobody")
    found = gpu_pool.collect(runner, ["test_it.py"])
    assert found["ids"] == []
    (case,) = found["uncollected"]
    assert case["outcome"] == "failed"
    assert "absent_module_of_nobody" in case["why"]


def test_no_pytest_is_a_failure(runner: gpu_pool.Runner) -> None:
    broken = gpu_pool.Runner(runner.root, runner.work, arguments=("--no-such-option",))
    (case,) = gpu_pool.collect(broken, ["test_it.py"])["uncollected"]
    assert case["outcome"] == "failed"
    assert "no-such-option" in case["why"]
    cases, _ = gpu_pool.run(broken, "it", ["test_it.py::test_passes"])
    assert cases[0]["outcome"] == "failed"
    assert "not begun" in cases[0]["why"]


@pytest.mark.parametrize(
    ("tool", "said", "outcome"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", "passed"),
        ("memcheck", "ERROR SUMMARY: 1 error", "failed"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        ("racecheck", "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", "failed"),
        ("racecheck", "Internal error", "failed"),
    ],
)
def test_sanitizer(runner: gpu_pool.Runner, tool: str, said: str, outcome: str) -> None:
    script = runner.root / "compute-sanitizer"
    script.write_text(SANITIZER)
    script.chmod(0o755)
    told = gpu_pool.Runner(runner.root, runner.work, environment={"SAID": said})
    stage = gpu_report.Stage(tool, "not slow", sanitizer=tool)
    words = ["test_it.py", "-k", "after"]
    part = gpu_report.run_stage(stage, told, words, script, None, 60)
    assert part["counts"] == {"passed": 3, "failed": 0, "skipped": 0, "not_run": 0}
    assert part["sanitizer"]["outcome"] == outcome
    if outcome == "failed":
        assert said in part["sanitizer"]["findings"]


def test_a_stage_for_which_there_is_no_time_is_told(runner: gpu_pool.Runner) -> None:
    stage = gpu_report.Stage("layer", "not slow")
    late = time.monotonic() - 1
    part = gpu_report.run_stage(stage, runner, ["test_it.py"], None, late, 60)
    assert part["skipped"] == "no time was left"
    report = gpu_report.write_report(runner.work / "report.json", MACHINE, 1.0, [part])
    assert gpu_report.exit_code(report) == 3


def names(*arguments: Any) -> list[str]:
    return [f"{s.name}{'-' * bool(s.skipped)}" for s in gpu_report.stages(*arguments)]


def test_stages() -> None:
    tool = Path("compute-sanitizer")
    assert names([], None, "", tool) == ["layer", "tensorrt", "alone", "memcheck", "racecheck"]
    assert names(["layer"], None, "", tool) == ["layer", "alone"]
    assert names(["sanitizer"], None, "", tool) == ["memcheck", "racecheck"]
    with_large = ["layer", "tensorrt", "alone", "large", "memcheck", "racecheck"]
    assert names([], None, "", tool, True) == with_large
    assert names(["large"], None, "", tool) == ["large"]
    without = gpu_report.stages([], None, "no TensorRT", None)
    assert [s.skipped for s in without if s.name == "tensorrt"] == ["no TensorRT"]
    assert [s.marks for s in without if s.name == "alone"] == ["alone and not engine"]
    assert all(s.skipped for s in without if s.sanitizer)


MACHINE = {"machine": {"gpu": []}, "versions": {"python": "3"}, "library": {"sha256": "0"}}


@pytest.mark.parametrize(
    ("given", "sanitizer", "code"),
    [
        (["passed", "skipped"], "passed", 0),
        (["passed", "failed"], "passed", 1),
        (["passed"], "failed", 1),
        (["passed", "not_run"], "passed", 3),
        (["passed", "not_run", "failed"], "passed", 1),
        (["passed"], "not_run", 3),
        (["skipped"], "passed", 2),
        ([], "passed", 2),
    ],
)
def test_report(tmp_path: Path, given: list[str], sanitizer: str, code: int) -> None:
    cases = [gpu_pool.case(f"test_{i}", outcome, why="it") for i, outcome in enumerate(given)]
    part = {"stage": "memcheck", "cases": cases, "sanitizer": {"outcome": sanitizer}}
    other = {"stage": "tensorrt", "skipped": "none here"}
    path = tmp_path / "new/gpu_tests.json"
    report = gpu_report.write_report(path, MACHINE, 1.0, [part, other])
    assert json.loads(path.read_text()) == report
    assert gpu_report.exit_code(report) == code
    assert report["counts"]["not_run"] == given.count("not_run")
    assert [entry["why"] for entry in report["not_run"]] == [
        "none here",
        *["it"] * given.count("not_run"),
    ]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if gpu_report.describe_machine({})["gpus"]:
        pytest.skip("here is a GPU")
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
