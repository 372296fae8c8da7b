"""Queue locks of orderly consumers (semantics.md 5.2): owners are replicated, leases are leader memory.

Only a change of owner is logged. Renewals move the lease on the leader's monotonic clock; a new leader gives every
owner a fresh lease, so a lock is never held by two at once because of a failover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from broker.tables import PendingTable
from remoting.message import MessageQueue

LockKey = tuple[str, str, int]
"""(group, topic, queue id)."""
LockRow = list[Any]
"""[group, topic, queue id, client id or None], as it lies in the log."""
ProposeLocks = Callable[[list[LockRow], Callable[[bool, str | None], None]], None]


class QueueLocks:
    """`propose` logs owner changes and calls back after commit; `lease_s` is a lock's life on `monotonic`."""

    def __init__(self, propose: ProposeLocks, monotonic: Callable[[], float], lease_s: float) -> None:
        self._propose = propose
        self._monotonic = monotonic
        self._lease_s = lease_s
        self._owners: PendingTable[LockKey, str] = PendingTable()
        self._leases: dict[LockKey, float] = {}

    def lock(
        self,
        group: str,
        client_id: str,
        queues: Sequence[MessageQueue],
        done: Callable[[list[MessageQueue] | None], None],
    ) -> None:
        """Leader only. `done` gets the queues this client holds now, None when the outcome is unknown or refused.

        Called back at once where only renewals are asked for, else after commit.
        """
        now = self._monotonic()
        granted: list[MessageQueue] = []
        renewed: list[LockKey] = []
        changes: list[LockRow] = []
        for queue in queues:
            key = (group, queue.topic, queue.queue_id)
            owner = self._owners.get_pending(key)
            if owner == client_id:
                renewed.append(key)
                if self._owners.is_pending(key):
                    # Not committed yet: logged once more, so that the answer waits behind it.
                    changes.append([*key, client_id])
            elif owner is None or self._leases.get(key, 0.0) <= now:
                changes.append([*key, client_id])
            else:
                continue
            granted.append(queue)
        for key in renewed:
            self._leases[key] = now + self._lease_s
        if not changes:
            done(granted)
            return
        leases = self._leases
        before = {key: leases.get(key, 0.0) for key in [(row[0], row[1], row[2]) for row in changes]}
        for key in before:
            leases[key] = now + self._lease_s

        def logged(ok: bool, _reason: str | None) -> None:
            if not ok:
                # Refused: the former owner's lease must not be longer for it.
                for key, until in before.items():
                    if not self._owners.is_pending(key):
                        leases[key] = until
            done(granted if ok else None)

        self._propose(changes, logged)

    def unlock(self, group: str, client_id: str, queues: Sequence[MessageQueue], done: Callable[[bool], None]) -> None:
        """Give up own locks; others' are left alone. `done(True)` after commit."""
        changes: list[LockRow] = []
        for queue in queues:
            key = (group, queue.topic, queue.queue_id)
            if self._owners.get_pending(key) == client_id:
                changes.append([*key, None])
        if not changes:
            done(True)
            return
        self._propose(changes, lambda ok, _reason: done(ok))

    def is_locked_by(self, group: str, queue: MessageQueue, client_id: str) -> bool:
        """The client holds the lock and its lease runs (leader only)."""
        key = (group, queue.topic, queue.queue_id)
        return self._owners.get(key) == client_id and self._leases.get(key, 0.0) > self._monotonic()

    def holder(self, group: str, queue: MessageQueue) -> str | None:
        """The committed owner, whether or not its lease runs."""
        return self._owners.get((group, queue.topic, queue.queue_id))

    def leading(self) -> None:
        """This node leads now: every owner gets a fresh lease."""
        until = self._monotonic() + self._lease_s
        self._leases = dict.fromkeys([*self._owners.committed, *self._owners.pending_keys()], until)

    # ------------------------------------------------------------------------------------------------ state machine

    def stage(self, rows: list[LockRow]) -> None:
        for group, topic, queue_id, client_id in rows:
            self._owners.stage((group, topic, queue_id), client_id)

    def apply(self, rows: list[LockRow]) -> None:
        for group, topic, queue_id, client_id in rows:
            self._owners.apply((group, topic, queue_id))
            if client_id is None and not self._owners.is_pending((group, topic, queue_id)):
                self._leases.pop((group, topic, queue_id), None)

    def discard(self, rows: list[LockRow]) -> None:
        for group, topic, queue_id, _client_id in reversed(rows):
            self._owners.discard((group, topic, queue_id))

    def remove_topic(self, topic: str) -> None:
        self._remove([key for key in self._owners.committed if key[1] == topic])

    def remove_group(self, group: str) -> None:
        self._remove([key for key in self._owners.committed if key[0] == group])

    def _remove(self, keys: list[LockKey]) -> None:
        for key in keys:
            del self._owners.committed[key]
            if not self._owners.is_pending(key):
                self._leases.pop(key, None)

    def snapshot(self) -> list[LockRow]:
        return [[*key, client_id] for key, client_id in sorted(self._owners.committed.items())]

    def restore(self, snapshot: list[LockRow] | None) -> None:
        self._owners = PendingTable()
        self._leases = {}
        for group, topic, queue_id, client_id in snapshot or ():
            self._owners.committed[group, topic, queue_id] = client_id
