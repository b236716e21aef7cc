"""The grouped product on the FP32 units, run on the host thread by thread, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from native.host_library import build_or_skip

NONE, SILU, RELU = 0, 1, 4  # ActivationKind
Floats = np.ndarray


class Sizes(ctypes.Structure):
    """As in simt_product.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("groups", "kind", "gated", "is_half")),
        *((name, ctypes.c_int64) for name in ("rows", "n", "k", "input_stride", "slot_bytes")),
        *((name, ctypes.c_int64) for name in ("weight_offset", "bias_offset")),
    ]


class Way(ctypes.Structure):
    """As in simt_product.cpp."""

    _fields_ = [(name, ctypes.c_int32) for name in ("narrow", "aligned", "blocks", "late")]


@dataclass
class Product:
    """Operands of a grouped product; expert e has slot e, and groups other slots in turn."""

    input: Floats
    weights: Floats  # (slots, n, k)
    bias: Floats | None  # (slots, n)
    source: Floats | None
    rows_of_group: list[int]
    first_row: int
    kind: int
    gated: bool
    dtype: type

    @property
    def slot_of_group(self) -> np.ndarray:
        return np.arange(len(self.rows_of_group), dtype=np.int32)[::-1].copy()

    @property
    def begins(self) -> np.ndarray:
        return self.first_row + np.cumsum([0, *self.rows_of_group])[:-1]

    def expected(self) -> Floats:
        """In float64; rows of no group stay NaN."""
        n = self.weights.shape[1]
        result = np.full((len(self.input), n // 2 if self.gated else n), np.nan)
        for begin, rows, slot in zip(
            self.begins, self.rows_of_group, self.slot_of_group, strict=True
        ):
            at = slice(begin, begin + rows)
            y = self.input[at].astype(np.float64) @ self.weights[slot].astype(np.float64).T
            if self.bias is not None:
                y += self.bias[slot].astype(np.float64)
            gate = y[:, ::2] if self.gated else y
            if self.kind == SILU:
                gate = gate / (1 + np.exp(-gate))
            elif self.kind == RELU:
                gate = np.maximum(gate, 0)
            y = gate * y[:, 1::2] if self.gated else gate
            if self.source is not None:
                y = y + self.source[at].astype(np.float64)
            result[at] = y
        return result


Run = Callable[..., Floats]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("simt")
    return build_or_skip(folder, "simt_product", "cuda_fp16.h")


@pytest.fixture(scope="module")
def run(library: ctypes.CDLL) -> Run:
    function = library.run_product
    function.restype = None

    def run(product: Product, stride: int = 0, **way: int) -> Floats:
        slots, n, k = product.weights.shape
        stride = max(stride, k)
        item = np.dtype(product.dtype).itemsize
        offset = 16 if way["aligned"] else item  # of the weights in a slot
        bias_offset = offset + n * k * item
        slot_bytes = (bias_offset + n * item + 15) // 16 * 16
        memory, slots_at = aligned_memory(slots * slot_bytes)
        for slot in range(slots):
            parts = [product.weights[slot]] + ([] if product.bias is None else [product.bias[slot]])
            data = b"".join(part.astype(product.dtype).tobytes() for part in parts)
            at = slots_at + slot * slot_bytes + offset
            memory[at : at + len(data)] = np.frombuffer(data, np.uint8)
        rows_memory, rows_at = aligned_memory(len(product.input) * stride * item)
        rows = rows_memory[rows_at:].view(product.dtype)[: len(product.input) * stride]
        rows = rows.reshape(-1, stride)
        rows[:, :k] = product.input
        columns = n // 2 if product.gated else n
        output_memory, output_at = aligned_memory(len(product.input) * columns * item)
        output = output_memory[output_at:].view(product.dtype)[: len(product.input) * columns]
        sizes = Sizes(
            groups=len(product.rows_of_group),
            kind=product.kind,
            gated=product.gated,
            is_half=product.dtype == np.float16,
            rows=len(product.input),
            n=n,
            k=k,
            input_stride=stride,
            slot_bytes=slot_bytes,
            weight_offset=offset,
            bias_offset=-1 if product.bias is None else bias_offset,
        )
        begins = product.begins.astype(np.int32)
        ends = (begins + product.rows_of_group).astype(np.int32)
        source = None if product.source is None else product.source.astype(product.dtype)
        function(
            ctypes.byref(sizes),
            ctypes.byref(Way(**way)),
            pointer(begins),
            pointer(ends),
            pointer(product.slot_of_group),
            pointer(memory, slots_at),
            pointer(rows),
            None if source is None else pointer(source),
            pointer(output),
        )
        return output.reshape(-1, columns).copy()

    return run


def aligned_memory(size: int) -> tuple[np.ndarray, int]:
    """Bytes that are NaN in every type, with some around them, and where the first 16 begin."""
    memory = np.full(size + 512, 0xFF, np.uint8)
    return memory, 256 - memory.ctypes.data % 16


def pointer(array: np.ndarray, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)


def make(
    rows: list[int],
    n: int,
    k: int,
    *,
    kind: int = NONE,
    gated: bool = False,
    bias: bool = False,
    source: bool = False,
    first_row: int = 0,
    dtype: type = np.float32,
) -> Product:
    rng = np.random.default_rng(n * k + sum(rows))
    total = first_row + sum(rows) + 3

    def random(*shape: int, scale: float = 1.0) -> Floats:
        return (rng.standard_normal(shape) * scale).astype(dtype)

    return Product(
        random(total, k),
        random(len(rows), n, k, scale=k**-0.5),
        random(len(rows), n) if bias else None,
        random(total, n) if source else None,
        rows,
        first_row,
        kind,
        gated,
        dtype,
    )


CASES = [
    make([1], 4, 4),
    make([5, 0, 1, 0, 0, 130, 3, 0], 132, 20, bias=True, kind=RELU),
    make([0, 33, 0, 31], 260, 1028, source=True, first_row=7),
    make([128, 64, 129, 1], 136, 36, kind=SILU, gated=True, bias=True, first_row=130),
    make([17, 100, 90], 8, 44, kind=SILU, gated=True),
    make([0, 0], 4, 4),
]
UNALIGNED = [
    make([1], 1, 1),
    make([5, 0, 1, 0, 0, 130, 3, 0], 131, 19, bias=True, kind=RELU),
    make([0, 33, 0, 31], 129, 1027, source=True, first_row=7),
    make([70, 9], 134, 33, kind=SILU, gated=True, bias=True, first_row=1),
]


def named(product: Product) -> str:
    return f"{product.rows_of_group}x{product.weights.shape[1]}x{product.weights.shape[2]}"


def check(product: Product, found: Floats) -> None:
    expected = product.expected()
    # A value that no group has stays what it was: NaN.
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    tolerance = 2e-3 if product.dtype == np.float16 else 3e-6
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


WAYS = [
    {"narrow": narrow, "blocks": blocks, "late": late}
    for narrow, blocks, late in ((0, 1, 0), (0, 3, 1), (1, 2, 0), (1, 7, 1))
]


@pytest.mark.parametrize("product", CASES, ids=named)
def test_aligned(run: Run, product: Product) -> None:
    """Neither the tile nor the order of threads, blocks and copies changes a bit."""
    first = run(product, aligned=1, **WAYS[0])
    check(product, first)
    stride = product.weights.shape[2] + 8
    for way in WAYS[1:]:
        assert run(product, stride, aligned=1, **way).tobytes() == first.tobytes()
        assert run(product, stride + 1, aligned=0, **way).tobytes() == first.tobytes()


@pytest.mark.parametrize("product", UNALIGNED, ids=named)
def test_unaligned(run: Run, product: Product) -> None:
    first = run(product, aligned=0, **WAYS[0])
    check(product, first)
    for way in WAYS[1:]:
        assert run(product, product.weights.shape[2] + 2, aligned=0, **way).tobytes() == (
            first.tobytes()
        )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_float16(run: Run, way: dict[str, int]) -> None:
    for product in (
        make([9, 0, 40], 134, 37, kind=SILU, gated=True, bias=True, dtype=np.float16),
        make([2, 131], 65, 1030, source=True, dtype=np.float16),
    ):
        check(product, run(product, aligned=0, **way))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_sums_are_taken_in_slices(run: Run, way: dict[str, int]) -> None:
    """Ones are lost in a sum of 2^24, and are not where they are summed first."""
    product = make([3], 4, 2050)
    product.input[:] = 1
    product.weights[:] = 0
    product.weights[:, :, 0] = 2.0**24
    product.weights[:, :, 1000:2048] = 1  # 24 in the first slice
    product.weights[:, :, 2048:] = 2
    found = run(product, aligned=0, **way)[:3]
    np.testing.assert_array_equal(found, np.float32(2.0**24 + 1024 + 4))


@pytest.mark.parametrize("narrow", [0, 1])
def test_one_group_of_many_gives_the_same_bits(run: Run, narrow: int) -> None:
    """As when experts stream: a call has one group, in the same rows."""
    product = make([70, 0, 131, 20], 68, 40, bias=True, first_row=5)
    way = {"narrow": narrow, "aligned": 1, "blocks": 2, "late": 1}
    together = run(product, **way)
    for group, (begin, rows) in enumerate(zip(product.begins, product.rows_of_group, strict=True)):
        slot = product.slot_of_group[group]
        assert product.bias is not None
        alone = Product(
            product.input,
            product.weights[slot : slot + 1],
            product.bias[slot : slot + 1],
            None,
            [rows],
            int(begin),
            NONE,
            False,
            np.float32,
        )
        found = run(alone, **way)
        at = slice(begin, begin + rows)
        assert found[at].tobytes() == together[at].tobytes()
        assert int(np.isfinite(found).all(axis=1).sum()) == rows


@pytest.mark.parametrize("narrow", [0, 1])
def test_a_warp_reads_and_writes_each_bank_once(library: ctypes.CDLL, narrow: int) -> None:
    """Shared memory has 8 units of 16 bytes in its width; equal places are read as one."""
    lists = [np.full((256, 64), -1, np.int32) for _ in range(3)]
    threads = 1
    for thread in range(256):
        threads = library.shared_places(narrow, thread, *(pointer(one[thread]) for one in lists))
        if thread + 1 == threads:
            break
    rows, columns, loaded = (one[:threads] for one in lists)
    for warp in range(0, threads, 32):
        for wanted in (*rows[warp : warp + 32].T, *columns[warp : warp + 32].T):
            assert len(set(wanted % 8)) == len(set(wanted)) <= 8
        for quarter in range(warp, warp + 32, 8):  # of a warp, whose 16 bytes a lane are 4 widths
            for at in range(2):
                assert len(set(loaded[quarter : quarter + 8, at] % 8)) == 8
    for places in (rows, columns):  # all of a stage's units are read
        read = set(places[places >= 0].tolist())
        assert read == set(range(len(read)))
