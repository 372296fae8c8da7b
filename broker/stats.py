"""Counters behind the `tps` values of runtime information and behind VIEW_BROKER_STATS_DATA (semantics.md 13).

Counting is one or two additions per batch. Rates come from samples that one timer takes: totals each second for the
10, 60 and 600 s values; items each 10 s (minute), 10 min (hour) and 1 h (day).
"""

from __future__ import annotations

from collections import deque
from typing import Final

from attrs import Factory, define, frozen

TOPIC_PUT_NUMS: Final = "TOPIC_PUT_NUMS"
TOPIC_PUT_SIZE: Final = "TOPIC_PUT_SIZE"
GROUP_GET_NUMS: Final = "GROUP_GET_NUMS"
GROUP_GET_SIZE: Final = "GROUP_GET_SIZE"
SEND_BACK_NUMS: Final = "SNDBCK_PUT_NUMS"
BROKER_PUT_NUMS: Final = "BROKER_PUT_NUMS"
BROKER_GET_NUMS: Final = "BROKER_GET_NUMS"

ITEM_SAMPLE_S: Final = 10
ITEMS_MAX: Final = 100_000
"""Keys counted per statistic. Beyond it new keys are not counted: names come from clients, memory must not."""

_DAY_MS: Final = 86_400_000


@frozen
class Snapshot:
    """Sum, rate per second and average per call over one period."""

    sum: int = 0
    tps: float = 0.0
    avgpt: float = 0.0


def _samples(length: int) -> deque[tuple[float, int, int]]:
    return deque(maxlen=length)


@define(eq=False)
class Item:
    """One counted key: how much in all, in how many calls, and where it stood at past samples."""

    value: int = 0
    times: int = 0
    minute: deque[tuple[float, int, int]] = Factory(lambda: _samples(7))
    hour: deque[tuple[float, int, int]] = Factory(lambda: _samples(7))
    day: deque[tuple[float, int, int]] = Factory(lambda: _samples(25))


def _over(samples: deque[tuple[float, int, int]]) -> Snapshot:
    """What happened between the oldest and the newest sample."""
    if len(samples) < 2:
        return Snapshot()
    first_at, first_value, first_times = samples[0]
    last_at, last_value, last_times = samples[-1]
    total, calls, seconds = last_value - first_value, last_times - first_times, last_at - first_at
    return Snapshot(total, total / seconds if seconds > 0 else 0.0, total / calls if calls else 0.0)


class RateMeter:
    """Rates of one total over 10, 60 and 600 s."""

    __slots__ = ("_samples", "total")

    def __init__(self) -> None:
        self.total = 0
        self._samples: deque[tuple[float, int]] = deque(maxlen=601)

    def sample(self, now: float) -> None:
        self._samples.append((now, self.total))

    def rate(self, seconds: int) -> float:
        """Per second over the last `seconds`; 0 until that much time has been sampled, as RocketMQ answers."""
        samples = self._samples
        if len(samples) <= seconds:
            return 0.0
        newest_at, newest = samples[-1]
        oldest_at, oldest = samples[-1 - seconds]
        return (newest - oldest) / (newest_at - oldest_at) if newest_at > oldest_at else 0.0

    def text(self) -> str:
        """The three rates as runtime information shows them."""
        return f"{self.rate(10)} {self.rate(60)} {self.rate(600)}"


class BrokerStats:
    """All counters of one broker node. `sample` is called once a second."""

    def __init__(self, cluster: str, wall_ms: int) -> None:
        self._cluster = cluster
        self.put = RateMeter()
        self.get_found = RateMeter()
        self.get_missed = RateMeter()
        self.get_total = RateMeter()
        self.transferred = RateMeter()
        self.put_bytes = 0
        self.put_failed = 0
        self.boot_ms = wall_ms
        self._items: dict[str, dict[str, Item]] = {
            name: {}
            for name in (
                TOPIC_PUT_NUMS,
                TOPIC_PUT_SIZE,
                GROUP_GET_NUMS,
                GROUP_GET_SIZE,
                SEND_BACK_NUMS,
                BROKER_PUT_NUMS,
                BROKER_GET_NUMS,
            )
        }
        self._topic_put_nums = self._items[TOPIC_PUT_NUMS]
        self._topic_put_size = self._items[TOPIC_PUT_SIZE]
        self._group_get_nums = self._items[GROUP_GET_NUMS]
        self._group_get_size = self._items[GROUP_GET_SIZE]
        self._broker_put = self._items[BROKER_PUT_NUMS].setdefault(cluster, Item())
        self._broker_get = self._items[BROKER_GET_NUMS].setdefault(cluster, Item())
        self._day = wall_ms // _DAY_MS
        self.put_this_morning = self.put_yesterday_morning = 0
        self.get_this_morning = self.get_yesterday_morning = 0
        self._next_item_sample = float("-inf")
        self._item_samples = 0

    # ------------------------------------------------------------------------------------------------- counting

    def count_put(self, topic: str, messages: int, nbytes: int) -> None:
        """One stored batch of one topic."""
        self.put.total += messages
        self.put_bytes += nbytes
        self._broker_put.value += messages
        self._broker_put.times += 1
        item = self._topic_put_nums.get(topic) or self._new_item(self._topic_put_nums, topic)
        item.value += messages
        item.times += 1
        item = self._topic_put_size.get(topic) or self._new_item(self._topic_put_size, topic)
        item.value += nbytes
        item.times += 1

    def count_get(self, topic: str, group: str, messages: int, nbytes: int) -> None:
        """One pull that found messages."""
        self.get_total.total += 1
        self.get_found.total += 1
        self.transferred.total += messages
        self._broker_get.value += messages
        self._broker_get.times += 1
        key = f"{topic}@{group}"
        item = self._group_get_nums.get(key) or self._new_item(self._group_get_nums, key)
        item.value += messages
        item.times += 1
        item = self._group_get_size.get(key) or self._new_item(self._group_get_size, key)
        item.value += nbytes
        item.times += 1

    def count_miss(self) -> None:
        """One pull that found nothing."""
        self.get_total.total += 1
        self.get_missed.total += 1

    def count_send_back(self, topic: str, group: str) -> None:
        items = self._items[SEND_BACK_NUMS]
        key = f"{topic}@{group}"
        item = items.get(key) or self._new_item(items, key)
        item.value += 1
        item.times += 1

    @staticmethod
    def _new_item(items: dict[str, Item], key: str) -> Item:
        item = Item()
        if len(items) < ITEMS_MAX:
            items[key] = item
        return item

    def forget_topic(self, topic: str) -> None:
        """A topic was deleted: drop what was counted for it."""
        self._topic_put_nums.pop(topic, None)
        self._topic_put_size.pop(topic, None)
        for items in (self._group_get_nums, self._group_get_size, self._items[SEND_BACK_NUMS]):
            for key in [key for key in items if key.startswith(f"{topic}@")]:
                del items[key]

    def forget_group(self, group: str) -> None:
        """A consumer group was deleted."""
        for items in (self._group_get_nums, self._group_get_size, self._items[SEND_BACK_NUMS]):
            for key in [key for key in items if key.endswith(f"@{group}")]:
                del items[key]

    # ------------------------------------------------------------------------------------------------- sampling

    def sample(self, now: float, wall_ms: int) -> None:
        """Take the samples that are due. `now` is monotonic seconds."""
        for meter in (self.put, self.get_found, self.get_missed, self.get_total, self.transferred):
            meter.sample(now)
        day = wall_ms // _DAY_MS
        if day != self._day:
            self._day = day
            self.put_yesterday_morning, self.put_this_morning = self.put_this_morning, self.put.total
            self.get_yesterday_morning, self.get_this_morning = self.get_this_morning, self.transferred.total
        if now < self._next_item_sample:
            return
        self._next_item_sample = now + ITEM_SAMPLE_S
        hourly = self._item_samples % 60 == 0
        daily = self._item_samples % 360 == 0
        self._item_samples += 1
        for items in self._items.values():
            for item in items.values():
                entry = (now, item.value, item.times)
                item.minute.append(entry)
                if hourly:
                    item.hour.append(entry)
                if daily:
                    item.day.append(entry)

    # -------------------------------------------------------------------------------------------------- reading

    def view(self, name: str, key: str) -> tuple[Snapshot, Snapshot, Snapshot] | None:
        """Minute, hour and day of one item; None where nothing of that name and key was ever counted."""
        item = self._items.get(name, {}).get(key)
        if item is None:
            return None
        return _over(item.minute), _over(item.hour), _over(item.day)

    def minute_rate(self, name: str, key: str) -> float:
        """Per second over the last minute; 0.0 where nothing was counted."""
        item = self._items[name].get(key)
        return _over(item.minute).tps if item is not None else 0.0

    def put_average_bytes(self) -> float:
        return self.put_bytes / self.put.total if self.put.total else 0.0
