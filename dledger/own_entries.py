"""Entries that no client asked for: the no-op at the beginning of a term, changes of members (CONFIG), trims (TRIM)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dledger.core.errors import LocalError
from dledger.core.raft import Raft
from dledger.core.types import HEADER_BYTES, Entry, EntryType, frame_entry, next_position
from dledger.reads import Told
from dledger.store.log_store import LogStore

WAITING_MAX = 64
"""Changes of members and trims that wait to be logged."""
OLD_PEER = "a connected member runs an older version; upgrade it first"


class OwnEntries:
    """Those that wait to be logged, and those whose commit somebody waits for. Whoever asked is told once."""

    def __init__(self, store: LogStore, core: Raft, segment_bytes: int) -> None:
        self._store = store
        self._core = core
        self._segment_bytes = segment_bytes
        self.asked: deque[tuple[EntryType, Callable[[], bytes], Told]] = deque()
        """What waits to be logged. A plain attribute: every turn looks at it."""
        self._awaited: deque[tuple[int, Told]] = deque()

    def frame(self, entry_type: EntryType, body: bytes) -> Entry:
        """An entry of the present term at the end of the log."""
        store = self._store
        return frame_entry(
            store.last_index + 1,
            self._core.term,
            next_position(store.position_end, HEADER_BYTES + len(body), self._segment_bytes),
            entry_type,
            0,
            (body,) if body else (),
            store.last_head_crc,
            self._core.commit_index,
        )

    def ask(self, entry_type: EntryType, make_body: Callable[[], bytes], told: Told) -> None:
        """Log an entry in a turn of a leader. `make_body` is called then; it raises LocalError where that must not
        be. Refused at once where too many wait.
        """
        if len(self.asked) >= WAITING_MAX:
            told("too many changes wait to be logged")
        else:
            self.asked.append((entry_type, make_body, told))

    def log(self, oldest_version: int, propose: Callable[[Entry], str | None]) -> None:
        """Log everything that was asked for. `propose` says why it cannot be, or None. `oldest_version`: of the peer
        protocol, among those connected; version 1 knows none of these entries.
        """
        while self.asked:
            entry_type, make_body, told = self.asked.popleft()
            if oldest_version < 2:
                told(OLD_PEER)
                continue
            try:
                entry = self.frame(entry_type, make_body())
            except LocalError as error:
                told(str(error))
                continue
            reason = propose(entry)
            if reason is None:
                self._awaited.append((entry.index, told))
            else:
                told(reason)

    def refuse(self, reason: str) -> None:
        """This node cannot log what was asked for."""
        asked, self.asked = self.asked, deque()
        for _, _, told in asked:
            told(reason)

    def applied(self, applied_index: int) -> None:
        """Tell those whose entries are committed and have had their effect."""
        awaited = self._awaited
        while awaited and awaited[0][0] <= applied_index:
            awaited.popleft()[1](None)

    def lost(self, reason: str) -> None:
        """Whether the entries on their way are committed will not be known here."""
        awaited, self._awaited = self._awaited, deque()
        for _, told in awaited:
            told(reason)
