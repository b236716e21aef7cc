"""A pytest plugin that tells gpu_pool.py what happens, as it happens.

One JSON object a line, in the file that MOE_INFER_CASE_LOG names: `collected` (all test ids),
`uncollected` (a module that could not be read, and why), `begins` (a test's id) and `case` (its
outcome, and what it recorded with record_property). So a process that crashes or hangs leaves
behind what it did and where it was.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

LONGEST_REASON = 3000


def write(record: dict[str, Any]) -> None:
    with open(os.environ["MOE_INFER_CASE_LOG"], "a") as log:
        log.write(json.dumps(record) + "\n")


def reason(longrepr: Any) -> str:
    # A skip is (file, line, text).
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")[-LONGEST_REASON:]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        write(
            {
                "uncollected": report.nodeid,
                "outcome": report.outcome,
                "why": reason(report.longrepr),
            }
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    write({"collected": [item.nodeid for item in session.items]})


class Case:
    """The phases of the test that runs."""

    def __init__(self) -> None:
        self.outcome, self.seconds, self.why = "passed", 0.0, ""
        self.measured: dict[str, Any] = {}

    def add(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        self.measured.update(report.user_properties)
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome, self.why = report.outcome, reason(report.longrepr)


_case = Case()


def pytest_runtest_logstart(nodeid: str) -> None:
    global _case
    _case = Case()
    write({"begins": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _case.add(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    record = {"case": nodeid, "outcome": _case.outcome, "seconds": round(_case.seconds, 3)}
    if _case.why:
        record["why"] = _case.why
    if _case.measured:
        record["measured"] = _case.measured
    write(record)
