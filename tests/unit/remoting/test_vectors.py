"""Codecs against what Apache's own classes produced (tests/vectors)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from remoting import bodies, fastjson
from remoting.command import Command, encode_command, encode_response
from remoting.errors import BodyError
from remoting.frames import FrameReader, decode_frame, decode_pull, decode_send_v2, peek_code
from remoting.message import (
    MessageQueue,
    UniqKeyGenerator,
    host_to_bytes,
    index_key_hash,
    java_hash,
    offset_msg_id,
    parse_offset_msg_id,
    properties_to_string,
    string_to_properties,
    tags_code,
    unique_key_time_ms,
)
from remoting.message_codec import (
    MAGIC_BLANK,
    MAGIC_V1,
    MAGIC_V2,
    body_crc,
    decode_stored,
    decode_stored_many,
    encode_batch_item,
    encode_record,
    iter_batch,
    record_size,
)

VECTORS = Path(__file__).parents[2] / "vectors"


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


FRAMES = load("remoting_frames.json")
BODIES = load("json_bodies.json")
STORE = load("store.json")
BATCH = load("batch.json")
HASHES = load("hashes.json")
MISC = load("misc.json")
TRANSCRIPTS = load("transcripts.json")


def frame_id(vector: dict[str, Any]) -> str:
    return f"{vector['serialize']}-{vector['name'][:40]}"


# ------------------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize("vector", FRAMES, ids=frame_id)
def test_frames_decode_as_java_meant_them(vector: dict[str, Any]) -> None:
    (frame,) = FrameReader().cut(bytes.fromhex(vector["frame_hex"]))
    command = decode_frame(frame)
    assert command.code == vector.get("decoded_code", vector["code"])
    assert peek_code(frame) == command.code
    assert (command.opaque, command.flag, command.version) == (vector["opaque"], vector["flag"], vector["version"])
    assert (command.language, command.remark) == (vector["language"], vector["remark"])
    assert command.ext == (vector["extFields"] or {})
    assert bytes(command.body) == bytes.fromhex(vector["body_hex"] or "")
    assert command.serialize == (0 if vector["serialize"] == "JSON" else 1)


@pytest.mark.parametrize("vector", FRAMES, ids=frame_id)
def test_frames_encode_to_the_same_content_and_length(vector: dict[str, Any]) -> None:
    command = Command(
        vector["code"],
        vector["opaque"],
        vector["flag"],
        vector["version"],
        vector["language"],
        vector["remark"],
        vector["extFields"] or {},
        bytes.fromhex(vector["body_hex"] or ""),
        0 if vector["serialize"] == "JSON" else 1,
    )
    ours, theirs = encode_command(command), bytes.fromhex(vector["frame_hex"])
    assert len(ours) == len(theirs), "only the order of fields may differ"
    assert decode_frame(FrameReader().cut(ours)[0]) == decode_frame(FrameReader().cut(theirs)[0])


SENDS = [vector for vector in FRAMES if vector["code"] in (10, 310)]


@pytest.mark.parametrize("vector", SENDS, ids=frame_id)
def test_send_headers_of_both_forms_and_serializations(vector: dict[str, Any]) -> None:
    (frame,) = FrameReader().cut(bytes.fromhex(vector["frame_hex"]))
    header = decode_send_v2(frame)
    ext = vector["extFields"]
    short = "a" in ext
    assert header.producer_group == ext["a" if short else "producerGroup"] == "PG_demo"
    assert (header.topic, header.default_topic, header.default_topic_queue_nums) == ("TopicTest", "TBW102", 4)
    assert (header.queue_id, header.sys_flag, header.born_timestamp, header.message_flag) == (2, 0, 1700000000000, 0)
    assert header.properties == ext["i" if short else "properties"]
    assert (header.reconsume_times, header.unit_mode, header.max_reconsume_times, header.batch) == (
        0,
        False,
        None,
        False,
    )
    assert header.broker_name == "broker-a"
    assert (header.code, header.opaque, header.flag, header.version) == (vector["code"], vector["opaque"], 0, 479)


def test_pull_header_in_both_serializations() -> None:
    vectors = [vector for vector in FRAMES if vector["code"] == 11]
    assert {vector["serialize"] for vector in vectors} == {"JSON", "ROCKETMQ"}
    for vector in vectors:
        header = decode_pull(FrameReader().cut(bytes.fromhex(vector["frame_hex"]))[0])
        assert (header.consumer_group, header.topic, header.queue_id) == ("CG_demo", "TopicTest", 0)
        assert (header.queue_offset, header.max_msg_nums, header.sys_flag) == (42, 32, 6)
        assert (header.commit_offset, header.suspend_timeout_ms) == (0, 15000)
        assert (header.subscription, header.sub_version) == ("TagA || TagB", 1700000000001)
        assert (header.expression_type, header.max_msg_bytes) == ("TAG", 262144)
        assert (header.code, header.opaque, header.version) == (11, 4, 479)


def transcript_pairs() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{part}-{number}", pair)
        for part, pairs in TRANSCRIPTS.items()
        if isinstance(pairs, list)
        for number, pair in enumerate(pairs)
        if "request" in pair
    ]


def test_the_transcripts_hold_163_pairs() -> None:
    assert len(transcript_pairs()) >= 163


@pytest.mark.parametrize(("name", "pair"), transcript_pairs(), ids=[name for name, _ in transcript_pairs()])
def test_recorded_requests_and_answers_survive_both_serializations(name: str, pair: dict[str, Any]) -> None:
    for serialize in (0, 1):
        request = pair["request"]
        body = bytes.fromhex(request["body_hex"]) if "body_hex" in request else str(request.get("body") or "").encode()
        command = Command(
            request["code"],
            9,
            0,
            request.get("version", 0),
            ext=request.get("extFields") or {},
            body=body,
            serialize=serialize,
        )
        decoded = decode_frame(FrameReader().cut(encode_command(command))[0])
        if serialize == 1:
            # Zero-length values read back as null, and codes lose their upper bits.
            command.ext = {key: value for key, value in command.ext.items() if value}
            command.code = struct.unpack(">h", struct.pack(">I", command.code)[2:])[0]
        assert decoded == command
        response = pair.get("response")
        if not response:
            continue
        frame = encode_response(
            9, response["code"], response["extFields"], b"", response["remark"], serialize=serialize
        )
        answer = decode_frame(FrameReader().cut(frame)[0])
        assert (answer.code, answer.opaque, answer.is_response) == (response["code"], 9, True)
        assert answer.remark == (response["remark"] or (None if serialize else response["remark"]))
        assert answer.ext == {k: v for k, v in (response["extFields"] or {}).items() if v or not serialize}


@pytest.mark.parametrize(("name", "pair"), transcript_pairs(), ids=[name for name, _ in transcript_pairs()])
def test_recorded_json_bodies_can_be_read(name: str, pair: dict[str, Any]) -> None:
    for side in (pair["request"], pair.get("response") or {}):
        text = side.get("body") or ""
        if text[:1] == "{":
            assert isinstance(fastjson.loads(text), dict)


# ------------------------------------------------------------------------------------------------------------ bodies

CLASSES = {
    "TopicConfigAndMappingSerializeWrapper": bodies.TopicConfigSerializeWrapper,
    "GetConsumerListByGroupResponseBody": bodies.ConsumerIdList,
    "QueryCorrectionOffsetBody": bodies.CorrectionOffsets,
    "TopicConfigAndQueueMapping": bodies.TopicConfig,
    "ConsumerOffsetSerializeWrapper": bodies.ConsumerOffsetTable,
}
READERS = {
    "ConsumeStats": bodies.decode_consume_stats,
    "ConsumeStatsList": bodies.decode_consume_stats_list,
    "TopicStatsTable": bodies.decode_topic_stats,
    "ResetOffsetBody": bodies.decode_reset_offset,
    "GetConsumerStatusBody": bodies.decode_consumer_status,
}
NOT_OURS = {"BatchAckMessageRequestBody", "MessageQueue", "ResetOffsetBodyForC", "ConsumerRunningInfo"}


def body_vectors() -> list[tuple[str, str, str]]:
    found = []
    for vector in BODIES:
        name = vector["class"].split()[0].split(".")[0]
        if vector["text"].startswith("{") and name not in NOT_OURS:
            found.append((name, vector["class"], vector["text"]))
    return found


@pytest.mark.parametrize(("name", "title", "text"), body_vectors(), ids=[v[1][:50] for v in body_vectors()])
def test_bodies_read_and_write_back_what_java_wrote(name: str, title: str, text: str) -> None:
    kind = CLASSES.get(name) or getattr(bodies, name)
    reader = READERS.get(name)
    value = reader(text) if reader else bodies.decode_body(text, kind)
    if "standard" in title:
        assert bodies.encode_topic_route(value, standard_json=True).decode() == text
        return
    written = bodies.encode_body(value).decode()
    expected = fastjson.loads(text)
    if name == "QueryConsumeTimeSpanBody":  # the ...Str members are derived and may be left out
        for span in expected["consumeTimeSpanSet"]:
            for member in [member for member in span if member.endswith("Str")]:
                del span[member]
        assert fastjson.loads(written) == expected
        return
    assert fastjson.loads(written) == expected
    if name not in ("KVTable",):  # a hash map's order there
        assert written == text


def text_of(title: str) -> str:
    return next(str(vector["text"]) for vector in BODIES if vector["class"] == title)


def test_topic_config_text_form() -> None:
    for title in ("TopicConfig.encode() (space form)", "TopicConfig.encode() with attribute"):
        assert bodies.TopicConfig.from_text(text_of(title)).to_text() == text_of(title)
    assert bodies.TopicConfig.from_text("T 4 5 6 SINGLE_TAG").write_queue_nums == 5
    with pytest.raises(BodyError):
        bodies.TopicConfig.from_text("T 4 5")


def test_registration_plain_and_compressed_with_their_checksums() -> None:
    plain = text_of("RegisterBrokerBody uncompressed").encode()
    assert bodies.register_body_crc(plain) == int(text_of("RegisterBrokerBody uncompressed bodyCrc32 (decimal)"))
    packed = bytes.fromhex(text_of("RegisterBrokerBody compressed (hex of zlib stream)"))
    assert bodies.register_body_crc(packed) == int(text_of("RegisterBrokerBody compressed bodyCrc32 (decimal)"))
    from_plain = bodies.decode_register_broker(plain).topic_config_serialize_wrapper
    from_packed = bodies.decode_register_broker(packed).topic_config_serialize_wrapper
    assert from_plain.topic_config_table == from_packed.topic_config_table
    assert from_plain.data_version == from_packed.data_version
    inflated = bytes.fromhex(text_of("RegisterBrokerBody compressed, inflated (hex)"))
    ours = bodies.encode_register_broker(bodies.decode_register_broker(packed), compressed=True)
    assert zlib.decompress(ours) == inflated
    without_tail = bodies.encode_register_broker(bodies.decode_register_broker(packed), compressed=True, version=401)
    assert zlib.decompress(without_tail) == inflated[:-4]


@pytest.mark.parametrize("cut", [1, 5, 20, 60, 100, 105])
def test_truncated_registration_is_refused(cut: int) -> None:
    inflated = bytes.fromhex(text_of("RegisterBrokerBody compressed, inflated (hex)"))
    with pytest.raises(BodyError):
        bodies.decode_register_broker(zlib.compress(inflated[:cut]))


def test_registration_bomb_is_refused() -> None:
    with pytest.raises(BodyError, match="inflates"):
        bodies.decode_register_broker(zlib.compress(bytes(bodies.INFLATED_LIMIT_BYTES + 1)))


def test_queue_keys_raw_and_as_text() -> None:
    for vector in BODIES:
        if vector["class"].startswith('DECODE TEST {"offsetTable'):
            stats = bodies.decode_consume_stats(vector["class"].removeprefix("DECODE TEST "))
            assert list(stats.offset_table) == [MessageQueue("TopicTest", "broker-a", 0)]
            assert stats.offset_table[MessageQueue("TopicTest", "broker-a", 0)].broker_offset == 100
        if vector["class"].startswith('DECODE TEST {"brokerAddrTable'):
            info = bodies.decode_body(vector["class"].removeprefix("DECODE TEST "), bodies.ClusterInfo)
            assert info.broker_addr_table["broker-a"].broker_addrs[0] == "10.0.0.1:10911"


def test_reset_offset_list_form() -> None:
    text = text_of("ResetOffsetBodyForC")
    body = bodies.decode_reset_offset(text)
    assert body.offset_table == {MessageQueue("TopicTest", "broker-a", 0): 42}
    assert bodies.encode_reset_offset(body, list_form=True).decode() == text
    assert bodies.decode_reset_offset(
        '{"offsetTable":[[{"topic":"t","brokerName":"b","queueId":"1"},5]]}'
    ).offset_table == {MessageQueue("t", "b", 1): 5}


def test_running_info_is_written_with_raw_queue_keys() -> None:
    text = next(v["text"] for v in BODIES if v["class"].startswith("ConsumerRunningInfo"))
    expected = fastjson.loads(text)
    info = bodies.ConsumerRunningInfo(
        properties=expected["properties"],
        subscription_set=[bodies.from_plain(item, bodies.SubscriptionData) for item in expected["subscriptionSet"]],
        mq_table={
            fastjson.queue_of_key(key): bodies.from_plain(value, bodies.ProcessQueueInfo)
            for key, value in expected["mqTable"].items()
        },
        mq_pop_table={fastjson.queue_of_key(key): value for key, value in expected["mqPopTable"].items()},
        status_table={k: bodies.from_plain(v, bodies.ConsumeStatus) for k, v in expected["statusTable"].items()},
    )
    assert bodies.encode_body(info).decode() == text


# ------------------------------------------------------------------------------------------------------------- store


def packed_host(text: str) -> bytes:
    host, _, port = text.rpartition(":")
    return host_to_bytes(host, int(port))


@pytest.mark.parametrize("vector", STORE["stored_messages"], ids=lambda vector: vector["name"])
def test_stored_messages_byte_for_byte(vector: dict[str, Any]) -> None:
    stored = bytes.fromhex(vector["stored_hex"])
    body = bytes.fromhex(vector["body_hex"])
    topic, properties = vector["topic"].encode(), vector["properties"].encode()
    born, store = packed_host(vector["bornHost"]), packed_host(vector["storeHost"])
    encoded = encode_record(
        vector["queueId"],
        vector["flag"],
        vector["queueOffset"],
        vector["physicalOffset"],
        vector["sysFlag_in"],
        vector["bornTimestamp"],
        born,
        vector["storeTimestamp"],
        store,
        vector["reconsumeTimes"],
        vector["preparedTransactionOffset"],
        body,
        topic,
        properties,
    )
    assert encoded.hex() == stored.hex()
    size = record_size(len(body), len(topic), len(properties), born_v6=len(born) == 20, store_v6=len(store) == 20)
    assert size == vector["totalSize"] == len(stored)
    message = decode_stored(b"xyz" + stored + b"!", 3, check_crc=True)
    assert message.topic == vector["decoded_topic"]
    assert message.offset_message_id == vector["decoded_offsetMsgId"]
    assert message.properties == (vector["decoded_properties"] or {})
    assert (message.body, message.body_crc) == (body, vector["bodyCRC"])
    assert (message.queue_id, message.queue_offset) == (vector["queueId"], vector["queueOffset"])
    assert (message.physical_offset, message.store_size) == (vector["physicalOffset"], vector["decoded_storeSize"])
    assert (message.flag, message.sys_flag) == (vector["flag"], vector["sysFlag_stored"])
    assert (message.born_timestamp, message.store_timestamp) == (vector["bornTimestamp"], vector["storeTimestamp"])
    assert message.reconsume_times == vector["reconsumeTimes"]
    assert message.prepared_transaction_offset == vector["preparedTransactionOffset"]
    assert message.store_host == "10.0.0.1:10911" or message.store_host == "[2001:db8::1]:10911"


def test_magic_numbers() -> None:
    constants = STORE["constants"]
    assert constants["MESSAGE_MAGIC_CODE_V1"] == MAGIC_V1
    assert constants["MESSAGE_MAGIC_CODE_V2"] == MAGIC_V2
    assert constants["BLANK_MAGIC_CODE"] == MAGIC_BLANK


@pytest.mark.parametrize("vector", STORE["properties_decode"], ids=lambda vector: vector["string_hex"])
def test_property_strings_of_all_writers(vector: dict[str, Any]) -> None:
    assert string_to_properties(bytes.fromhex(vector["string_hex"]).decode()) == vector["decoded"]


def test_property_string_ends_with_a_separator() -> None:
    vector = STORE["properties_encode"]
    assert properties_to_string(vector["in"]).encode().hex() == vector["out_hex"]


def test_offset_message_ids() -> None:
    assert offset_msg_id(host_to_bytes("10.0.0.1", 10911), 1234) == STORE["offsetMsgId"][0]["offsetMsgId"]
    assert offset_msg_id(host_to_bytes("2001:db8::1", 10911), 1234) == STORE["offsetMsgId"][1]["offsetMsgId"]
    assert parse_offset_msg_id(STORE["offsetMsgId"][0]["offsetMsgId"]) == ("10.0.0.1", 10911, 1234)
    assert parse_offset_msg_id(STORE["offsetMsgId"][1]["offsetMsgId"]) == ("2001:db8::1", 10911, 1234)


@pytest.mark.parametrize("vector", STORE["uniqKey"], ids=lambda vector: vector["ip"])
def test_unique_keys_have_javas_layout(vector: dict[str, Any]) -> None:
    address = host_to_bytes(vector["ip"], 0)[:-4]
    generator = UniqKeyGenerator(address, vector["pid"], bytes.fromhex(vector["classLoaderHash_hex"]))
    november = 1_698_796_800_000  # 2023-11-01T00:00:00Z
    elapsed = int(vector["msSinceMonthStart_hex"], 16)
    generator.next(november + elapsed)
    assert generator.next(november + elapsed) == vector["uniqKey"]
    assert unique_key_time_ms(vector["uniqKey"], november + elapsed + 5) == november + elapsed


@pytest.mark.parametrize("vector", STORE["crc32"], ids=lambda vector: vector["data_hex"])
def test_checksums_have_31_bits(vector: dict[str, Any]) -> None:
    assert body_crc(bytes.fromhex(vector["data_hex"])) == vector["UtilAll.crc32"]


def test_consume_queue_unit_holds_the_tag_code() -> None:
    unit = STORE["consume_queue_unit"]
    packed = struct.pack(">qiq", unit["physicalOffset"], unit["size"], tags_code(unit["tag"]))
    assert packed.hex() == unit["hex"]


# ----------------------------------------------------------------------------------------------------------- batches


def test_batch_body_and_its_stored_form() -> None:
    items = list(iter_batch(bytes.fromhex(BATCH["batch_body_hex"])))
    assert len(items) == len(BATCH["messages"])
    for (flag, body, properties), vector in zip(items, BATCH["messages"], strict=True):
        assert (flag, body.decode()) == (vector["flag"], vector["body"])
        assert string_to_properties(properties.decode()) == vector["properties"]
        assert encode_batch_item(flag, body, properties).hex() == vector["encoded_hex"]
    stored = bytes.fromhex(BATCH["stored_form_before_offsets_are_filled_hex"])
    for message, vector in zip(decode_stored_many(stored, check_crc=True), BATCH["stored_form_decoded"], strict=True):
        assert (message.store_size, message.flag) == (vector["storeSize"], vector["flag"])
        assert (message.body.decode(), message.properties) == (vector["body"], vector["properties"])


# ------------------------------------------------------------------------------------------------------------ hashes


@pytest.mark.parametrize("vector", HASHES["tag_hash"], ids=lambda vector: ascii(vector["tag"]))
def test_tag_codes(vector: dict[str, Any]) -> None:
    assert java_hash(vector["tag"]) == vector["String.hashCode"]
    assert tags_code(vector["tag"]) == vector["tagsCode"]


@pytest.mark.parametrize("vector", HASHES["index_key_hash"], ids=lambda vector: ascii(vector["key"]))
def test_index_key_hashes(vector: dict[str, Any]) -> None:
    assert index_key_hash(vector["key"]) == vector["indexKeyHash"]
    assert index_key_hash(vector["key"]) % 5_000_000 == vector["slot_of_5000000"]


def test_index_file_entries_carry_our_hash() -> None:
    index = load("index_file.json")
    raw = bytes.fromhex(index["file_hex"])
    first_entry = 40 + 4 * index["hashSlotNum"] + 20
    for number, put in enumerate(index["puts"]):
        key, position, _time = put.split(" ")
        stored_hash, offset = struct.unpack_from(">iq", raw, first_entry + 20 * number)
        assert stored_hash == index_key_hash(key)
        assert offset == int(position[1:])


# -------------------------------------------------------------------------------------------------------------- misc


@pytest.mark.parametrize("vector", [v for v in MISC["acl"] if "extFields" in v], ids=["pull", "with token"])
def test_fields_reach_the_server_as_they_were_signed(vector: dict[str, Any]) -> None:
    body = bytes.fromhex(vector["body_hex"] or "")
    for serialize in (0, 1):
        frame = encode_command(Command(11, 1, ext=vector["extFields"], body=body, serialize=serialize))
        command = decode_frame(FrameReader().cut(frame)[0])
        signed = "".join(command.ext[name] for name in sorted(command.ext) if name != "Signature").encode()
        mac = hmac.new(vector["secretKey"].encode(), signed + bytes(command.body), hashlib.sha1).digest()
        assert base64.b64encode(mac).decode() == vector["Signature"]
