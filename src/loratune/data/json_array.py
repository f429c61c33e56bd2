"""A JSON array read in chunks: one row at a time, whatever the size of the file."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from loratune.data.strict_json import (
    DECODER,
    MAX_DEPTH,
    MAX_ROW_BYTES,
    TOO_LONG,
    as_object,
    check_strings,
    json_reason,
)
from loratune.errors import DataError

BLOCK_BYTES = 1 << 20
_BLANK = re.compile(r"[ \t\n\r]*")


class _Text:
    """The characters of a file in chunks: `text[at:]` is what is not read yet. Bytes that are not UTF-8 are escaped."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Drops what was read and adds a block to the rest; DataError where that is longer than a row may be."""
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > MAX_ROW_BYTES:
            raise DataError(TOO_LONG)
        block = self._file.read1(BLOCK_BYTES)  # `read` would lose what stands before the cut of a gzip
        self.ended = not block
        self.text += self._decode(block, final=self.ended)

    def next(self) -> str:
        """Moves to the next character that is not blank and returns it; the empty string at the end of the file."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        """Reads one JSON value; a DataError that can be stepped over is returned, others are raised."""
        while True:
            try:
                value, end = _decode_at(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not _may_go_on(self.text, error):
                    near = self.text[error.pos : error.pos + 20].encode("utf-8", "replace").decode()
                    place = repr(near) if near else "the end of the file"
                    raise DataError(f"not valid JSON at {place}: {error.msg}; no row after it can be read.") from error
                self.more()
            else:
                span, self.at = self.text[self.at : end], end
                return value if isinstance(value, DataError) else _checked(value, span)


def _decode_at(text: str, at: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, at)
    except DataError as error:
        return error, json.JSONDecoder().raw_decode(text, at)[1]


def _may_go_on(text: str, error: json.JSONDecodeError) -> bool:
    """Says whether the text may only have been cut off: inside a string, or within a literal's or escape's length."""
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


def _checked(value: Any, span: str) -> Any:
    try:
        if not span.isascii():
            _refuse_escaped(span)
        if "\\u" in span or span.count("[") + span.count("{") > MAX_DEPTH:
            check_strings(value)
        return as_object(value)
    except DataError as error:
        return error


def _refuse_escaped(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text[error.start :].encode("utf-8", "surrogateescape")
        raise DataError(
            f"the row holds the byte 0x{line[0]:02x}, which is not UTF-8; save the file as UTF-8."
        ) from error


def read_array(file: io.BufferedReader) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yields the numbered rows of one JSON array; broken JSON, which nothing can step over, is one last DataError."""
    number = 0
    try:
        for number, row in enumerate(_values(_Text(file)), 1):
            yield number, row
    except DataError as error:
        yield number + 1, error
    except (ValueError, RecursionError) as error:
        yield number + 1, DataError(json_reason(error))


def _values(text: _Text) -> Iterator[Any]:
    text.next()
    text.at += 1  # the bracket by which the array was known
    if text.next() == "]":
        return
    while True:
        yield text.value()
        after = text.next()
        text.at += 1
        if after == "]":
            break
        if after != ",":
            found = repr(after) if after else "the file's end"
            raise DataError(f"after the row before, the array goes on with {found}; expected ',' or ']'.")
        text.next()
    if text.next():
        raise DataError("text follows the array's closing bracket; a .json file holds one array, or one object a line.")
