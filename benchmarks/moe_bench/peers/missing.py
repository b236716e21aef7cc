"""Loads a peer by name; one whose imports fail stands in the table with its reason."""

from __future__ import annotations

from pathlib import Path

from moe_bench.inputs import InputSet
from moe_bench.peers.peer import Maker, Peer, Problem, UnavailableError

NAMES = {
    "bare": ("bare_graph", "bare"),
    "tensorrt": ("trt", "trt_graph", "trt_layers"),
    "ort_moe": ("ort_moe", "ort_moe_graph", "ort_moe_layers"),
    "torch": ("torch",),
    "module": ("module",),
}


class MissingPeer(Peer):
    """Stands for a peer that cannot be imported here."""

    def __init__(self, names: tuple[str, ...], reason: str) -> None:
        self.names, self._reason = names, reason

    def prepare(self, problem: Problem) -> None:
        raise UnavailableError(self._reason)

    def entries(self, sets: list[InputSet], model: bool) -> dict[str, Maker]:
        raise UnavailableError(self._reason)


def load_peer(name: str, module: Path | None) -> Peer:
    """A peer by its name on the command line.

    Args:
        name: one of NAMES.
        module: the file of "module".
    """
    try:
        if name == "bare":
            from moe_bench.peers.bare import BarePeer

            return BarePeer()
        if name == "tensorrt":
            from moe_bench.peers.tensorrt_session import TensorRtPeer

            return TensorRtPeer()
        if name == "ort_moe":
            from moe_bench.peers.microsoft_moe import MicrosoftMoePeer

            return MicrosoftMoePeer()
        if name == "torch":
            from moe_bench.peers.torch_grouped import TorchPeer

            return TorchPeer()
        from moe_bench.peers.module import ModulePeer

        if module is None:
            raise UnavailableError("no file was named")
        return ModulePeer(module)
    except (ImportError, OSError, UnavailableError) as error:
        return MissingPeer(NAMES[name], str(error))
