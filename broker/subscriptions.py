"""What a consumer wants from a topic: tag expressions and the hashes they are matched by (semantics.md 4.5)."""

from __future__ import annotations

from typing import Final

from attrs import frozen

from remoting.message import java_hash

TAG: Final = "TAG"
SQL92: Final = "SQL92"
ALL: Final = "*"

_CACHE_MAX: Final = 4_096
_cache: dict[str, frozenset[int] | None] = {}


def is_tag_type(expression_type: str | None) -> bool:
    """Whether an expression type means tags: absent, empty or TAG."""
    return not expression_type or expression_type == TAG


def split_tags(expression: str | None) -> list[str]:
    """The tags of `a || b`; none for "everything"."""
    if not expression or expression == ALL:
        return []
    return [tag for tag in (part.strip() for part in expression.split("||")) if tag]


def tag_hashes(expression: str | None) -> frozenset[int] | None:
    """Low 32 bits of the hashes a tag expression matches; None for everything. Remembered by text: pulls repeat it."""
    if not expression or expression == ALL:
        return None
    try:
        return _cache[expression]
    except KeyError:
        pass
    tags = split_tags(expression)
    hashes = frozenset(java_hash(tag) & 0xFFFFFFFF for tag in tags) if tags and ALL not in tags else None
    if len(_cache) >= _CACHE_MAX:
        _cache.clear()
    _cache[expression] = hashes
    return hashes


@frozen
class Subscription:
    """One topic of a consumer group, as its last heartbeat said."""

    topic: str
    expression: str = ALL
    version: int = 0
    expression_type: str = TAG
    tags: tuple[str, ...] = ()
    class_filter: bool = False

    @classmethod
    def of(
        cls, topic: str, expression: str | None, version: int, expression_type: str | None, class_filter: bool = False
    ) -> Subscription:
        """From what a client sent. The tags are taken from the expression, whatever sets came with it."""
        kind = expression_type or TAG
        text = expression if expression else ALL
        tags = tuple(split_tags(text)) if kind == TAG else ()
        return cls(topic, text, version, kind, tags, class_filter)

    @property
    def hashes(self) -> frozenset[int] | None:
        return tag_hashes(self.expression) if self.expression_type == TAG else None
