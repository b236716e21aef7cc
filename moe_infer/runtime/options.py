"""Session options of our own, so that the caller's stay as they are.

ONNX Runtime offers no copy of SessionOptions, no way to remove an entry, and prints a warning for
every entry that is set twice. But a session that is constructed copies its options and gives them
out, and constructing one of a model with a single node takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import onnxruntime as ort
from onnx import TensorProto, helper

_BUILT_IN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_DEFAULTS = {"session.disable_prepacking": "0"}


def copy_options(
    options: ort.SessionOptions | None, domains: Iterable[str]
) -> ort.SessionOptions | None:
    """A copy of a caller's options.

    Args:
        options: None: fresh ones.
        domains: of the model's operators. A copy has no custom operators.

    Returns:
        None if these cannot be copied: they may hold custom operators, or hold providers.
    """
    if options is None:
        return ort.SessionOptions()
    if not _BUILT_IN.issuperset(domains):
        return None
    # A session begins its profile, which is a file, as soon as it is there.
    profiling = options.enable_profiling
    options.enable_profiling = False
    try:
        if options.has_providers():
            return None
        core = ort.capi._pybind_state.InferenceSession(options, _tiny_model(), False, False)
        copy = core.session_options
        copy.enable_profiling = profiling
    except Exception:  # another ONNX Runtime, or options that take no such model
        return None
    finally:
        options.enable_profiling = profiling
    return copy


def set_entries(options: ort.SessionOptions, entries: Mapping[str, str]) -> dict[str, str]:
    """Sets configuration entries; returns what was there of those that changed.

    What was not there is returned as ONNX Runtime's default.
    """
    before = {}
    for key, value in entries.items():
        found = get_entry(options, key)
        if found != value:
            before[key] = found
            options.add_session_config_entry(key, value)
    return before


def get_entry(options: ort.SessionOptions, key: str) -> str:
    """An entry, or ONNX Runtime's default."""
    with suppress(RuntimeError):  # for one that was never set
        return str(options.get_session_config_entry(key))
    return _DEFAULTS.get(key, "")


def _tiny_model() -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "none", [x], [y])
    opsets = [helper.make_opsetid("", 14)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=7)
    return bytes(model.SerializeToString())
