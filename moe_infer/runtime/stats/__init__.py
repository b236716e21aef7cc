"""What the experts of live layers did: counters, a table, a heat map."""

from moe_infer.runtime.stats.collect import expert_stats
from moe_infer.runtime.stats.counters import ExpertStats

__all__ = ["ExpertStats", "expert_stats"]
