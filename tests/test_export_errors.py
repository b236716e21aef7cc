"""Exports that PyTorch refuses end in one line that says why and what helps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moe_infer.torch import explain_export_error  # noqa: E402

pytestmark = pytest.mark.needs_torch

HIDDEN = 16


def _experts(implementation: str) -> Any:
    """Mixtral's MoE block alone: its export fails as the whole model's does, only sooner."""
    from transformers.models.mixtral import modeling_mixtral

    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = implementation
    return modeling_mixtral.MixtralSparseMoeBlock(config).eval()


def _switch() -> Any:
    from transformers.models.switch_transformers import modeling_switch_transformers

    config = transformers.SwitchTransformersConfig(d_model=HIDDEN, d_ff=8, num_experts=4)
    return modeling_switch_transformers.SwitchTransformersSparseMLP(config).eval()


def _failure(module: Any, path: Path, **options: Any) -> Exception:
    x = (torch.randn(2, 5, HIDDEN),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(module, x, str(path), verbose=False, **options)
        except Exception as error:
            return error
    raise AssertionError("it was exported")


class _Guarded(torch.nn.Module):  # type: ignore[misc, name-defined]
    """The loop of DeepSeek-V3 in transformers 4: an expert that has no token is skipped."""

    def forward(self, x: Any) -> Any:
        out = torch.zeros_like(x)
        for e in range(2):
            rows = torch.where(x[..., 0] > e)
            if rows[0].numel() > 0:
                out[rows] = x[rows]
        return out


class _OverHits(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A dictionary of experts, of which the ones that were chosen are looped over (NLLB-MoE)."""

    def forward(self, x: Any) -> Any:
        out = torch.zeros_like(x)
        for e in (x.sum(-1) > 0).nonzero():
            out = out + x * e[0]
        return out


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "grouped_mm, dynamo": (lambda: _experts("grouped_mm"), {"dynamo": True}, "grouped_mm"),
    "grouped_mm, dynamo, bfloat16": (
        lambda: _Cast(_experts("grouped_mm").bfloat16()),
        {"dynamo": True},
        "grouped_mm",
    ),
    "grouped_mm, TorchScript": (
        lambda: _experts("grouped_mm"),
        {"dynamo": False, "opset_version": 18},
        "grouped_mm",
    ),
    "eager, dynamo": (lambda: _experts("eager"), {"dynamo": True}, "the experts that its input"),
    "guard on the number of tokens": (_Guarded, {"dynamo": True}, "the experts that its input"),
    "a loop over hits": (_OverHits, {"dynamo": True}, "the experts that its input"),
    "Switch's router, dynamo": (_switch, {"dynamo": True}, "converts its weights"),
}


class _Cast(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        return self.module(x.bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_the_failure_is_explained_with_its_remedy(name: str, tmp_path: Path) -> None:
    make, options, reason = CASES[name]
    error = _failure(make(), tmp_path / "model.onnx", **options)
    told = explain_export_error(error)
    assert told is not None, repr(error)
    assert reason in told
    assert "moe_infer.torch.replace_moe" in told
    assert "\n" not in told
    assert not list(tmp_path.iterdir())


def test_the_place_of_the_loop_is_told(tmp_path: Path) -> None:
    told = explain_export_error(_failure(_experts("eager"), tmp_path / "model.onnx", dynamo=True))
    assert told is not None
    assert "(modeling_mixtral.py, line " in told


def test_batched_mm_is_the_remedy(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = (torch.randn(2, 5, HIDDEN),)
        torch.onnx.export(
            _experts("batched_mm"), x, str(tmp_path / "model.onnx"), dynamo=True, verbose=False
        )


def test_other_errors_are_left_to_themselves() -> None:
    assert explain_export_error(ValueError("a dimension is 7")) is None
    error = RuntimeError("wrapped")
    error.__cause__ = error
    assert explain_export_error(error) is None


def test_the_command_ends_in_the_explanation_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if `moe-infer export` left the experts as transformers sets them."""
    from moe_infer.torch import ExportError, export_pretrained, pretrained

    config = transformers.MixtralConfig(
        vocab_size=16,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(pretrained, "_batched", lambda _: None)
    with pytest.raises(ExportError, match=r"could not export .* by grouped_mm.*batched_mm"):
        export_pretrained(tmp_path / "model", tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())
