"""The JSON dialect of fastjson 1.2 (remoting.md 7): ordinary JSON, and maps whose keys are bare numbers or objects.

Reading takes both the raw forms (`{0:"a"}`, `{{"queueId":0}:42}`) and the quoted ones. Writing chooses by `raw_keys`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from remoting.errors import BodyError
from remoting.message import MessageQueue

_DEPTH_LIMIT: Final = 64
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_BARE_WORD: Final = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")

_decode = msgspec.json.Decoder().decode
_decode_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode


class ObjectKey(Mapping[str, Any]):
    """A JSON object that stands as a key; equal and hashed by content."""

    __slots__ = ("_hash", "_members")

    def __init__(self, members: Mapping[str, Any]) -> None:
        self._members = dict(members)
        self._hash = hash(tuple(sorted((name, repr(value)) for name, value in self._members.items())))

    def __getitem__(self, name: str) -> Any:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectKey) and self._members == other._members

    def __repr__(self) -> str:
        return f"ObjectKey({self._members!r})"


def loads(text: str | bytes | bytearray | memoryview) -> Any:
    """Read a value in the dialect. Keys are str, int (bare numbers) or ObjectKey. Raises BodyError."""
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    if not isinstance(text, str):
        try:
            text = bytes(text).decode()
        except UnicodeDecodeError as error:
            raise BodyError(f"JSON text is not UTF-8: {error}") from error
    reader = _Reader(text)
    value = reader.value(0)
    reader.skip_space()
    if reader.position != len(text):
        raise reader.error("text after the value")
    return value


class _Reader:
    """Recursive descent over text that plain JSON reading refused; so clarity counts here, not speed."""

    __slots__ = ("position", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def error(self, what: str) -> BodyError:
        return BodyError(f"JSON: {what} at {self.position}: {self.text[self.position : self.position + 20]!r}")

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.position)
        if match:
            self.position = match.end()

    def peek(self) -> str:
        self.skip_space()
        return self.text[self.position : self.position + 1]

    def value(self, depth: int) -> Any:
        if depth > _DEPTH_LIMIT:
            raise self.error("nested too deeply")
        first = self.peek()
        if first == "{":
            return self.object(depth)
        if first == "[":
            return self.array(depth)
        if first == '"':
            return self.string()
        for word, meaning in (("true", True), ("false", False), ("null", None)):
            if self.text.startswith(word, self.position):
                self.position += len(word)
                return meaning
        return self.number()

    def string(self) -> str:
        match = _STRING.match(self.text, self.position)
        if not match:
            raise self.error("string without an end")
        try:
            value = _decode_text(match.group().encode("utf-8", "surrogatepass"))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.error("string cannot be read") from error
        self.position = match.end()
        return value

    def number(self) -> int | float:
        match = _NUMBER.match(self.text, self.position)
        if not match or match.end() - match.start() > 40:
            raise self.error("no value")
        self.position = match.end()
        if match.group(1) or match.group(2):
            return float(match.group())
        return int(match.group())

    def array(self, depth: int) -> list[Any]:
        items: list[Any] = []
        self.position += 1
        if self.peek() == "]":
            self.position += 1
            return items
        while True:
            items.append(self.value(depth + 1))
            following = self.peek()
            if following not in (",", "]"):
                raise self.error("',' or ']' expected")
            self.position += 1
            if following == "]":
                return items

    def object(self, depth: int) -> dict[Any, Any]:
        members: dict[Any, Any] = {}
        self.position += 1
        if self.peek() == "}":
            self.position += 1
            return members
        while True:
            key = self.key(depth + 1)
            if self.peek() != ":":
                raise self.error("':' expected")
            self.position += 1
            members[key] = self.value(depth + 1)
            following = self.peek()
            if following not in (",", "}"):
                raise self.error("',' or '}' expected")
            self.position += 1
            if following == "}":
                return members

    def key(self, depth: int) -> str | int | ObjectKey:
        first = self.peek()
        if first == '"':
            return self.string()
        if first == "{":
            if depth > _DEPTH_LIMIT:
                raise self.error("nested too deeply")
            return ObjectKey(self.object(depth))
        word = _BARE_WORD.match(self.text, self.position)
        if word:
            self.position = word.end()
            return word.group()
        number = self.number()
        if isinstance(number, float):
            raise self.error("a key is text, a whole number or an object")
        return number


def dumps(value: Any, *, raw_keys: bool, ascii_only: bool = False) -> bytes:
    """Write a value without blanks.

    With `raw_keys` a number or a MessageQueue as key is written bare, as Java does; without, as a string (a queue as a
    string that holds its JSON text, which Java reads as well). `ascii_only` escapes everything beyond ASCII.
    """
    parts: list[str] = []
    _write(value, raw_keys, parts.append, 0)
    text = "".join(parts)
    if ascii_only and not text.isascii():
        text = "".join(character if character < "\x80" else _escape(character) for character in text)
    return text.encode()


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))


def queue_object(queue: MessageQueue) -> dict[str, Any]:
    """A queue as JSON members, sorted by name as Java writes it."""
    return {"brokerName": queue.broker_name, "queueId": queue.queue_id, "topic": queue.topic}


def _write(value: Any, raw_keys: bool, put: Any, depth: int) -> None:
    if depth > _DEPTH_LIMIT:
        raise BodyError("JSON: nested too deeply")
    if isinstance(value, Mapping):
        separator = "{"
        for key, member in value.items():
            put(separator)
            _write_key(key, raw_keys, put, depth)
            put(":")
            _write(member, raw_keys, put, depth + 1)
            separator = ","
        put("}" if separator == "," else "{}")
    elif isinstance(value, list | tuple):
        separator = "["
        for item in value:
            put(separator)
            _write(item, raw_keys, put, depth + 1)
            separator = ","
        put("]" if separator == "," else "[]")
    elif isinstance(value, MessageQueue):
        _write(queue_object(value), raw_keys, put, depth)
    else:
        put(_encode(value).decode())


def _write_key(key: Any, raw_keys: bool, put: Any, depth: int) -> None:
    if isinstance(key, str):
        put(_encode(key).decode())
    elif isinstance(key, MessageQueue | ObjectKey):
        members = queue_object(key) if isinstance(key, MessageQueue) else dict(key)
        if raw_keys:
            _write(members, raw_keys, put, depth + 1)
        else:
            put(_encode(dumps(members, raw_keys=False).decode()).decode())
    else:
        put(str(key) if raw_keys else f'"{key}"')


def queue_of_key(key: object) -> MessageQueue:
    """The queue a key stands for: an ObjectKey, or a string that holds the JSON text of one. Raises BodyError."""
    members: Any = loads(key) if isinstance(key, str) else key
    if isinstance(members, Mapping):
        try:
            return MessageQueue(str(members["topic"]), str(members["brokerName"]), int(members["queueId"]))
        except (KeyError, ValueError, TypeError) as error:
            raise BodyError(f"no message queue: {key!r}") from error
    raise BodyError(f"no message queue: {key!r}")
