"""Experts as a loop that was unrolled: each on the tokens that chose it.

What tracing makes of ``for expert in experts``: for each expert the rows of its one-hot mask
(NonZero) are the pairs (token, chosen expert) that it serves; the tokens are gathered, go through
the expert's own weights, are weighted and added to the rows from which they came (ScatterND,
ScatterElements). Mixtral, Qwen and OLMoE of transformers 4, optimum-onnx and Switch Transformers
are written so, with the weights of each expert as constants of their own.

Read here as: an axis ``r3`` of the rows of expert 3, on which values are what they are on the
pairs; the sum of all experts' rows is the sum over the chosen experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from onnx import NodeProto

from moe_infer.graph.apart import leaves
from moe_infer.graph.expression import Expr, factors_of, terms_of
from moe_infer.graph.interpreter import Opaque, Value
from moe_infer.graph.match import GraphView, Match, NearMiss, attribute, describe
from moe_infer.graph.rows import RowsInterpreter
from moe_infer.graph.search import search

NAME = "unrolled"

_EXPERT_NAME = re.compile(r"experts?[._/](?:expert_)?(\d+)\b")
"""As transformers names its modules: ``experts.3``, ``experts/expert_3``."""


_FIXED = re.compile(r"a Reshape .*(the axis r\d+ a fixed size|leaves out axes \['r\d+'\])")
_ONE_TOKEN = (
    "the exporter wrote into the graph how many tokens of the sample input went to one of the"
    " experts, so it fails when there are others. Export again with a sample input of which each"
    " expert gets two tokens or more, or put MoELayer in before the export with"
    " moe_infer.torch.replace_moe"
)


def find(view: GraphView) -> Iterator[Match | NearMiss]:
    """Every block, or how far it went, in the order of the graph."""
    return search(view, NAME, LoopInterpreter)


def _list(numbers: Sequence[int]) -> str:
    shown = [str(n) for n in numbers[:12]]
    return ", ".join(shown) + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")


class LoopInterpreter(RowsInterpreter):
    """Adds loops: over the chosen experts, with capacities, and what they sum up to."""

    def __init__(self, view: GraphView, hidden_states: str, logits: str) -> None:
        """As :class:`moe_infer.graph.interpreter.Interpreter`."""
        super().__init__(view, hidden_states, logits)
        self.passes: dict[int, int] = {}
        """Passes of a loop that has fewer than there are experts: their numbers, and how many."""
        self.mask_names: dict[Expr, str] = {}
        """Names of masks of the chosen experts from which some are taken out."""

    # The sum of all experts' rows

    def _read_add(self, node: NodeProto) -> list[Value]:
        return [Value(v.axes, self._complete(v.expr)) for v in super()._read_add(node)]

    def _complete(self, total: Expr) -> Expr:
        """The sum of all experts' rows as a sum over the chosen experts; else the same."""
        terms = terms_of(total)
        count = self.sizes["e"]
        if len(terms) != count or any(t.op != "scattered" for t in terms) or self.passes:
            return total
        experts = {int(t.params[0]): t for t in terms}
        masks = {t.args[0] for t in terms}
        if len(experts) != count or len(masks) != 1:
            return total
        mask = masks.pop()
        merged = self._merged(mask, [experts[e].args[1] for e in range(count)])
        if self.sizes["k"]:
            merged = self.algebra.sum("k", self.sizes["k"], merged)
        return merged

    def _merged(self, mask: Expr, experts: Sequence[Expr]) -> Expr:
        if mask.op == "one_hot":
            return self.merged(experts, mask.args[0])
        hot = [e for e in mask.args if e.op == "one_hot"]
        within = [e for e in mask.args if e.op == "within"]
        if (
            len(mask.args) != 2
            or len(hot) != 1
            or len(within) != 1
            or within[0].args[0] is not hot[0]
        ):
            raise Opaque("the experts' rows are not those of a mask of the chosen experts")
        merged = self.merged(experts, hot[0].args[0])
        along, limit = within[0].params
        size = self.sizes[str(along)]
        if size is not None and size <= int(limit):
            return merged
        if mask not in self.mask_names:
            raise Opaque("the mask of tokens within capacity is not (..., experts)")
        return self.algebra.mul((merged, self.algebra.make("kept", (mask,), (), self.tokens)))

    # Loops over the experts that were chosen at all

    def _read_greater(self, node: NodeProto) -> list[Value]:
        value, zero = self._input(node, 0), self._input(node, 1)
        atoms, counted = set(), value.expr
        while counted.op == "sum":
            atoms.add(str(counted.params[0]))
            counted = counted.args[0]
        everywhere = set(self.tokens) | ({"k"} & counted.atoms)
        positive = zero.expr is self.algebra.const(0) and value.axes == (("e",),)
        if counted not in self.chosen_masks or atoms != everywhere or not positive:
            return super()._read_greater(node)
        self.loops = True
        return [Value(value.axes, self.algebra.make("hit", (counted,), (), ("e",)))]

    def _hit(self, value: Value, axis: int, number: int, count: int) -> Value:
        """The expert at which pass ``number`` of the loop works.

        When there is a pass for every expert the graph runs only if all of them are chosen (the
        Split fails otherwise), and then pass ``n`` is expert ``n``. With fewer passes it is that of
        the sample input, which the graph does not tell.
        """
        axes = (*value.axes[:axis], (), *value.axes[axis + 1 :])
        return Value(axes, self.algebra.make("pass", (value.expr,), (number, count), ()))

    def _read_nonzero(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        if value.expr.op == "hit":
            return [Value(((), ("hit",)), self._rows("hit_rows", value))]
        return super()._read_nonzero(node)

    def _read_split(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(value.axes)
        if value.axes[axis] != ("hit",):
            return super()._read_split(node)
        sizes = self.view.ints(node.input[1]) if len(node.input) > 1 else None
        if sizes != [1] * len(node.output):
            raise Opaque("a Split of the chosen experts that does not fail when one is not chosen")
        return [self._hit(value, axis, i, len(node.output)) for i in range(len(node.output))]

    def _read_gather(self, node: NodeProto) -> list[Value]:
        index = None
        if self.view.small(node.input[1]) is None:
            index = self._input(node, 1)
        if index is None or index.expr.op != "pass":
            return super()._read_gather(node)
        data = self._input(node, 0)
        axis = attribute(node, "axis", 0) % len(data.axes)
        number, count = (int(p) for p in index.expr.params)
        picked = self.pick(data, axis, number, keep=False)
        if count != self.sizes["e"]:
            self.passes[number] = count
        return [Value((*picked.axes[:axis], *index.axes, *picked.axes[axis:]), picked.expr)]

    # Capacity: a token whose expert has enough tokens before it is served by none

    def _read_cumsum(self, node: NodeProto) -> list[Value]:
        value = self._input(node, 0)
        axis = self.view.ints(node.input[1])
        self.loops |= value.expr.op == "one_hot"
        plain = not attribute(node, "exclusive", 0) and not attribute(node, "reverse", 0)
        if value.expr.op != "one_hot" or self.sizes["k"] or not axis or not plain:
            raise Opaque("a running sum that does not count the tokens of each expert")
        along = value.axes[axis[0]]
        if not along:  # transformers 5.17 sums along an axis of size 1, so no expert is ever full
            return [value]
        if along != (self.tokens[-1],):
            raise Opaque("a running sum that is not along the tokens")
        return [Value(value.axes, self.algebra.make("running", (value.expr,), along))]

    def _within(self, node: NodeProto, more: int) -> list[Value]:
        running, limit = self._input(node, 0), self.view.ints(node.input[1])
        if running.expr.op == "one_hot" and limit and len(limit) == 1 and limit[0] + more >= 1:
            return [Value(running.axes, self.algebra.const(1))]
        if running.expr.op != "running" or not limit or len(limit) != 1:
            raise Opaque("a comparison that no known pattern uses")
        params = (*running.expr.params, limit[0] + more)
        return [Value(running.axes, self.algebra.make("within", running.expr.args, params))]

    def _read_lessorequal(self, node: NodeProto) -> list[Value]:
        return self._within(node, 0)

    def _read_less(self, node: NodeProto) -> list[Value]:
        if self._input(node, 0).expr.op != "running":
            return super()._read_less(node)
        return self._within(node, -1)

    def _read_mul(self, node: NodeProto) -> list[Value]:
        values = super()._read_mul(node)
        expr = values[0].expr
        if {e.op for e in expr.args} == {"one_hot", "within"}:
            axes = (*((t,) for t in self.tokens), ("e",))
            if values[0].axes == axes and len(expr.args) == 2:
                self.mask_names.setdefault(expr, node.output[0])
            self.chosen_masks.add(expr)
        return values

    def outside(self, expr: Expr) -> tuple[Expr, dict[str, Any]]:
        """Takes the capacity's factor off, which becomes a product outside the layer."""
        factors = list(factors_of(expr))
        kept = [f for f in factors if f.op == "kept"]
        if len(kept) != 1:
            return expr, {}
        factors.remove(kept[0])
        return self.algebra.mul(factors), {"kept": self.mask_names[kept[0].args[0]]}

    # Loops in which experts are missing

    def unfinished(self, expr: Expr) -> bool:
        """Sums of some experts' rows."""
        return any(t.op == "scattered" for t in terms_of(expr))

    def wrong_export(self) -> tuple[str, str] | None:
        """A loop in which the exporter recorded only the experts that its sample input chose."""
        fixed = [i for i, reason in self.opaque.items() if _FIXED.match(reason)]
        if fixed:
            return describe(self.view.nodes[fixed[0]]), _ONE_TOKEN
        count = self.sizes["e"]
        sums = [(n, v.expr) for n, v in self.env.items() if n in self.view.position]
        sums = [(n, e) for n, e in sums if all(t.op == "scattered" for t in terms_of(e))]
        if count is None or not sums:
            return None
        name, total = max(sums, key=lambda s: self.view.position[s[0]])
        there = {int(t.params[0]): t for t in terms_of(total)}
        served = {int(e.args[0].params[0]) for e in self.masks if e.op == "rows"}
        if served != set(there) or len(there) >= count or self._goes_on(name):
            return None
        numbers = sorted(there) if not self.passes else self._numbers(there.values())
        left = "" if numbers is None else _list(sorted(set(range(count)) - set(numbers)))
        missing = f" (missing: {left})" if left else ""
        node = describe(self.view.nodes[self.view.position[name]])
        return node, (
            f"the export holds {len(there)} of {count} experts{missing}: its loop was recorded with"
            " a sample input that chose no others, so a token that needs another one is computed"
            " wrongly, or the run fails. Export again with transformers 5 and"
            " experts_implementation='batched_mm', as `moe-infer export` does"
        )

    def _goes_on(self, name: str) -> bool:
        """Whether more is added to a sum of rows, in a way that could not be read."""
        for user in self.view.users.get(name, ()):
            node = self.view.nodes[user]
            makers = [self.view.producer(i) for i in node.input if i != name]
            adds = [m for m in makers if m is not None and m.op_type.startswith("Scatter")]
            if node.op_type.startswith("Scatter") or (node.op_type == "Add" and adds):
                return True
        return False

    def _numbers(self, terms: Iterable[Expr]) -> list[int] | None:
        """Experts' numbers by the names of the nodes that read their weights."""
        found = []
        for term in terms:
            names = {str(e.params[0]) for e in leaves(term) if e.op == "matrix"}
            users = [u for n in names for u in self.view.users.get(n, ())]
            texts = [n for u in users for n in (self.view.nodes[u].name, *self.view.nodes[u].input)]
            numbers = [int(m.group(1)) for t in texts for m in [_EXPERT_NAME.search(t)] if m]
            if not numbers:
                return None
            found.append(numbers[0])
        return found
