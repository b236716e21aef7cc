"""A byte-pair tokenizer in plain Python; its table is ``tokenizer.json`` beside this file.

    python -m examples.tiny_moe.tokenizer         # learns the table again from build/corpus/kjv.txt

The first tokens are the text's characters, every further one joins two earlier ones. Pairs are
joined inside words only, where a word takes along the space before it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

TABLE = Path(__file__).with_name("tokenizer.json")
VOCABULARY = 512

_WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]+|\s")


class Tokenizer:
    """Text to token ids and back, without loss for text of the table's characters.

    Args:
        characters: the single-character tokens, in the order of their ids.
        merges: pairs of ids; pair ``i`` makes the token ``len(characters) + i``.
    """

    def __init__(self, characters: str, merges: Sequence[tuple[int, int]]) -> None:
        self.tokens = list(characters)
        for left, right in merges:
            self.tokens.append(self.tokens[left] + self.tokens[right])
        self.characters = characters
        self.merges = [(left, right) for left, right in merges]
        self._ids = {c: i for i, c in enumerate(characters)}
        self._rank = {pair: len(characters) + i for i, pair in enumerate(self.merges)}
        self._words: dict[str, tuple[int, ...]] = {}

    @classmethod
    def load(cls, path: Path = TABLE) -> Tokenizer:
        """Reads a table written by :meth:`save`."""
        table = json.loads(path.read_text(encoding="utf-8"))
        return cls(table["characters"], [(left, right) for left, right in table["merges"]])

    def save(self, path: Path = TABLE) -> None:
        """Writes the table as JSON."""
        table = {"characters": self.characters, "merges": self.merges}
        path.write_text(json.dumps(table, separators=(",", ":")) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            ValueError: a character is not in the table.
        """
        for at, character in enumerate(text):
            if character not in self._ids:
                raise ValueError(
                    f"character {character!r} at position {at} is not in the vocabulary;"
                    f" it has {self.characters!r}"
                )
        return [i for word in _WORD.findall(text) for i in self._encode_word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        return "".join(self.tokens[i] for i in ids)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word not in self._words:
            ids = [self._ids[c] for c in word]
            while len(ids) > 1:
                # The pair that was learned first is joined first, as in learning.
                best = min(self._rank.get(pair, len(self)) for pair in pairwise(ids))
                if best == len(self):
                    break
                ids = _join(ids, self.merges[best - len(self.characters)], best)
            self._words[word] = tuple(ids)
        return self._words[word]


def learn(text: str, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learns a table of ``vocabulary`` tokens; ties go to the smaller pair, so it is repeatable."""
    characters = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(characters)}
    words = [([index[c] for c in w], n) for w, n in sorted(Counter(_WORD.findall(text)).items())]
    merges: list[tuple[int, int]] = []
    while len(characters) + len(merges) < vocabulary:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        token = len(characters) + len(merges)
        merges.append(best)
        words = [(_join(ids, best, token), count) for ids, count in words]
    return Tokenizer(characters, merges)


def _join(ids: list[int], pair: tuple[int, int], token: int) -> list[int]:
    joined: list[int] = []
    for i in ids:
        if joined and (joined[-1], i) == pair:
            joined[-1] = token
        else:
            joined.append(i)
    return joined


def main() -> None:
    """Learns the table from the training part of the corpus and writes it."""
    from examples.tiny_moe import corpus

    text = corpus.read()
    table = learn(text)
    table.save()
    ids = table.encode(text)
    print(f"{TABLE.name}: {len(table)} tokens, {len(text) / len(ids):.2f} characters a token")


if __name__ == "__main__":
    main()
