"""Detection on ONNX text: what must match, what must not and why, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from evaluate_graph import assert_same_outputs
from models_text import EXPERTS, block, tokens
from moe_infer.graph.external import ExternalDataError
from moe_infer.graph.report import RewriteReport
from moe_infer.graph.rewrite import rewrite
from moe_infer.op import OP_TYPE
from moe_infer.weights import WeightFileError, open_weight_file
from rewrite_memory import grown_by_rewrite


def _rewrite(model: onnx.ModelProto, folder: Path, **options: Any) -> RewriteReport:
    (folder / "in").mkdir()
    onnx.save(model, folder / "in" / "model.onnx")
    return rewrite(folder / "in" / "model.onnx", folder / "out", **options)


def _check_same(folder: Path, counts: tuple[int, ...] = (1, 3, 0, 7)) -> None:
    for count in counts:
        original, made = folder / "in" / "model.onnx", folder / "out" / "model.onnx"
        assert_same_outputs(original, made, tokens(count))


CHOSEN = "chosen = Reshape (top_i, last)"

MATCHING: dict[str, dict[str, str]] = {
    "as it is": {},
    "division written as a product with the reciprocal": {
        "weight = Div (top_w, total)": (
            "inverse = Reciprocal (total)\n  weight = Mul (inverse, top_w)"
        )
    },
    "activation applied in another order": {
        "act = Mul (g, sg)\n  hidden = Mul (act, u)": "act = Mul (sg, u)\n  hidden = Mul (act, g)"
    },
    "normalised after the sum": {
        "  weight = Div (top_w, total)\n": "",
        "wc = Reshape (weight, column)": "wc = Reshape (top_w, column)",
        "moe = ReduceSum <keepdims = 0> (slots, one)": (
            "raw = ReduceSum <keepdims = 0> (slots, one)\n  moe = Div (raw, total)"
        ),
    },
    "weighted before the last projection": {
        "hc = Unsqueeze (hidden, last)": "hw = Mul (hidden, wc)\n  hc = Unsqueeze (hw, last)",
        "wc = Reshape (weight, column)\n  ow = Mul (o, wc)": "ow = Identity (o)",
        "sg = Sigmoid (g)": "wc = Reshape (weight, column)\n  sg = Sigmoid (g)",
    },
    "probabilities gathered by index": {
        "top_w, top_i": "unused, top_i",
        "total = ": "top_w = GatherElements <axis = 1> (probabilities, top_i)\n  total = ",
    },
    "relu and gate": {"sg = Sigmoid (g)\n  act = Mul (g, sg)": "act = Relu (g)"},
    "gelu and gate": {"sg = Sigmoid (g)\n  act = Mul (g, sg)": "act = Gelu (g)"},
    "gelu by tanh and gate": {
        "sg = Sigmoid (g)\n  act = Mul (g, sg)": 'act = Gelu <approximate = "tanh"> (g)'
    },
    "no gate": {
        "  ups = Gather <axis = 0> (up, chosen)\n": "",
        "  u3 = MatMul (ups, xc)\n  u = Squeeze (u3, last)\n": "",
        "hidden = Mul (act, u)": "hidden = Identity (act)",
        "float[4, 8, 6] gate, float[4, 8, 6] up,": "float[4, 8, 6] gate,",
    },
    "numbers of the chosen clipped to those of experts": {
        CHOSEN: (
            "zero = Constant <value = int64 {0}> ()\n  three = Constant <value = int64 {3}> ()\n"
            "  flat = Reshape (top_i, last)\n  chosen = Clip (flat, zero, three)"
        )
    },
    "numbers of the chosen clipped from above only, as int32": {
        CHOSEN: (
            "nine = Constant <value = int32 {9}> ()\n  flat = Reshape (top_i, last)\n"
            "  small = Cast <to = 6> (flat)\n  chosen = Clip (small, , nine)"
        )
    },
    "numbers of the chosen between Max and Min": {
        CHOSEN: (
            "zero = Constant <value = int64 {0}> ()\n  three = Constant <value = int64 {3}> ()\n"
            "  low = Max (top_i, zero)\n  between = Min (three, low)\n"
            "  chosen = Reshape (between, last)"
        )
    },
    "numbers of the chosen counted from the end where negative": {
        CHOSEN: (
            "zero = Constant <value = int64 {0}> ()\n  four = Constant <value = int64 {4}> ()\n"
            "  flat = Reshape (top_i, last)\n  negative = Less (flat, zero)\n"
            "  raised = Add (flat, four)\n  chosen = Where (negative, raised, flat)"
        )
    },
    "weights of experts beyond the last set to zero": {
        "  weight = Div (top_w, total)\n": (
            "  four = Constant <value = int64 {4}> ()\n  none = Constant <value = float {0}> ()\n"
            "  beyond = GreaterOrEqual (top_i, four)\n  share = Div (top_w, total)\n"
            "  weight = Where (beyond, none, share)\n"
        )
    },
    "softmax after top-k": {
        "(probabilities, k)": "(logits, k)",
        "total = ReduceSum <keepdims = 1> (top_w, last)\n  weight = Div (top_w, total)": (
            "weight = Softmax <axis = -1> (top_w)"
        ),
    },
}


@pytest.mark.parametrize("changes", MATCHING.values(), ids=MATCHING.keys())
def test_what_matches(changes: dict[str, str], tmp_path: Path) -> None:
    report = _rewrite(block(changes), tmp_path)
    assert len(report.layers) == 1, str(report)
    _check_same(tmp_path)
    made = onnx.load(tmp_path / "out" / "model.onnx")
    left = [n.op_type for n in made.graph.node]
    assert left.count(OP_TYPE) == 1
    assert not {"TopK", "Gather", "Sigmoid", "ReduceSum"} & set(left)
    assert {t.name for t in made.graph.initializer} == {"router"}


MISSES: dict[str, tuple[dict[str, str], str, str]] = {
    # name: (changes, the node at which it stopped, part of the reason)
    "smallest scores": ({"largest = 1": "largest = 0"}, "TopK", "largest=0"),
    "top-k of tokens": (
        {"TopK <axis = -1, largest = 1> (probabilities, k)": "TopK <axis = 0> (probabilities, k)"},
        "TopK",
        "not taken along the axis of the experts",
    ),
    "number of experts not constant": (
        {"k = Constant <value = int64[1] {2}> ()": "k = Shape <start = 0, end = 1> (x)"},
        "TopK",
        "number of experts a token is not constant",
    ),
    "weights are an input": (
        {
            "moe (float[n, 6] x)": "moe (float[n, 6] x, float[4, 8, 6] gate)",
            "float[4, 8, 6] gate,": "",
        },
        "Gather -> gates",
        "'gate' is an input of the graph",
    ),
    "initializer that is an input": (
        {"moe (float[n, 6] x)": "moe (float[n, 6] x, float[4, 8, 6] gate)"},
        "Gather -> gates",
        "'gate' is an input of the graph",
    ),
    "weights computed": (
        {
            "gates = Gather <axis = 0> (gate, chosen)": (
                "scaled = Mul (gate, up)\n  gates = Gather <axis = 0> (scaled, chosen)"
            )
        },
        "Gather -> gates",
        "'scaled' does not come from",
    ),
    "wrong axis of the weights": (
        {
            "<axis = 0> (gate, chosen)": "<axis = 1> (square, chosen)",
            "float[4, 8, 6] gate": "float[4, 4, 6] square, float[4, 8, 6] gate",
            "g3 = MatMul (gates, xc)": "g4 = Unsqueeze (gates, last)\n  g3 = MatMul (gates, xc)",
        },
        "Gather -> gates",
        "not that of the experts",
    ),
    "the last expert clipped away": (
        {
            CHOSEN: (
                "zero = Constant <value = int64 {0}> ()\n  two = Constant <value = int64 {2}> ()\n"
                "  flat = Reshape (top_i, last)\n  chosen = Clip (flat, zero, two)"
            )
        },
        "Clip -> chosen",
        "the numbers of the chosen, 0 to 3, are clipped to [0, 2]",
    ),
    "the first expert raised away": (
        {
            CHOSEN: (
                "first = Constant <value = int64 {1}> ()\n  flat = Reshape (top_i, last)\n"
                "  chosen = Max (flat, first)"
            )
        },
        "Max -> chosen",
        "are clipped to [1, inf]",
    ),
    "numbers below 1 counted from the end": (
        {
            CHOSEN: (
                "first = Constant <value = int64 {1}> ()\n  two = Constant <value = int64 {2}> ()\n"
                "  flat = Reshape (top_i, last)\n  small = Less (flat, first)\n"
                "  raised = Add (flat, two)\n  chosen = Where (small, raised, flat)"
            )
        },
        "Gather -> gates",
        "neither the chosen expert nor the token",
    ),
    "weights of the last expert set to zero": (
        {
            "  weight = Div (top_w, total)\n": (
                "  three = Constant <value = int64 {3}> ()\n"
                "  none = Constant <value = float {0}> ()\n"
                "  beyond = GreaterOrEqual (top_i, three)\n  share = Div (top_w, total)\n"
                "  weight = Where (beyond, none, share)\n"
            )
        },
        "GreaterOrEqual -> beyond",
        "GreaterOrEqual of these values",
    ),
    "unknown activation": ({"Sigmoid (g)": "Tanh (g)"}, "ReduceSum -> moe", "activation"),
    "gate squared": (
        {"hidden = Mul (act, u)": "hidden = Mul (act, g)"},
        "ReduceSum -> moe",
        "an unknown function of one projection",
    ),
    "three projections": (
        {
            "hidden = Mul (act, u)": (
                "mores = Gather <axis = 0> (more, chosen)\n  m3 = MatMul (mores, xc)\n"
                "  m = Squeeze (m3, last)\n  au = Mul (act, u)\n  hidden = Mul (au, m)"
            ),
            "float[4, 8, 6] up": "float[4, 8, 6] up, float[4, 8, 6] more",
        },
        "ReduceSum -> moe",
        "3 projections",
    ),
    "weights not those of the chosen": (
        {"weight = Div (top_w, total)": "weight = Sigmoid (top_w)"},
        "ReduceSum -> moe",
        "routing weight is sigmoid",
    ),
    "no weights": (
        {"ow = Mul (o, wc)": "ow = Identity (o)"},
        "ReduceSum -> moe",
        "without weights",
    ),
    "maximum over experts": (
        {"moe = ReduceSum": "moe = ReduceMax"},
        "ReduceMax -> moe",
        "",
    ),
    "summed over the wrong axis": (
        {
            "{-1, 2, 6}": "{2, -1, 6}",
            "(slots, one)": "(slots, zero)",
            "k = Constant": "zero = Constant <value = int64[1] {0}> ()\n  k = Constant",
        },
        "Reshape -> slots",
        "gives the axis",
    ),
    "tokens repeated in the wrong order": (
        {
            "wide = Unsqueeze (h, one)": "wide = Unsqueeze (h, zero)",
            "{1, 2, 1}": "{2, 1, 1}",
            "k = Constant": "zero = Constant <value = int64[1] {0}> ()\n  k = Constant",
        },
        "MatMul",
        "combined as if they were one",
    ),
    "different experts for gate and down": (
        {
            "downs = Gather <axis = 0> (down, chosen)": (
                "low_w, low_i = TopK <axis = -1> (h4, k)\n  low = Reshape (low_i, last)\n"
                "  downs = Gather <axis = 0> (down, low)"
            ),
            "wide = Unsqueeze (h, one)": "h4 = MatMul (h, other)\n  wide = Unsqueeze (h, one)",
            "float[6, 4] router": "float[6, 4] router, float[6, 4] other",
        },
        "MatMul -> h4",
        "does not come from",
    ),
    "inner value is an output": (
        {"=> (float[n, 6] y)": "=> (float[n, 6] y, float[n, 2] weight)"},
        "Div -> weight",
        "is an output of the graph",
    ),
    "inner value used elsewhere": (
        {
            "=> (float[n, 6] y)": "=> (float[n, 6] y, float[n, 4] z)",
            "y = Add (moe, x)": "y = Add (moe, x)\n  z = Exp (probabilities)",
        },
        "Softmax -> probabilities",
        "is also used by Exp -> z",
    ),
    "weight used elsewhere": (
        {
            "=> (float[n, 6] y)": "=> (float[n, 6] y, float z)",
            "y = Add (moe, x)": "y = Add (moe, x)\n  z = ReduceMax <keepdims = 0> (up)",
        },
        "ReduceMax -> z",
        "reads 'up', which is shared with the layer",
    ),
}


@pytest.mark.parametrize(("changes", "node", "reason"), MISSES.values(), ids=MISSES.keys())
def test_near_misses_are_left_alone_and_explained(
    changes: dict[str, str], node: str, reason: str, tmp_path: Path
) -> None:
    report = _rewrite(block(changes), tmp_path)
    assert not report
    assert not report.layers
    assert report.near_misses, str(report)
    found = report.near_misses[0]
    assert node in found.node, str(report)
    assert reason in found.reason, str(report)
    assert found.node in str(report)
    assert report.model_path is None
    assert not (tmp_path / "out").exists()


def test_a_graph_without_any_choice_says_so(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
    )
    report = _rewrite(model, tmp_path)
    assert not report
    assert "no TopK and no ArgMax" in str(report)


def test_shared_weights_are_copied_on_request(tmp_path: Path) -> None:
    changes = MISSES["weight used elsewhere"][0]
    report = _rewrite(block(changes), tmp_path, copy_shared_weights=True)
    assert len(report.layers) == 1
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert {t.name for t in made.graph.initializer} == {"router", "up"}
    _check_same(tmp_path)


def test_rows_of_gate_and_up_alternate_in_the_file(tmp_path: Path) -> None:
    model = block()
    report = _rewrite(model, tmp_path)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    file = open_weight_file(tmp_path / "out" / "experts.safetensors")
    assert set(file.tensors) == {"layers.0.gate_up", "layers.0.down"}
    packed = file.read("layers.0.gate_up")
    np.testing.assert_array_equal(packed[:, ::2], constants["gate"])
    np.testing.assert_array_equal(packed[:, 1::2], constants["up"])
    np.testing.assert_array_equal(file.read("layers.0.down"), constants["down"])
    config = report.layers[0].config
    assert config.expert_weight_digest == file.digest
    assert config.expert_weight_file == "experts.safetensors"
    assert report.layers[0].nbytes == sum(i.nbytes for i in file.tensors.values())


def test_half_weights_behind_casts_stay_half_in_the_file(tmp_path: Path) -> None:
    report = _rewrite(block(half=True), tmp_path)
    assert len(report.layers) == 1, str(report)
    file = open_weight_file(tmp_path / "out" / "experts.safetensors")
    assert {i.dtype for i in file.tensors.values()} == {"float16"}
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert "Cast" not in [n.op_type for n in made.graph.node]
    _check_same(tmp_path)


def test_an_existing_weight_file_is_referred_to_and_checked(tmp_path: Path) -> None:
    first = _rewrite(block(), tmp_path)
    path = tmp_path / "out" / "experts.safetensors"
    source = tmp_path / "in" / "model.onnx"
    again = rewrite(source, tmp_path / "other", expert_weight_file=path)
    assert not (tmp_path / "other" / "experts.safetensors").exists()
    assert again.layers[0].config.expert_weight_file == str(path.resolve())
    assert_same_outputs(source, tmp_path / "other" / "model.onnx", tokens(3))
    assert (
        first.layers[0].config.expert_weight_digest == again.layers[0].config.expert_weight_digest
    )
    text = path.read_bytes().replace(b"layers.0.down", b"layers.9.down")
    (tmp_path / "wrong.safetensors").write_bytes(text)
    with pytest.raises((WeightFileError, ValueError), match="down"):
        rewrite(source, tmp_path / "third", expert_weight_file=tmp_path / "wrong.safetensors")
    assert not (tmp_path / "third" / "model.onnx").exists()


def test_the_output_name_changes_with_attributes_and_weights(tmp_path: Path) -> None:
    names = set()
    for i, options in enumerate(({}, {"max_concurrency": 1}, {"max_concurrency": 1, "seed": 1})):
        model = block()
        if options.pop("seed", None):
            weight = next(t for t in model.graph.initializer if t.name == "gate")
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, "gate"))
        report = rewrite(model, tmp_path / str(i), **options)
        names.add(report.layers[0].output)
    assert len(names) == 3


def test_two_rewrites_are_equal_byte_by_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rewrite(block(), tmp_path / name)
    for name in ("model.onnx", "experts.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_given_model_is_not_changed(tmp_path: Path) -> None:
    model = block()
    before = model.SerializeToString(deterministic=True)
    rewrite(model, tmp_path / "out")
    assert model.SerializeToString(deterministic=True) == before


def test_writing_over_the_source_is_refused(tmp_path: Path) -> None:
    onnx.save(block(), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="would overwrite the model that is read"):
        rewrite(tmp_path / "model.onnx", tmp_path)


def test_missing_and_broken_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.onnx. not found"):
        rewrite(tmp_path / "nothing.onnx", tmp_path / "out")
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="is no ONNX model"):
        rewrite(tmp_path / "broken.onnx", tmp_path / "out")


def _external(folder: Path, **entries: str) -> Path:
    """The block with external data; ``entries`` replace those of the weight ``gate``."""
    (folder / "in").mkdir()
    path = folder / "in" / "model.onnx"
    onnx.save(block(), path, save_as_external_data=True, location="data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "gate")
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read_from_the_models_folder(tmp_path: Path) -> None:
    path = _external(tmp_path)
    assert len(rewrite(path, tmp_path / "out").layers) == 1
    _check_same(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../secret"}, "outside the model's folder"),
        ({"location": "/etc/hostname"}, "outside the model's folder"),
        ({"location": "link"}, "outside the model's folder"),
        ({"location": "missing"}, "does not exist"),
        ({"offset": "1000000"}, "are outside the file"),
        ({"offset": "-4"}, "is no non-negative number"),
        ({"length": "4"}, "length is 4, but shape"),
        ({"length": "many"}, "is no non-negative number"),
    ],
)
def test_hostile_external_data_is_refused(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(100_000))
    path = _external(tmp_path, **entries)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ExternalDataError, match=message):
        rewrite(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_weight_is_refused(tmp_path: Path) -> None:
    model = block()
    tensor = next(t for t in model.graph.initializer if t.name == "gate")
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(ExternalDataError, match=r"weight 'gate': \d+ bytes, but shape"):
        rewrite(model, tmp_path / "out")


def _large_model(path: Path, hidden: int, d_model: int) -> int:
    """The block with external weights of (4, hidden, d_model); returns their bytes."""
    sizes = {
        "gate": (EXPERTS, hidden, d_model),
        "up": (EXPERTS, hidden, d_model),
        "down": (EXPERTS, d_model, hidden),
    }
    model = block()
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and list(attribute.t.dims) in ([2], [3]):
                values = numpy_helper.to_array(attribute.t)
                attribute.t.CopyFrom(
                    numpy_helper.from_array(np.where(values == 6, d_model, values))
                )
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[1].dim_value = d_model
    offset = 0
    del model.graph.value_info[:]
    generator = np.random.default_rng(0)
    with open(path.with_name("weights"), "wb") as file:
        for tensor in model.graph.initializer:
            shape = sizes.get(tensor.name, (d_model, EXPERTS))
            size = 4 * int(np.prod(shape))
            for _ in range(shape[0]):
                row = generator.standard_normal(shape[1:], dtype=np.float32) / 64
                file.write(row.tobytes())
            name = tensor.name
            tensor.CopyFrom(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", offset), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            offset += size
    path.write_bytes(model.SerializeToString())
    return offset


def test_memory_is_bounded_by_one_expert(tmp_path: Path) -> None:
    """240 MB of experts, 20 MB each tensor of an expert; the process may grow by 100 MB."""
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    total = _large_model(path, hidden=5120, d_model=1024)
    assert total > 240e6
    grown = grown_by_rewrite(path, tmp_path / "out")
    assert grown < 100e6, f"{grown / 1e6:.0f} MB"
    file = open_weight_file(tmp_path / "out" / "experts.safetensors")
    assert sum(i.nbytes for i in file.tensors.values()) > 240e6
    source = np.memmap(path.with_name("weights"), np.float32)
    start = 1024 * EXPERTS
    gate = source[start : start + EXPERTS * 5120 * 1024].reshape(EXPERTS, 5120, 1024)
    np.testing.assert_array_equal(file.read("layers.0.gate_up")[3, ::2], gate[3])


EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_moe"


@pytest.mark.parametrize(
    ("variant", "sublayer", "dtypes"),
    [
        ("t5_top1", "T5_FF", {"layer_norm": "float32", "gate_up": "float16", "down": "float16"}),
        ("gated_top2", "Gated_SiLU", {"gate_up": "float16", "down": "float16"}),
    ],
)
def test_the_trained_example(
    variant: str, sublayer: str, dtypes: dict[str, str], tmp_path: Path
) -> None:
    source = EXAMPLE / f"{variant}.onnx"
    report = rewrite(source, tmp_path)
    assert [layer.config.expert_sublayer_type for layer in report.layers] == [sublayer] * 4
    assert not report.untyped_values
    for i, layer in enumerate(report.layers):
        assert {n: d for n, (d, _) in layer.tensors.items()} == {
            f"layers.{i}.{name}": dtype for name, dtype in dtypes.items()
        }
    inputs = {"tokens": np.arange(40).reshape(1, 40)}
    assert_same_outputs(source, tmp_path / "model.onnx", inputs)


def _t5(change: Callable[[onnx.NodeProto, dict[str, onnx.TensorProto]], None]) -> RewriteReport:
    """The example's T5 graph with its nodes or constants changed; nothing may be written."""
    model = onnx.load(EXAMPLE / "t5_top1.onnx", load_external_data=False)
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        change(node, constants)
    return rewrite(model, "/nonexistent/never-written", base_dir=EXAMPLE)


def test_a_norm_with_another_epsilon_is_no_t5() -> None:
    def change(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
        if node.op_type == "Add":
            for name in node.input:
                tensor = constants.get(name)
                if tensor is not None and not tensor.dims:
                    tensor.CopyFrom(numpy_helper.from_array(np.array(1e-5, np.float32), name))

    report = _t5(change)
    assert not report
    assert len(report.near_misses) >= 4
    assert "the norm's epsilon is 1e-05; T5_FF's is 1e-06" in report.near_misses[0].reason


def test_gelu_by_erf_is_no_t5() -> None:
    def change(node: onnx.NodeProto, _: dict[str, onnx.TensorProto]) -> None:
        if node.op_type == "Gelu":
            del node.attribute[:]

    report = _t5(change)
    assert not report
    assert (
        "the activation is gelu; T5_FF's is gelu by tanh with a gate"
        in report.near_misses[0].reason
    )


def test_an_old_opset_is_said() -> None:
    model = block()
    model.opset_import[0].version = 12
    report = rewrite(model, "/nonexistent/never-written")
    assert not report
    assert "opset 12; convert the model to 13 or newer" in str(report)


def test_the_report_says_what_was_done(tmp_path: Path) -> None:
    text = str(_rewrite(block(), tmp_path))
    assert "1 MoE layer rewritten, 2.2 KiB of experts:" in text
    assert "layer 0: MoELayer.0: 4 experts Gated_SiLU 6 x 8, softmax_topk top 2, normalised" in text
    assert f"experts: {tmp_path / 'out' / 'experts.safetensors'}" in text


def test_progress_is_shown_on_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(block(), tmp_path / "a", progress=True)
    assert "writing experts" in capsys.readouterr().err
    rewrite(block(), tmp_path / "b")
    assert capsys.readouterr().err == ""
