"""How much memory a rewrite takes, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def grown_by_rewrite(path: Path, out: Path) -> int:
    """Bytes that a process takes beside its modules while it rewrites a model of one layer."""
    script = textwrap.dedent(
        f"""
        import resource, sys
        import onnx, numpy
        from moe_infer.graph.rewrite import rewrite
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report = rewrite({str(path)!r}, {str(out)!r})
        assert len(report.layers) == 1, str(report)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
