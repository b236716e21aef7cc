"""Evictions while many threads run: 10,000 runs, each with the bits of resident experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("moe_infer.runtime.native")

from gpu_layers import make_attributes, make_input, make_layer, run  # noqa: E402
from gpu_threads import in_threads  # noqa: E402

pytestmark = pytest.mark.needs_library
THREADS, RUNS = 8, 10_000
EXPERTS, D_MODEL, HIDDEN, SLOTS = 24, 128, 192, 6
SIZES = (1, 3, 1, 2, 40)
"""Tokens of a run: up to 3 the device can serve, more experts than slots only the host."""


@pytest.mark.parametrize("mode", ["host", "device", "auto"])
def test_ten_thousand_runs(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_INFER_FETCH", mode)
    size = (EXPERTS, D_MODEL, HIDDEN)
    made = make_attributes(tmp_path, "Gated_SiLU", "softmax_topk", *size, 2, "float16")
    inputs = [make_input(n, D_MODEL, "float16", seed) for seed in range(6) for n in SIZES]
    with make_layer(made, D_MODEL, "float16") as layer:
        right = [torch.from_numpy(run(layer, x).view(np.int16)).cuda() for x in inputs]
    given = [torch.from_numpy(x).cuda() for x in inputs]
    with make_layer({**made, "max_concurrency": SLOTS}, D_MODEL, "float16") as layer:

        def work(thread: int) -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                workspace = torch.empty(
                    layer.workspace(max(SIZES)), dtype=torch.uint8, device="cuda"
                )
                outputs = [torch.empty_like(x) for x in given]
                wrong = torch.zeros((), dtype=torch.int64, device="cuda")
                for turn in range(RUNS // THREADS):
                    i = (7 * turn + 3 * thread) % len(given)
                    outputs[i].fill_(float("nan"))
                    layer.run(
                        given[i].data_ptr(),
                        None,
                        outputs[i].data_ptr(),
                        len(given[i]),
                        workspace.data_ptr(),
                        len(workspace),
                        stream.cuda_stream,
                    )
                    wrong += (outputs[i].view(torch.int16) != right[i]).any()
                assert int(wrong) == 0, f"{int(wrong)} of {RUNS // THREADS} runs differ"

        in_threads(THREADS, work)
        torch.cuda.synchronize()
        stats = layer.stats()
    assert stats.runs == RUNS
    assert stats.evictions > RUNS  # several a run
