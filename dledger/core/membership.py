"""Who belongs to a raft group: the body of a CONFIG entry, the single steps between two of them, and their history.

The members in force on a node are those of the last CONFIG entry in its log, committed or not (Raft 6, dissertation
4.1); before the first one, the bootstrap list. One step adds or removes at most one voter, so that any quorum of the
old voters and any quorum of the new ones share a node. A new node joins as a learner: it gets entries, but neither
counts nor campaigns, until it is promoted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import cbor2
from attrs import evolve, field, frozen

from dledger.core.errors import LocalError

MEMBERS_FORMAT = 1
MEMBERS_MAX = 31
"""Voters and learners together. A larger group would be slower, not safer."""
NAME_BYTES_MAX = 255
PORT_MAX = 65_535
REPLACED_CONFIGS_KEPT = 16

Address = tuple[str, int]


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


def _by_name(addresses: Mapping[str, Address]) -> Mapping[str, Address]:
    return MappingProxyType({name: addresses[name] for name in sorted(addresses)})


@frozen
class Members:
    """Voters and learners by node id, and where to dial them. `addresses` may lack members: the bootstrap list does."""

    voters: tuple[str, ...] = field(converter=_sorted)
    learners: tuple[str, ...] = field(default=(), converter=_sorted)
    addresses: Mapping[str, Address] = field(factory=dict, converter=_by_name, hash=False)

    @property
    def all(self) -> tuple[str, ...]:
        return _sorted((*self.voters, *self.learners))

    def __contains__(self, node: str) -> bool:
        return node in self.voters or node in self.learners


@frozen
class AddLearner:
    """Let `node`, dialled at `address` (host, port), have the log. It does not count yet."""

    node: str
    address: Address


@frozen
class Promote:
    """Make a voter of a learner that has caught up."""

    node: str


@frozen
class Remove:
    """Leave out a voter or a learner."""

    node: str


Change = AddLearner | Promote | Remove


def apply_change(members: Members, change: Change) -> Members:
    """The members after one change. Raises LocalError with a sentence when it makes no sense."""
    node = change.node
    match change:
        case AddLearner():
            if node in members:
                raise LocalError(f"{node} is already a member")
            if not 0 < len(node.encode()) <= NAME_BYTES_MAX:
                raise LocalError(f"{node!r} is no name for a node")
            host, port = change.address
            if not host or not 0 < port <= PORT_MAX:
                raise LocalError(f"{host}:{port} is no address for {node}")
            if len(members.all) >= MEMBERS_MAX:
                raise LocalError(f"a group has at most {MEMBERS_MAX} members")
            return evolve(
                members,
                learners=(*members.learners, node),
                addresses={**members.addresses, node: change.address},
            )
        case Promote():
            if node in members.voters:
                raise LocalError(f"{node} is a voter already")
            if node not in members.learners:
                raise LocalError(f"{node} is not a learner; a node joins as one first")
            learners = tuple(name for name in members.learners if name != node)
            return evolve(members, voters=(*members.voters, node), learners=learners)
        case Remove():
            if node not in members:
                raise LocalError(f"{node} is not a member")
            if members.voters == (node,):
                raise LocalError(f"{node} is the last voter")
            return Members(
                tuple(name for name in members.voters if name != node),
                tuple(name for name in members.learners if name != node),
                {name: address for name, address in members.addresses.items() if name != node},
            )


def promoted(old: Members, new: Members) -> str | None:
    """The learner that became a voter between the two, or None."""
    return next((node for node in new.voters if node in old.learners), None)


def check_single_step(old: Members, new: Members) -> None:
    """Raises LocalError unless `new` is `old`, or one change away from it. Addresses may differ: they do not vote."""
    steps: list[Change] = [AddLearner(node, ("any", 1)) for node in new.learners if node not in old]
    steps += [Promote(node) for node in new.voters if node not in old.voters]
    steps += [Remove(node) for node in old.all if node not in new]
    if len(steps) > 1:
        raise LocalError(f"one member at a time: {', '.join(step.node for step in steps)} would change together")
    reached = apply_change(old, steps[0]) if steps else old
    if (reached.voters, reached.learners) != (new.voters, new.learners):
        raise LocalError("a voter cannot become a learner; remove it first")


def encode_members(members: Members) -> bytes:
    """The body of a CONFIG entry, the same bytes for equal members."""
    addresses = [[name, host, port] for name, (host, port) in members.addresses.items()]
    return cbor2.dumps([MEMBERS_FORMAT, list(members.voters), list(members.learners), addresses])


def decode_members(body: bytes | bytearray | memoryview) -> Members:
    """Raises ValueError for anything that `encode_members` does not write."""
    data = bytes(body)
    try:
        fields = cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError, TypeError) as error:
        raise ValueError(f"unreadable list of members: {error}") from error
    if not isinstance(fields, list) or len(fields) != 4 or type(fields[0]) is not int:
        raise ValueError("a list of members has four fields")
    if fields[0] != MEMBERS_FORMAT:
        raise ValueError(f"list of members of format {fields[0]}; this program knows {MEMBERS_FORMAT}")
    voters, learners = _names(fields[1]), _names(fields[2])
    members = Members(voters, learners, _addresses(fields[3]))
    if not voters:
        raise ValueError("a group without a voter")
    if len({*voters, *learners}) != len(voters) + len(learners):
        raise ValueError("a member is named twice")
    if any(name not in members for name in members.addresses):
        raise ValueError("an address of a node that is no member")
    if len(members.all) > MEMBERS_MAX:
        raise ValueError(f"{len(members.all)} members; at most {MEMBERS_MAX}")
    # Also refuses what follows the list: one group of members has one encoding.
    if encode_members(members) != data:
        raise ValueError("a list of members in another order or with bytes behind it")
    return members


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(name, str) and 0 < len(name.encode()) <= NAME_BYTES_MAX for name in value
    ):
        raise ValueError("members are named by short texts")
    return tuple(value)


def _addresses(value: object) -> dict[str, Address]:
    if not isinstance(value, list):
        raise ValueError("addresses are a list")
    addresses: dict[str, Address] = {}
    for item in value:
        if not isinstance(item, list) or [type(part) for part in item] != [str, str, int]:
            raise ValueError("an address is a node, a host and a port")
        name, host, port = item
        if not host or not 0 < port <= PORT_MAX or name in addresses:
            raise ValueError(f"{host}:{port} is no address for {name}")
        addresses[name] = (host, port)
    return addresses


class ConfigHistory:
    """The CONFIG entries of a log that a cut may still bring back: the last committed ones and all behind them.

    `known` are the entries found at start, ascending by index, all of them in the log or below its first entry;
    `bootstrap` is in force before the first. Raises LocalError when they are not ascending.
    """

    __slots__ = ("_configs",)

    def __init__(self, bootstrap: Members, known: Sequence[tuple[int, Members]]) -> None:
        self._configs: list[tuple[int, Members]] = [(0, bootstrap), *known]
        for (before, _), (after, _) in zip(self._configs, self._configs[1:], strict=False):
            if after <= before:
                raise LocalError(f"CONFIG entries out of order: {after} behind {before}")

    @property
    def index(self) -> int:
        """Index of the entry in force; 0 for the bootstrap list."""
        return self._configs[-1][0]

    @property
    def members(self) -> Members:
        return self._configs[-1][1]

    def above(self, index: int) -> list[tuple[int, Members]]:
        """Those behind `index`, oldest first."""
        return [config for config in self._configs if config[0] > index]

    def at(self, index: int) -> Members:
        """What was in force behind entry `index`, as far back as is remembered."""
        return next((members for at, members in reversed(self._configs) if at <= index), self._configs[0][1])

    def latest(self, index: int) -> tuple[int, Members] | None:
        """The last one up to entry `index`; None where that is forgotten. Also from a thread."""
        return next((config for config in reversed(list(self._configs)) if config[0] <= index), None)

    def append(self, index: int, members: Members) -> None:
        self._configs.append((index, members))

    def cut(self, from_index: int) -> bool:
        """The log was cut there. True when that changes who is in force."""
        before = self.index
        while self._configs[-1][0] >= from_index and len(self._configs) > 1:
            self._configs.pop()
        return self.index != before

    def settle(self, commit_index: int) -> None:
        """What is committed is never cut: forget what it has replaced, but for the last ones. A checkpoint of a moment
        ago asks for them."""
        while (
            len(self._configs) > REPLACED_CONFIGS_KEPT + 1
            and self._configs[REPLACED_CONFIGS_KEPT + 1][0] <= commit_index
        ):
            self._configs.pop(0)
