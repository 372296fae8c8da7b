"""What one run did, whichever engine played it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attrs import asdict, field, frozen


@frozen(kw_only=True)
class SeedResult:
    """`violation` is None when every promise held; `counts` has what the engine counts, by name."""

    engine: str
    seed: int
    violation: str | None
    at_seconds: float
    """Virtual time of the violation, else of the end."""
    plan: str
    trace_hash: str
    counts: Mapping[str, int]
    reached: Mapping[str, int] = field(factory=dict)
    faults_by_kind: Mapping[str, int] = field(factory=dict)
    trace: tuple[str, ...] = ()
    standing: tuple[str, ...] = ()
    """How each node stood where the run was stopped on request."""

    @property
    def ok(self) -> bool:
        return self.violation is None

    @property
    def violation_class(self) -> str:
        """Which promise is broken, without the circumstances: what shrinking has to keep."""
        return "" if self.violation is None else violation_class(self.violation)

    @property
    def reproduction(self) -> str:
        """The command that plays this seed again."""
        return f"quorate chaos replay {self.seed} --trace{' --full' if self.engine == 'full' else ''}"

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = asdict(self)
        del fields["counts"]
        for name in ("trace", "standing"):
            if not fields[name]:
                del fields[name]
        return {"ok": self.ok, **fields, **self.counts}


def violation_class(violation: str) -> str:
    """The words up to the second colon, numbers and node names taken out."""
    head = ":".join(violation.split(":")[:2])
    return re.sub(r"\bn?\d+\b", "#", head)
