"""Property tests: whatever the bytes, a file reads as it was or is refused by WeightFileError."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_infer.weights import SafetensorsWriter, WeightFileError, open_weight_file, write_npz

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["weights.npz", "weights_deflated.npz", "weights.safetensors"]
ORIGINAL = {name: (GOLDEN / name).read_bytes() for name in NAMES}
FAST = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def contents(path: Path, verify: bool = True) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    file = open_weight_file(path)
    if verify:
        file.verify_content()
    return {n: (t.dtype, t.shape, file.read(n).tobytes()) for n, t in file.tensors.items()}


def index_bytes(name: str) -> range:
    """Where the bytes that describe the tensors lie: mutations elsewhere seldom matter."""
    data = ORIGINAL[name]
    if name.endswith(".npz"):
        return range(data.index(b"PK\1\2"), len(data))
    return range(8 + int.from_bytes(data[:8], "little"))


def mutated(data: st.DataObject, name: str) -> bytes:
    """A golden file with up to four bytes set, inserted or deleted, or with its end cut off."""
    whole = bytearray(ORIGINAL[name])
    where = st.sampled_from(index_bytes(name)) | st.integers(0, len(whole) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(data.draw(where), len(whole) - 1)
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set":
            whole[at] = data.draw(st.sampled_from([0, 0xFF, 0x30, 0x39]) | st.integers(0, 255))
        elif kind == "insert":
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del whole[at : at + data.draw(st.integers(1, 9))]
        else:
            del whole[max(at, 1) :]
        if not whole:
            break
    return bytes(whole)


@pytest.mark.parametrize("name", NAMES)
@FAST
@given(data=st.data())
def test_mutations(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(mutated(data, name))
        try:
            found = contents(path)
        except WeightFileError as error:
            assert str(path) in str(error)
            return
    # What was accepted must keep to the types: a mutated name or shape is a valid file too.
    for dtype, shape, data_bytes in found.values():
        itemsize = 4 if dtype == "float32" else 2
        assert len(data_bytes) == itemsize * int(np.prod(shape, dtype=object))


@pytest.mark.parametrize("name", NAMES)
def test_every_single_bit_of_the_data_is_verified(name: str, tmp_path: Path) -> None:
    """Outside the index a flipped bit is found by the checksum, or changes nothing."""
    path = tmp_path / name
    path.write_bytes(ORIGINAL[name])
    expected = contents(path)
    index = index_bytes(name)
    for at in range(len(ORIGINAL[name])):
        if at in index:
            continue
        whole = bytearray(ORIGINAL[name])
        whole[at] ^= 1 << (at % 8)
        path.write_bytes(whole)
        with contextlib.suppress(WeightFileError):
            assert contents(path) == expected, f"byte {at}"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@FAST
@given(data=st.binary(max_size=400))
def test_any_bytes(suffix: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        for start in (b"", b"PK\3\4", len(data).to_bytes(8, "little")):
            path.write_bytes(start + data)
            with contextlib.suppress(WeightFileError):
                contents(path)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1,
                max_size=12).filter(lambda n: n != "__metadata__"),
        hnp.arrays(st.sampled_from([np.float32, np.float16]),
                   hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
        min_size=1, max_size=5,
    ),
    st.booleans(),
)  # fmt: skip
def test_round_trip(arrays: dict[str, np.ndarray], compress: bool) -> None:
    expected = {n: (a.dtype.name, a.shape, a.tobytes()) for n, a in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        with SafetensorsWriter(path, {n: (a.dtype.name, a.shape) for n, a in arrays.items()}) as w:
            for name, array in arrays.items():
                w.write(name, array)
        assert contents(path) == expected
        path = Path(folder) / "w.npz"
        write_npz(path, arrays.items(), compress)
        assert contents(path) == expected
