"""One point: every contender on the same inputs, checked, then timed in turn."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from typing import Any

import torch

from moe_bench.cases import model_layers
from moe_bench.check import Expected, WrongResultError, compare, expect, judge
from moe_bench.floor import Rates, floor_ms
from moe_bench.inputs import InputSet, make_inputs, mean_active
from moe_bench.peers.peer import Entry, Peer, Problem, UnavailableError
from moe_bench.report import add_shares
from moe_bench.timing import Contender, Spread, measure

MESSAGE_LENGTH = 2000
BELIEVABLE = 0.8
"""Part of the floor below which a time is no time of the layer, but of something not waited for."""


class Contest:
    """The peers on one layer. A failure costs only the entries that depend on what failed.

    Args:
        problem: the layer.
        rates: of the chip, from the same run.
        peers: who takes part.
        l2_bytes: of the GPU.
    """

    def __init__(
        self, problem: Problem, rates: Rates, peers: Sequence[Peer], l2_bytes: int
    ) -> None:
        self._problem, self._rates, self._peers = problem, rates, peers
        self._failures: dict[Peer, str] = {}
        self._tokens = 0
        self._l2_bytes = l2_bytes
        self._closed_for_tokens: dict[Peer, str] = {}
        for peer in peers:
            torch.cuda.empty_cache()  # what PyTorch keeps for itself others cannot have
            try:
                peer.prepare(problem)
            except Exception as error:
                self._failures[peer] = message(error)

    def open(self, tokens: int) -> None:
        """The next points are of so many tokens."""
        self._tokens = tokens
        self._closed_for_tokens = {}
        gc.collect()
        torch.cuda.empty_cache()
        for peer in self._peers:
            if peer not in self._failures:
                try:
                    peer.open(tokens)
                except Exception as error:
                    self._closed_for_tokens[peer] = message(error)

    def measure(self, routing: str, budget_s: float) -> dict[str, Any]:
        """Checks and times all contenders; the point for the JSON."""
        case, dtype, tokens = self._problem.case, self._problem.dtype, self._tokens
        gc.collect()
        torch.cuda.empty_cache()
        device = self._problem.experts.down.device.type
        sets = make_inputs(case, dtype, tokens, routing, device=device)
        active = mean_active(sets)
        contenders: dict[str, dict[str, Any]] = {}
        entries: dict[str, Entry] = {}
        references = _References(self._problem, sets)
        for peer in self._peers:
            for name, found in self._entries(peer, sets, routing == "uniform").items():
                if isinstance(found, str):
                    contenders[name] = {"failed": found}
                    continue
                entry = found
                contenders[name] = {"ours": entry.ours}
                try:
                    contenders[name] |= references.check(entry)
                    entries[name] = entry
                except WrongResultError as error:
                    contenders[name] |= {"failed": str(error), "wrong": True}
                except Exception as error:
                    contenders[name] |= {"failed": message(error)}
        timed = {
            name: Contender(entry.run, entry.runs, entry.before, entry.on_device)
            for name, entry in entries.items()
        }
        dense = self._rates.dense[dtype]
        floor = floor_ms(case, tokens, active, self._rates.read, dense)
        for name, result in measure(timed, budget_s).items():
            if isinstance(result, Spread) and result.median < BELIEVABLE * floor:
                contenders[name]["failed"] = (
                    f"{result.median:.3g} ms is less than the chip needs, {floor:.3g} ms: the"
                    " events did not wait for the run"
                )
            elif isinstance(result, Spread):
                contenders[name] |= {
                    "ms": result.median,
                    "p10": result.p10,
                    "p90": result.p90,
                    "samples": result.samples,
                    "runs_a_sample": entries[name].runs,
                }
            else:
                contenders[name]["failed"] = message(result)
        layers = model_layers(tokens)
        add_shares(contenders, layers)
        return {
            "case": case.name,
            "dtype": dtype,
            "tokens": tokens,
            "routing": routing,
            "input_sets": len(sets),
            "layers_of_a_model": layers,
            "active_experts": active,
            "expert_bytes_a_run": active * case.expert_bytes,
            "expert_bytes_exceed_l2": min(s.active for s in sets) * case.expert_bytes
            > self._l2_bytes,
            "floor_ms": floor,
            "contenders": contenders,
        }

    def _entries(self, peer: Peer, sets: list[InputSet], model: bool) -> dict[str, Entry | str]:
        """A peer's entries, or why there is none."""
        reason = self._failures.get(peer) or self._closed_for_tokens.get(peer)
        if reason is None:
            try:
                makers = peer.entries(sets, model)
            except Exception as error:
                reason = message(error)
        if reason is not None:
            return {name: reason for name in peer.names if model or not name.endswith("_layers")}
        found: dict[str, Entry | str] = {}
        for name, make in makers.items():
            try:
                found[name] = make()
            except Exception as error:
                found[name] = message(error)
        return found

    def close(self) -> None:
        """Gives back what the peers hold."""
        for peer in self._peers:
            if peer not in self._failures:
                with contextlib.suppress(Exception):  # after an error of CUDA nothing can be freed
                    peer.close()


class _References:
    """The expected outputs of the sets, computed when they are first needed."""

    def __init__(self, problem: Problem, sets: list[InputSet]) -> None:
        self._problem, self._sets = problem, sets
        self._expected: dict[tuple[str, int], Expected] = {}

    def check(self, entry: Entry) -> dict[str, Any]:
        """Largest errors over all sets, and notes.

        Raises:
            WrongResultError: an output is not the layer's.
        """
        dtype = self._problem.dtype
        notes, largest, norm, count = {entry.note: None}, 0.0, 0.0, 0
        for i, output in entry.results():
            error = compare(output, self._expect(entry.sublayer, i), dtype)
            notes[judge(error, dtype, peer=not entry.ours)] = None
            largest, norm, count = max(largest, error.largest), max(norm, error.norm), count + 1
        if count != entry.outputs:
            raise WrongResultError(f"{count} outputs instead of {entry.outputs}")
        return _with_note({"largest_error": largest, "norm_error": norm}, *notes)

    def _expect(self, sublayer: str | None, i: int) -> Expected:
        key = (sublayer or self._problem.case.sublayer, i)
        if key not in self._expected:
            self._expected[key] = expect(
                self._problem.case, self._problem.experts, self._sets[i], sublayer=sublayer
            )
        return self._expected[key]


def _with_note(fields: dict[str, Any], *notes: str) -> dict[str, Any]:
    text = "; ".join(note for note in notes if note)
    return {**fields, "note": text} if text else fields


def message(error: Exception) -> str:
    """An exception as a line of the table's notes."""
    kind = "" if isinstance(error, (UnavailableError, WrongResultError)) else type(error).__name__
    text = " ".join(str(error).split())
    return f"{kind}: {text}"[:MESSAGE_LENGTH] if kind else text[:MESSAGE_LENGTH]
