"""Replays routing traces against policies and budgets of an expert cache, without a GPU.

The decisions are the library's own (``ops/core/policy.h``), so hits, misses and victims are those
of a real run on the same trace.
"""

from moe_infer.simulate.ahead import Ahead, Pace, fetch_ahead
from moe_infer.simulate.belady import optimal_hits
from moe_infer.simulate.compare import OPTIMUM, Point, compare
from moe_infer.simulate.generate import COVERAGE, generate
from moe_infer.simulate.record import record
from moe_infer.simulate.replay import Replay, policy_text, replay
from moe_infer.simulate.timing import Machine
from moe_infer.simulate.trace import Calls, Trace

__all__ = [
    "COVERAGE",
    "OPTIMUM",
    "Ahead",
    "Calls",
    "Machine",
    "Pace",
    "Point",
    "Replay",
    "Trace",
    "compare",
    "fetch_ahead",
    "generate",
    "optimal_hits",
    "policy_text",
    "record",
    "replay",
]
