"""Four layers of Mixtral-8x7B's and Qwen3-30B-A3B's shapes in bfloat16, end to end.

Not run unless MOE_INFER_LARGE=1 or `tools/gpu_report.py --large`: together about 16 GB on disk and
50 GB of the GPU.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import large_models  # noqa: E402
from gpu_models import Ran, run, with_rest  # noqa: E402
from large_models import BATCH, SEQ, SHAPES  # noqa: E402
from tensorrt_needed import ENGINE, TRT  # noqa: E402

NEEDED = 14 << 30
"""Bytes of the larger model, with its graph."""
RANGES = {"batch": (1, BATCH, BATCH), "seq": (1, SEQ, SEQ)}


pytestmark = [*ENGINE, pytest.mark.large]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory if there is room; removed at once, not with pytest's folders of earlier runs."""
    given = os.environ.get("MOE_INFER_LARGE_DIR")
    places = [given] if given else ["/dev/shm", tempfile.gettempdir()]
    free = {p: shutil.disk_usage(p).free for p in places if os.path.isdir(p)}
    place = next((p for p, size in free.items() if size >= 2 * NEEDED), None)
    if place is None:
        pytest.fail(f"{2 * NEEDED >> 30} GiB are needed, free are {free}; set MOE_INFER_LARGE_DIR")
    with tempfile.TemporaryDirectory(prefix="moe-infer-large-", dir=place) as made:
        yield Path(made)


@pytest.mark.parametrize("name", SHAPES)
def test_large_model(
    name: str, folder: Path, record_property: Callable[[str, object], None]
) -> None:
    model = large_models.make(SHAPES[name], "cuda")
    inputs = large_models.make_inputs(model)
    expected = large_models.references(model, inputs)
    path = large_models.export(model, inputs, folder)
    del model
    torch.cuda.empty_cache()
    ran = on_tensorrt(path, {n: value.numpy() for n, value in inputs.items()}, folder)
    found = large_models.closeness(ran.logits, expected)
    for key, value in found._asdict().items():
        record_property(key, value)
    record_property("nodes", ran.parts())
    ran.check_on_tensorrt()
    assert ran.layers == large_models.LAYERS
    found.check()


def on_tensorrt(path: Path, feeds: dict[str, object], folder: Path) -> Ran:
    """In the graph's own types; where a release wants to be told of bfloat16, it is."""
    errors: list[Exception] = []
    for options in ({}, {"trt_bf16_enable": True}):
        try:
            return run(path, feeds, folder, with_rest((TRT, options)), dims=RANGES)
        except Exception as error:  # ONNX Runtime's own types differ by release
            errors.append(error)
    raise AssertionError(f"by the graph's types: {errors[0]}; with trt_bf16_enable: {errors[1]}")
