"""Runs everything that needs a GPU and writes one report: benchmarks/results/gpu_tests.json.

    make test-gpu
    python3 tools/gpu_report.py --library build/libmoe_infer.so --out DIR

The stages: the layer through the C entry, in several processes; engines through TensorRT, the same;
cases that compare free GPU memory, alone; with --large four layers of models of real sizes;
compute-sanitizer's memcheck and racecheck on the cases marked `sanitize`. Needs pytest and PyTorch;
no virtual environment of its own, no pytest plugin.

Exit code: 0 all passed, 1 something failed, 2 nothing could be run, 3 the time was over before all
had run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_pool

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
REPORT = "gpu_tests.json"
OUTCOMES = ("passed", "failed", "skipped", "not_run")
# A process takes about 1 GB of host memory and 0.7 GB of the GPU's; engine builds take more.
LAYER_JOBS, TENSORRT_JOBS, SANITIZER_JOBS = 8, 5, 4
NO_TIME = "no time was left"
# Together the two models need 50 GB of the GPU and 16 GB of disk or shared memory.
LARGE_JOBS = 2
# What a tool says at its end, and the text without which it found something.
SANITIZERS = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<found>\d+) errors?"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (?P<found>\d+) hazards? displayed.*"),
}
LONGEST_FINDINGS = 6000


@dataclass(frozen=True)
class Stage:
    """Cases that run in one way.

    Attributes:
        name: of the stage.
        marks: pytest's -m expression.
        jobs: most processes at once.
        sanitizer: tool of compute-sanitizer to run them under.
        skipped: why it is not run; "": it is.
    """

    name: str
    marks: str
    jobs: int = 1
    sanitizer: str = ""
    skipped: str = ""


def stages(
    only: Sequence[str],
    jobs: int | None,
    why_no_tensorrt: str,
    sanitizer: Path | None,
    large: bool = False,
) -> list[Stage]:
    """In the order in which they are worth most if the time does not suffice."""
    cores = os.cpu_count() or 1
    layer = not only or "layer" in only
    engines = not only or "tensorrt" in only
    made = []
    if layer:
        marks = "not engine and not alone"
        made.append(Stage("layer", marks, jobs or min(LAYER_JOBS, cores)))
    if engines:
        marks = "engine and not alone and not large"
        count = jobs or min(TENSORRT_JOBS, cores)
        made.append(Stage("tensorrt", marks, count, skipped=why_no_tensorrt))
    with_engines = engines and not why_no_tensorrt
    if layer or with_engines:
        marks = "alone"
        if not (layer and with_engines):
            marks += " and not engine" if layer else " and engine"
        made.append(Stage("alone", marks))
    if large or "large" in only:
        made.append(Stage("large", "large", jobs or LARGE_JOBS, skipped=why_no_tensorrt))
    if not only or "sanitizer" in only:
        missing = "" if sanitizer else "no compute-sanitizer on PATH or under the CUDA prefix"
        for tool in SANITIZERS:
            marks = "sanitize" if not why_no_tensorrt else "sanitize and not engine"
            count = jobs or min(SANITIZER_JOBS, cores)
            made.append(Stage(tool, marks, count, tool, missing))
    return made


def find_sanitizer(cuda_prefix: Path) -> Path | None:
    found = shutil.which("compute-sanitizer")
    if found:
        return Path(found)
    folders = [cuda_prefix, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    for folder in folders:
        for path in (folder / "bin/compute-sanitizer", *folder.glob("**/compute-sanitizer")):
            if path.is_file() and os.access(path, os.X_OK):
                return path
    return None


def run_stage(
    stage: Stage,
    runner: gpu_pool.Runner,
    words: Sequence[str],
    sanitizer: Path | None,
    deadline: float | None,
    case_limit: float,
) -> dict[str, Any]:
    """The stage's part of the report."""
    what: dict[str, Any] = {"stage": stage.name, "marks": stage.marks}
    if stage.skipped:
        return {**what, "skipped": stage.skipped}
    started = time.monotonic()
    if deadline is not None and started > deadline:
        return {**what, "skipped": NO_TIME}
    found = gpu_pool.collect(runner, ["-m", stage.marks, *words], f"{stage.name}-collect")
    if stage.sanitizer:
        assert sanitizer is not None
        prefix = (str(sanitizer), "--tool", stage.sanitizer)
        runner = gpu_pool.Runner(
            runner.root, runner.work, prefix, runner.arguments, runner.environment
        )
    cases, outputs = gpu_pool.run(
        runner, stage.name, found["ids"], stage.jobs, deadline, case_limit
    )
    cases += found["uncollected"]
    part = {
        **what,
        "jobs": stage.jobs,
        "seconds": round(time.monotonic() - started, 1),
        "counts": count(cases),
    }
    if stage.sanitizer and cases:
        part["sanitizer"] = sanitizer_result(stage.sanitizer, outputs, cases)
    return {**part, "cases": cases}


def sanitizer_result(
    tool: str, outputs: Iterable[Path], cases: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What compute-sanitizer said; passed if each of its processes said that it found nothing."""
    texts = [path.read_text(errors="replace") for path in outputs]
    summaries = [SANITIZERS[tool].search(text) for text in texts]
    result: dict[str, Any] = {
        "tool": tool,
        "summaries": [s.group() if s else "none" for s in summaries],
    }
    if any(s is None for s in summaries):
        # Killed, at the end of the time or because a case stood still.
        incomplete = any(c["outcome"] == "not_run" for c in cases)
        result["outcome"] = "not_run" if incomplete else "failed"
    else:
        clean = all(int(s.group("found")) == 0 for s in summaries if s)
        result["outcome"] = "passed" if clean else "failed"
    if result["outcome"] != "passed":
        lines = [line for text in texts for line in text.splitlines() if line.startswith("=====")]
        result["findings"] = "\n".join(lines)[:LONGEST_FINDINGS]
    return result


def count(cases: Iterable[dict[str, Any]]) -> dict[str, int]:
    counts = dict.fromkeys(OUTCOMES, 0)
    for one in cases:
        counts[one["outcome"]] += 1
    return counts


def write_report(
    path: Path, machine: dict[str, Any], seconds: float, parts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Writes what is known so far; under its name there is always a whole report."""
    cases = [c for part in parts for c in part.get("cases", ())]
    report = {
        "what": "tests/gpu, by tools/gpu_report.py",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        **{key: machine[key] for key in ("machine", "versions", "library")},
        "counts": count(cases),
        "sanitizer": {
            part["stage"]: part["sanitizer"]["outcome"] for part in parts if "sanitizer" in part
        },
        "not_run": [
            {"stage": part["stage"], "why": part["skipped"]} for part in parts if "skipped" in part
        ]
        + [
            {"stage": part["stage"], "test": c["test"], "why": c["why"]}
            for part in parts
            for c in part.get("cases", ())
            if c["outcome"] == "not_run"
        ],
        "stages": list(parts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)
    return report


def exit_code(report: dict[str, Any]) -> int:
    counts, sanitizer = report["counts"], report["sanitizer"].values()
    if counts["failed"] or "failed" in sanitizer:
        return 1
    late = any(part.get("skipped") == NO_TIME for part in report["stages"])
    if counts["not_run"] or "not_run" in sanitizer or late:
        return 3
    return 0 if counts["passed"] else 2


def tell(part: dict[str, Any]) -> None:
    if "skipped" in part:
        print(f"{part['stage']}: not run: {part['skipped']}", flush=True)
        return
    numbers = ", ".join(f"{n} {outcome}" for outcome, n in part["counts"].items() if n)
    said = part.get("sanitizer")
    more = f"; {said['outcome']}: {', '.join(said['summaries'])}" if said else ""
    print(f"{part['stage']}: {numbers or 'no case'} in {part['seconds']} s{more}", flush=True)
    for one in part["cases"]:
        if one["outcome"] == "failed":
            print(f"  FAILED {one['test']}\n    " + one.get("why", "").replace("\n", "\n    "))


def describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """In a process of its own: what it loads must not be in this one when others start."""
    call = [sys.executable, str(ROOT / "tools/machine.py")]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        sys.exit(f"[gpu_report] moe_infer cannot be used here: {done.stderr.strip()[-2000:]}")
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--library", type=Path, help="the plugin; without it the one that the package finds")
    add("--out", type=Path, default=RESULTS, help=f"folder for {REPORT}")
    add(
        "--only",
        action="append",
        default=[],
        choices=("layer", "tensorrt", "large", "sanitizer"),
        help="these stages alone (may be given more than once)",
    )
    add("--large", action="store_true", help="also models of real sizes: 50 GB of the GPU")
    add("--select", default="", help="only cases that pytest's -k would choose")
    add("--jobs", type=int, help="most processes at once")
    add("--time-limit", type=float, help="seconds for all; what did not run is in the report")
    add("--case-limit", type=float, default=300, help="seconds after which a case hangs")
    add("--cuda-prefix", type=Path, default=ROOT / ".cuda", help="for compute-sanitizer")
    options = parser.parse_args(arguments)
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library: {options.library} is no file")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = parse(arguments)
    environment = {}
    if options.library is not None:
        environment["MOE_INFER_LIBRARY"] = str(options.library.resolve())
    large = options.large or "large" in options.only
    if large:
        environment["MOE_INFER_LARGE"] = "1"
    machine = describe_machine(environment)
    for missing, what in ((not machine["gpus"], "NVIDIA GPU"), (not machine["library"], "plugin")):
        if missing:
            print(f"[gpu_report] no {what}: {machine['why_no_tensorrt']}", file=sys.stderr)
            return 2
    deadline = None if options.time_limit is None else started + options.time_limit
    sanitizer = find_sanitizer(options.cuda_prefix)
    words = ["tests/gpu", *(["-k", options.select] if options.select else [])]
    parts: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as work:
        runner = gpu_pool.Runner(ROOT, Path(work), environment=environment)
        why_no_tensorrt = machine["why_no_tensorrt"]
        for stage in stages(options.only, options.jobs, why_no_tensorrt, sanitizer, large):
            parts.append(run_stage(stage, runner, words, sanitizer, deadline, options.case_limit))
            tell(parts[-1])
            seconds = time.monotonic() - started
            report = write_report(options.out / REPORT, machine, seconds, parts)
    print(f"{options.out / REPORT}: {report['counts']}, sanitizer {report['sanitizer']}")
    return exit_code(report)


if __name__ == "__main__":
    sys.exit(main())
