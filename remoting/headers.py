"""Reading header fields with their types: all travel as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, overload

from remoting.errors import HeaderError

_Number = int | bool | str
_T = TypeVar("_T", str, int, bool)
_D = TypeVar("_D")


@overload
def require(ext: Mapping[str, str], name: str, kind: type[bool]) -> bool: ...
@overload
def require(ext: Mapping[str, str], name: str, kind: type[int], *, bits: int = ...) -> int: ...
@overload
def require(ext: Mapping[str, str], name: str, kind: type[str]) -> str: ...
def require(ext: Mapping[str, str], name: str, kind: type, *, bits: int = 64) -> _Number:
    """The field as `kind` (str, int or bool). Raises HeaderError where it is missing or no number of `bits` bits."""
    text = ext.get(name)
    if text is None:
        raise HeaderError(f"the custom field <{name}> is null")
    if kind is str:
        return text
    if kind is bool:
        return text.lower() == "true"
    return parse_int(text, name, bits)


@overload
def optional(ext: Mapping[str, str], name: str, kind: type[bool], default: _D) -> bool | _D: ...
@overload
def optional(ext: Mapping[str, str], name: str, kind: type[int], default: _D, *, bits: int = ...) -> int | _D: ...
@overload
def optional(ext: Mapping[str, str], name: str, kind: type[str], default: _D) -> str | _D: ...
def optional(ext: Mapping[str, str], name: str, kind: type, default: object, *, bits: int = 64) -> object:
    """As `require`, with a default for a missing field, and for an empty number."""
    text = ext.get(name)
    if text is None or (not text and kind is not str):
        return default
    if kind is str:
        return text
    if kind is bool:
        return text.lower() == "true"
    return parse_int(text, name, bits)


def parse_int(text: str, name: str, bits: int = 64) -> int:
    """A Java int or long. Raises HeaderError."""
    digits = text[1:] if text[:1] in ("-", "+") else text
    if not (digits.isdecimal() and digits.isascii()) or len(digits) > 19:
        raise HeaderError(f"the custom field <{name}> is not a number: {text[:40]!r}")
    value = int(text)
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise HeaderError(f"the custom field <{name}> is out of range: {text}")
    return value
