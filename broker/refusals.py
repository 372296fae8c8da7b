"""Why something is not done, in RocketMQ's words, and the answers for proposals that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define

from broker.answers import REFUSALS, UNKNOWN
from remoting.codes import ResponseCode
from remoting.command import Command, encode_response

if TYPE_CHECKING:
    from broker.config import BrokerConfig


@define
class Refusal:
    """Why a message is not stored."""

    code: int
    remark: str


def illegal(config: BrokerConfig) -> Refusal:
    """Body or properties are empty or too long."""
    return Refusal(
        ResponseCode.MESSAGE_ILLEGAL,
        "the message is illegal, maybe msg body or properties length not matched. msg body length limit "
        f"{config.max_message_bytes}B, msg properties length limit {config.max_properties_bytes}B.",
    )


def refusal_answer(request: Command, reason: str | None) -> bytes:
    """The answer for a reason of `Done`; without one the outcome is unknown."""
    code, remark = REFUSALS[reason or UNKNOWN]
    return encode_response(request, code, {}, remark=remark)
