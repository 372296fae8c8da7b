"""`quorate log` on folders written by the real store: whole, torn, damaged, in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from dledger.core.types import HEADER_BYTES, Entry, EntryType, frame_entry, next_position
from dledger.store.format import Format
from dledger.store.log_store import LogStore, format_folder
from dledger.store.meta import MetaFile, boot_tag
from remoting.message_codec import encode_record
from runtime.files import RealFiles
from runtime.real import real_env
from runtime.testing import test_env
from tests.unit.cli.test_cli_verbs import invoke

SEGMENT = 65_536
IDENTITY = Format(
    cluster="c", cluster_uuid="cu", group="broker-a", group_uuid="gu", node_id="n1", segment_bytes=SEGMENT
)
ENTRIES = 40
TERMS = [1 + (index > 10) for index in range(1, ENTRIES + 1)]


def record(position: int, queue_offset: int) -> bytes:
    return encode_record(
        queue_id=0,
        flag=0,
        queue_offset=queue_offset,
        physical_offset=position,
        sys_flag=0,
        born_timestamp=1,
        born_host=bytes([127, 0, 0, 1, 0, 0, 0, 9]),
        store_timestamp=2,
        store_host=bytes([127, 0, 0, 1, 0, 0, 0, 8]),
        reconsume_times=0,
        prepared_offset=0,
        body=b"hello %d " % queue_offset + b"x" * 4000,
        topic=b"orders",
        properties=b"",
    )


def entries() -> list[Entry]:
    found: list[Entry] = []
    end = crc = 0
    for index, term in enumerate(TERMS, 1):
        body = record(0, index)
        position = next_position(end, HEADER_BYTES + len(body), SEGMENT)
        body = record(position + HEADER_BYTES, index)
        entry = frame_entry(index, term, position, EntryType.DATA, 1, [body], crc, index - 1)
        found.append(entry)
        end, crc = entry.end, entry.head_crc
    return found


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A stopped node's data folder: four segments, everything synced."""

    async def write() -> None:
        env, folder = test_env(tmp_path), str(tmp_path / "n1" / "raft")
        format_folder(env, folder, IDENTITY)
        meta = MetaFile.open(env.files, folder, IDENTITY)
        store, _ = await LogStore.open(env, folder, SEGMENT, meta)
        for entry in entries():
            store.accept([entry])
            while store.write() < entry.index:
                await store.prepare_spare()
        await store.close()
        await meta.save_mark(store.durable_index, clean=True)
        meta.close()

    trio.run(write)
    return tmp_path / "n1"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def verified(folder: Path, code: int) -> dict[str, Any]:
    before = contents(folder)
    result = invoke("log", "verify", str(folder), "--json")
    assert result.exit_code == code, result.output
    assert contents(folder) == before, "a look changes nothing"
    document = json.loads(result.output)
    assert isinstance(document, dict)
    return document


def test_a_whole_log(node: Path) -> None:
    document = verified(node, 0)
    assert document["is_whole"]
    assert (document["first_index"], document["last_index"], document["segments"]) == (1, ENTRIES, 3)
    assert (document["group"], document["node"], document["stopped_in_order"]) == ("broker-a", "n1", True)
    assert "whole" in invoke("log", "verify", f"{node}/raft").output


def test_a_flipped_bit_is_found_and_told(node: Path) -> None:
    damaged = entries()[4]
    path = node / "raft" / "log" / f"{0:020d}"
    data = bytearray(path.read_bytes())
    data[damaged.position + 200] ^= 1
    path.write_bytes(data)
    document = verified(node, 5)
    assert [(fault["first_index"], fault["last_index"]) for fault in document["faults"]] == [(5, 5)]
    shown = invoke("log", "verify", str(node)).output
    assert "DAMAGED: entry 5 at position" in shown
    assert "repairs this from its peers" in shown
    dumped = invoke("log", "dump", str(node), "--from", "3", "--count", "4", "--json").output
    assert [json.loads(line)["index"] for line in dumped.splitlines()] == [3, 4, 6, 7]


def test_a_torn_tail_is_no_damage(node: Path) -> None:
    last = entries()[-1]
    path = node / "raft" / "log" / f"{last.position - last.position % SEGMENT:020d}"
    data = bytearray(path.read_bytes())
    at = last.end % SEGMENT
    data[at : at + 100] = b"t" * 100
    path.write_bytes(data)
    document = verified(node, 0)
    assert document["is_whole"]
    assert document["torn_bytes"] >= 100


@pytest.mark.parametrize("is_same_boot", [True, False])
def test_damage_that_nothing_but_later_entries_proves_is_torn_only_after_a_power_loss(
    node: Path, is_same_boot: bool
) -> None:
    """As the node's own next start judges it."""

    async def forget() -> None:
        meta = MetaFile.open(RealFiles(), str(node / "raft"), IDENTITY)
        await meta.save_mark(0)
        await meta.save_started(boot_tag(real_env().ids.boot_id if is_same_boot else "another boot"))
        meta.close()

    trio.run(forget)
    for path in (node / "raft" / "rows").iterdir():
        path.write_bytes(b"")
    path = node / "raft" / "log" / f"{0:020d}"
    data = bytearray(path.read_bytes())
    data[entries()[4].position + 200] ^= 1
    path.write_bytes(data)
    document = verified(node, 5 if is_same_boot else 0)
    assert document["last_index"] == (ENTRIES if is_same_boot else 4)


def test_stats_count_terms_segments_and_messages(node: Path) -> None:
    document = json.loads(invoke("log", "stats", str(node), "--json").output)
    assert document["messages"] == ENTRIES
    assert document["kinds"] == {"data": ENTRIES}
    assert [(run["term"], run["first_index"], run["entries"]) for run in document["terms"]] == [(1, 1, 10), (2, 11, 30)]
    assert sum(each["entries"] for each in document["segment_files"]) == ENTRIES
    assert document["segment_files"][1]["first_index"] == document["segment_files"][0]["last_index"] + 1
    assert "messages              40" in invoke("log", "stats", str(node)).output


def test_dump_shows_entries_and_their_messages(node: Path) -> None:
    lines = invoke("log", "dump", str(node), "--from", "38", "--messages", "--json").output.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows] == [38, 39, 40]
    assert rows[0]["message_list"][0]["topic"] == "orders"
    assert rows[0]["message_list"][0]["queue_offset"] == 38
    assert rows[0]["message_list"][0]["body"].startswith("hello 38 ")
    assert rows[0]["message_list"][0]["physical_offset"] == rows[0]["position"] + HEADER_BYTES
    assert "orders queue 0 offset 2" in invoke("log", "dump", str(node), "--from", "2", "--messages").output


def test_wrong_folders_and_numbers_get_a_sentence(node: Path, tmp_path: Path) -> None:
    result = invoke("log", "verify", str(tmp_path))
    assert result.exit_code == 5
    assert f"{tmp_path} is no data folder of a broker node" in result.output
    result = invoke("log", "dump", str(node), "--from", "41")
    assert result.exit_code == 2
    assert "no entry 41: the log has 1 to 40" in result.output


def test_a_running_node_is_left_alone(node: Path) -> None:
    with RealFiles().lock(str(node / "raft" / "lock")):
        result = invoke("log", "verify", str(node))
    assert result.exit_code == 2
    assert "is in use by process" in result.output
