"""Weight files of a part, for as long as it runs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_bench.cases import Case
from moe_bench.streaming.shapes import file_bytes
from moe_bench.weights import Experts, folder_with_room, make_experts


@contextlib.contextmanager
def weight_files(
    folder: str, case: Case, dtype: str, count: int, device: str
) -> Iterator[list[Experts]]:
    """Makes ``count`` files of different experts, in ``folder`` or where there is room for them.

    Args:
        folder: where they should lie.
        case: the layer of each.
        dtype: its type.
        count: of files.
        device: where the experts are made.
    """
    place = folder_with_room(folder, count * file_bytes(case, dtype))
    with tempfile.TemporaryDirectory(dir=place) as made:
        yield [
            make_experts(case, dtype, Path(made) / f"{i}.safetensors", seed=i, device=device)
            for i in range(count)
        ]
