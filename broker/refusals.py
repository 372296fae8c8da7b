"""Answers for proposals that failed, in the words of `broker.answers`."""

from __future__ import annotations

from broker.answers import REFUSALS, UNKNOWN
from remoting.command import Command, encode_response


def refusal_answer(request: Command, reason: str | None) -> bytes:
    """The answer for a reason of `Done`; without one the outcome is unknown."""
    code, remark = REFUSALS[reason or UNKNOWN]
    return encode_response(request, code, {}, remark=remark)
