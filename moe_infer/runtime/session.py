"""An ``onnxruntime.InferenceSession`` that runs MoELayer nodes wherever it is.

The way of a model: it is opened without its weights and every layer is checked (``lower_nodes``),
then ``_choose`` says what runs it. With TensorRT the graph goes to ONNX Runtime as it is;
otherwise ``graph/lower`` replaces the layers in memory first.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from moe_infer.budget import BUDGET_VARIABLE, Budget, budget_from_environment, split_budget
from moe_infer.byte_size import ByteSize, parse_bytes
from moe_infer.errors import PluginError
from moe_infer.graph.lower import EMBED_LIMIT, Lowered, lower_model
from moe_infer.graph.lower_data import (
    ELEMENT_TYPES,
    embed_inflated,
    make_absolute,
    place_in_memory,
)
from moe_infer.graph.lower_fused import CPU_PROVIDER, CUDA_PROVIDER
from moe_infer.graph.lower_nodes import LayerNode, inline_functions, load_model, read_layers
from moe_infer.graph.update import update_layers, with_slots
from moe_infer.inspect import LayerInfo, describe
from moe_infer.op import DOMAIN
from moe_infer.runtime import native, plugin
from moe_infer.runtime.expert_use import ExpertUse, UseTotals, add_taps, choices, count
from moe_infer.runtime.options import copy_options, set_entries
from moe_infer.runtime.profiles import Profiles, ShapeWatch, border_profiles, make_profiles
from moe_infer.runtime.stats.collect import of_library, of_lowered
from moe_infer.runtime.stats.counters import ExpertStats
from moe_infer.weights import check_content, resolve_weight_path

TENSORRT_PROVIDER = "TensorrtExecutionProvider"
_FOLDER = "session.model_external_initializers_file_folder_path"
_PREPACKING = "session.disable_prepacking"

_logger = logging.getLogger("moe_infer")
_said = False
_said_of_budget = False
_said_lock = threading.Lock()

Providers = Sequence[str | tuple[str, dict[Any, Any]]]


class InferenceSession(ort.InferenceSession):  # type: ignore[misc]
    """Runs a model with MoELayer nodes: through TensorRT, or lowered to ONNX Runtime's operators.

    Each layer and its weight file are checked first, so that what is wrong is told at creation.
    Relative weight paths are looked for in the model's folder too.

    Args:
        path: the model's path, or its bytes (without ``base_dir`` relative weight paths are then
            looked for in ``MOE_INFER_WEIGHT_DIR`` and the working directory alone).
        sess_options: as for ONNX Runtime. The session uses a copy, in which the entries for the
            folder of external data and, for a lowered model, prepacking are set. In options that
            cannot be copied (with custom operators or providers of their own) these entries are set
            while the session is made.
        providers: obeyed exactly. None: TensorRT with CUDA and CPU where TensorRT and the plugin
            can be used; otherwise the model is lowered for CUDA if there is a GPU, else for the
            CPU, which is said once in a process through the logger ``moe_infer``.
        provider_options: as for ONNX Runtime.
        input_shapes: ranges of dynamic inputs, which TensorRT builds its engine for: three shapes
            (smallest, usual, largest) under an input's name, or three numbers under the name of a
            symbolic dimension. Checked on every provider. Without ranges TensorRT builds its engine
            for the first run's shapes and again whenever a run is outside of those before, of which
            the logger ``moe_infer`` warns once; with them a run outside is an error.
        dims: ranges of symbolic dimensions, such as ``{"batch": (1, 1, 8), "seq": (1, 1, 4096)}``;
            the same as in ``input_shapes``.
        expert_use: make :attr:`expert_use` tell which experts the last run used.
        base_dir: folder of weight files and external data for a model given by its bytes.
        gpu_budget: bytes of GPU memory for the experts of all layers, or a text such as ``8G``. It
            sets each layer's slots in memory, in the place of the model's ``max_concurrency``; see
            :func:`moe_infer.budget.split_budget`. None: what the environment variable
            ``MOE_INFER_GPU_BUDGET`` says, if it is set. It is for slots alone, not for workspace,
            and for this session alone. On a lowered model it has no effect, which is said once in a
            process.

    Attributes:
        moe_layers: what :func:`moe_infer.inspect_model` tells of the layers.
        moe_provider: provider that runs the layers; None for a model without any.
        lowered: True if the layers were replaced by standard operators.
        gpu_budget: what the budget holds; None without one, or where it has no effect.
        profiles: the ranges that TensorRT was given, of inputs and of values at which the graph has
            to be cut; None without ranges or TensorRT. They are logged, too.

    Raises:
        FileNotFoundError: the model or a weight file is nowhere.
        WeightFileError: a weight file is damaged or does not fit its layer.
        PluginError: ``providers`` asks for TensorRT, which cannot run here.
        ValueError: the model, a layer or an argument is not right; the budget does not hold the
            experts of one token.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | bytes,
        sess_options: ort.SessionOptions | None = None,
        providers: Providers | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        input_shapes: Mapping[str, Any] | None = None,
        *,
        dims: Mapping[str, tuple[int, int, int]] | None = None,
        expert_use: bool = False,
        base_dir: str | os.PathLike[str] | None = None,
        gpu_budget: ByteSize | None = None,
        **kwargs: Any,
    ) -> None:
        model, folder = load_model(path, base_dir)
        model = inline_functions(model)
        layers = read_layers(model, folder)
        asked = _normalize(providers, provider_options)
        ranges = _ranges(input_shapes, dims)
        profiles = make_profiles(_inputs(model), ranges) if ranges else None
        budget = _given_budget(gpu_budget)
        choice = _choose(asked, bool(layers))
        self.lowered = bool(layers) and choice.moe_provider != TENSORRT_PROVIDER
        self.gpu_budget: Budget | None = None
        resized = False
        if budget is not None and self.lowered:
            _say_budget_once(budget, choice)
        elif budget is not None and layers:
            self.gpu_budget, updated = _apply_budget(budget, model, layers)
            resized = any(a.config != b.config for a, b in zip(layers, updated, strict=True))
            layers = updated
        self.moe_layers: list[LayerInfo] = [describe(layer) for layer in layers]
        self.moe_provider = choice.moe_provider if layers else None
        self._layers = layers
        self._taps = add_taps(model, layers) if expert_use else []
        self._expert_use: list[ExpertUse] | None = None
        self._use_totals = [UseTotals(layer) for layer in layers] if expert_use else []

        copied = copy_options(sess_options, _foreign_domains(model))
        options = sess_options if copied is None else copied
        # Bytes have no folder; ONNX Runtime is told the one of the external data.
        given_bytes = isinstance(path, bytes) and folder is not None
        prepared = _Prepared(path, {_FOLDER: str(folder)} if given_bytes else {})
        if self.lowered:
            check_content(layer.weights for layer in layers)
            prepared = _lower(model, folder, choice.moe_provider, layers, options)
        elif layers:
            changed = bool(self._taps) or given_bytes or resized
            prepared = _for_tensorrt(path, model, folder, layers, changed)
        self.profiles: Profiles | None = None
        self._watch: ShapeWatch | None = None
        if self.moe_provider == TENSORRT_PROVIDER:
            self._watch = ShapeWatch(_inputs(model), profiles)
            if profiles is not None:
                self.profiles = border_profiles(model, ranges, profiles)
                options_of_tensorrt = dict(choice.providers)[TENSORRT_PROVIDER]
                options_of_tensorrt.update(self.profiles.provider_options())
                _logger.info("TensorRT builds its engine for %s", self.profiles)
        self._kept_alive = prepared.kept_alive
        if self.lowered and choice.reason:
            _say_once(choice)
        before = set_entries(options, prepared.entries)
        try:
            super().__init__(
                prepared.model,
                options,
                [name for name, _ in choice.providers],
                [values for _, values in choice.providers],
                # The first error is the one that helps; ONNX Runtime's own fallback hides it.
                **{"enable_fallback": 0, **kwargs},
            )
        except Exception as error:
            _add_native_error(error, self.moe_provider)
            raise
        finally:
            if copied is None:
                set_entries(options, before)

    @property
    def expert_use(self) -> list[ExpertUse]:
        """For each layer, how many tokens chose each expert in the last ``run``.

        Raises:
            ValueError: the session was made without ``expert_use=True``, or did not run yet.
        """
        if self._expert_use is None:
            what = "did not run yet" if self._taps else "was made without expert_use=True"
            raise ValueError(f"expert_use: the session {what}")
        return self._expert_use

    def expert_stats(self) -> list[ExpertStats]:
        """The counters of each layer since it was made, in the model's order.

        On TensorRT they are the compiled library's: all of them where a layer streams its experts,
        runs and tokens where all experts stay. A layer is made when TensorRT attaches the engine,
        which may be at the first run, and anew when it builds another one; before that there is no
        entry. Another session on the same weight file in this process has entries of its own, which
        cannot be told apart and are returned too. Lowered layers count nothing themselves. With
        ``expert_use=True`` what :meth:`run` counted fills the gap. May be called while other
        threads run the session.

        Raises:
            RuntimeError: CUDA failed.
        """
        if self.lowered:
            return of_lowered(self._layers, str(self.moe_provider), self._use_totals)
        if not self._layers:
            return []
        return of_library(self._layers, native.live_layers(), self._use_totals)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: ort.RunOptions | None = None,
    ) -> list[Any]:
        """As ONNX Runtime's; with ``expert_use=True`` it also counts the experts' tokens."""
        self._look({name: _shape(value) for name, value in input_feed.items()})
        if not self._taps:
            plain: list[Any] = super().run(output_names, input_feed, run_options)
            return plain
        names = list(output_names or [output.name for output in self.get_outputs()])
        values = super().run([*names, *self._taps], input_feed, run_options)
        tapped = values[len(names) :]
        found = [count(*pair) for pair in zip(self._layers, tapped, strict=True)]
        for total, use in zip(self._use_totals, found, strict=True):
            total.add(use)
        self._expert_use = found
        return list(values[: len(names)])

    def expert_choices(self, input_feed: Mapping[str, Any]) -> list[Any]:
        """Runs the model and tells which experts each token chose.

        Args:
            input_feed: inputs by name.

        Returns:
            For each layer, in the model's order, (tokens, top_k) expert numbers; the tokens are in
            the order of the layer's hidden states.

        Raises:
            ValueError: the session was made without ``expert_use=True``.
        """
        if not self._taps:
            raise ValueError("expert_choices: the session was made without expert_use=True")
        self._look({name: _shape(value) for name, value in input_feed.items()})
        values = super().run(self._taps, input_feed)
        return [choices(*pair) for pair in zip(self._layers, values, strict=True)]

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Mapping[str, ort.OrtValue],
        run_options: ort.RunOptions | None = None,
    ) -> Any:
        """As ONNX Runtime's; looks at the shapes as :meth:`run` does."""
        self._look({n: tuple(v.shape()) for n, v in input_dict_ort_values.items()})
        return super().run_with_ort_values(output_names, input_dict_ort_values, run_options)

    def _look(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if self._watch is not None and (warning := self._watch.look(shapes)):
            _logger.warning("%s", warning)

    def get_outputs(self) -> list[Any]:
        """The model's outputs, without those that are there for ``expert_use`` alone."""
        return [output for output in super().get_outputs() if output.name not in self._taps]


@dataclass(frozen=True)
class _GivenBudget:
    """A budget and where it comes from."""

    nbytes: int
    what: str


@dataclass(frozen=True)
class _Choice:
    """What runs a model.

    Attributes:
        providers: name and options, in order.
        moe_provider: the one that runs the MoELayer nodes.
        reason: why not TensorRT, if nobody asked for the providers; else "".
    """

    providers: list[tuple[str, dict[Any, Any]]]
    moe_provider: str
    reason: str = ""


@dataclass
class _Prepared:
    """What goes to ONNX Runtime."""

    model: str | os.PathLike[str] | bytes
    entries: dict[str, str] = field(default_factory=dict)
    kept_alive: list[Any] = field(default_factory=list)


def _foreign_domains(model: onnx.ModelProto) -> set[str]:
    """Domains of the model's operators, without our own and those that it defines itself."""
    return {o.domain for o in model.opset_import} - {DOMAIN} - {f.domain for f in model.functions}


def _normalize(
    providers: Providers | None, provider_options: Sequence[dict[Any, Any]] | None
) -> list[tuple[str, dict[Any, Any]]] | None:
    """Names and options, in order; None if no providers are asked for."""
    if providers is None:
        if provider_options is not None:
            raise ValueError("provider_options are given without providers; give both")
        return None
    if not providers:
        raise ValueError(f"providers is empty; available are {_available()}")
    given = provider_options if provider_options is not None else [{} for _ in providers]
    if len(given) != len(providers):
        raise ValueError(
            f"providers has {len(providers)} entries, but provider_options has {len(given)}"
        )
    pairs = []
    for provider, options in zip(providers, given, strict=True):
        name, own = (provider, {}) if isinstance(provider, str) else provider
        pairs.append((name, {**own, **options}))
    return pairs


def _choose(asked: list[tuple[str, dict[Any, Any]]] | None, has_layers: bool) -> _Choice:
    """What runs the model; see ``providers`` of the session."""
    available = ort.get_available_providers()
    if asked is None:
        return _choose_best(available)
    names = [name for name, _ in asked]
    for name in names:
        if name not in available:
            message = f"{name} was asked for, but this ONNX Runtime has {', '.join(available)}"
            if name == TENSORRT_PROVIDER:
                raise PluginError(f"{message}; pip install 'moe-infer[gpu]' brings it")
            raise ValueError(f"{message}; choose among these or install another ONNX Runtime")
    if TENSORRT_PROVIDER in names:
        if has_layers and not (status := plugin.status()).usable:
            raise PluginError(f"{TENSORRT_PROVIDER} was asked for, but {status.reason}")
        return _Choice(asked, TENSORRT_PROVIDER)
    return _Choice(asked, CUDA_PROVIDER if CUDA_PROVIDER in names else CPU_PROVIDER)


def _choose_best(available: Sequence[str]) -> _Choice:
    if TENSORRT_PROVIDER not in available:
        reason = f"this ONNX Runtime has no {TENSORRT_PROVIDER} (pip install 'moe-infer[gpu]')"
    elif (status := plugin.status()).usable:
        names = (TENSORRT_PROVIDER, CUDA_PROVIDER, CPU_PROVIDER)
        return _Choice([(name, {}) for name in names if name in available], TENSORRT_PROVIDER)
    else:
        reason = status.reason
    if CUDA_PROVIDER in available and plugin.gpu_count():
        return _Choice([(CUDA_PROVIDER, {}), (CPU_PROVIDER, {})], CUDA_PROVIDER, reason)
    return _Choice([(CPU_PROVIDER, {})], CPU_PROVIDER, reason)


def _available() -> str:
    return ", ".join(ort.get_available_providers())


def _say_once(choice: _Choice) -> None:
    global _said
    with _said_lock:
        if _said:
            return
        _said = True
    _logger.warning(
        "MoELayer nodes are lowered to operators of %s, without TensorRT: %s",
        choice.moe_provider,
        choice.reason,
    )


def _given_budget(argument: ByteSize | None) -> _GivenBudget | None:
    """The argument, else what the environment says."""
    what, value = "gpu_budget", argument
    if value is None:
        what, value = f"environment variable {BUDGET_VARIABLE}", budget_from_environment()
    return None if value is None else _GivenBudget(parse_bytes(value, what), what)


def _apply_budget(
    budget: _GivenBudget, model: onnx.ModelProto, layers: list[LayerNode]
) -> tuple[Budget, list[LayerNode]]:
    """Splits a budget and gives the model's layers these slots; the model is changed in place."""
    split = split_budget(budget.nbytes, [describe(layer) for layer in layers], budget.what)
    pairs = zip(layers, split.layers, strict=True)
    configs = [with_slots(layer, part.slots) for layer, part in pairs]
    _logger.info(
        "%s of %d bytes: %d of %d experts have a slot, in %d bytes",
        budget.what,
        split.given,
        split.slots,
        split.experts,
        split.nbytes,
    )
    return split, update_layers(model, layers, configs)


def _say_budget_once(budget: _GivenBudget, choice: _Choice) -> None:
    global _said_of_budget
    with _said_lock:
        if _said_of_budget:
            return
        _said_of_budget = True
    _logger.warning(
        "%s has no effect: the layers are lowered to operators of %s, which have no slots",
        budget.what,
        choice.moe_provider,
    )


def _lower(
    model: onnx.ModelProto,
    folder: Path | None,
    provider: str,
    layers: list[LayerNode],
    options: ort.SessionOptions,
) -> _Prepared:
    lowered = lower_model(model, folder, provider, layers)
    kept_alive: list[Any] = []
    if lowered.data.inflated_bytes > EMBED_LIMIT:
        kept_alive = _give_arrays(lowered, options)
    else:
        embed_inflated(lowered.model, lowered.data)
    # Without prepacking the weights stay in the mapped file and only what is used is read; with
    # it every expert would be repacked into private memory now.
    entries = {_PREPACKING: "1"}
    found = place_in_memory(lowered.model)
    if found is not None:
        entries[_FOLDER] = str(found)
    return _Prepared(lowered.model.SerializeToString(), entries, kept_alive)


def _give_arrays(lowered: Lowered, options: ort.SessionOptions) -> list[Any]:
    """Hands deflated experts to ONNX Runtime in memory, beside a model that could not hold them."""
    names: list[str] = []
    values: list[Any] = []
    kept: list[Any] = []
    for name, array in lowered.data.arrays():
        dtype = ELEMENT_TYPES[array.dtype.name]
        bits = array.view("u2") if array.dtype.name == "bfloat16" else array
        names.append(name)
        values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype))
        kept += [array, values[-1]]
    options.add_external_initializers(names, values)
    return kept


def _for_tensorrt(
    path: str | os.PathLike[str] | bytes,
    model: onnx.ModelProto,
    folder: Path | None,
    layers: list[LayerNode],
    changed: bool,
) -> _Prepared:
    """The model for TensorRT, whose plugin does not know the model's folder."""
    for layer in layers:
        file = layer.weights.file
        if file is None or _plugin_finds(layer.config.expert_weight_file, file.path):
            continue
        changed = True
        for attribute in model.graph.node[layer.index].attribute:
            if attribute.name == "expert_weight_file":
                attribute.s = os.fsencode(file.path)
    if not changed:
        return _Prepared(path)
    make_absolute(model, folder)
    found = place_in_memory(model)
    entries = {} if found is None else {_FOLDER: str(found)}
    return _Prepared(model.SerializeToString(), entries)


def _plugin_finds(text: str, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samefile(resolve_weight_path(text), path)
    return False


def _add_native_error(error: Exception, moe_provider: str | None) -> None:
    """Puts the plugin's sentence, which is otherwise only in TensorRT's log, into the exception."""
    if moe_provider != TENSORRT_PROVIDER:
        return
    with suppress(PluginError, AttributeError):
        said = plugin.load().moe_infer_last_error().decode(errors="replace")
        if said and said not in str(error):
            error.args = (f"{error}; the plugin says: {said}", *error.args[1:])


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape()) if isinstance(value, ort.OrtValue) else np.shape(value)


def _ranges(
    input_shapes: Mapping[str, Any] | None, dims: Mapping[str, Any] | None
) -> dict[str, Any]:
    ranges = dict(input_shapes or {})
    for name, numbers in (dims or {}).items():
        if name in ranges:
            raise ValueError(f"'{name}' has a range both in input_shapes and in dims; give one")
        whole = isinstance(numbers, Sequence) and all(isinstance(n, int) for n in numbers)
        if not whole or len(numbers) != 3:
            raise ValueError(
                f"dims: '{name}' must have three numbers (smallest, usual, largest), got"
                f" {numbers!r}; whole shapes go to input_shapes"
            )
        ranges[name] = tuple(numbers)
    return ranges


def _inputs(model: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Dimensions of each input that is no initializer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: [
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
            for d in value.type.tensor_type.shape.dim
        ]
        for value in model.graph.input
        if value.name not in constants
    }
