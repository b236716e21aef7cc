"""Runs pytest cases in several processes, and loses none to a crash, a hang or the end of the time.

A process gets its share of the cases. When it dies or stands still, the case that ran is a failure
and a new process goes on with the rest; when the time is over, what is left was not run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
POLL_SECONDS = 0.1
START_SECONDS = 240.0  # for what a process imports before its first case, under a sanitizer too
TAIL_CHARACTERS = 2000


@dataclass(frozen=True)
class Runner:
    """How a process of pytest is started.

    Attributes:
        root: folder that it runs in; test ids are relative to it.
        work: folder for logs, outputs and the tests' temporary files.
        prefix: program in front of Python's, such as a sanitizer with its options.
        arguments: more of pytest's.
        environment: beside that of this process.
    """

    root: Path
    work: Path
    prefix: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, words: Sequence[str]) -> Process:
        return Process(self, name, words)


class Process:
    """pytest, and what it has told so far."""

    def __init__(self, runner: Runner, name: str, words: Sequence[str]) -> None:
        self.output = runner.work / f"{name}.txt"
        self.log = runner.work / f"{name}.jsonl"
        self.log.touch()
        self._read = 0
        command = [
            *runner.prefix, sys.executable, "-m", "pytest", "-q", "-p", "gpu_case_log",
            "-p", "no:cacheprovider", "--basetemp", str(runner.work / f"{name}.tmp"),
            *runner.arguments, *words,
        ]  # fmt: skip
        path = [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")]
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=runner.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that kill() reaches its children too
                env={
                    **os.environ,
                    **runner.environment,
                    "PYTHONPATH": os.pathsep.join(filter(None, path)),
                    "MOE_INFER_CASE_LOG": str(self.log),
                },
            )

    def records(self) -> list[dict[str, Any]]:
        """Those that are new."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        if not self.ended():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the process ended {how}; its last output: {self.tail()}"

    def tail(self) -> str:
        return self.output.read_text(errors="replace")[-TAIL_CHARACTERS:].strip()


def collect(runner: Runner, words: Sequence[str], name: str = "collect") -> dict[str, Any]:
    """Test ids, and what could not be read: {"ids": [...], "uncollected": [cases]}."""
    process = runner.start(name, ["--collect-only", *words])
    while not process.ended():
        time.sleep(POLL_SECONDS)
    ids: list[str] | None = None
    uncollected = []
    for record in process.records():
        if "uncollected" in record:
            uncollected.append(
                case(record["uncollected"] or "collection", record["outcome"], why=record["why"])
            )
        ids = record.get("collected", ids)
    if ids is None and not uncollected:
        uncollected.append(case("collection", "failed", why=process.how_it_ended()))
    return {"ids": ids or [], "uncollected": uncollected}


def case(
    test: str,
    outcome: str,
    seconds: float = 0.0,
    why: str = "",
    measured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    made: dict[str, Any] = {"test": test, "outcome": outcome, "seconds": round(seconds, 3)}
    if why:
        made["why"] = why
    return {**made, "measured": measured} if measured else made


class Share:
    """Some of the cases, one process after the other."""

    def __init__(self, runner: Runner, name: str, ids: Sequence[str], case_limit: float) -> None:
        self.cases: list[dict[str, Any]] = []
        self.outputs: list[Path] = []
        self._runner, self._name, self._left, self._limit = runner, name, list(ids), case_limit
        self._process: Process | None = None
        self._under_way = ""
        self._since = 0.0
        self._finished = 0  # by the process that runs

    def step(self) -> bool:
        """Looks after the process; False when nothing is left."""
        if self._process is None:
            if not self._left:
                return False
            self._start()
            return True
        ended = self._process.ended()
        self._take_records(self._process)
        if ended:
            self._process_ended(self._process)
        else:
            limit = self._limit if self._under_way else max(self._limit, START_SECONDS)
            if time.monotonic() - self._since > limit:
                self._process.kill()
                self._take_records(self._process)
                what = f"still running after {limit:.0f} s, killed; {self._process.tail()}"
                self._give_up(what, limit)
                self._process = None
        return True

    def stop(self, why: str) -> None:
        """Ends the process; what is left was not run."""
        if self._process is not None:
            self._process.kill()
            self._take_records(self._process)
        self.cases += [case(test, "not_run", why=why) for test in self._left]
        self._left, self._process = [], None

    def _start(self) -> None:
        name = f"{self._name}-{len(self.outputs)}"
        self._process = self._runner.start(name, self._left)
        self.outputs.append(self._process.output)
        self._under_way, self._since, self._finished = "", time.monotonic(), 0

    def _take_records(self, process: Process) -> None:
        for record in process.records():
            if "begins" in record:
                self._under_way, self._since = record["begins"], time.monotonic()
            elif "case" in record:
                self._left.remove(record["case"])
                self._under_way, self._since = "", time.monotonic()
                self._finished += 1
                self.cases.append(
                    case(
                        record["case"],
                        record["outcome"],
                        record["seconds"],
                        record.get("why", ""),
                        record.get("measured"),
                    )
                )

    def _process_ended(self, process: Process) -> None:
        if self._left:
            self._give_up(process.how_it_ended(), time.monotonic() - self._since)
        self._process = None

    def _give_up(self, why: str, seconds: float) -> None:
        """On the case that ran; on all that are left if the process came to none."""
        if self._under_way:
            self._left.remove(self._under_way)
            self.cases.append(case(self._under_way, "failed", seconds, why))
        elif not self._finished:
            self.cases += [case(test, "failed", why=f"not begun: {why}") for test in self._left]
            self._left = []


def run(
    runner: Runner,
    name: str,
    ids: Sequence[str],
    jobs: int = 1,
    deadline: float | None = None,
    case_limit: float = 300.0,
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Runs the cases.

    Args:
        runner: how.
        name: of the files in its work folder.
        ids: test ids.
        jobs: most processes at once.
        deadline: of time.monotonic(); None: no end.
        case_limit: seconds for one case.

    Returns:
        A case (test, outcome, seconds, why, measured) for each id, in their order, and the
        processes' outputs.
    """
    count = max(1, min(jobs, len(ids)))
    shares = [
        Share(runner, f"{name}-{i}", ids[i::count], case_limit)
        for i in range(count)
        if ids[i::count]
    ]
    try:
        running = list(shares)
        while running:
            if deadline is not None and time.monotonic() > deadline:
                break
            running = [share for share in running if share.step()]
            time.sleep(POLL_SECONDS)
    finally:
        for share in shares:
            share.stop("no time was left")
    done = {c["test"]: c for share in shares for c in share.cases}
    return [done[test] for test in ids], [path for share in shares for path in share.outputs]
