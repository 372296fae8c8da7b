"""Requests that a broker passes on to a connected client: 307, 309 and 223 (remoting.md 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from remoting.bodies import GetConsumerStatusBody, decode_consumer_status, encode_body
from remoting.codes import VERSION_RESET_OFFSET_PUSH, VERSION_RUNNING_INFO, RequestCode, ResponseCode, version_name
from remoting.command import Command, encode_response
from remoting.errors import BodyError, ConnectionLost, RequestTimeout
from remoting.headers import require
from remoting.message import parse_offset_msg_id

if TYPE_CHECKING:
    from broker.clients import Member
    from broker.context import BrokerContext

CLIENT_TIMEOUT_S: Final = 10.0
STATUS_TIMEOUT_S: Final = 5.0


class ClientCallProcessor:
    def __init__(self, broker: BrokerContext) -> None:
        self._broker = broker

    def running_info(self, request: Command, conn: Any) -> bytes | None:
        """GET_CONSUMER_RUNNING_INFO: the client's answer, untouched."""
        ext = request.ext
        group = require(ext, "consumerGroup", str)
        client_id = require(ext, "clientId", str)
        forwarded = {"consumerGroup": group, "clientId": client_id, "jstackEnable": ext.get("jstackEnable") or "false"}
        return self._pass_on(request, conn, group, client_id, forwarded, b"")

    def consume_directly(self, request: Command, conn: Any) -> bytes | None:
        """CONSUME_MESSAGE_DIRECTLY: the stored message goes along."""
        ext = dict(request.ext)
        group = require(ext, "consumerGroup", str)
        client_id = ext.get("clientId") or ""
        message_id = require(ext, "msgId", str)
        try:
            offset = parse_offset_msg_id(message_id)[2]
        except ValueError as error:
            return encode_response(request, ResponseCode.INVALID_PARAMETER, remark=str(error))
        record = self._broker.state.read_message(offset)
        if record is None:
            remark = f"can not find message by the offset, {offset}"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        ext["brokerName"] = self._broker.config.broker_name
        ext.setdefault("topicSysFlag", "0")
        ext.setdefault("groupSysFlag", "0")
        return self._pass_on(request, conn, group, client_id, ext, bytes(record))

    def _pass_on(
        self, request: Command, conn: Any, group_name: str, client_id: str, ext: dict[str, str], body: bytes
    ) -> bytes | None:
        group = self._broker.clients.consumer_group(group_name)
        member = group.find(client_id) if group is not None else None
        if member is None:
            remark = f"The Consumer <{group_name}> <{client_id}> not online"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        if member.version < VERSION_RUNNING_INFO:
            remark = (
                f"The Consumer <{client_id}> Version <{version_name(member.version)}> too low to finish, "
                "please upgrade it to V3_1_8_SNAPSHOT"
            )
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        command = Command(code=request.code, opaque=0, ext=ext, body=body)
        if self._broker.jobs.start(self._call, request, conn, member, command):
            return None
        return encode_response(request, ResponseCode.SYSTEM_BUSY, remark="[OVERLOAD]too many calls to clients")

    async def _call(self, request: Command, conn: Any, member: Member, command: Command) -> None:
        try:
            answer = await member.conn.request(command, CLIENT_TIMEOUT_S)
        except RequestTimeout:
            remark = f"consumer <{member.client_id}> did not answer within {CLIENT_TIMEOUT_S:g} s"
            frame = encode_response(request, ResponseCode.CONSUME_MSG_TIMEOUT, remark=remark)
        except ConnectionLost as error:
            remark = f"invoke consumer <{member.client_id}> Exception: {error}"
            frame = encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        else:
            frame = encode_response(request, answer.code, answer.ext, body=answer.body, remark=answer.remark)
        conn.write(frame)
        conn.flush()

    def consumer_status(self, request: Command, conn: Any) -> bytes | None:
        """INVOKE_BROKER_TO_GET_CONSUMER_STATUS: offsets as the members themselves see them."""
        ext = request.ext
        topic = require(ext, "topic", str)
        group_name = require(ext, "group", str)
        wanted = ext.get("clientAddr") or ""
        group = self._broker.clients.consumer_group(group_name)
        if group is None:
            remark = f"No Any Consumer online in the consumer group: [{group_name}]"
            return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        members = [member for member in group.members.values() if not wanted or member.client_id == wanted]
        for member in members:
            if member.version < VERSION_RESET_OFFSET_PUSH:
                remark = f"the client does not support this feature. version={version_name(member.version)}"
                return encode_response(request, ResponseCode.SYSTEM_ERROR, remark=remark)
        if self._broker.jobs.start(self._ask_all, request, conn, members, {"topic": topic, "group": group_name}):
            return None
        return encode_response(request, ResponseCode.SYSTEM_BUSY, remark="[OVERLOAD]too many calls to clients")

    async def _ask_all(self, request: Command, conn: Any, members: list[Member], ext: dict[str, str]) -> None:
        body = GetConsumerStatusBody()
        for member in members:
            command = Command(code=RequestCode.GET_CONSUMER_STATUS_FROM_CLIENT, opaque=0, ext=dict(ext))
            try:
                answer = await member.conn.request(command, STATUS_TIMEOUT_S)
                if answer.code == ResponseCode.SUCCESS and answer.body:
                    body.consumer_table[member.client_id] = decode_consumer_status(answer.body).message_queue_table
            except (RequestTimeout, ConnectionLost, BodyError) as error:
                self._broker.log.info("consumer status is missing", client=member.client_id, reason=str(error))
        conn.write(encode_response(request, ResponseCode.SUCCESS, body=encode_body(body)))
        conn.flush()
