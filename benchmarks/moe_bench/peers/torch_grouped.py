"""The layer in PyTorch: sort by expert, two grouped products, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from moe_bench.cases import Case
from moe_bench.inputs import InputSet
from moe_bench.peers.peer import Entry, Maker, Peer, Problem, UnavailableError, in_graph
from moe_bench.timing import Contender, capture
from moe_bench.weights import Experts
from moe_infer.op import RMS_NORM_EPSILON

try:
    from moe_bench.peers.gated_kernel import gated_kernel
except ImportError:
    gated_kernel = None

_BLOCK = 1024
_PROBES = 5

Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class TorchPeer(Peer):
    """``torch._grouped_mm`` on Hopper; weights as a PyTorch model has them."""

    names = ("torch",)

    def prepare(self, problem: Problem) -> None:
        if not hasattr(torch, "_grouped_mm"):
            raise UnavailableError(f"torch {torch.__version__} has no _grouped_mm")
        self._problem = problem

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        return {"torch": lambda: self._fastest(sets)}

    def _fastest(self, sets: list[InputSet]) -> Entry:
        """The quicker of the ways to add up a token's rows, for this number of tokens."""
        case, experts = self._problem.case, self._problem.experts
        best = min(COMBINES, key=lambda name: self._probe(COMBINES[name], sets[0]))
        layer = TorchLayer(case, experts, COMBINES[best])
        return in_graph(layer, sets, f"rows added up by {best}")

    def _probe(self, combine: Combine, given: InputSet) -> float:
        """Milliseconds of one run."""
        layer = TorchLayer(self._problem.case, self._problem.experts, combine)
        _refuse_synchronisation(lambda: layer(given))
        contender = Contender(capture(lambda: layer(given)).replay, on_device=True)
        return min(contender.sample() for _ in range(_PROBES))


class TorchLayer:
    """One layer of standard operators, without host synchronisation.

    Args:
        case: the layer.
        experts: its weights.
        combine: adds up a token's rows.
    """

    def __init__(self, case: Case, experts: Experts, combine: Combine) -> None:
        self._case, self._experts, self._combine = case, experts, combine
        device = experts.down.device
        self._numbers = torch.arange(case.experts, dtype=torch.int16, device=device)

    def __call__(self, given: InputSet) -> torch.Tensor:
        case, x = self._case, given.hidden_states
        scores, chosen = given.logits.float().topk(case.top_k, dim=-1)
        # Short keys: the sort takes a pass for each byte.
        ordered, order = chosen.flatten().to(torch.int16).sort(stable=True)
        ends = torch.searchsorted(ordered, self._numbers, right=True, out_int32=True)
        rows = x[order // case.top_k]
        y = self._experts_of(rows, ordered, ends)
        if case.router == "default":
            return torch.empty_like(x).index_copy_(0, order, y)
        if case.normalize:
            weights = scores.softmax(-1)
        else:
            weights = given.logits.float().softmax(-1).gather(1, chosen)
        return self._combine(x, y, order, weights)

    def _experts_of(
        self, rows: torch.Tensor, ordered: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        experts = self._experts
        n = rows
        if self._case.sublayer == "T5_FF":
            assert experts.layer_norm is not None
            n = F.rms_norm(rows, rows.shape[-1:], eps=RMS_NORM_EPSILON)
            n = n * experts.layer_norm[ordered.int()]
        inner = torch._grouped_mm(n, experts.gate_up.transpose(1, 2), offs=ends)
        inner = gated(inner, self._case.sublayer == "T5_FF")
        y = torch._grouped_mm(inner, experts.down.transpose(1, 2), offs=ends)
        return rows + y if self._case.sublayer == "T5_FF" else y


def gated(inner: torch.Tensor, gelu: bool) -> torch.Tensor:
    """act(gate) * up of (rows, 2 * hidden), in one pass where there is Triton."""
    hidden = inner.shape[1] // 2
    if gated_kernel is None or not inner.is_cuda:
        gate, up = inner.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    output = torch.empty((len(inner), hidden), dtype=inner.dtype, device=inner.device)
    grid = (len(inner), -(-hidden // _BLOCK))
    gated_kernel[grid](inner, output, hidden, gelu, _BLOCK)
    return output


def _gather_and_sum(
    x: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    each = y[places].view(*weights.shape, -1)
    return torch.bmm(weights.to(y.dtype)[:, None], each)[:, 0]


def _index_add(
    x: torch.Tensor, y: torch.Tensor, order: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    weighted = y * weights.flatten()[order, None]  # float32, as the sum
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return total.index_add_(0, order // weights.shape[1], weighted).to(x.dtype)


COMBINES: dict[str, Combine] = {"gather and bmm": _gather_and_sum, "index_add": _index_add}


def _refuse_synchronisation(run: Callable[[], Any]) -> None:
    """Runs once and raises if the host waits for the GPU, which a capture would not survive.

    Raises:
        UnavailableError: it does.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        raise UnavailableError(f"cannot be captured in a CUDA graph: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
