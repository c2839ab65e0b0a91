"""A .json file as records, streamed: the elements of an array, or one object after the other."""

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from pipeline.errors import CorpusError
from stages.prepare.inputs import InputFile

READ_BYTES = 1 << 20
DECODER = json.JSONDecoder()


def json_values(file: InputFile, longest: int) -> Iterator[tuple[Any, int]]:
    """The values in the file, each with the bytes that have been read so far; holds at most `longest` characters.

    Raises CorpusError where the file is not JSON: nobody can tell where the next record would begin.
    """
    with file.path.reader() as raw, io.BufferedReader(raw, READ_BYTES) as stream:
        source = _Source(file, stream, longest)
        is_array = source.peek() == "["
        if is_array:
            source.take("[")
        while (char := source.peek()) and not (is_array and char == "]"):
            yield source.value(), stream.tell()
            if is_array and source.peek() != "]":
                source.take(",")
                if source.peek() == "]":
                    source.refuse("a value after the comma")
        if is_array:
            source.take("]")
            if source.peek():
                source.refuse("nothing behind the array")


class _Source:
    """Characters of a file, a part at a time."""

    def __init__(self, file: InputFile, stream: Any, longest: int) -> None:
        self._file, self._stream, self._longest = file, stream, longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._before = "", 0, 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._place < len(self._text):
                if not self._text[self._place].isspace():
                    return self._text[self._place]
                self._place += 1
            if self._ended:
                return ""
            self._fill(READ_BYTES)

    def take(self, char: str) -> None:
        """Step over the next character; raises CorpusError if it is another."""
        if self.peek() != char:
            self.refuse(repr(char))
        self._place += 1

    def value(self) -> Any:
        """The next value, and step over it."""
        self.peek()
        while True:
            try:
                value, self._place = DECODER.raw_decode(self._text, self._place)
                return value
            except (json.JSONDecodeError, RecursionError) as exc:
                rest = len(self._text) - self._place
                if self._ended or isinstance(exc, RecursionError):
                    self.refuse(f"JSON ({exc if isinstance(exc, RecursionError) else exc.msg})")
                if rest > self._longest:
                    raise CorpusError(
                        f"{self._file.path}: a record has more than {self._longest:,} characters; cut it."
                    ) from None
                self._fill(max(READ_BYTES, rest))  # as much again: linear in all

    def refuse(self, wanted: str) -> None:
        """Raise CorpusError at the current place."""
        raise CorpusError(
            f"{self._file.path}: expected {wanted} at character {self._before + self._place}; a .json file holds an "
            "array of objects, or objects; mend or fetch this file again."
        )

    def _fill(self, num_bytes: int) -> None:
        content = self._stream.read(num_bytes)
        self._ended = not content
        try:
            more = self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as exc:
            raise CorpusError(
                f"{self._file.path}: byte 0x{exc.object[exc.start]:02x}; expected UTF-8; convert the file to UTF-8."
            ) from None
        self._before += self._place
        self._text, self._place = self._text[self._place :] + more, 0
