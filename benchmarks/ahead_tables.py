"""The tables of docs/fetching-ahead.md from benchmarks/results/ahead_study.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_bench.report import markdown_table


def speeds(record: Mapping[str, Any], model: str, place: str) -> str:
    """Percent by which a token gets faster, by slots, idle time, guesses and recall."""
    rows = [row for row in record["rows"] if row["model"] == model]
    ways = [name for name in rows[0] if name.startswith(f"{place}, ")]
    header = ["slots", "hits", "idle us a layer", "ms a token"]
    for way in ways:
        header += [f"{way.split(', ')[1]} at {percent(float(name))} %" for name in rows[0][way]]
    lines = []
    for row in rows:
        cells = [f"{gain(row['ms'], value)}" for way in ways for value in row[way].values()]
        first = [str(row["slots"]), f"{percent(row['hit_rate'])} %", str(row["idle_us"])]
        lines.append([*first, f"{row['ms']:.1f}", *cells])
    return markdown_table(header, lines, texts=0)


def quality(record: Mapping[str, Any]) -> str:
    """Precision among guesses that are fetched, and the part of the misses that they are."""
    rows = record["quality"]
    header = ["model", "slots", "recall", "1 guess: right", "of the misses", "2 guesses: right"]
    header += ["of the misses", "hits without", "hits, 1 guess in a slot"]
    lines = []
    for row in rows:
        rates = [row["1"]["precision"], row["1"]["of_misses"]]
        rates += [row["2"]["precision"], row["2"]["of_misses"]]
        rates += [row["hit_rate"]["spare"], row["hit_rate"]["slot"]]
        cells = [percent(rate, 1) for rate in rates]
        lines.append([row["model"], str(row["slots"]), percent(row["recall"]), *cells])
    return markdown_table(header, lines, texts=1)


def ways(record: Mapping[str, Any], model: str) -> str:
    """Percent by which a token gets faster, by idle time, for other ways to do it."""
    rows = [row for row in record["ways"] if row["model"] == model]
    header = ["one guess at most", "slots", "right", *(f"{idle} us" for idle in rows[0]["ms"])]
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        for row in rows:
            if row["way"] == way:
                cells = [gain(row["without"][idle], value) for idle, value in row["ms"].items()]
                lines.append([way, str(row["slots"]), percent(row["precision"]), *cells])
    return markdown_table(header, lines, texts=1)


def recorded(record: Mapping[str, Any]) -> str:
    """The trained examples with their routers' guesses."""
    idles = list(record["recorded"][0]["ms"])
    header = ["model", "slots", "recall", "hits", "right"]
    header += [f"spare, {idle} us" for idle in idles]
    header += ["hits, in a slot", *(f"in a slot, {idle} us" for idle in idles)]
    header += ["counts: right", f"counts, {idles[-1]} us"]
    lines = []
    for row in record["recorded"]:
        times = row["ms"]
        lines.append(
            [
                row["model"],
                str(row["slots"]),
                percent(row["recall"]),
                percent(row["hit_rate"]["without"], 1),
                percent(row["precision"]["spare"]),
                *(gain(times[idle]["without"], times[idle]["spare"]) for idle in idles),
                percent(row["hit_rate"]["slot"], 1),
                *(gain(times[idle]["without"], times[idle]["slot"]) for idle in idles),
                percent(row["precision"]["counts"]),
                gain(times[idles[-1]]["without"], times[idles[-1]]["counts"]),
            ]
        )
    return markdown_table(header, lines, texts=1)


def gain(without: float, ms: float) -> str:
    """Percent more tokens in the same time."""
    return f"{100 * (without / ms - 1):+.1f}"


def percent(rate: float, digits: int = 0) -> str:
    """Of a rate."""
    return f"{100 * rate:.{digits}f}"
