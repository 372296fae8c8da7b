"""What can go wrong on the wire, as classes. All carry a sentence that can be shown."""

from __future__ import annotations

from remoting.codes import ResponseCode


class RemotingError(Exception):
    """Base of everything this package raises."""


class RemoteProtocolError(RemotingError):
    """The peer sent bytes that are no RocketMQ frame; the connection must be closed."""


class HeaderError(RemotingError):
    """A header field is missing or cannot be read; servers answer code 1 with this text."""


class BodyError(RemotingError):
    """A body cannot be read; servers answer code 1 with this text."""


class ConnectFailed(RemotingError):
    """No connection could be made, so the request has certainly not been executed."""


class ConnectionLost(RemotingError):
    """The connection ended while an answer was outstanding: whether the request was executed is unknown."""


class RequestTimeout(RemotingError):
    """No answer in time: whether the request was executed is unknown."""


class ResponseError(RemotingError):
    """The peer answered with a code other than the expected ones."""

    def __init__(self, code: int, remark: str | None, address: str = "") -> None:
        self.code = code
        self.remark = remark or ""
        self.address = address
        try:
            name = ResponseCode(code).name
        except ValueError:
            name = "code"
        where = f" from {address}" if address else ""
        super().__init__(f"{name} ({code}){where}: {self.remark}" if self.remark else f"{name} ({code}){where}")
