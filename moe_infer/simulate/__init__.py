"""Replays routing traces against policies and budgets of an expert cache, without a GPU.

The decisions are the library's own (``ops/core/policy.h``), so hits, misses and victims are those
of a real run on the same trace.
"""

from moe_infer.simulate.replay import Replay, policy_text, replay

__all__ = ["Replay", "policy_text", "replay"]
