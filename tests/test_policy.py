"""The expert cache's decisions against a plain statement of them, decision by decision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_infer.simulate import Replay, policy_text, replay

pytestmark = pytest.mark.needs_library

POLICIES = ["lru", "lfu:1", "lfu:3", "lfu:512", "halved:1", "halved:4", "halved:128"]
ONE = 1 << 16
LN2 = math.log(2)
# 2^-x is about 1 - x (a - x (b - x c)): slope at 0, and 1/2 at 1.
A, B = LN2, LN2**2 / 2
CUBIC = tuple(round(2**32 * v) for v in (A, B, 0.5 - A + B))


class Plain:
    """One cache, from the comment at the top of ops/core/policy.h; nothing is taken over."""

    def __init__(self, experts: int, slots: int, policy: str) -> None:
        self.name, *numbers = policy.split(":")
        self.numbers = [int(number) for number in numbers]
        self.slots: list[int | None] = [None] * slots
        self.clock = 0
        self.last = [0] * experts
        self.count = [0] * experts
        self.fetched = [0] * experts

    def decayed(self, expert: int) -> int:
        (half_life,) = self.numbers
        halvings, rest = divmod(self.clock - self.last[expert], half_life)
        count = self.count[expert] >> halvings if halvings < 32 else 0
        x = (rest << 32) // half_life
        a, b, c = CUBIC
        return count - (count * ((x * (a - ((x * (b - ((x * c) >> 32))) >> 32))) >> 32) >> 32)

    def worth(self, expert: int) -> tuple[int, ...]:
        if self.name == "lru":
            return (self.last[expert],)
        if self.name == "lfu":
            return (self.decayed(expert),)
        return (self.count[expert], -self.fetched[expert])

    def use(self, expert: int) -> None:
        if self.name == "lfu":
            self.count[expert] = self.decayed(expert)
        self.count[expert] += ONE if self.name == "lfu" else 1
        self.last[expert] = self.clock

    def call(self, needed: Sequence[int]) -> list[tuple[int, int, int, int]]:
        self.clock += 1
        if self.name == "halved" and self.clock % self.numbers[0] == 0:
            self.count = [count >> 1 for count in self.count]
        hits = [e for e in needed if e in self.slots]
        misses = [e for e in needed if e not in self.slots]
        for expert in needed:
            self.use(expert)
        for expert in misses:
            self.fetched[expert] = self.clock
        plan = [(e, self.slots.index(e), -1, 1) for e in hits]
        if len(needed) <= len(self.slots):
            # All at once, as a kernel would.
            free = [slot for slot, expert in enumerate(self.slots) if expert not in hits]
            order = sorted(free, key=lambda slot: self.key(slot, needed))
            chosen = dict(zip(misses, order, strict=False))
        else:
            chosen = {}
        filled: list[int] = []
        for expert in misses:
            blocked = (
                filled[-2:] if len(self.slots) > 2 else filled[len(filled) - len(self.slots) + 1 :]
            )
            if len(self.slots) == 1:
                blocked = []
            slot = chosen.get(expert)
            if slot is None:
                allowed = [s for s in range(len(self.slots)) if s not in blocked]
                slot = min(allowed, key=lambda s: self.key(s, needed))
            evicted = self.slots[slot]
            plan.append((expert, slot, -1 if evicted is None else evicted, 0))
            self.slots[slot] = expert
            filled.append(slot)
        return plan

    def key(self, slot: int, needed: Sequence[int]) -> tuple[int, tuple[int, ...], int]:
        expert = self.slots[slot]
        if expert is None:
            return (0, (), slot)
        return (2 if expert in needed else 1, self.worth(expert), slot)


def replayed(
    calls: Sequence[Sequence[int]], experts: int, slots: int, policy: str | None
) -> Replay:
    offsets = np.cumsum([0, *(len(call) for call in calls)])
    return replay(
        offsets, np.array([e for c in calls for e in c], np.int32), experts, slots, policy
    )


def misses_of_a_round(experts: int, slots: int, rounds: int, policy: str | None) -> float:
    """Experts one after another, in a circle; the second half of the rounds counts."""
    found = replayed([[e] for _ in range(rounds) for e in range(experts)], experts, slots, policy)
    return float(found.misses[experts * (rounds // 2) :].sum() / (rounds - rounds // 2))


@st.composite
def traces(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    experts = draw(st.integers(1, 12))
    # Some experts are chosen more often than others, and the same call comes again.
    some = draw(st.lists(st.sets(st.integers(0, experts - 1)), min_size=1, max_size=6))
    calls = draw(st.lists(st.sampled_from([sorted(call) for call in some]), max_size=60))
    return experts, draw(st.integers(1, 14)), calls


@given(traces(), st.sampled_from(POLICIES))
@settings(max_examples=400, deadline=None)
def test_every_decision_is_the_plain_statements(
    trace: tuple[int, int, list[list[int]]], policy: str
) -> None:
    experts, slots, calls = trace
    found = replayed(calls, experts, slots, policy)
    plain = Plain(experts, slots, policy)
    expected = [plain.call(call) for call in calls]
    assert [tuple(entry) for entry in found.plan.tolist()] == list(itertools.chain(*expected))
    assert found.hits.tolist() == [sum(entry[3] for entry in call) for call in expected]
    assert found.needed.tolist() == [len(call) for call in calls]


@pytest.mark.parametrize("policy", POLICIES)
def test_long_traces(policy: str) -> None:
    """Counts that grow, decay to nothing and come back."""
    rng = np.random.default_rng(5)
    likely = rng.dirichlet(np.full(40, 0.3), 4)
    calls = []
    for i in range(1500):
        size = 40 if i % 301 == 300 else 5 if i % 7 else 0
        p = likely[i // 400] + 1e-3
        calls.append(sorted(rng.choice(40, size, replace=False, p=p / p.sum()).tolist()))
    plain = Plain(40, 11, policy)
    expected = [entry for call in calls for entry in plain.call(call)]
    found = replayed(calls, 40, 11, policy)
    assert [tuple(entry) for entry in found.plan.tolist()] == expected


def test_what_the_header_promises() -> None:
    rng = np.random.default_rng(2)
    calls = [
        sorted(rng.choice(30, rng.integers(0, 31), replace=False).tolist()) for _ in range(400)
    ]
    for slots in (1, 2, 3, 8, 29, 30, 40):
        for policy in POLICIES:
            found = replayed(calls, 30, slots, policy)
            plan = iter(found.plan.tolist())
            there: dict[int, int] = {}  # expert of slot
            for call in calls:
                entries = [next(plan) for _ in call]
                hits = [entry[0] for entry in entries if entry[3]]
                misses = [entry[0] for entry in entries if not entry[3]]
                assert hits == sorted(set(there.values()) & set(call))
                assert misses == sorted(set(call) - set(hits))
                slots_of_misses = []
                for expert, slot, evicted, hit in entries:
                    assert there.get(slot, -1) == (expert if hit else evicted)
                    if not hit:
                        there[slot] = expert
                        apart = min(slots - 1, 2)
                        assert (
                            slot not in slots_of_misses[len(slots_of_misses) - apart :] or not apart
                        )
                        slots_of_misses.append(slot)
                if len(call) <= slots:
                    assert set(call) <= set(there.values())
                    assert len({slot for _, slot, _, _ in entries}) == len(call)


@pytest.mark.parametrize("half_life", [1, 3, 100, 16384])
def test_a_count_decays_as_it_should(half_life: int) -> None:
    """The cubic against 2^-x, and many short steps against a long one."""
    plain = Plain(1, 1, f"lfu:{half_life}")
    plain.count[0] = 1 << 30
    for plain.clock in {*range(0, 3 * half_life, max(half_life // 50, 1)), 8 * half_life}:
        assert plain.decayed(0) == pytest.approx(2**30 * 0.5 ** (plain.clock / half_life), rel=2e-3)
    # Used in every call: the sum of a geometric series.
    calls = 8 * half_life if half_life <= 100 else half_life // 4
    plain.count[0] = plain.last[0] = 0
    for plain.clock in range(1, calls + 1):
        plain.use(0)
    q = 0.5 ** (1 / half_life)
    assert plain.count[0] == pytest.approx(ONE * (1 - q**calls) / (1 - q), rel=5e-3)


# --- Scans


def test_a_circle_over_more_experts_than_slots() -> None:
    """20 experts, 16 slots: at least 4 must miss in a round; LRU misses all 20."""
    assert misses_of_a_round(20, 16, 40, "lru") == 20
    assert misses_of_a_round(20, 16, 40, None) <= 6
    assert misses_of_a_round(20, 4, 40, None) <= 18
    assert misses_of_a_round(128, 32, 40, None) <= 98


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 2, 4, 8, 16, 19, 20])
def test_all_experts_in_every_call(slots: int, policy: str) -> None:
    """What lies in the slots runs first, so a call fetches no more than what is not there."""
    found = replayed([list(range(20))] * 10, 20, slots, policy)
    assert found.misses.tolist() == [20] + [20 - slots] * 9


def test_prefill_between_decoded_tokens() -> None:
    """Tokens that need 4 of the same 8 experts; now and then one call needs all 64."""
    rng = np.random.default_rng(1)
    calls = []
    for i in range(600):
        everything = i % 50 == 49
        calls.append(
            list(range(64)) if everything else sorted(rng.choice(8, 4, replace=False).tolist())
        )
    decoding = [len(call) == 4 for call in calls]
    # A prefill passes through three slots.
    assert replayed(calls, 64, 8 + 3, None).misses[decoding].sum() == 8
    assert replayed(calls, 64, 8 + 3, "lru").misses[decoding].sum() > 4 * 8


def test_the_sequence_of_the_layers_test() -> None:
    """What tests/gpu/test_layer.py::test_statistics expects of a layer with two slots."""
    calls = [[0, 1], [0, 1], [1], [2], [1, 2], [0, 1, 3]]
    for policy in (None, "lru"):
        found = replayed(calls, 6, 2, policy)
        assert found.hits.tolist() == [0, 2, 1, 0, 2, 1]
        assert found.plan.tolist()[5] == (2, 0, 0, 0)
        assert [entry[2] for entry in found.plan.tolist()[8:]] == [-1, 2, 1]


# --- Settings and errors


def test_policies_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_INFER_POLICY", raising=False)
    assert policy_text() == policy_text("halved") == "halved:128"
    assert policy_text("lru") == "lru"
    assert policy_text("lfu:16384") == "lfu:16384"
    assert policy_text("lfu") == "lfu:128"
    monkeypatch.setenv("MOE_INFER_POLICY", "lfu:77")
    assert policy_text() == "lfu:77"
    assert replayed([[0]], 1, 1, None).policy == "lfu:77"
    monkeypatch.setenv("MOE_INFER_POLICY", "")
    assert policy_text() == "halved:128"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mru", "must be lru, lfu:HALF_LIFE or halved:HALF_LIFE, got 'mru'"),
        ("", "got ''"),
        (":", "got ':'"),
        ("LRU", "got 'LRU'"),
        ("lru:1", "'lru' takes no number, got 'lru:1'"),
        ("lru:", "'lru' takes no number, got 'lru:'"),
        ("lfu:1:2", "HALF_LIFE must be a number of calls from 1 to 16384, got '1:2' in 'lfu:1:2'"),
        ("lfu:", "got '' in 'lfu:'"),
        ("lfu:0", "got '0'"),
        ("halved:16385", "got '16385'"),
        ("halved:99999999999999999999", "got '99999999999999999999'"),
        ("halved:-1", "got '-1'"),
        ("halved: 1", "got ' 1'"),
    ],
)
def test_wrong_policies(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=sentence):
        policy_text(text)
    if text:
        monkeypatch.setenv("MOE_INFER_POLICY", text)
        with pytest.raises(ValueError, match=r"environment variable MOE_INFER_POLICY.*" + sentence):
            policy_text()


@pytest.mark.parametrize(
    ("offsets", "experts", "count", "slots", "sentence"),
    [
        ([0, 2], [0, 0], 2, 1, "expert 1 of call 0 must be from 1 to 1"),
        ([0, 2], [1, 0], 2, 1, "expert 1 of call 0 must be from 2"),
        ([0, 1], [2], 2, 1, "expert 0 of call 0 must be from 0 to 1 .*, got 2"),
        ([0, 1], [-1], 2, 1, "got -1"),
        ([0, 3], [0, 1, 2], 2, 1, r"offsets\[1\] must be 0 to 2, got 3"),
        ([0, 1], [0], 2, 0, "slots must be a number from 1"),
        ([0, 1], [0], 0, 1, "expert_count must be a number from 1"),
        ([0, 1], [0], 1, 2**30, "slots must be 1 to 16777216"),
        ([0, 2], [0], 1, 1, "lead from 0 to 2"),
        ([0, 2, 1], [0], 1, 1, "must not decrease"),
        ([], [], 1, 1, r"shape \(calls \+ 1\)"),
    ],
)
def test_wrong_traces(
    offsets: list[int], experts: list[int], count: int, slots: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        replay(np.array(offsets, np.int64), np.array(experts, np.int32), count, slots, "lru")


def test_empty_traces() -> None:
    assert replayed([], 3, 2, "lru").hit_rate == 1
    assert replayed([[], []], 3, 2, "lru").misses.tolist() == [0, 0]
