"""The tables of docs/scheduling.md from benchmarks/results/policy_study.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_bench.report import markdown_table


def by_trace(record: Mapping[str, Any]) -> str:
    """Hit rates with slots for a quarter of the experts, the best online one bold."""
    rows = [row for row in record["rows"] if row["slots"] == round(row["experts"] / 4)]
    names = list(rows[0]["hit_rate"])
    lines = []
    for row in rows:
        rates = row["hit_rate"]
        best = f"{100 * max(value for name, value in rates.items() if name != 'belady'):.1f}"
        cells = [f"{100 * rates[name]:.1f}" for name in names]
        bold = [
            f"**{cell}**" if name != "belady" and cell == best else cell
            for name, cell in zip(names, cells, strict=True)
        ]
        lines.append([row["trace"], *bold])
    return markdown_table(["hit rate in %", *names], lines, texts=1)


def by_budget(record: Mapping[str, Any]) -> str:
    """Hit rates of some policies with more and fewer slots."""
    names = ("lru", "lfu:128", "halved:128", "belady")
    lines = [
        [row["trace"], str(row["slots"]), *(f"{100 * row['hit_rate'][name]:.1f}" for name in names)]
        for row in record["rows"]
    ]
    return markdown_table(["hit rate in %", "slots", *names], lines, texts=1)


def circles(record: Mapping[str, Any]) -> str:
    """Misses of a round."""
    found = record["circle"]
    names = list(next(iter(found.values())))
    lines = [[title, *(f"{cell[name]:.1f}" for name in names)] for title, cell in found.items()]
    return markdown_table(["misses a round", *names], lines, texts=1)


def informed(record: Mapping[str, Any]) -> str:
    """Beside what can be expected at best."""
    found = record["informed"]
    names = list(next(iter(found.values())))
    lines = [
        [locality, *(f"{100 * cell[name]:.1f}" for name in names)]
        for locality, cell in found.items()
    ]
    return markdown_table(["locality", *names], lines, texts=1)


def shared(record: Mapping[str, Any]) -> str:
    """Own slots of each layer against the same number for all together."""
    found = record["shared"]
    names = list(next(iter(found.values())))
    lines = [[title, *(f"{100 * cell[n]:.1f}" for n in names)] for title, cell in found.items()]
    return markdown_table(["hit rate in %", *names], lines, texts=1)
