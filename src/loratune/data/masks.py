"""From characters to tokens: where a turn begins and ends in the ids, exactly, or not at all.

A boundary at character b is a boundary between tokens n and n+1 only if the text before b alone makes the first n ids:
then generation, which gets that text, sees what training saw. A special token cuts the text before anything else does,
so the ids around it are those of the two sides taken apart, and only the tail since the last special token needs to be
tokenised again: mostly the few words of the generation prompt, the same for every turn of every row.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Lookup = Callable[[str], list[int]]  # the ids of a text as it stands
_NOTHING = re.compile(r"(?!)")


class Tokenizer(Protocol):
    """What this part needs of a `transformers` tokenizer."""

    @property
    def name_or_path(self) -> str: ...
    @property
    def special_tokens_map(self) -> dict[str, Any]: ...
    @property
    def all_special_tokens(self) -> list[str]: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    @property
    def chat_template(self) -> Any: ...
    def get_chat_template(self, chat_template: str | None = ..., tools: list[Any] | None = ..., /) -> str: ...
    def convert_tokens_to_ids(self, tokens: str, /) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool = ..., **kwargs: Any) -> list[int]: ...


@dataclass(frozen=True)
class Marks:
    """A tokenizer's special tokens: `pattern` finds any of them in a text, `anchors` those that always cut it.

    Not an anchor: a token matched after normalisation or only as a whole word, and the one for unknown characters,
    which stands in ids without standing in the text.
    """

    pattern: re.Pattern[str]
    anchors: re.Pattern[str]
    is_anchor: npt.NDArray[np.bool_]  # by token id; ids beyond the last anchor read its last entry, False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Marks":
        added = [(int(i), token) for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        unknown = str(tokenizer.special_tokens_map.get("unk_token"))
        anchors = {
            str(token.content): i
            for i, token in added
            if not token.normalized and not token.single_word and str(token.content) != unknown
        }
        is_anchor = np.zeros(max(anchors.values(), default=-1) + 2, dtype=np.bool_)
        is_anchor[list(anchors.values())] = True
        names = {*tokenizer.all_special_tokens, *(str(token.content) for _, token in added)}
        return cls(_any_of(names), _any_of(anchors), is_anchor)


@dataclass(frozen=True)
class Cut:
    """A boundary of a text, before `character`: behind `num_anchors` anchors, at the end of the `tail`.

    The tail begins with the last of these anchors, or with the text.
    """

    character: int
    num_anchors: int
    tail: str


@dataclass(frozen=True)
class Cuts:
    """A text with boundaries to find in its ids; `texts` is what must be tokenised for that."""

    text: str
    cuts: list[Cut]
    num_anchors: int

    @classmethod
    def of(cls, text: str, characters: Iterable[int], marks: Marks) -> "Cuts":
        found = [match.span() for match in marks.anchors.finditer(text)]
        ends = [end for _, end in found]
        cuts: list[Cut] = []
        for character in characters:
            behind = bisect_right(ends, character)
            cuts.append(Cut(character, behind, text[found[behind - 1][0] if behind else 0 : character]))
        return cls(text, cuts, len(found))

    @property
    def texts(self) -> list[str]:
        return [self.text, *(cut.tail for cut in self.cuts)]

    def positions(self, lookup: Lookup, marks: Marks) -> list[int | None]:
        """Returns how many of the text's ids stand before each boundary; None where a token spans it."""
        ids = lookup(self.text)
        anchors = np.flatnonzero(marks.is_anchor.take(np.array(ids, dtype=np.int32), mode="clip"))
        aligned = len(anchors) == self.num_anchors  # else a token stands for text that is not its own: count on none
        positions: list[int | None] = []
        for cut in self.cuts:
            start = int(anchors[cut.num_anchors - 1]) if aligned and cut.num_anchors else 0
            tail = lookup(cut.tail if aligned else self.text[: cut.character])
            end = start + len(tail)
            positions.append(end if ids[start:end] == tail else None)
        return positions


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern of all tokens, the longest first, as a tree of their letters.

    Python tries the branches of a pattern one by one: Gemma's 6,248 tokens side by side cost 12 us at each "<" of a
    text, as a tree 0.02 us.
    """
    tree: dict[str, Any] = {}
    for token in filter(None, tokens):
        node = tree
        for letter in token:
            node = node.setdefault(letter, {})
        node[""] = {}  # a token may end here
    return re.compile(_branches(tree)) if tree else _NOTHING


def _branches(tree: dict[str, Any]) -> str:
    patterns = [re.escape(letter) + _branches(rest) for letter, rest in tree.items() if letter]
    longer = patterns[0] if len(patterns) == 1 else "(?:" + "|".join(patterns) + ")" if patterns else ""
    return f"(?:{longer})?" if longer and "" in tree else longer
