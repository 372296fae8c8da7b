"""Failures of one request that nobody foresaw: said once with their traceback, answered, survived.

A bug in a handler must not take the node down with it, nor hide. Broken invariants are none of these: they stop it.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec

from remoting.codes import ResponseCode
from remoting.command import Command, encode_response

UNEXPECTED: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    struct.error,
    msgspec.MsgspecError,
)
"""What a bug in a handler, or a failing disk, looks like."""

_TRACEBACKS_MAX: Final = 100


class FailureLog:
    """Remembers what it has said. All methods are called while the exception is being handled."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._seen: dict[tuple[int, str, str], None] = {}
        self.count = 0

    def note(self, code: int, peer: str, error: BaseException) -> str:
        """Log the failure, once per code and place; returns the remark for the answer."""
        self.count += 1
        place = _place_of(error)
        key = (code, type(error).__name__, place)
        if key not in self._seen and len(self._seen) < _TRACEBACKS_MAX:
            self._seen[key] = None
            self._log.exception("request failed unexpectedly", code=code, peer=peer, place=place)
        return f"{type(error).__name__}: {error}, {place}"

    def answer(self, request: Command, conn: Any, error: BaseException) -> None:
        """Note the failure and answer the request with 1."""
        remark = self.note(request.code, conn.peer_text, error)
        if not request.is_oneway:
            conn.write(encode_response(request, ResponseCode.SYSTEM_ERROR, {}, remark=remark))


def _place_of(error: BaseException) -> str:
    """File and line where an exception was raised."""
    trace = error.__traceback__
    if trace is None:
        return "unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
