"""Words: the tokens of a text as they are read, in lines that break between words, and what differs in two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, TypeAlias

Run: TypeAlias = Literal["both", "plain", "steered"]
"""In which run a token was fed to the model: a prompt's in both."""
_LONG = 16  # characters after which a word may break
_MARKS = {"\n": "↵", "\t": "⇥"} | {chr(code): "\ufffd" for code in (*range(9), *range(11, 32), 127)}


@dataclass(frozen=True)
class Token:
    """A token on the page.

    Args:
        text: what it says.
        run, index: in which run it is, and the how manieth there.
        differs: whether the other run has it not.
    """

    text: str
    run: Run
    index: int
    differs: bool = False

    @property
    def shown(self) -> str:
        """What it says, with marks for what cannot be seen."""
        return "".join(_MARKS.get(letter, letter) for letter in self.text) or "\ufffd"

    @property
    def ends_line(self) -> bool:
        """Whether what comes after it is on a line of its own."""
        return "\n" in self.text


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; without a tokenizer its id."""
    if tokenizer is None:
        return [f" {number}" for number in ids]
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        same = 0  # the bytes of one letter may lie in several tokens, and then the end of `before` changes
        while same < min(len(before), len(text)) and before[same] == text[same]:
            same += 1
        found.append(text[same:])
        before = text
    return found


def words(tokens: Sequence[Token]) -> list[list[Token]]:
    """Tokens that stand on one line together: a word begins with a space, and a very long one may break.

    >>> [[token.text for token in word] for word in words([Token(t, "both", 0) for t in ("a", " wh", "ale", ".")])]
    [['a'], [' wh', 'ale', '.']]
    """
    found: list[list[Token]] = []
    for token in tokens:
        length = len(token.text) + sum(len(own.text) for own in found[-1]) if found else 0
        if not found or token.text[:1].isspace() or found[-1][-1].ends_line or length > _LONG:
            found.append([])
        found[-1].append(token)
    return found


def differing(one: Sequence[int], other: Sequence[int]) -> tuple[set[int], set[int]]:
    """The places in each of two sequences that are not in what they share in one order.

    >>> differing([1, 2, 3, 4], [1, 5, 3])
    ({1, 3}, {1})
    """
    left, right = set(range(len(one))), set(range(len(other)))
    for block in SequenceMatcher(None, list(one), list(other), autojunk=False).get_matching_blocks():
        left -= set(range(block.a, block.a + block.size))
        right -= set(range(block.b, block.b + block.size))
    return left, right
