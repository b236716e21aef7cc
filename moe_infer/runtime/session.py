"""An ``onnxruntime.InferenceSession`` that runs MoELayer nodes wherever it is.

The way of a model: it is opened without its weights and every layer is checked (``lower_nodes``),
then ``providers`` says what runs it and ``prepare`` makes what ONNX Runtime gets. With TensorRT the
graph goes there as it is; otherwise ``graph/lower`` replaces the layers in memory first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import onnxruntime as ort

from moe_infer.budget import Budget
from moe_infer.byte_size import ByteSize
from moe_infer.errors import PluginError
from moe_infer.graph.lower_nodes import inline_functions, load_model, read_layers
from moe_infer.inspect import LayerInfo, describe
from moe_infer.runtime import native, plugin
from moe_infer.runtime.expert_use import ExpertUse, UseTotals, add_taps, choices, count
from moe_infer.runtime.input_ranges import dimensions_of, ranges_of, shape_of
from moe_infer.runtime.layers_only import add_remedy, exclude_the_rest
from moe_infer.runtime.options import copy_options, set_entries
from moe_infer.runtime.prepare import FOLDER, Prepared, for_tensorrt, foreign_domains, lower_for
from moe_infer.runtime.profiles import Profiles, ShapeWatch, border_profiles, make_profiles
from moe_infer.runtime.providers import (
    TENSORRT_PROVIDER,
    Providers,
    choose,
    normalize,
    say_lowered_once,
)
from moe_infer.runtime.session_budget import apply_budget, given_budget, say_budget_once
from moe_infer.runtime.stats.collect import of_library, of_lowered
from moe_infer.runtime.stats.counters import ExpertStats
from moe_infer.weights import check_content

_logger = logging.getLogger("moe_infer")


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
        layers_only: TensorRT runs the MoELayer nodes alone, each as an engine of its own, and the
            other providers the rest: for graphs of which TensorRT cannot build the rest. No effect
            on a lowered model.

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
        layers_only: bool = False,
        **kwargs: Any,
    ) -> None:
        model, folder = load_model(path, base_dir)
        model = inline_functions(model)
        layers = read_layers(model, folder)
        asked = normalize(providers, provider_options)
        ranges = ranges_of(input_shapes, dims)
        profiles = make_profiles(dimensions_of(model), ranges) if ranges else None
        budget = given_budget(gpu_budget)
        choice = choose(asked, bool(layers))
        self.lowered = bool(layers) and choice.moe_provider != TENSORRT_PROVIDER
        self.gpu_budget: Budget | None = None
        resized = False
        if budget is not None and self.lowered:
            say_budget_once(budget, choice)
        elif budget is not None and layers:
            self.gpu_budget, updated = apply_budget(budget, model, layers)
            resized = any(a.config != b.config for a, b in zip(layers, updated, strict=True))
            layers = updated
        self.moe_layers: list[LayerInfo] = [describe(layer) for layer in layers]
        self.moe_provider = choice.moe_provider if layers else None
        self._layers = layers
        self._taps = add_taps(model, layers) if expert_use else []
        # A model without layers has nothing to tell, which is no error.
        self._asked_for_use = expert_use
        self._expert_use: list[ExpertUse] | None = [] if expert_use and not layers else None
        self._use_totals = [UseTotals(layer) for layer in layers] if expert_use else []

        copied = copy_options(sess_options, foreign_domains(model))
        options = sess_options if copied is None else copied
        # Bytes have no folder; ONNX Runtime is told the one of the external data.
        given_bytes = isinstance(path, bytes) and folder is not None
        prepared = Prepared(path, {FOLDER: str(folder)} if given_bytes else {})
        if self.lowered:
            check_content(layer.weights for layer in layers)
            prepared = lower_for(model, folder, choice.moe_provider, layers, options)
        elif layers:
            changed = bool(self._taps) or given_bytes or resized
            prepared = for_tensorrt(path, model, folder, layers, changed)
        self.profiles: Profiles | None = None
        self._watch: ShapeWatch | None = None
        if self.moe_provider == TENSORRT_PROVIDER:
            self._watch = ShapeWatch(dimensions_of(model), profiles)
            options_of_tensorrt = dict(choice.providers)[TENSORRT_PROVIDER]
            if layers_only:
                exclude_the_rest(model, options_of_tensorrt)
            if profiles is not None:
                self.profiles = border_profiles(model, ranges, profiles, layers_only)
                options_of_tensorrt.update(self.profiles.provider_options())
                _logger.info("TensorRT builds its engine for %s", self.profiles)
        self._kept_alive = prepared.kept_alive
        if self.lowered and choice.reason:
            say_lowered_once(choice)
        before = set_entries(options, prepared.entries)
        _forget_native_errors(self.moe_provider)
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
            asked = self._asked_for_use
            what = "did not run yet" if asked else "was made without expert_use=True"
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
        self._look({name: shape_of(value) for name, value in input_feed.items()})
        if not self._taps:
            return self._run(output_names, input_feed, run_options)
        names = list(output_names or [output.name for output in self.get_outputs()])
        values = self._run([*names, *self._taps], input_feed, run_options)
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
        if not self._asked_for_use:
            raise ValueError("expert_choices: the session was made without expert_use=True")
        if not self._taps:
            return []
        self._look({name: shape_of(value) for name, value in input_feed.items()})
        values = self._run(self._taps, input_feed)
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

    def _run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: ort.RunOptions | None = None,
    ) -> list[Any]:
        """ONNX Runtime's own run, whose error says the remedy if there is one."""
        try:
            values: list[Any] = super().run(output_names, input_feed, run_options)
        except Exception as error:
            add_remedy(error)
            raise
        return values

    def _look(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if self._watch is not None and (warning := self._watch.look(shapes)):
            _logger.warning("%s", warning)

    def get_outputs(self) -> list[Any]:
        """The model's outputs, without those that are there for ``expert_use`` alone."""
        return [output for output in super().get_outputs() if output.name not in self._taps]


def _forget_native_errors(moe_provider: str | None) -> None:
    """So that what the plugin says afterwards is about this session."""
    if moe_provider == TENSORRT_PROVIDER:
        with suppress(PluginError, AttributeError):
            plugin.load().moe_infer_clear_last_error()


def _add_native_error(error: Exception, moe_provider: str | None) -> None:
    """Puts the plugin's sentence, which is otherwise only in TensorRT's log, into the exception."""
    if moe_provider != TENSORRT_PROVIDER:
        return
    with suppress(PluginError, AttributeError):
        said = plugin.load().moe_infer_last_error().decode(errors="replace")
        if said and said not in str(error):
            error.args = (f"{error}; the plugin says: {said}", *error.args[1:])
