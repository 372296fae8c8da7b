"""Which members a node knows, and where they are dialled: as configured, then by each CONFIG entry (Raft 6)."""

from __future__ import annotations

from attrs import evolve

from dledger.config import Address, GroupConfig
from dledger.core.membership import Change, Members, apply_change, decode_members, encode_members
from dledger.errors import FormatError
from dledger.store.checkpoint import Checkpoint
from dledger.store.log_store import LogStore


class Roster:
    """The members in force on one node."""

    def __init__(self, config: GroupConfig, members: Members, members_index: int) -> None:
        """`members` are those of CONFIG entry `members_index`; 0: those the group was formatted with."""
        self._configured = config.peers
        self.members = members
        self.members_index = members_index

    def change(self, members: Members, members_index: int) -> None:
        """Those of another CONFIG entry are in force."""
        self.members, self.members_index = members, members_index

    def addresses_of(self, members: Members) -> dict[str, Address]:
        """By the CONFIG entry, else as configured."""
        found: dict[str, Address] = {}
        for name in members.all:
            address = members.addresses.get(name) or self._configured.get(name)
            if address is not None:
                found[name] = address
        return found

    def config_body(self, change: Change) -> bytes:
        """Of the CONFIG entry for one change of the members in force. Raises LocalError where it must not be."""
        known = evolve(self.members, addresses=self.addresses_of(self.members))
        return encode_members(apply_change(known, change))


def known_members(config: GroupConfig, store: LogStore, checkpoint: Checkpoint | None) -> list[tuple[int, Members]]:
    """The CONFIG entries known, ascending; the configured members before them as entry 0. Raises FormatError, or
    LogDamaged where one of the entries cannot be read.
    """
    founders = Members(config.first_voters, (), {name: config.peers[name] for name in config.first_voters})
    known = [(0, founders)]
    try:
        if checkpoint is not None and checkpoint.config:
            known.append((checkpoint.config_index, decode_members(checkpoint.config)))
        covered = max(checkpoint.index, checkpoint.config_index) if checkpoint is not None else 0
        for index, body in store.config_entries(covered):
            known.append((index, decode_members(body)))
    except ValueError as error:
        raise FormatError(f"a list of members in {config.data_dir} cannot be read: {error}") from error
    return known
