"""The table of GET_BROKER_RUNTIME_INFO: RocketMQ's keys (mqadmin.md 7), and where the raft group stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from broker.records import UNIT
from remoting.codes import SCHEDULE_TOPIC, VERSION, version_name

if TYPE_CHECKING:
    from broker.context import BrokerContext

GIBIBYTE = 1024**3


def runtime_info(broker: BrokerContext) -> dict[str, str]:
    """Every value is text. Never waits."""
    table = _counters(broker)
    table |= _storage(broker)
    table |= _queues_of_work()
    table |= _delays(broker)
    table |= _raft(broker)
    return table


def _counters(broker: BrokerContext) -> dict[str, str]:
    stats = broker.stats
    now_ms = broker.env.clock.wall_ms()
    return {
        "brokerVersionDesc": version_name(VERSION),
        "brokerVersion": str(VERSION),
        "brokerActive": "true" if broker.group.is_ready_leader else "false",
        "bootTimestamp": str(stats.boot_ms),
        "runtime": _duration(max(0, now_ms - stats.boot_ms) // 1000),
        "startAcceptSendRequestTimeStamp": "0",
        "putTps": stats.put.text(),
        "getFoundTps": stats.get_found.text(),
        "getMissTps": stats.get_missed.text(),
        "getTotalTps": stats.get_total.text(),
        "getTransferredTps": stats.transferred.text(),
        "msgPutTotalYesterdayMorning": str(stats.put_yesterday_morning),
        "msgPutTotalTodayMorning": str(stats.put_this_morning),
        "msgPutTotalTodayNow": str(stats.put.total),
        "msgGetTotalYesterdayMorning": str(stats.get_yesterday_morning),
        "msgGetTotalTodayMorning": str(stats.get_this_morning),
        "msgGetTotalTodayNow": str(stats.transferred.total),
        "putMessageTimesTotal": str(stats.put.total),
        "putMessageSizeTotal": str(stats.put_bytes),
        "putMessageAverageSize": str(stats.put_average_bytes()),
        "putMessageFailedTimes": str(stats.put_failed),
        "putMessageEntireTimeMax": "0",
        "putMessageDistributeTime": "null",
        "putLatency99": "0.00",
        "putLatency999": "0.00",
        "getMessageEntireTimeMax": "0",
    }


def _storage(broker: BrokerContext) -> dict[str, str]:
    group = broker.group
    data_dir = broker.config.data_dir
    free, total = broker.env.files.free_space(data_dir)
    ratio = f"{1 - free / total:.2f}" if total else "0.0"
    return {
        "dispatchMaxBuffer": "0",
        "dispatchBehindBytes": str(max(0, group.end_position - group.committed_position)),
        "commitLogDiskRatio": ratio,
        f"commitLogDiskRatio_{data_dir}": ratio,
        "consumeQueueDiskRatio": ratio,
        "commitLogMinOffset": str(group.first_position),
        "commitLogMaxOffset": str(group.committed_position),
        "earliestMessageTimeStamp": str(_earliest_ms(broker)),
        "pageCacheLockTimeMills": "0",
        "remainHowManyDataToFlush": "0 B",
        "remainHowManyDataToCommit": "0 B",
        "remainTransientStoreBufferNumbs": "2147483647",
        "commitLogDirCapacity": f"Total : {total / GIBIBYTE:.1f} GiB, Free : {free / GIBIBYTE:.1f} GiB.",
    }


def _earliest_ms(broker: BrokerContext) -> int:
    """Store time of the oldest message there is; -1 for none."""
    queues = broker.state.queues
    oldest: tuple[int, str, int] | None = None
    for queue in queues:
        if queue.min_offset < queue.max_offset:
            position = UNIT.unpack_from(queues.units(queue.topic, queue.queue_id, queue.min_offset, 1))[0]
            if oldest is None or position < oldest[0]:
                oldest = (position, queue.topic, queue.queue_id)
    return -1 if oldest is None else queues.earliest_store_time(oldest[1], oldest[2])


def _queues_of_work() -> dict[str, str]:
    """RocketMQ's thread pools. There are none here, so nothing ever waits in them."""
    table: dict[str, str] = {}
    capacities = {"send": 10_000, "pull": 100_000, "litePull": 100_000, "query": 20_000, "ack": 100_000}
    for name, capacity in capacities.items():
        table[f"{name}ThreadPoolQueueSize"] = "0"
        table[f"{name}ThreadPoolQueueCapacity"] = str(capacity)
        table[f"{name}ThreadPoolQueueHeadWaitTimeMills"] = "0"
    table["EndTransactionQueueSize"] = "0"
    table["EndTransactionThreadPoolQueueCapacity"] = "100000"
    return table


def _delays(broker: BrokerContext) -> dict[str, str]:
    table = {
        "timerReadBehind": "0",
        "timerOffsetBehind": "0",
        "timerCongestNum": "0",
        "timerEnqueueTps": "0.0",
        "timerDequeueTps": "0.0",
    }
    for level, offset in broker.state.delay.levels.items():
        highest = broker.state.queues.max_offset(SCHEDULE_TOPIC, level - 1)
        table[f"scheduleMessageOffset_{level}"] = f"{offset},{highest}"
    return table


def _raft(broker: BrokerContext) -> dict[str, str]:
    group = broker.group
    statistics = group.statistics()
    peers = {
        peer: {
            "match": statistics.acknowledged.get(peer, 0),
            "lag": statistics.lag_bytes.get(peer, 0),
            "connected": bool(statistics.connected.get(peer, False)),
            "state": statistics.peer_state.get(peer, ""),
            "learner": peer in statistics.learners,
        }
        for peer in sorted({*(statistics.members or broker.config.group.peers), *statistics.learners})
        if peer != group.node_id
    }
    return {
        "raftRole": statistics.role.name.lower(),
        "raftReady": "true" if statistics.ready else "false",
        "raftTerm": str(statistics.term),
        "raftLeader": statistics.leader_id or "",
        "raftNode": statistics.node_id,
        "raftGroup": broker.config.broker_name,
        "raftGroupUuid": group.group_uuid,
        "raftLastIndex": str(statistics.last_index),
        "raftWrittenIndex": str(statistics.written_index),
        "raftDurableIndex": str(statistics.durable_index),
        "raftCommittedIndex": str(statistics.commit_index),
        "raftAppliedIndex": str(statistics.applied_index),
        "raftFirstPosition": str(statistics.first_position),
        "raftCommittedPosition": str(statistics.committed_position),
        "raftEndPosition": str(statistics.end_position),
        "raftPeers": msgspec.json.encode(peers).decode(),
        "raftState": statistics.state,
        "raftMembers": ";".join(statistics.members),
        "raftLearners": ";".join(statistics.learners),
        "raftRecovering": "true" if statistics.recovering else "false",
        "raftTrimmedPosition": str(statistics.trimmed_position),
        "raftFlush": statistics.flush,
        "raftWaitingRecords": str(statistics.waiting_records),
        "raftLoopSaturation": f"{statistics.loop_saturation:.3f}",
        "raftDiskOk": "true" if statistics.disk_ok else "false",
    }


def _duration(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"[ {days} days, {hour} hours, {minute} minutes, {second} seconds ]"
