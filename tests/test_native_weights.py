"""The library's readers of weight files against Python's: the same verdicts, sentences and data.

The tests of the Python readers run again here with every file that they open given to the C++
readers too, which are compiled with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import test_weights_experts
import test_weights_npz
import test_weights_safetensors
from moe_infer.weights import WeightFileError, open_weight_file
from native.weight_reader import WeightReader, build, why_not
from test_weights_experts import EXPERTS, FILES, D, H, config, separate, stacked
from test_weights_experts import save as save_layer
from test_weights_fuzz import NAMES, ORIGINAL, index_bytes, mutated

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
LARGE = 1 << 28
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

pytestmark = pytest.mark.needs_library


@pytest.fixture(scope="module")
def program() -> Path:
    if reason := why_not():
        pytest.skip(reason)
    return build(ROOT / "build/read_weights")


@pytest.fixture(scope="module")
def reader(program: Path) -> Iterator[WeightReader]:
    reader = WeightReader(program)
    yield reader
    assert reader.finish() == ""


def normal(message: str) -> str:
    """Leaves out how a language shows bytes and values, and the words of its JSON parser."""
    message = re.sub(r"\bb(?=['\"])", "", message)
    message = message.replace("Error -3 while decompressing data: ", "")
    message = re.sub(r"(is not JSON in UTF-8) \(.*\)(?=; the file)", r"\1", message)
    message = re.sub(r"(is described by) .*(?=; expected exactly)", r"\1", message)
    return re.sub(r"(has type) (?!'I64').*(?=; expected F32)", r"\1", message)


def contents(file: Any) -> dict[str, list[Any]]:
    return {
        n: [t.dtype, list(t.shape), zlib.crc32(file.read(n).tobytes())]
        for n, t in file.tensors.items()
    }


def agree(reader: WeightReader, path: Path, texts: bool = True) -> None:
    """Gives a file to both readers and compares."""
    command = "index" if path.is_file() and path.stat().st_size > LARGE else "read"
    native = reader.ask(command, path)
    try:
        file = open_weight_file(path)
        if command == "index":
            assert isinstance(native, dict)
            assert set(native["tensors"]) == set(file.tensors)
            return
        expected = contents(file)
    except (WeightFileError, OSError) as error:
        assert isinstance(native, str), f"refused only by Python: {error}"
        if texts and isinstance(error, WeightFileError):
            assert normal(native) == normal(str(error))
        return
    assert isinstance(native, dict), f"refused only by the library: {native}"
    assert native == {"digest": file.digest, "tensors": expected}


@pytest.fixture(autouse=True)
def both(reader: WeightReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_both(path: Any) -> Any:
        agree(reader, Path(path))
        return open_weight_file(path)

    for module in (test_weights_npz, test_weights_safetensors):
        monkeypatch.setattr(module, "open_weight_file", open_both)


def again(module: Any, name: str) -> None:
    short = module.__name__.removeprefix("test_weights_")
    globals()[f"test_{short}_{name.removeprefix('test_')}"] = getattr(module, name)


for _module in (test_weights_npz, test_weights_safetensors):
    for _name in [n for n in vars(_module) if n.startswith("test_")]:
        again(_module, _name)


# --- Layers: pieces, packing, sharing.


def experts_of(reader: WeightReader, path: Path, prefix: str = "") -> dict[str, Any] | str:
    return reader.ask("experts", path, prefix or "-", EXPERTS, H)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", ["", "layers.3."])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_packed_experts(
    reader: WeightReader, form: str, name: str, prefix: str, dtype: Any, tmp_path: Path
) -> None:
    arrays = separate(dtype, prefix)
    packed = stacked(arrays, prefix)
    other = {f"layers.4.{n}": a for n, a in arrays.items()} if prefix else {}
    path = save_layer(tmp_path / name, {**(arrays if form == "separate" else packed), **other})
    found = experts_of(reader, path, prefix)
    assert isinstance(found, dict)
    assert found["d_model"] == D
    assert found["shared"], "two layers of one file have two copies of it"
    assert len(found["experts"]) == EXPERTS
    for e, expert in enumerate(found["experts"]):
        assert expert == {
            tensor: [np.dtype(dtype).name, list(array[e].shape), zlib.crc32(array[e].tobytes())]
            for tensor, array in (
                (n, packed[prefix + n]) for n in ("layer_norm", "gate_up", "down")
            )
        }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", test_weights_experts.BAD)
def test_bad_layer(reader: WeightReader, case: str, name: str, tmp_path: Path) -> None:
    form, change, message = test_weights_experts.BAD[case]
    arrays = separate() if form == "separate" else stacked(separate())
    path = save_layer(tmp_path / name, change(arrays))
    with pytest.raises(WeightFileError, match=message) as error:
        test_weights_experts.open_expert_weights(config(path))
    assert experts_of(reader, path) == str(error.value)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(program: Path, tmp_path: Path) -> None:
    """Nothing is mapped: no signal ends the process."""
    arrays = {n: np.random.default_rng(1).random((300, 300)) for n in ("0/a", "0/b")}
    path = tmp_path / "w.npz"
    np.savez_compressed(path, **{n: a.astype(np.float32) for n, a in arrays.items()})
    whole = path.read_bytes()
    reader = WeightReader(program)
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        assert isinstance(reader.ask("read", path), str)
    assert reader.finish() == ""


@pytest.mark.parametrize("limit", ["0", "4096", "1G"])
def test_unpinned_weights_are_told(program: Path, limit: str, tmp_path: Path) -> None:
    """Without a GPU nothing can be pinned, and with too low a bound nothing is."""
    path = save_layer(tmp_path / "w.safetensors", separate())
    reader = WeightReader(program, {"MOE_INFER_PINNED_BYTES": limit, "CUDA_VISIBLE_DEVICES": ""})
    found = experts_of(reader, path)
    assert isinstance(found, dict)
    assert found["pinned"] == 0
    assert f"{path}: 3 of 3 experts are not page-locked" in found["note"]
    reason = "raise MOE_INFER_PINNED_BYTES" if limit == "0" else "page-locking .* bytes failed"
    assert re.search(reason, found["note"])
    assert reader.finish() == ""


@pytest.mark.parametrize("limit", ["lots", "-1", "8X", "99999999999999T", "G"])
def test_bad_bound(program: Path, limit: str, tmp_path: Path) -> None:
    path = save_layer(tmp_path / "w.safetensors", separate())
    reader = WeightReader(program, {"MOE_INFER_PINNED_BYTES": limit})
    with pytest.raises(AssertionError, match=f"error 1 .*a number of bytes such as 8G.*'{limit}'"):
        experts_of(reader, path)
    assert reader.finish() == ""


# --- Any bytes: the same verdict as Python's, and no access outside the file.


def agree_on_bytes(reader: WeightReader, suffix: str, data: bytes) -> None:
    # A new file each time: Python's mappings of the last one may still be alive.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"w{suffix}"
        path.write_bytes(data)
        agree(reader, path, texts=False)


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_mutations(reader: WeightReader, name: str, data: st.DataObject) -> None:
    agree_on_bytes(reader, Path(name).suffix, mutated(data, name))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@FUZZ
@given(data=st.binary(max_size=400))
def test_any_bytes(reader: WeightReader, suffix: str, data: bytes) -> None:
    starts: list[Callable[[bytes], bytes]] = [
        lambda d: d,
        lambda d: b"PK\3\4" + d,
        lambda d: len(d).to_bytes(8, "little") + d,
    ]
    for start in starts:
        agree_on_bytes(reader, suffix, start(data))


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_of_the_index(reader: WeightReader, name: str) -> None:
    whole = bytearray(ORIGINAL[name])
    for at in index_bytes(name):
        for bit in (0, 3, 7):
            whole[at] ^= 1 << bit
            agree_on_bytes(reader, Path(name).suffix, bytes(whole))
            whole[at] ^= 1 << bit
