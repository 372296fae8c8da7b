"""Helpers for tests that run on the real environment."""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from runtime.model import Env
from runtime.real import real_env


def test_env(folder: object = None, *, seed: int = 0) -> Env:
    """The real environment with predictable randomness: the same seed and stream name give the same numbers.

    `folder` is accepted so that a test may hand over its tmp_path; both are printed, for a failure's sake.
    """
    print(f"test_env seed={seed} folder={folder}")  # noqa: T201 - pytest shows it when the test fails

    def stream(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}")

    return real_env(stream)


# pytest would collect the function itself as a test.
test_env.__test__ = False  # type: ignore[attr-defined]


async def wait_until(condition: Callable[[], object], *, limit: float = 5.0, what: str = "the condition") -> None:
    """Wait until `condition()` is true, at most `limit` seconds. Checkpoint. Raises TimeoutError naming `what`."""
    with trio.move_on_after(limit):
        while not condition():  # noqa: ASYNC110 - any condition, so there is no event to wait for
            await trio.sleep(0.002)
        return
    raise TimeoutError(f"{what} did not come true within {limit} s")
