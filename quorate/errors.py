"""What the client raises. Each says what is known about the outcome."""

from __future__ import annotations

from remoting.codes import ResponseCode


class QuorateError(Exception):
    """Base of everything the client raises on purpose."""


class InvalidArgument(QuorateError, ValueError):
    """What no broker would take as it is meant, an address that is none: said before anybody is asked."""


class NoRoute(QuorateError):
    """No name server knows a broker for the topic (or none could be asked)."""


class NoTopic(NoRoute):
    """A name server answers, but knows no such topic."""


class Unavailable(QuorateError):
    """No broker of the group answered in time. `maybe_done` tells whether one may have executed the request."""

    def __init__(self, text: str, *, maybe_done: bool) -> None:
        super().__init__(text)
        self.maybe_done = maybe_done


class RequestRefused(QuorateError):
    """A broker or name server refused: `code` is RocketMQ's, `remark` says why. Nothing was executed."""

    def __init__(self, code: int, remark: str, address: str) -> None:
        try:
            name = ResponseCode(code).name
        except ValueError:
            name = "code"
        super().__init__(f"{name} ({code}) from {address}: {remark}")
        self.code = code
        self.remark = remark
        self.address = address


class SendRefused(RequestRefused):
    """The broker refused the message for good (too large, illegal topic, ...): it is not stored."""


class SendFailed(QuorateError):
    """No acknowledgement in time. `maybe_stored` is False only where the message is certainly not stored."""

    def __init__(self, topic: str, attempts: list[str], *, maybe_stored: bool, unique_key: str) -> None:
        shown = attempts if len(attempts) <= 6 else [*attempts[:3], f"... {len(attempts) - 5} more ...", *attempts[-2:]]
        outcome = "it may be stored all the same" if maybe_stored else "it is not stored"
        super().__init__(
            f"message to {topic} was not acknowledged ({outcome}): {'; '.join(shown) or 'no route in time'}"
        )
        self.topic = topic
        self.attempts = attempts
        self.maybe_stored = maybe_stored
        self.unique_key = unique_key


class PullFailed(QuorateError):
    """A pull that could not be answered with messages or an offset."""
