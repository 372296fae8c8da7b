"""Runs a verb's async body and turns what can go wrong with a cluster into one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from cli.exits import CLUSTER_ANSWERED_ERROR, GAVE_UP_WAITING, NOBODY_REACHED, USAGE, Failure

T = TypeVar("T")


def run(body: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """`trio.run`, with errors of the cluster as `Failure`. A group of nothing but such errors counts as its first."""
    try:
        return trio.run(body, *arguments, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        errors = _flat(group)
        known = [failure for error in errors if (failure := as_failure(error)) is not None]
        if len(known) == len(errors):
            raise known[0] from None
        if all(isinstance(error, KeyboardInterrupt) for error in errors):
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        failure = as_failure(error)
        if failure is None:
            raise
        raise failure from None


def _flat(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _flat(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def as_failure(error: BaseException) -> Failure | None:
    """None for an error that is a mistake of ours and deserves its traceback."""
    if isinstance(error, Failure):
        return error
    from cluster.layout import ClusterError
    from cluster.supervisor import NotReadyInTime
    from quorate.errors import InvalidArgument, NoRoute, NoTopic, QuorateError, RequestRefused, SendFailed, Unavailable

    text = str(error)
    match error:
        case NotReadyInTime():
            return Failure(text, GAVE_UP_WAITING)
        case ClusterError():
            return Failure(text, CLUSTER_ANSWERED_ERROR)
        case RequestRefused():
            return Failure(f"the cluster answered {text}", CLUSTER_ANSWERED_ERROR, code=int(error.code))
        case InvalidArgument():
            return Failure(text, USAGE)
        case NoTopic():
            return Failure(text, CLUSTER_ANSWERED_ERROR)
        case NoRoute() | Unavailable():
            return Failure(f"could not reach anybody: {text}", NOBODY_REACHED)
        case SendFailed():
            return Failure(text, GAVE_UP_WAITING)
        case QuorateError():
            return Failure(text, CLUSTER_ANSWERED_ERROR)
        case trio.TooSlowError():
            return Failure("waited and gave up", GAVE_UP_WAITING)
    return None
