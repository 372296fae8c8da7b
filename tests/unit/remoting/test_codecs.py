"""Round trips with frames cut at arbitrary points, odd clients, and garbage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remoting import bodies, fastjson
from remoting.codes import FRAME_LIMIT_BYTES, RequestCode, version_name
from remoting.command import Command, encode_command, encode_request, encode_response
from remoting.errors import BodyError, HeaderError, RemoteProtocolError
from remoting.frames import (
    FrameReader,
    RefusedFrame,
    decode_frame,
    decode_pull,
    decode_send_v2,
    format_pull_response_head,
    format_send_response,
    peek_code,
)
from remoting.headers import optional, require
from remoting.message import (
    Message,
    MessageQueue,
    UniqKeyGenerator,
    host_to_bytes,
    month_bounds_ms,
    parse_offset_msg_id,
    properties_to_string,
    property_of,
    string_to_properties,
    unique_key_time_ms,
)
from remoting.message_codec import (
    RecordTemplate,
    body_crc,
    decode_stored,
    decode_stored_many,
    encode_batch,
    encode_batch_item,
    encode_record,
    iter_batch,
    record_size,
)

int32 = st.integers(-(2**31), 2**31 - 1)
text = st.text(st.characters(codec="utf-8"), max_size=20)
fields = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=10), text, max_size=5)
commands = st.builds(
    Command,
    code=int32,
    opaque=int32,
    flag=int32,
    version=st.integers(0, 1000),
    language=st.sampled_from(["JAVA", "GO", "PYTHON", "NODE_JS", "OTHER"]),
    remark=st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    ext=fields,
    body=st.binary(max_size=300),
    serialize=st.sampled_from([0, 1]),
)


def one(data: bytes) -> Command:
    (frame,) = FrameReader().cut(data)
    return decode_frame(frame)


def as_received(command: Command) -> Command:
    if command.serialize == 1:
        command.code = (command.code + 0x8000 & 0xFFFF) - 0x8000
        command.ext = {key: value for key, value in command.ext.items() if value}
    return command


@given(st.lists(commands, max_size=6), st.data())
def test_commands_survive_any_cutting_of_the_stream(sent: list[Command], data: st.DataObject) -> None:
    stream = b"".join(encode_command(command) for command in sent)
    reader = FrameReader()
    received: list[Command] = []
    position = 0
    while position < len(stream):
        step = data.draw(st.integers(1, 200))
        reader.feed(stream[position : position + step])
        received += [decode_frame(frame) for frame in reader.take()]
        position += step
    assert received == [as_received(command) for command in sent]
    assert reader.pending_bytes == 0


@given(st.binary(max_size=400), st.integers(1, 50))
def test_garbage_never_raises_anything_but_a_protocol_error(garbage: bytes, step: int) -> None:
    reader = FrameReader(limit_bytes=1 << 20)
    try:
        for position in range(0, len(garbage), step):
            for frame in reader.cut(garbage[position : position + step]):
                decode_frame(frame)
    except RemoteProtocolError:
        pass


@given(st.sampled_from([0, 1, 2, 255]), st.binary(max_size=200))
def test_garbage_headers_never_raise_anything_else(serialize: int, header: bytes) -> None:
    for decode in (decode_frame, decode_send_v2, decode_pull, peek_code):
        try:
            decode((serialize, header, b""))
        except (RemoteProtocolError, HeaderError):
            pass


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(["code", "opaque", "flag", "version", "language", "remark", "extFields", "x"]), json_values
    )
)
def test_any_json_object_as_header_is_read_or_refused(header: dict[str, Any]) -> None:
    raw = json.dumps(header).encode()
    for decode in (decode_frame, decode_send_v2, decode_pull, peek_code):
        try:
            result = decode((0, raw, b""))
        except (RemoteProtocolError, HeaderError):
            continue
        if isinstance(result, Command):
            assert all(isinstance(value, str) for value in result.ext.values())
            encode_response(result, 0)


def test_deeply_nested_header_is_refused() -> None:
    for raw in (b'{"code":1,"x":' + b"[" * 100_000, b'{"code":310,"extFields":' + b'{"a":' * 100_000):
        for decode in (decode_frame, decode_send_v2, decode_pull):
            with pytest.raises(RemoteProtocolError):
                decode((0, raw, b""))


def test_length_over_the_limit_is_refused_before_anything_is_collected() -> None:
    reader = FrameReader()
    with pytest.raises(RefusedFrame, match="over the limit"):
        # Only the length has arrived; the first byte alone could still be a frame.
        reader.cut(b"\x01")
        reader.cut((FRAME_LIMIT_BYTES + 1).to_bytes(4)[1:])
    assert reader.pending_bytes <= 4


def test_the_largest_frame_passes() -> None:
    body = bytes(FRAME_LIMIT_BYTES - 200)
    reader = FrameReader()
    data = encode_request(10, 1, {"a": "b"}, body)
    frames = [frame for start in range(0, len(data), 262_144) for frame in reader.cut(data[start : start + 262_144])]
    assert [len(frame[2]) for frame in frames] == [len(body)]
    with pytest.raises(RemoteProtocolError):
        encode_request(10, 1, {"a": "b"}, bytes(FRAME_LIMIT_BYTES))


def json_frame(header: dict[str, Any], body: bytes = b"") -> tuple[int, bytes, bytes]:
    return 0, json.dumps(header, separators=(",", ":")).encode(), body


def test_node_client_sends_numbers_and_booleans() -> None:
    header = {
        "code": 310,
        "language": "JAVA",
        "opaque": 3,
        "flag": 0,
        "version": 121,
        "extFields": {
            "a": "g", "b": "t", "c": "TBW102", "d": 4, "e": 0, "f": 0, "g": 1700000000000, "h": 0, "i": "", "j": 0,
            "k": False, "l": None,
        },
    }  # fmt: skip
    command = decode_frame(json_frame(header))
    assert command.ext["e"] == "0"
    assert command.ext["k"] == "false"
    assert "l" not in command.ext
    send = decode_send_v2(json_frame(header))
    assert (send.queue_id, send.born_timestamp, send.unit_mode, send.version) == (0, 1700000000000, False, 121)
    pull = decode_pull(
        json_frame(
            {
                "code": 11,
                "opaque": 1,
                "extFields": {
                    "consumerGroup": "g",
                    "topic": "t",
                    "queueId": 1,
                    "queueOffset": 5,
                    "maxMsgNums": 32,
                    "sysFlag": 3,
                    "commitOffset": 0,
                    "suspendTimeoutMillis": 15000,
                    "subscription": "*",
                    "subVersion": 1,
                },
            }
        )
    )
    assert (pull.queue_id, pull.expression_type, pull.sys_flag) == (1, None, 3)


def test_members_may_be_missing() -> None:
    command = decode_frame(json_frame({"code": 105, "opaque": 8}))
    assert (command.flag, command.version, command.language, command.remark, command.ext) == (0, 0, "JAVA", None, {})
    command = decode_frame(json_frame({"code": "105", "opaque": 8, "language": None, "extFields": None, "more": [1]}))
    assert (command.code, command.language, command.ext) == (105, "OTHER", {})
    with pytest.raises(RemoteProtocolError):
        decode_frame(json_frame({"opaque": 8}))


SHORT = {"a": "g", "b": "t", "c": "TBW102", "d": "4", "e": "0", "f": "0", "g": "1", "h": "0", "i": "p"}
LONG = {
    "producerGroup": "g", "topic": "t", "defaultTopic": "TBW102", "defaultTopicQueueNums": "4", "queueId": "0",
    "sysFlag": "0", "bornTimestamp": "1", "flag": "0", "properties": "p",
}  # fmt: skip


@pytest.mark.parametrize("code", [10, 310, 320, 324, 325])
@pytest.mark.parametrize("ext", [SHORT, LONG], ids=["letters", "long names"])
@pytest.mark.parametrize("serialize", [0, 1])
def test_both_send_forms_under_every_code(code: int, ext: dict[str, str], serialize: int) -> None:
    (frame,) = FrameReader().cut(encode_command(Command(code, 5, 2, 317, ext=ext, serialize=serialize)))
    header = decode_send_v2(frame)
    assert (header.producer_group, header.topic, header.properties) == ("g", "t", "p")
    assert (header.code, header.opaque, header.flag, header.version) == (code, 5, 2, 317)
    assert header.batch == (code == 320)


def test_batch_of_an_old_go_client_without_a_template() -> None:
    for template in ({"c": "", "d": ""}, {"c": "", "d": "0"}, {}):
        ext = {key: value for key, value in SHORT.items() if key not in "cd"} | template
        header = decode_send_v2(FrameReader().cut(encode_command(Command(320, 5, ext=ext)))[0])
        assert (header.default_topic, header.default_topic_queue_nums, header.batch) == ("", 0, True)


@pytest.mark.parametrize("missing", ["a", "b", "e", "f", "g", "h"])
@pytest.mark.parametrize("serialize", [0, 1])
def test_missing_required_send_field_is_a_header_error(missing: str, serialize: int) -> None:
    ext = {key: value for key, value in SHORT.items() if key != missing}
    (frame,) = FrameReader().cut(encode_command(Command(310, 5, ext=ext, serialize=serialize)))
    with pytest.raises(HeaderError):
        decode_send_v2(frame)


@pytest.mark.parametrize("value", ["x", "1.5", "99999999999999999999", "2147483648", "1_0", "٣"])
def test_unreadable_numbers_are_header_errors(value: str) -> None:
    (frame,) = FrameReader().cut(encode_command(Command(310, 5, ext=SHORT | {"e": value})))
    with pytest.raises(HeaderError, match="<e>"):
        decode_send_v2(frame)
    with pytest.raises(HeaderError, match="queueId"):
        decode_pull(FrameReader().cut(encode_command(Command(11, 5, ext={"consumerGroup": "g", "topic": "t"})))[0])


def test_header_fields_by_type() -> None:
    ext = {"n": "-5", "t": "TRUE", "f": "yes", "e": ""}
    assert require(ext, "n", int) == -5
    assert require(ext, "t", bool) is True
    assert require(ext, "f", bool) is False
    assert optional(ext, "e", int, 7) == 7
    assert optional(ext, "none", str, None) is None
    with pytest.raises(HeaderError, match="<none> is null"):
        require(ext, "none", str)
    with pytest.raises(HeaderError, match="out of range"):
        require({"n": "9223372036854775808"}, "n", int)


def test_codes_are_peeked_whatever_the_order_of_members() -> None:
    assert peek_code((0, b'{"flag":0,"code":310}', b"")) == 310
    assert peek_code((0, b'{"code":200050,"flag":0}', b"")) == 200050
    assert peek_code((0, b'{"code": 310 ,"flag":0}', b"")) == 310
    assert peek_code((0, b'{"code":"34"}', b"")) == 34
    for code in RequestCode:
        assert peek_code(FrameReader().cut(encode_request(code, 1))[0]) == code
    with pytest.raises(RemoteProtocolError):
        peek_code((3, b"", b""))


@given(int32, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1), st.text(st.characters(codec="utf-8"), max_size=40))
def test_send_answer_is_what_the_general_encoder_would_say(opaque: int, queue: int, offset: int, key: str) -> None:
    answer = one(format_send_response(opaque, "AB12", queue, offset, key))
    expected = {"queueId": str(queue), "queueOffset": str(offset), "msgId": "AB12"}
    expected |= {"TRACE_ON": "true", "MSG_REGION": "DefaultRegion"}
    if key:
        expected["transactionId"] = key
    assert answer.ext == expected
    assert (answer.code, answer.opaque, answer.flag, answer.version) == (0, opaque, 1, 479)


def test_pull_answer_head_counts_the_body_that_follows() -> None:
    head = format_pull_response_head(9, 0, "FOUND", 43, 0, 44, 5, 1)
    answer = one(head + b"12345")
    assert bytes(answer.body) == b"12345"
    assert answer.remark == "FOUND"
    assert answer.ext["nextBeginOffset"] == "43"
    assert answer.ext["suggestWhichBrokerId"] == "1"


# ----------------------------------------------------------------------------------------------------------- fastjson

keys = text | st.integers(-(2**40), 2**40)
dialect: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | text,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.integers(-(2**40), 2**40), inner, max_size=4)
        | st.dictionaries(text, inner, max_size=4)
    ),
    max_leaves=15,
)


@given(dialect)
def test_the_dialect_round_trips_with_raw_keys(value: Any) -> None:
    assert fastjson.loads(fastjson.dumps(value, raw_keys=True)) == value


@given(dialect)
def test_quoted_keys_make_standard_json(value: Any) -> None:
    written = fastjson.dumps(value, raw_keys=False, ascii_only=True)
    assert written.isascii()
    json.loads(written)


@given(st.text(max_size=60) | st.text(alphabet='{}[]":,0a\\ \n', max_size=60))
def test_any_text_is_read_or_refused(value: str) -> None:
    try:
        fastjson.loads(value.encode("utf-8", "surrogatepass"))
    except BodyError:
        pass


def test_nesting_is_bounded() -> None:
    for start in ("[", '{"a":', "{{", "{0:"):
        with pytest.raises(BodyError):
            fastjson.loads(start * 100_000)


def test_queues_as_keys() -> None:
    queue = MessageQueue("t", "b", 3)
    raw = fastjson.dumps({queue: 1}, raw_keys=True)
    assert raw == b'{{"brokerName":"b","queueId":3,"topic":"t"}:1}'
    quoted = fastjson.dumps({queue: 1}, raw_keys=False)
    for written in (raw, quoted):
        (key,) = fastjson.loads(written)
        assert fastjson.queue_of_key(key) == queue
    with pytest.raises(BodyError):
        fastjson.queue_of_key('{"topic":"t"}')


# ------------------------------------------------------------------------------------------------------------- bodies


def test_reading_is_lenient() -> None:
    body = bodies.decode_body(
        '{"clientID":"c","consumerDataSet":[{"groupName":"g","subscriptionDataSet":[{"topic":"t","tagsSet":null,'
        '"codeSet":["12"],"subVersion":"7","unknown":{}}]}],"more":1}',
        bodies.HeartbeatData,
    )
    (subscription,) = body.consumer_data_set[0].subscription_data_set
    assert (subscription.tags_set, subscription.code_set, subscription.sub_version) == ([], [12], 7)
    for wrong in ('{"clientID":', "[]", '{"clientID":{}}', "{}"):
        with pytest.raises(BodyError):
            bodies.decode_body(wrong, bodies.HeartbeatData)


def test_tag_subscriptions() -> None:
    everything = bodies.tag_subscription("t", " * ", 5)
    assert (everything.sub_string, everything.tags_set, everything.code_set) == ("*", [], [])
    assert everything.takes_all
    some = bodies.tag_subscription("t", "TagA || TagB||TagA", 5)
    assert some.tags_set == ["TagA", "TagB"]
    assert some.code_set == [2598919, 2598920]
    assert not some.takes_all
    with pytest.raises(ValueError, match="no tag"):
        bodies.tag_subscription("t", " || ", 5)


def test_route_without_non_ascii_text_or_blanks() -> None:
    route = bodies.TopicRouteData(
        broker_datas=[bodies.BrokerData(broker_name="b", cluster="Größe", broker_addrs={2: "y:2", 0: "x:1"})]
    )
    standard = bodies.encode_topic_route(route, standard_json=True)
    assert b'"brokerAddrs":{"0":"x:1","2":"y:2"}' in standard
    assert standard.isascii()
    legacy = bodies.encode_topic_route(route, standard_json=False)
    assert b'"brokerAddrs":{2:"y:2",0:"x:1"}' in legacy
    assert b" " not in legacy
    for written in (standard, legacy):
        assert bodies.decode_topic_route(written) == route


def test_properties_text() -> None:
    written = bodies.encode_properties_text({"a": "1", "b": "x y"})
    assert bodies.decode_properties_text(written) == {"a": "1", "b": "x y"}
    odd = b"# note\n! note\n a : 1\nb c\nd\\=e=f\\\n   g\nh=\\u0041\\t\n\nk"
    assert bodies.decode_properties_text(odd) == {"a": "1", "b": "c", "d=e": "fg", "h": "A\t", "k": ""}


# ----------------------------------------------------------------------------------------------------------- messages

clean = st.text(st.characters(codec="utf-8", exclude_characters="\x01\x02"), min_size=1, max_size=12)


@given(st.dictionaries(clean, clean, max_size=6))
def test_property_strings_round_trip(properties: dict[str, str]) -> None:
    written = properties_to_string(properties)
    assert string_to_properties(written) == properties
    assert string_to_properties(written.removesuffix("\x02")) == properties
    for name, value in properties.items():
        assert property_of(written, name) == value


@given(st.text(alphabet="ab\x01\x02", max_size=30))
def test_reading_one_property_agrees_with_reading_all(written: str) -> None:
    everything = string_to_properties(written)
    for name in ("a", "b", "ab"):
        assert property_of(written, name) == everything.get(name)


v4 = st.binary(min_size=4, max_size=4)
v6 = st.binary(min_size=16, max_size=16)
hosts = st.builds(lambda address, port: address + port.to_bytes(4), v4 | v6, st.integers(0, 65535))


@given(
    hosts,
    hosts,
    st.binary(max_size=100),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=200),
    st.dictionaries(clean, clean, max_size=4),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**63 - 1),
)
def test_records_round_trip(
    born: bytes, store: bytes, body: bytes, topic: str, properties: dict[str, str], number: int, big: int
) -> None:
    topic_bytes, properties_bytes = topic.encode(), properties_to_string(properties).encode()
    record = encode_record(
        number, number, big, big, number, big, born, big, store, number, big, body, topic_bytes, properties_bytes
    )
    size = record_size(
        len(body), len(topic_bytes), len(properties_bytes), born_v6=len(born) == 20, store_v6=len(store) == 20
    )
    assert len(record) == size
    message = decode_stored(record, check_crc=True)
    assert (message.topic, message.body, message.properties) == (topic, body, properties)
    assert (message.queue_id, message.queue_offset, message.physical_offset) == (number, big, big)
    assert (message.reconsume_times, message.prepared_transaction_offset) == (number, big)
    assert decode_stored_many(record * 2) == [message, message]
    for cut in (0, 10, len(record) - 1):
        with pytest.raises(BodyError):
            decode_stored(record[:cut])


@given(
    hosts,
    hosts,
    st.binary(max_size=40),
    st.integers(1, 200).map(lambda length: b"t" * length),
    st.binary(max_size=40),
    st.integers(0, 2**31 - 1),
)
def test_a_template_makes_the_same_records(
    born: bytes, store: bytes, body: bytes, topic: bytes, properties: bytes, sys_flag: int
) -> None:
    size = record_size(len(body), len(topic), len(properties), born_v6=len(born) == 20, store_v6=len(store) == 20)
    template = RecordTemplate(sys_flag, 1_700_000_000_123, born, 1_700_000_000_456, store, 7, topic)
    head = template.pack_head(size, template.magic, body_crc(body), 3, 5, 11, 13, template.fixed, len(body))
    record = b"".join((head, body, template.topic, len(properties).to_bytes(2), properties))
    assert record == encode_record(
        3, 5, 11, 13, sys_flag, 1_700_000_000_123, born, 1_700_000_000_456, store, 7, 0, body, topic, properties
    )


@given(st.binary(max_size=300))
def test_garbage_is_no_message_and_no_batch(garbage: bytes) -> None:
    for read in (decode_stored, lambda data: list(iter_batch(data))):
        try:
            read(garbage)
        except BodyError:
            pass
    forged = bytes.fromhex("0000012c daa320a7") + garbage.ljust(292, b"\xff")
    try:
        decode_stored(forged)
    except BodyError:
        pass


def test_damaged_body_is_noticed() -> None:
    host = host_to_bytes("127.0.0.1", 1)
    record = bytearray(encode_record(0, 0, 0, 0, 0, 0, host, 0, host, 0, 0, b"hello", b"t", b""))
    record[89] ^= 1
    decode_stored(bytes(record))
    with pytest.raises(BodyError, match="checksum"):
        decode_stored(bytes(record), check_crc=True)


@given(st.lists(st.tuples(int32, st.binary(max_size=50), st.dictionaries(clean, clean, max_size=3)), max_size=6))
def test_batches_round_trip(items: list[tuple[int, bytes, dict[str, str]]]) -> None:
    body = encode_batch(Message(topic="t", body=body, flag=flag, properties=props) for flag, body, props in items)
    decoded = [(flag, part, string_to_properties(props.decode())) for flag, part, props in iter_batch(memoryview(body))]
    assert decoded == items
    if body:
        with pytest.raises(BodyError):
            list(iter_batch(body[:-1]))


def test_batch_item_with_too_long_properties() -> None:
    with pytest.raises(BodyError):
        encode_batch_item(0, b"", bytes(32_768))


def test_ids_that_are_none() -> None:
    for wrong in ("", "zz" * 16, "00" * 15, "7F0000010B6A18B4AAC2000000000000"):
        with pytest.raises(ValueError, match=r"."):
            parse_offset_msg_id(wrong)
    assert unique_key_time_ms("not hex", 0) is None


def test_unique_keys_do_not_repeat_within_a_millisecond() -> None:
    generator = UniqKeyGenerator(bytes(4), 1, bytes(4))
    made = [generator.next(1_700_000_000_000) for _ in range(200_000)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    ("moment", "start", "following"),
    [
        (1_700_000_000_000, 1_698_796_800_000, 1_701_388_800_000),  # 2023-11
        (1_709_200_000_000, 1_706_745_600_000, 1_709_251_200_000),  # 2024-02, leap
        (1_740_787_199_999, 1_738_368_000_000, 1_740_787_200_000),  # 2025-02
        (1_735_689_600_000, 1_735_689_600_000, 1_738_368_000_000),  # 2025-01
        (0, 0, 2_678_400_000),  # 1970-01
    ],
)
def test_months(moment: int, start: int, following: int) -> None:
    assert month_bounds_ms(moment) == (start, following)


def test_version_names() -> None:
    assert version_name(479) == "V5_3_3"
    assert version_name(9999) == "HIGHER_VERSION"
    assert version_name(300) == "300"
