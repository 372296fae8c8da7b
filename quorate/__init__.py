"""What a Python program imports to talk to a Quorate (or RocketMQ) cluster: producer, consumers, administration.

```python
import quorate, trio

async def main():
    async with quorate.connect("127.0.0.1:9876") as mq:
        await mq.send("orders", b"hello", tag="new", key="42")
        async with mq.subscribe("orders", group="demo", start="first") as inbox:
            async for message in inbox:
                print(message.body)

trio.run(main)
```

Names are loaded on first use, so importing this package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quorate.admin import Admin
    from quorate.client import Client, connect
    from quorate.consumer import Inbox, ReceivedMessage
    from quorate.errors import (
        InvalidArgument,
        NoRoute,
        NoTopic,
        PullFailed,
        QuorateError,
        RequestRefused,
        SendFailed,
        SendRefused,
        Unavailable,
    )
    from quorate.producer import SendReceipt, by_key
    from quorate.pull import PullConsumer, PullResult
    from remoting.message import Message, MessageExt, MessageQueue

_HOME = {
    "Admin": "quorate.admin",
    "Client": "quorate.client",
    "Inbox": "quorate.consumer",
    "InvalidArgument": "quorate.errors",
    "Message": "remoting.message",
    "MessageExt": "remoting.message",
    "MessageQueue": "remoting.message",
    "NoRoute": "quorate.errors",
    "NoTopic": "quorate.errors",
    "PullConsumer": "quorate.pull",
    "PullFailed": "quorate.errors",
    "PullResult": "quorate.pull",
    "QuorateError": "quorate.errors",
    "ReceivedMessage": "quorate.consumer",
    "RequestRefused": "quorate.errors",
    "SendFailed": "quorate.errors",
    "SendReceipt": "quorate.producer",
    "SendRefused": "quorate.errors",
    "Unavailable": "quorate.errors",
    "by_key": "quorate.producer",
    "connect": "quorate.client",
}

__all__ = [
    "Admin",
    "Client",
    "Inbox",
    "InvalidArgument",
    "Message",
    "MessageExt",
    "MessageQueue",
    "NoRoute",
    "NoTopic",
    "PullConsumer",
    "PullFailed",
    "PullResult",
    "QuorateError",
    "ReceivedMessage",
    "RequestRefused",
    "SendFailed",
    "SendReceipt",
    "SendRefused",
    "Unavailable",
    "by_key",
    "connect",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'quorate' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
