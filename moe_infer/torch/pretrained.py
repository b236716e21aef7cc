"""``export_pretrained``: from a folder with a transformers model to a graph with MoELayer nodes."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_infer.budget import check_slot_options
from moe_infer.byte_size import ByteSize
from moe_infer.graph.external import WEIGHT_DTYPES
from moe_infer.graph.guess_next import GuessReport
from moe_infer.graph.lower_nodes import load_model
from moe_infer.graph.outputs import make_folder
from moe_infer.graph.progress import status
from moe_infer.graph.report import RewriteReport
from moe_infer.graph.rewrite import EXPERTS_NAME, MODEL_NAME, rewrite
from moe_infer.set_budget import set_gpu_budget
from moe_infer.set_guesses import set_fetch_ahead
from moe_infer.torch.decoder import Decoder
from moe_infer.torch.export_errors import explain_export_error
from moe_infer.torch.finish import finish
from moe_infer.torch.replace import ReplaceReport, replace_moe

OPSET = 20
"""The newest that TensorRT 10 reads in full."""

DTYPES = ("float32", "float16", "bfloat16")

CHECK_TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Of ``check``, as a share of the largest logit."""

_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "chat_template*",
)
"""What generation needs beside the graph."""


class ExportError(ValueError):
    """PyTorch or transformers could not export the model; the message says what helps."""


@dataclass(frozen=True)
class ExportReport:
    """Result of :func:`export_pretrained`.

    Attributes:
        model_path: the graph.
        layers: what became MoELayer nodes.
        difference: of the check, as a share of the largest logit; None if there was none.
        guesses: of the next layers' experts; None unless ``fetch_ahead`` was asked for.
    """

    model_path: Path
    layers: RewriteReport | ReplaceReport
    difference: float | None
    guesses: GuessReport | None = None

    def __str__(self) -> str:
        lines = [str(self.layers)]
        if isinstance(self.layers, ReplaceReport):
            lines.append(f"model: {self.model_path}")
        if self.guesses is not None:
            lines.append(str(self.guesses))
        if self.difference is not None:
            lines.append(
                f"largest difference to PyTorch: {self.difference:.3g} of the largest logit"
            )
        return "\n".join(lines)


def export_pretrained(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    insert: bool = False,
    cached: bool = True,
    dtype: str | None = None,
    max_concurrency: int | None = None,
    gpu_budget: ByteSize | None = None,
    opset: int = OPSET,
    fetch_ahead: bool = False,
    check: bool = False,
    progress: bool | None = None,
) -> ExportReport:
    """Exports a causal language model of transformers 5 with MoELayer nodes.

    Nothing is fetched, and no code of the folder is run. By default the model's experts are set to
    ``batched_mm``, the form whose export is right for every input, the graph is written to a
    temporary folder inside ``out_dir`` and rewritten. With ``insert`` the layers are put in before
    the export (:func:`moe_infer.torch.replace_moe`), which is quicker and needs neither the memory
    nor the disk for a second copy of the experts.

    Args:
        model_dir: has ``config.json`` and the weights.
        out_dir: made if it does not exist; gets ``model.onnx``, ``experts.safetensors``, perhaps
            ``model.onnx.data``, and the tokenizer's and configuration's files.
        insert: see above.
        cached: with a key/value cache as inputs and outputs (see
            :mod:`moe_infer.torch.decoder`), as text generation needs it.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None: as the weights are stored.
        max_concurrency: most experts of a layer on the GPU at once; None: all of them.
        gpu_budget: bytes for the experts of all layers on the GPU, or a text such as ``8G``, in the
            place of ``max_concurrency``; as :func:`moe_infer.set_gpu_budget` on the finished graph.
        opset: of the graph.
        fetch_ahead: let each layer guess the experts of the next one, for layers that stream; as
            :func:`moe_infer.set_fetch_ahead` on the finished graph.
        check: run the graph on the CPU and compare its logits with PyTorch's.
        progress: say what is being done; None: if standard error is a terminal.

    Raises:
        FileNotFoundError: there is no such folder, or no ``config.json`` in it.
        ExportError: the model could not be loaded or exported.
        ValueError: an argument is not right, nothing matched, or the check failed. Or
            ``gpu_budget`` does not hold the experts of one token; the graph is there then, with
            slots for all experts.
    """
    # Whether a budget suffices is known at the end; what is no size must not wait for that.
    check_slot_options(max_concurrency, gpu_budget)
    source, target = Path(model_dir), Path(out_dir)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"{source} has no config.json; expected a folder with a transformers model (a name on a"
            " hub must be downloaded first)"
        )
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError("out_dir is the model's folder; give another one")
    with status(progress) as step:
        step("loading the model")
        model = load(source, dtype)
        make_folder(target)
        decoder = Decoder(model, cached)
        example = decoder.example()
        expected = _logits(decoder, example) if check else None
        layers: RewriteReport | ReplaceReport
        # Both ways by a temporary folder: of an export that fails nothing stays.
        with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as temporary:
            folder = Path(temporary)
            if insert:
                step("writing the experts")
                layers = replace_moe(
                    model, folder / EXPERTS_NAME, max_concurrency=max_concurrency, progress=False
                )
                step("exporting")
                _export(decoder, example, folder / MODEL_NAME, opset, insert)
                finish(folder / MODEL_NAME)
                layers = replace(layers, expert_weight_path=target / EXPERTS_NAME)
                _move(folder, target)
            else:
                _batched(model)
                step("exporting")
                _export(decoder, example, folder / MODEL_NAME, opset, insert)
                del model
                decoder.model = None
                step("rewriting")
                layers = rewrite(
                    folder / MODEL_NAME,
                    target,
                    max_concurrency=max_concurrency,
                    progress=False,
                )
            if not layers:
                raise ExportError(
                    f"the exported graph was not rewritten: {layers}; --insert (insert=True) puts"
                    " MoELayer in before the export"
                )
        _copy_beside(source, target)
        if gpu_budget is not None:
            _set_budget(target / MODEL_NAME, gpu_budget)
        path, guesses, difference = target / MODEL_NAME, None, None
        if fetch_ahead:
            guesses = set_fetch_ahead(path, True, path)
        if expected is not None:
            step("checking")
            difference = _check(path, decoder, example, expected)
    return ExportReport(path, layers, difference, guesses)


def load(folder: Path, dtype: str | None = None) -> Any:
    """A causal language model from a local folder, in evaluation mode, with eager attention.

    Raises:
        ExportError: transformers cannot load it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ExportError(
            "transformers 5 is needed to load the model; pip install 'transformers>=5'"
        ) from error
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=getattr(torch, dtype) if dtype else "auto",
            attn_implementation="eager",
        ).eval()
    except Exception as error:  # of damaged weights safetensors and pickle have their own
        raise ExportError(f"transformers cannot load {folder}: {_first_line(error)}") from error


def _set_budget(path: Path, gpu_budget: ByteSize) -> None:
    try:
        set_gpu_budget(path, gpu_budget, path)
    except ValueError as error:
        raise ValueError(
            f"{error}; {path} is whole, with slots for all experts, and `moe-infer budget` sets"
            " others without another export"
        ) from error


def _move(folder: Path, target: Path) -> None:
    """The graph last: when it is there, all is."""
    for name in (EXPERTS_NAME, f"{MODEL_NAME}.data", MODEL_NAME):
        if (folder / name).exists():
            os.replace(folder / name, target / name)


def _batched(model: Any) -> None:
    """The one way to compute experts whose export does not depend on the example's routing."""
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")


def _export(
    decoder: Decoder, example: tuple[Any, ...], path: Path, opset: int, insert: bool
) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                decoder,
                example,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=decoder.input_names,
                output_names=decoder.output_names,
                dynamic_shapes=decoder.dynamic_shapes(),
            )
        if program is None:
            raise RuntimeError("torch.onnx.export returned no program")
        program.save(os.fspath(path), external_data=True)
    except Exception as error:  # PyTorch's exporter lets any exception through
        raise ExportError(_explain(decoder, error, insert)) from error


def _explain(decoder: Decoder, error: Exception, insert: bool) -> str:
    kind = type(decoder.model).__name__
    text = f"PyTorch could not export {kind}: {_first_line(_root(error))}"
    known = explain_export_error(error)
    if known is not None:
        return f"PyTorch could not export {kind}: {known}"
    if insert:
        return text
    return f"{text}; with --insert (insert=True) the experts are left out of the export"


def _root(error: BaseException) -> BaseException:
    """The first of a chain of exceptions: PyTorch's exporter wraps them, step by step."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _logits(decoder: Decoder, example: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        output = decoder(*example)
    logits = output[0] if isinstance(output, tuple) else output
    return logits.float().cpu().numpy()  # type: ignore[no-any-return]


def _check(
    path: Path, decoder: Decoder, example: tuple[Any, ...], expected: np.ndarray[Any, Any]
) -> float:
    """Largest difference of the logits, relative to the largest.

    Raises:
        ValueError: it is too large.
    """
    import onnxruntime as ort

    from moe_infer.compare.feeds import ort_value
    from moe_infer.compare.taps import add_outputs
    from moe_infer.runtime.session import InferenceSession

    model, folder = load_model(path)
    kind = next(o.type.tensor_type.elem_type for o in model.graph.output if o.name == "logits")
    logits = add_outputs(model, ["logits"])["logits"]  # in float32: NumPy has no bfloat16
    session = InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"], base_dir=folder
    )
    feeds: dict[str, ort.OrtValue] = {}
    for name, tensor in zip(decoder.input_names, example, strict=True):
        feeds[name] = ort_value(_array(tensor))
    (value,) = session.run_with_ort_values([logits], feeds)
    found = value.numpy()
    difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    if not difference <= CHECK_TOLERANCES[WEIGHT_DTYPES[kind]]:
        raise ValueError(
            f"the graph's logits differ from PyTorch's by {difference:.3g} of the largest; do not"
            f" use {path}"
        )
    return difference


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    import ml_dtypes

    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def _copy_beside(source: Path, target: Path) -> None:
    for pattern in _BESIDE:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy(path, target / path.name)
