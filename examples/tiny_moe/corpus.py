"""The training text: the King James Bible from Debian's packages, made into plain chapters.

    python -m examples.tiny_moe.corpus            # writes build/corpus/kjv.txt

Debian's ``bible-kjv-text`` holds the text (the translation of 1611, in the public domain) and
``bible-kjv`` the program that reads it. Both are downloaded by apt and unpacked in a temporary
folder; nothing is installed and no root is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = "Debian packages bible-kjv and bible-kjv-text (King James Version, public domain)"
PACKAGES = ("bible-kjv", "bible-kjv-text")
DEFAULT_PATH = Path("build/corpus/kjv.txt")
SHA256 = "c7e7725a09591bcff7a3728259ded9c95b9b07fd6072fdf880b214823a7d7726"
"""Of the text that version 4.38 of the packages gives."""

VALIDATION_SHARE = 0.05

BOOKS = {
    "Ge": "Genesis",
    "Exo": "Exodus",
    "Lev": "Leviticus",
    "Num": "Numbers",
    "Deu": "Deuteronomy",
    "Josh": "Joshua",
    "Jdgs": "Judges",
    "Ruth": "Ruth",
    "1Sm": "1 Samuel",
    "2Sm": "2 Samuel",
    "1Ki": "1 Kings",
    "2Ki": "2 Kings",
    "1Chr": "1 Chronicles",
    "2Chr": "2 Chronicles",
    "Ezra": "Ezra",
    "Neh": "Nehemiah",
    "Est": "Esther",
    "Job": "Job",
    "Psa": "Psalm",
    "Prv": "Proverbs",
    "Eccl": "Ecclesiastes",
    "SSol": "Song of Solomon",
    "Isa": "Isaiah",
    "Jer": "Jeremiah",
    "Lam": "Lamentations",
    "Eze": "Ezekiel",
    "Dan": "Daniel",
    "Hos": "Hosea",
    "Joel": "Joel",
    "Amos": "Amos",
    "Obad": "Obadiah",
    "Jonah": "Jonah",
    "Mic": "Micah",
    "Nahum": "Nahum",
    "Hab": "Habakkuk",
    "Zep": "Zephaniah",
    "Hag": "Haggai",
    "Zec": "Zechariah",
    "Mal": "Malachi",
    "Mat": "Matthew",
    "Mark": "Mark",
    "Luke": "Luke",
    "John": "John",
    "Acts": "Acts",
    "Rom": "Romans",
    "1Cor": "1 Corinthians",
    "2Cor": "2 Corinthians",
    "Gal": "Galatians",
    "Eph": "Ephesians",
    "Phi": "Philippians",
    "Col": "Colossians",
    "1Th": "1 Thessalonians",
    "2Th": "2 Thessalonians",
    "1Tim": "1 Timothy",
    "2Tim": "2 Timothy",
    "Titus": "Titus",
    "Phmn": "Philemon",
    "Heb": "Hebrews",
    "Jas": "James",
    "1Pet": "1 Peter",
    "2Pet": "2 Peter",
    "1Jn": "1 John",
    "2Jn": "2 John",
    "3Jn": "3 John",
    "Jude": "Jude",
    "Rev": "Revelation",
}
"""The program's abbreviation of every book, and the name in our headings."""

_VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)")


def format_chapters(listing: str) -> str:
    """Turns lines ``Ge1:1 In the beginning ...`` into chapters.

    A chapter is a heading (``Genesis 1``), its verses, one a line, and an empty line.

    Raises:
        ValueError: a line is not a verse, or a book or the order of the verses is not known.
    """
    lines: list[str] = []
    books = list(BOOKS)
    previous = (0, 0, 0)
    for number, line in enumerate(listing.splitlines(), 1):
        match = _VERSE.fullmatch(line.strip())
        if match is None or match[1] not in BOOKS:
            raise ValueError(f"line {number} of the listing is no verse: {line[:60]!r}")
        place = (books.index(match[1]), int(match[2]), int(match[3]))
        if place <= previous and number > 1:
            raise ValueError(f"line {number} of the listing is out of order: {line[:60]!r}")
        if place[:2] != previous[:2]:
            lines += [""] if lines else []
            lines.append(f"{BOOKS[match[1]]} {match[2]}")
        lines.append(re.sub(r"\s+", " ", match[4]).strip())
        previous = place
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, str]:
    """Training and validation text: the last 5 %, from the next chapter's heading on."""
    at = text.index("\n\n", int(len(text) * (1 - VALIDATION_SHARE))) + 2
    return text[:at], text[at:]


def read(path: Path = DEFAULT_PATH) -> str:
    """The text of :func:`download`.

    Raises:
        FileNotFoundError: it was not made yet; says how.
        ValueError: the file is not the text that the models were trained on.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; make it by: python -m examples.tiny_moe.corpus"
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {SHA256}; remove it and make it again"
        )
    return data.decode("ascii")


def download(path: Path = DEFAULT_PATH) -> str:
    """Gets the packages, writes the text to ``path`` and returns its sha256.

    Raises:
        RuntimeError: apt-get, dpkg or the packages' program did not work; says which.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is missing: this step needs Debian or Ubuntu")
    with tempfile.TemporaryDirectory() as folder:
        _run(["apt-get", "download", *PACKAGES], folder, "apt-get update may be needed before")
        for package in sorted(Path(folder).glob("*.deb")):
            _run(["dpkg", "-x", str(package), "tree"], folder, "the package is damaged")
        listing = _run(
            ["tree/usr/bin/bible", "-d", "tree/usr/lib/bible.data", "-f", "gen1:1-rev22:21"],
            folder,
            "it needs libreadline8",
        )
    data = format_chapters(listing).encode("ascii")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _run(command: list[str], folder: str, hint: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode} ({hint}):\n{done.stderr.strip()}"
        )
    return done.stdout


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH)
    out = parser.parse_args().out
    digest = download(out)
    print(f"{out}: {out.stat().st_size:,} bytes, sha256 {digest}")
    if digest != SHA256:
        raise SystemExit(f"not the text that the models were trained on (sha256 {SHA256})")


if __name__ == "__main__":
    main()
