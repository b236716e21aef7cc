"""The library's checks against Python's: the same rules, in the same order, in the same words."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layer_models import make_parts, write_experts
from moe_infer.op import ATTRIBUTES, DTYPES, ROUTERS, SUBLAYERS, LayerConfig
from moe_infer.runtime import native, plugin
from moe_infer.weights import WeightFileError, open_expert_weights, open_weight_file, write_npz
from test_op import BAD, BAD_INPUTS, CPM_2, FULL, LEAST
from test_weights_experts import BAD as BAD_LAYERS
from test_weights_experts import FILES, D, H, config, save, separate, stacked

pytestmark = pytest.mark.needs_library
GOLDEN = Path(__file__).parent / "golden"
INVALID, FILE = 1, 2
# Values for which Python has its own names, which the library never sees.
NATIVE_KINDS = {"str": "string", "list": "floats"}  # int and float have the same names in both


def python_says(attributes: dict[str, Any], inputs: tuple[int, bool] | None = None) -> str:
    try:
        layer = LayerConfig.from_attributes(attributes)
        if inputs is not None:
            layer.check_inputs(*inputs)
    except ValueError as error:
        match = re.fullmatch(r"(.* must be of type \w+, got )(\w+)", str(error))
        return match[1] + NATIVE_KINDS.get(match[2], match[2]) if match else str(error)
    return ""


def library_says(attributes: dict[str, Any], inputs: tuple[int, bool] | None = None) -> str:
    given_inputs = None if inputs is None else native.LayerInputs(inputs[0], "float32", inputs[1])
    try:
        native.check(attributes, given_inputs)
    except WeightFileError as error:
        # The file is looked at after all else was found right.
        assert "weight file 'w.npz' not found" in str(error)
    except ValueError as error:
        return str(error)
    return ""


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in {**LEAST, **changes}.items() if v is not None}


@pytest.mark.parametrize("changes", [case for case, _ in BAD] + FULL, ids=str)
def test_attributes(changes: dict[str, Any]) -> None:
    attributes = changed(changes)
    assert library_says(attributes) == python_says(attributes)


@pytest.mark.parametrize(("changes", "d_model", "logits"), [case[:3] for case in BAD_INPUTS])
def test_inputs(changes: dict[str, Any], d_model: int, logits: bool) -> None:
    found = library_says(changed(changes), (d_model, logits))
    assert found == python_says(changed(changes), (d_model, logits)) != ""


def test_good_inputs() -> None:
    for changes, logits in (({}, True), ({"expert_centroids": [1.0] * 8}, False), (CPM_2, False)):
        assert library_says(changed(changes), (2, logits)) == ""


INTS = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 1024, 1025, 2**31 - 1, -(2**31)])
FLOATS = st.lists(
    st.sampled_from([0.0, 1.5, -2.0, float("nan"), float("inf"), float("-inf")]), max_size=9
)
NAMES = st.sampled_from(["", "x", "ü", *ROUTERS, *SUBLAYERS, "w.npz"])
NUMBERS = st.sampled_from([0.0, 0.01, 1.0, 1.702, 7.0, -0.5, 1e39, float("nan"), float("-inf")])
VALUES = {"int": INTS, "float": NUMBERS, "floats": FLOATS, "string": NAMES}
ANY = st.fixed_dictionaries(
    {},
    optional={
        a.name: st.one_of(VALUES[a.kind], VALUES[a.kind], VALUES[a.kind], *VALUES.values())
        for a in ATTRIBUTES
        if a.name != "expert_weight_file"
    },
)


GOOD = [LEAST, *({**LEAST, **changes} for changes in FULL)]


@settings(max_examples=900, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ANY,
    st.sampled_from(GOOD),
    st.sampled_from([None, (0, True), (2, True), (2, False), (1, False), (3, False)]),
)
def test_any_attributes(
    changes: dict[str, Any], good: dict[str, Any], inputs: tuple[int, bool] | None
) -> None:
    """Half of the time from a good set, so that later checks are reached too."""
    for attributes in (changes, {**{n: v for n, v in good.items() if v is not None}, **changes}):
        if attributes.get("expert_sublayer_type") == "Identity":
            attributes = {**attributes, "expert_weight_file": "w.npz"}
        assert library_says(attributes, inputs) == python_says(attributes, inputs)


def test_the_constants_agree() -> None:
    header = (Path(__file__).parent.parent / "ops/include/moe_infer.h").read_text()
    for number, dtype in enumerate(DTYPES):
        assert re.search(rf"MOE_INFER_{dtype.upper()} = {number}\b", header)
    assert re.search(rf"MOE_INFER_INVALID = {INVALID},\s+MOE_INFER_FILE = {FILE},", header)


# --- What only C callers can do.


def raw_check(
    *items: tuple[str | None, int, int, Any], inputs: tuple[int, int, int, int] | None = None
) -> tuple[int, str]:
    """moe_infer_check on (name, kind, count, ctypes data); status and sentence."""
    array = (native._Attribute * len(items))()
    keep = []
    for attribute, (name, kind, count, data) in zip(array, items, strict=True):
        attribute.name = None if name is None else name.encode()
        attribute.kind, attribute.count = kind, count
        attribute.data = None if data is None else ctypes.cast(data, ctypes.c_void_p)
        keep.append(data)
    library = plugin.load()
    check = library.moe_infer_check
    check.argtypes, check.restype = native._SIGNATURES["moe_infer_check"], ctypes.c_int
    given_inputs = None if inputs is None else ctypes.byref(native._Inputs(*inputs))
    status = check(array, len(items), given_inputs)
    return status, library.moe_infer_last_error().decode()


def ints(*values: int) -> Any:
    return (ctypes.c_int32 * max(len(values), 1))(*values)


IDENTITY: list[tuple[str | None, int, int, Any]] = [
    ("expert_count", 0, 1, ints(2)),
    ("hidden_size", 0, 1, ints(0)),
    ("expert_sublayer_type", 2, 8, b"Identity"),
]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("top_k", 0, 2, ints(1, 2)), "attribute 'top_k' must have 1 value, got 2"),
        (("top_k", 0, 0, None), "attribute 'top_k' must have 1 value, got 0"),
        (("top_k", 0, -1, ints(1)), "attribute 'top_k' has no data: length -1"),
        (("top_k", 0, 1, None), "attribute 'top_k' has no data: length 1"),
        (("top_k", 1, 1, ints(1)), "attribute 'top_k' must be of type int, got floats"),
        (("top_k", 7, 1, ints(1)), "attribute 'top_k' must be of type int, got kind number 7"),
        (("top_k", 3, 1, ints(1)), "attribute 'top_k' must be of type int, got float"),
        (("swiglu_limit", 3, 2, ints(1, 1)), "'swiglu_limit' must have 1 value, got 2"),
        (("swiglu_limit", 3, 0, None), "attribute 'swiglu_limit' must have 1 value, got 0"),
        (("swiglu_limit", 1, 1, ints(1)), "'swiglu_limit' must be of type float, got floats"),
        (("router_bias", 3, 1, ints(1)), "'router_bias' must be of type floats, got float"),
        (("expert_count", 0, 1, ints(2)), "attribute 'expert_count' is given twice"),
        ((None, 0, 1, ints(2)), "unknown attribute ''"),
        (("moe_variant", 2, 5, b"a\0b\0\0"), "'moe_variant' has a NUL character at position 1"),
    ],
)
def test_malformed_fields(item: tuple[str | None, int, int, Any], message: str) -> None:
    status, sentence = raw_check(*IDENTITY, item)
    assert status == INVALID
    assert sentence.startswith("MoELayer: ") and message in sentence


@pytest.mark.parametrize("text", [b"cpm_2", b"cpm_2\0", b"cpm_2\0\0\0"])
def test_strings_with_and_without_nul(text: bytes) -> None:
    norm = ("layernorm_weight", 1, 1, (ctypes.c_float * 1)(1.0))
    assert raw_check(*IDENTITY, ("moe_variant", 2, len(text), text), norm)[0] == 0
    status, sentence = raw_check(*IDENTITY, ("moe_variant", 2, len(text) - 1, text), norm)
    assert (status == 0) == (len(text) > 5), sentence


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((4, 9, 1, 0), "input hidden_states must be float32, float16 or bfloat16, got type number"),
        ((4, 0, 1, -1), "input router_logits must be float32, float16 or bfloat16, got type numb"),
        ((4, 1, 1, 2), "must be float32 or of hidden_states' type float16, got bfloat16"),
        ((2**62, 0, 1, 0), "the last dimension of hidden_states must be 1 to"),
        ((-(2**63), 0, 1, 0), "the last dimension of hidden_states must be at least 1, got -"),
    ],
)
def test_malformed_inputs(inputs: tuple[int, int, int, int], message: str) -> None:
    status, sentence = raw_check(*IDENTITY, inputs=inputs)
    assert status == INVALID and message in sentence
    good = {(4, 0, 1, 0), (4, 1, 1, 0), (4, 1, 1, 1), (4, 2, 1, 2)}
    assert all(raw_check(*IDENTITY, inputs=case)[0] == 0 for case in good)


def test_null_arguments() -> None:
    library = plugin.load()
    assert library.moe_infer_check(None, 3, None) == INVALID
    assert b"3 attributes, but no array" in library.moe_infer_last_error()
    assert library.moe_infer_weight_digest(None, None) == INVALID


def test_the_last_error_is_the_threads_own() -> None:
    assert raw_check()[0] == INVALID
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(plugin.load().moe_infer_last_error()))
    thread.start()
    thread.join()
    assert found == [b""]
    assert b"'expert_count' is missing" in plugin.load().moe_infer_last_error()
    plugin.load().moe_infer_clear_last_error()
    assert plugin.load().moe_infer_last_error() == b""


def test_what_the_binding_refuses() -> None:
    with pytest.raises(ValueError, match=r"'hidden_size' must fit 32 bits.* got 4294967296"):
        native.check(changed({"hidden_size": 2**32}))
    with pytest.raises(ValueError, match="'top_k' must be of type int, got float"):
        native.check(changed({"top_k": 1.0}))
    with pytest.raises(ValueError, match="float32, float16 or bfloat16, got float64"):
        native.check(changed({}), native.LayerInputs(4, "float64", True))


# --- The weight file.


@pytest.mark.parametrize("name", ["weights.npz", "weights_deflated.npz", "weights.safetensors"])
def test_digest(name: str) -> None:
    digest = native.weight_digest(GOLDEN / name)
    assert digest == open_weight_file(GOLDEN / name).digest
    assert digest.endswith(f"-{(GOLDEN / name).stat().st_size}")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_good_layer(form: str, name: str, dtype: Any, tmp_path: Path) -> None:
    arrays = separate(dtype, "layers.3.")
    path = save(tmp_path / name, arrays if form == "separate" else stacked(arrays, "layers.3."))
    layer = config(path, expert_weight_prefix="layers.3.")
    native.check(layer.to_attributes())
    native.check(layer.to_attributes(), native.LayerInputs(D, "float16", True))
    # What the file does not fit is told as Python tells it.
    with pytest.raises(WeightFileError) as expected:
        open_expert_weights(layer, d_model=D + 1)
    with pytest.raises(WeightFileError, match=re.escape(str(expected.value))):
        native.check(layer.to_attributes(), native.LayerInputs(D + 1, "float32", True))


@pytest.mark.parametrize("sublayer", [n for n, s in SUBLAYERS.items() if s.biases])
@pytest.mark.parametrize("form", ["safetensors separate", "safetensors stacked"])
def test_biases(sublayer: str, form: str, tmp_path: Path) -> None:
    """The same names and shapes as Python's, with biases and without."""
    for bias in (0, 1):
        parts = make_parts(sublayer, 3, D, H, "float32", bias=bool(bias))
        path = write_experts(tmp_path / f"w{bias}", parts, sublayer, 3, form)
        for said in (0, 1):
            layer = config(path, expert_sublayer_type=sublayer, expert_bias=said)
            if said == bias:
                native.check(layer.to_attributes(), native.LayerInputs(D, "float16", True))
                continue
            with pytest.raises(WeightFileError) as expected:
                open_expert_weights(layer)
            with pytest.raises(WeightFileError, match=re.escape(str(expected.value))):
                native.check(layer.to_attributes())
    if form.endswith("stacked"):
        return
    parts["1/down_bias"] = np.zeros(D, np.float16)
    path = write_experts(tmp_path / "mixed", parts, sublayer, 3, form)
    layer = config(path, expert_sublayer_type=sublayer, expert_bias=1)
    with pytest.raises(WeightFileError) as expected:
        open_expert_weights(layer)
    with pytest.raises(WeightFileError, match=re.escape(str(expected.value))):
        native.check(layer.to_attributes())


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_bad_layer(case: str, tmp_path: Path) -> None:
    form, change, message = BAD_LAYERS[case]
    arrays = separate() if form == "separate" else stacked(separate())
    path = save(tmp_path / "w.npz", change(arrays))
    with pytest.raises(WeightFileError, match=message):
        native.check(config(path).to_attributes())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def deflated_size(path: Path) -> None:
    """A member that says four bytes more than its shape has, in both of its zip headers."""
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size = archive.infolist()[0].file_size
    local = whole.index(b"\1\0\x10\0") + 4  # the zip64 field, which has 16 bytes
    whole[local : local + 8] = (size + 4).to_bytes(8, "little")
    if whole[22:26] != b"\xff" * 4:  # Python 3.10 gives the size in both places
        whole[22:26] = (size + 4).to_bytes(4, "little")
    central = whole.index(b"PK\1\2") + 24
    whole[central : central + 4] = (size + 4).to_bytes(4, "little")
    path.write_bytes(whole)


def header_length(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes((len(whole) * 2).to_bytes(8, "little") + whole[8:])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "w.npz",
            Path.unlink,
            "weight file '.*w.npz' not found; tried /.*set MOE_INFER_WEIGHT_DIR",
        ),
        ("w.npz", truncate, "no end of a zip directory .* truncated"),
        (
            "deflated.npz",
            deflated_size,
            r"has 20 bytes of data by the zip directory, but shape \(4,\) .* 16",
        ),
        ("w.safetensors", header_length, "header has .* by its length field, but only .* follow"),
        ("w.safetensors", truncate, "the data end at .* truncated"),
    ],
)
def test_damaged_file(
    name: str, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / name, separate())
    native.check(config(path).to_attributes())
    damage(path)
    with pytest.raises(WeightFileError, match=message):
        native.check(config(path).to_attributes())


def test_unsupported_type(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(path, **{n: a.astype(np.float64) for n, a in separate().items()})
    with pytest.raises(WeightFileError, match="has type '<f8'; expected little-endian float32"):
        native.check(config(path).to_attributes())


def test_changed_file(tmp_path: Path) -> None:
    """The index of another file is not kept from the last one at this path."""
    path = save(tmp_path / "w.safetensors", separate())
    layer = config(path, expert_weight_digest=open_weight_file(path).digest)
    native.check(layer.to_attributes())
    arrays = separate()
    arrays["2/wo_weight"][0, 0] += 1
    save(path, arrays)
    with pytest.raises(WeightFileError, match="put that file back, or rewrite the model"):
        native.check(layer.to_attributes())


def test_relative_path(tmp_path: Path) -> None:
    """As Python: MOE_INFER_WEIGHT_DIR, then the working directory; the error lists both."""
    folders = [tmp_path / "weights", tmp_path / "working"]
    for folder in folders:
        folder.mkdir()
    script = (
        "import sys; from moe_infer.runtime import native\n"
        "native.check({'expert_count': 3, 'hidden_size': 6, 'expert_sublayer_type': 'T5_FF',"
        " 'expert_weight_file': 'w.npz', 'embedding_size': int(sys.argv[1])})"
    )

    def run(d_model: int) -> str:
        environment = {**os.environ, "MOE_INFER_WEIGHT_DIR": str(folders[0])}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
        command = [sys.executable, "-c", script, str(d_model)]
        done = subprocess.run(
            command, cwd=folders[1], env=environment, capture_output=True, text=True
        )
        return done.stderr.strip().splitlines()[-1] if done.returncode else ""

    assert f"tried {folders[0]}/w.npz, {folders[1]}/w.npz; set MOE_INFER_WEIGHT_DIR" in run(D)
    save(folders[1] / "w.npz", separate())
    assert run(D) == ""
    wide = {n: np.zeros([2 * s if s == D else s for s in a.shape], a.dtype)
            for n, a in separate().items()}  # fmt: skip
    save(folders[0] / "w.npz", wide)
    assert f"{folders[1]}/w.npz" not in run(D) != ""
    assert run(2 * D) == ""


def test_identity_opens_no_file() -> None:
    native.check({"expert_count": 2, "hidden_size": 0, "expert_sublayer_type": "Identity"})


def test_embedding_size_is_compared_with_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "w.npz", separate())
    native.check(config(path, embedding_size=D).to_attributes())
    with pytest.raises(WeightFileError, match=rf"expected \({D + 1},\)"):
        native.check(config(path, embedding_size=D + 1).to_attributes())


def test_gated_silu(tmp_path: Path) -> None:
    arrays = [
        (f"{e}/{part}", np.ones(shape, np.float32))
        for e in range(2)
        for part, shape in (("gate_weight", (H, D)), ("up_weight", (H, D)), ("down_weight", (D, H)))
    ]
    write_npz(tmp_path / "w.npz", arrays)
    attributes = {"expert_count": 2, "hidden_size": H, "expert_sublayer_type": "Gated_SiLU",
                  "expert_weight_file": str(tmp_path / "w.npz")}  # fmt: skip
    native.check(attributes, native.LayerInputs(D, "bfloat16", True, "float32"))
    with pytest.raises(WeightFileError, match="T5_FF are missing"):
        native.check({**attributes, "expert_sublayer_type": "T5_FF"})
