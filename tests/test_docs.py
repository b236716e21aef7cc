"""The documentation says what the code does: generated parts, links and code blocks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"(?:<!-- (?P<note>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)```", re.S)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(note before the block, body) of each code block of a language."""
    text = page.read_text()
    return [(m["note"] or "", m["body"]) for m in BLOCK.finditer(text) if m["language"] == language]


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_names_its_language(page: Path) -> None:
    for match in BLOCK.finditer(page.read_text()):
        assert match["language"], f"{page.name}: a code block without a language: {match[0][:60]}"


def test_readme_python_runs() -> None:
    """All Python blocks of the README, in order, in one process; a GPU block only where it can."""
    source = [body for note, body in blocks(ROOT / "README.md", "python") if note != "needs: gpu"]
    assert len(source) >= 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(source)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_readme_shell_commands_exist() -> None:
    """`make` lines name targets, `moe-infer` lines parse and run, others are what make runs."""
    lines = [
        line
        for _, body in blocks(ROOT / "README.md", "sh")
        for line in body.splitlines()
        if line and not line.startswith("#")
    ]
    assert any(line.startswith("make ") for line in lines)
    for line in lines:
        words = line.split("#")[0].split()
        if words[0] == "make":
            done = subprocess.run(
                ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True
            )
        elif words[0] == "moe-infer":
            done = subprocess.run(
                [sys.executable, "-m", "moe_infer.cli", *words[1:]],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=300,
            )
        elif words[:2] == ["python", "setup.py"]:
            done = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--help"],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            for option in re.findall(r"--[a-z-]+(?==)", line):
                assert option in done.stdout, f"{line}: setup.py has no {option}"
        elif words[:2] == ["python", "-m"] or words[0] in ("pip", "python"):
            for word in words:
                if word.endswith(".py"):
                    assert (ROOT / word).exists(), line
            continue
        else:
            pytest.fail(f"a command that no test knows: {line}")
        assert done.returncode == 0, f"{line}\n{done.stderr}"
