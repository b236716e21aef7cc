"""Brings what tests/test_models.py found into the documentation: `python tools/make_models.py`.

The tests write build/models.json; this copies it to docs/models.json, in the order of the rows, and
makes docs/models.md anew. Rows whose tests did not run here keep what the page says.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import model_rows  # noqa: E402


def main() -> int:
    """Says which rows are nowhere."""
    outcomes = {**model_rows.load(model_rows.PAGE), **model_rows.load(model_rows.FOUND)}
    missing = [row.key for row in model_rows.ROWS if row.key not in outcomes]
    if missing:
        for key in missing:
            print(f"no result for {' '.join(filter(None, key))}", file=sys.stderr)
        print("run `pytest tests/test_models.py` first", file=sys.stderr)
        return 1
    model_rows.save(model_rows.PAGE, outcomes)
    return subprocess.run([sys.executable, str(ROOT / "tools/make_docs.py")]).returncode


if __name__ == "__main__":
    sys.exit(main())
