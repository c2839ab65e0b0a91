"""What was read from a file is somebody's claim: it is checked by type, form and range before it is used.

A document is a frozen dataclass. What its entries may be stands in their annotations, with the kinds below; what they
must be together, in its `__post_init__`, which raises ValueError. msgspec does the checking: nothing is converted, so
that True is no 1 and "1" is no number.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

Kind = TypeVar("Kind")
Refusal = Callable[[str], Exception]
"""The class of the error that is raised."""

_HASH = r"\A[0-9a-f]{32}\Z"
_NAME = r"\A(?!\.{1,2}\Z)[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,255}\Z"
_SAID = {
    repr(_HASH): "32 hexadecimal digits",
    repr(_NAME): "the plain name of a file, without a folder",
}
Hash = Annotated[str, Meta(pattern=_HASH)]
"""xxh3-128 as hex."""
FileName = Annotated[str, Meta(pattern=_NAME)]
"""A name inside the folder that the document speaks of."""
Text = Annotated[str, Meta(max_length=4096)]
"""Words for a person."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A number of things or bytes."""
Width = Annotated[int, Meta(ge=0, le=2**24)]
"""Columns of an array, ids of a vocabulary: what memory is asked for by."""
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Temperature = Annotated[float, Meta(gt=0, le=1e300)]
SHOWN = 160
"""Characters of a value that a message shows."""


def document_of(kind: type[Kind], values: Any, where: object, error: Refusal, *, newer: bool = False) -> Kind:
    """`values`, as JSON gives them, as a `kind`; raises `error` of one line that names the entry that does not fit.

    An entry that the class does not know is refused: what a newer version has put there may change what the others
    mean. With `newer`, for what nothing is decided from, it is passed over.
    """
    try:
        found = msgspec.convert(values, kind, strict=True)
    except msgspec.ValidationError as exc:
        raise error(f"{where}: {_problem(str(exc), values)}; the file is damaged, foreign or forged.") from None
    if not newer and (unknown := next(_unknown(values, found), None)) is not None:
        raise error(f"{where}: this version knows no entry {short(unknown)}; a newer one wrote the file.")
    return found


def parse_json(contents: bytes | str, where: object, error: Refusal) -> dict[str, Any]:
    """A JSON object; raises `error(message)` if it is anything else."""
    try:
        document = json.loads(contents)
    except (ValueError, RecursionError) as exc:
        raise error(f"{where}: not JSON ({printable(str(exc))}); the file is damaged or foreign.") from None
    if not isinstance(document, dict):
        raise error(f"{where}: JSON of type {type(document).__name__}; expected an object.")
    return document


def entry_of(values: dict[str, Any], name: str, kind: Any, default: Any, where: object, error: Refusal) -> Any:
    """One entry of a document of which not all is known, or the default; raises `error` unless it is a `kind`."""
    if name not in values:
        return default
    try:
        return msgspec.convert(values[name], kind, strict=True)
    except msgspec.ValidationError as exc:
        raise error(f"{where}: {name} is {short(values[name])}; {_expected(str(exc))}.") from None


def is_file_name(name: str) -> bool:
    """Whether it is a FileName."""
    return re.search(_NAME, name) is not None


def short(value: Any, *, quoted: bool = True) -> str:
    """A value for a message: one line that a terminal shows as it is, of SHOWN characters at most."""
    text = value[: 2 * SHOWN] if isinstance(value, str) else str(value)
    text = repr(value) if quoted and isinstance(value, str) else text
    return printable(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")


def printable(text: str, newline: str = "\\n") -> str:
    """The text without anything that moves a terminal's cursor or colours it: such characters as Python writes them."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else newline if each == "\n" else repr(each)[1:-1] for each in text)


def _problem(message: str, values: Any) -> str:
    """What msgspec says, by the entry that it is about."""
    if missing := re.search(r"missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", message, re.DOTALL):
        return f"{'.'.join(filter(None, (missing[2], missing[1])))} is missing"
    place = re.search(r" - at `(?:key in )?\$\.?(.*)`\Z", message, re.DOTALL)
    if place is None or not isinstance(values, dict):
        return _expected(message)
    found = values
    for part in re.findall(r"[^.\[\]]+", place[1]):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
    return f"{printable(place[1])} is {short(found)}; {_expected(message[: place.start()])}"


def _expected(message: str) -> str:
    if "enum value" in message:
        return "which is none of those that this version knows"
    for pattern, words in _SAID.items():
        message = message.replace(f"`str` matching regex {pattern}", words)
    return printable(f"{message[:1].lower()}{message[1:]}".replace("`", ""))


def _unknown(values: Any, found: Any) -> Iterator[str]:
    """Entries of a document that its class, or that of a part, does not have."""
    if dataclasses.is_dataclass(found):
        names = {field.name for field in dataclasses.fields(found)}
        for name, value in values.items():
            if name not in names:
                yield name
            else:
                yield from _unknown(value, getattr(found, name))
    elif isinstance(found, tuple) and found and dataclasses.is_dataclass(found[0]):
        for pair in zip(values, found):
            yield from _unknown(*pair)
