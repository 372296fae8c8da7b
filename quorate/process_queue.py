"""State of one assigned queue inside a push consumer: what is cached, in flight, done. No I/O."""

from __future__ import annotations

from collections import deque

from remoting.message import MessageExt, MessageQueue

CACHE_MESSAGES = 1000
CACHE_BYTES = 64 * 1024 * 1024


class ProcessQueue:
    """Messages of one queue between pull and acknowledgement.

    The offset to commit is the first one not acknowledged: what follows a hole is consumed again after a restart,
    nothing is skipped.
    """

    __slots__ = (
        "_done",
        "_order",
        "_sizes",
        "bytes_cached",
        "committed",
        "dropped",
        "in_flight",
        "last_consumed_at",
        "last_pulled_at",
        "locked_until",
        "next_pull",
        "paused_until",
        "persisted",
        "queue",
        "waiting",
    )

    def __init__(self, queue: MessageQueue, start_offset: int) -> None:
        self.queue = queue
        self.next_pull = start_offset
        self.persisted: int | None = None
        """The offset the broker is known to have, None before the first update."""
        self.committed = start_offset
        self.waiting: deque[MessageExt] = deque()
        """Pulled, not yet handed out."""
        self.in_flight = 0
        self.bytes_cached = 0
        self.dropped = False
        self.paused_until = 0.0
        self.locked_until = 0.0
        self.last_pulled_at = 0
        self.last_consumed_at = 0
        self._order: deque[int] = deque()
        self._done: set[int] = set()
        self._sizes: dict[int, int] = {}

    @property
    def cached(self) -> int:
        """Messages pulled and not acknowledged."""
        return len(self._order)

    @property
    def has_room(self) -> bool:
        return len(self._order) < CACHE_MESSAGES and self.bytes_cached < CACHE_BYTES

    def add(self, messages: list[MessageExt], next_offset: int) -> None:
        """Take the messages of one pull, in order, and where the next one starts."""
        for message in messages:
            offset = message.queue_offset
            if offset < self.next_pull:
                continue
            self._order.append(offset)
            self._sizes[offset] = len(message.body)
            self.bytes_cached += len(message.body)
            self.waiting.append(message)
        self.next_pull = max(self.next_pull, next_offset)
        self._advance()

    def take(self) -> MessageExt:
        """The next message to hand out; it is in flight from now on."""
        self.in_flight += 1
        return self.waiting.popleft()

    def put_back(self, message: MessageExt) -> None:
        """A message in flight that was not consumed is the next one again."""
        self.in_flight -= 1
        self.waiting.appendleft(message)

    def acknowledge(self, offset: int) -> None:
        """A message in flight is done with (consumed, or handed back to the broker)."""
        self.in_flight -= 1
        size = self._sizes.pop(offset, None)
        if size is None:
            return  # handed out before a jump
        self._done.add(offset)
        self.bytes_cached -= size
        self._advance()

    def _advance(self) -> None:
        order, done = self._order, self._done
        while order and order[0] in done:
            done.discard(order.popleft())
        self.committed = order[0] if order else self.next_pull

    def jump(self, offset: int) -> None:
        """Go on at another offset (the old one does not exist, or an operator moved it); the cache is dropped."""
        self._order.clear()
        self._done.clear()
        self._sizes.clear()
        self.waiting.clear()
        self.bytes_cached = 0
        self.next_pull = offset
        self.committed = offset
        self.persisted = None

    @property
    def dirty(self) -> bool:
        return self.persisted != self.committed
