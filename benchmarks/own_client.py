"""Our own client sends without pause until its standard input ends, then prints when each acknowledgement came.

    python -m benchmarks.own_client 127.0.0.1:9876 TOPIC

Times are of the system's monotonic clock, so that a killer in another process can tell what came after the kill.
"""

from __future__ import annotations

import json
import sys
import time

import trio

import quorate

_PAUSE_S = 0.005
_READY = "ready"


async def _send_until_told(namesrv: str, topic: str) -> list[float]:
    acknowledged: list[float] = []
    async with quorate.connect(namesrv) as client, trio.open_nursery() as nursery:

        async def send() -> None:
            while True:
                try:
                    await client.send(topic, b"own client")
                except quorate.QuorateError as error:
                    print(f"a send failed: {error}", file=sys.stderr)
                else:
                    acknowledged.append(time.monotonic())
                    if len(acknowledged) == 1:
                        print(_READY, flush=True)
                await trio.sleep(_PAUSE_S)

        nursery.start_soon(send)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()
    return acknowledged


def main() -> None:
    """Send until standard input ends."""
    acknowledged = trio.run(_send_until_told, sys.argv[1], sys.argv[2])
    print(json.dumps(acknowledged))


if __name__ == "__main__":
    main()
