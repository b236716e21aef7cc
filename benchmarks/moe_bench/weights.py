"""Random experts, made on the GPU, and the weight file that every contender reads."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_bench.cases import Case
from moe_infer.weights.safetensors_header import build_header, parse_header

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

_CHUNK = 64 << 20
_BUFFERS = 6
_WRITERS = 4


@dataclass(frozen=True)
class Experts:
    """A case's experts in GPU memory, and their file.

    Attributes:
        path: safetensors, stacked, gate and up rows alternating, as the kernels read them.
        gate_up: (experts, 2 * hidden, d_model); all gate rows, then all up rows, as PyTorch and
            Triton layers have them.
        down: (experts, d_model, hidden).
        layer_norm: (experts, d_model); None where the sub-layer has none.
    """

    path: Path
    gate_up: torch.Tensor
    down: torch.Tensor
    layer_norm: torch.Tensor | None


def make_experts(
    case: Case, dtype: str, path: Path, seed: int = 0, device: str = "cuda"
) -> Experts:
    """Fills GPU memory with random experts and writes them; outputs have about unit variance.

    The file has no digest of its contents: computing one would take longer than everything else.
    """
    kind = TORCH_DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(seed)

    def random(rows: int, columns: int) -> torch.Tensor:
        values = torch.empty((case.experts, rows, columns), dtype=kind, device=device)
        for e in range(case.experts):
            values[e].normal_(0, 1 / math.sqrt(columns), generator=generator)
        return values

    gate_up = random(2 * case.hidden, case.d_model)
    down = random(case.d_model, case.hidden)
    norm = None
    shapes = {"gate_up": (dtype, gate_up.shape), "down": (dtype, down.shape)}
    if case.sublayer == "T5_FF":
        shape = (case.experts, case.d_model)
        norm = torch.empty(shape, dtype=kind, device=device).normal_(1, 0.1, generator=generator)
        shapes["layer_norm"] = (dtype, norm.shape)
    header = build_header(shapes, {})
    size = 8 + len(header) + sum(math.prod(shape) * kind.itemsize for _, shape in shapes.values())
    tensors, _ = parse_header(str(path), header, size)  # the reader's own check, and the offsets
    with _FileWriter(path, size, pinned=device != "cpu") as writer:
        writer.write_bytes(0, len(header).to_bytes(8, "little") + header)
        for e in range(case.experts):
            packed = torch.stack(gate_up[e].chunk(2), dim=1)
            writer.write_tensor(tensors["gate_up"].offset + e * _nbytes(packed), packed)
            writer.write_tensor(tensors["down"].offset + e * _nbytes(down[e]), down[e])
        if norm is not None:
            writer.write_tensor(tensors["layer_norm"].offset, norm)
    return Experts(path, gate_up, down, norm)


def folder_with_room(preferred: str, needed: int) -> str:
    """The folder, or the one for temporary files where the preferred one is too small.

    Raises:
        OSError: neither has room.
    """
    folders = dict.fromkeys((preferred, tempfile.gettempdir()))
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    for folder, room in free.items():
        if room > needed:
            return folder
    found = ", ".join(f"{folder} has {room / 1e9:.1f} GB" for folder, room in free.items())
    raise OSError(f"the weight file needs {needed / 1e9:.1f} GB: {found}; name another with --dir")


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _FileWriter:
    """Copies device tensors into a file through pinned buffers; some threads write at a time.

    A new page of a file in memory costs more than the copy into it, so one thread would be slow.
    """

    def __init__(self, path: Path, size: int, pinned: bool) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.truncate(self._file, size)
        self._buffers = [
            torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(_BUFFERS)
        ]
        self._busy: list[Future[None] | None] = [None] * _BUFFERS
        self._next = 0
        self._pool = ThreadPoolExecutor(_WRITERS)

    def write_bytes(self, offset: int, data: bytes) -> None:
        _write_all(self._file, offset, memoryview(data))

    def write_tensor(self, offset: int, tensor: torch.Tensor) -> None:
        source = tensor.contiguous().view(-1).view(torch.uint8)
        for begin in range(0, len(source), _CHUNK):
            part = source[begin : begin + _CHUNK]
            i, self._next = self._next, (self._next + 1) % _BUFFERS
            if (busy := self._busy[i]) is not None:
                busy.result()
            buffer = self._buffers[i][: len(part)]
            buffer.copy_(part)  # returns when the bytes are there
            view = memoryview(buffer.numpy())
            self._busy[i] = self._pool.submit(_write_all, self._file, offset + begin, view)

    def __enter__(self) -> _FileWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            for busy in self._busy:
                if busy is not None:
                    busy.result()
        finally:
            self._pool.shutdown()
            os.close(self._file)


def _write_all(file: int, offset: int, data: memoryview) -> None:
    write: Callable[..., int] = os.pwrite
    while data:
        done = write(file, data, offset)
        data, offset = data[done:], offset + done
