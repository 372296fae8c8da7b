"""Whole segments from the other replicas, for a node that is blank, or too far behind for entries (raft.md 4.7).

A replica is asked for its checkpoint, then for its manifest: closed segments, and of the open one what is committed.
What is committed is the same on all of them, so every replica that has it may supply any chunk. Chunks lie in a staging
folder: a transfer that was cut short goes on where it stopped, with the manifest and the checkpoint it began with, as
long as somebody still has what is missing. What this node's own log has in common is copied and not fetched. Once all
is there the run ends with `Reopen`; the group verifies every frame, puts the segments in place of the log, and begins
again. Term and vote stay.

The checkpoint is asked for first: then it never covers more than the segments do.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import trio
from attrs import frozen

from dledger.errors import LogDamaged
from dledger.fetch import Answer, FetchClient
from dledger.store.checkpoint import Checkpoint, unpack_checkpoint
from dledger.store.log_store import LogStore
from dledger.store.manifest import Manifest
from dledger.store.meta import MetaFile
from dledger.store.rows import DISK_FULL
from dledger.store.staging import (
    INCOMING_FOLDER,
    INSTALL_MARK,
    Staging,
    complete_install,
    decode_manifest,
    staged_manifest,
)
from dledger.wire import FetchKind, FetchStatus
from runtime.logs import Logger
from runtime.model import Env, Files

REQUEST_BYTES = 128 * 1024
REQUESTS_UNDER_WAY = 2
"""Together 256 KiB: so much of a transfer may be before a heartbeat on the way, at most."""
TABLES_FILE = "tables"
"""The checkpoint that a transfer began with, in the staging folder."""
CHECKPOINT_BYTES_MAX = 2 * 1024 * 1024 * 1024
PAUSE_SECONDS_MIN = 0.05
PAUSE_SECONDS_MAX = 2.0

__all__ = ["Installer", "Pulled", "adds_to", "end_switch", "finish_install"]


class _Failed(Exception):
    """This source does not help now. The message is for the log."""


class _Outdated(_Failed):
    """What a transfer began with is not to be had any more: begin a new one."""


@frozen
class Pulled:
    """Everything needed for an installation; the chunks are in the staging folder."""

    manifest: Manifest
    checkpoint: bytes | None

    @property
    def last_index(self) -> int:
        return self.manifest.segments[-1].last_index


def adds_to(own: LogStore, manifest: Manifest) -> bool:
    """Whether segments bring a log further, or differ from it. What they hold is committed; so where they differ, this
    log's entries from there on never were, but where they agree, entries behind them may have been acknowledged.
    Raises LogDamaged.
    """
    end = manifest.segments[-1]
    if end.last_index > own.last_index:
        return True
    return end.last_index >= own.first_index - 1 and own.head_crc_at(end.last_index) != end.last_crc


class Installer:
    """Pulls segments, until they are all there. One at a time; resumed by the next one."""

    def __init__(
        self,
        env: Env,
        folder: str,
        segment_bytes: int,
        client: FetchClient,
        log: Logger,
        own: LogStore | None = None,
        *,
        misfits: int = 0,
    ) -> None:
        """`own` is this node's log, where it can be read. `misfits`: how many transfers in a row have brought segments
        that did not fit together: each begins with another source, and from the second on with nothing kept."""
        self._env = env
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._client = client
        self._log = log
        self._own = own
        self._misfits = misfits
        self.total_bytes = 0
        self.missing_bytes = 0
        """What is still to come of the present transfer."""
        self.waits_for = ""
        self._lenders: set[str] = set()
        """Sources that keep segments for this transfer."""

    async def pull(self, wanted_index: Callable[[], int], is_needed: Callable[[], bool]) -> Pulled | None:
        """Pull segments that reach entry `wanted_index()`, or at least further than this node's log does. None once
        they are not needed any more, because ordinary replication works again. Checkpoint; what was pulled is kept.
        Raises OSError where the disk fails.
        """
        pause = PAUSE_SECONDS_MIN
        turn = self._misfits
        if self._misfits > 1:  # whether the manifest, or a part, is the lie: begin anew
            await self._env.run_in_thread(self._discard)
        while is_needed():
            sources = self._client.sources()
            self.waits_for = "" if sources else "no peer is connected"
            if sources:
                source = sources[turn % len(sources)]
                turn += 1
                before = self._client.bytes_received
                try:
                    return await self._pull_from(source, wanted_index(), is_needed)
                except OSError as error:
                    if error.errno not in DISK_FULL:
                        raise
                    self.waits_for = f"the disk has no room for segments: {error}"
                    self._log.warning("no room for segments", error=str(error))
                except _Outdated as error:
                    self._log.info("beginning a new transfer of segments", reason=str(error))
                    await self._env.run_in_thread(self._discard)
                except _Failed as error:
                    self.waits_for = f"{source}: {error}"
                    self._log.info("segments not to be had now", source=source, reason=str(error))
                if self._client.bytes_received - before > REQUEST_BYTES:
                    pause = PAUSE_SECONDS_MIN
            await self._env.clock.sleep(pause)
            pause = min(2 * pause, PAUSE_SECONDS_MAX)
        return None

    async def _pull_from(self, source: str, wanted_index: int, is_needed: Callable[[], bool]) -> Pulled | None:
        env = self._env
        begun = await env.run_in_thread(self._begun)
        fresh = await self._pull_checkpoint(source) if begun is None else None
        # Asked for in any case: from now on the source keeps its segments for us.
        self._lenders.add(source)
        offered = _checked(await self._client.ask(source, FetchKind.MANIFEST), self._segment_bytes)
        pulled = begun if begun is not None else self._judge(Pulled(offered, fresh), wanted_index)
        staging = await env.run_in_thread(self._open_staging, pulled, begun is None)
        try:
            missing = staging.missing()
            self.total_bytes = sum(segment.used_bytes for segment in pulled.manifest.segments)
            self.missing_bytes = sum(nbytes for _, _, nbytes in missing)
            self._log.info(
                "fetching segments",
                source=source,
                first=pulled.manifest.base.index + 1,
                last=pulled.last_index,
                total_bytes=self.total_bytes,
                missing_bytes=self.missing_bytes,
                resumed=begun is not None,
            )
            common = self._common(pulled.manifest)
            for base, offset, nbytes in missing:
                if not is_needed():
                    return None
                data = None
                if base in common and self._own is not None:
                    data = await self._own.read_in_thread(base + offset, nbytes)
                if data is None:
                    data = await self._pull_chunk(source, base, offset, nbytes)
                await env.run_in_thread(staging.put, base, offset, data, crc32(data))
                self.missing_bytes -= nbytes
        finally:
            staging.close()
        for peer in self._lenders:
            self._client.tell_complete(peer, pulled.manifest.segments[-1].end_position)
        return pulled

    def _judge(self, pulled: Pulled, wanted_index: int) -> Pulled:
        """What a source offers, if it is of use."""
        covers = 0
        if pulled.checkpoint is not None:
            content = unpack_checkpoint(pulled.checkpoint)
            if content is None:
                raise _Failed("sent a damaged checkpoint")
            covers = content.index
        base_index, last_index = pulled.manifest.base.index, pulled.last_index
        if last_index < wanted_index:
            raise _Failed(f"its committed log ends at entry {last_index}, {wanted_index} are needed")
        if not base_index <= covers <= last_index:
            raise _Failed(f"its checkpoint covers {covers} entries, its log has {base_index + 1} to {last_index}")
        return pulled

    def _begun(self) -> Pulled | None:
        """A transfer that was cut short, if it still brings this node further."""
        files = self._env.files
        try:
            manifest = staged_manifest(files, self._folder)
            checkpoint = files.read_bytes(f"{self._folder}/{INCOMING_FOLDER}/{TABLES_FILE}")
        except (OSError, ValueError):
            return None
        if self._own is not None and not adds_to(self._own, manifest):
            return None
        content: Checkpoint | None = unpack_checkpoint(checkpoint) if checkpoint else None
        if checkpoint and content is None:
            return None
        if manifest.base.index > (content.index if content is not None else 0):
            return None
        return Pulled(manifest, checkpoint or None)

    def _open_staging(self, pulled: Pulled, is_new: bool) -> Staging:
        files = self._env.files
        if is_new:
            files.remove_tree(f"{self._folder}/{INCOMING_FOLDER}")
        try:
            staging = Staging.open(files, self._folder, pulled.manifest)
        except ValueError as error:
            raise _Outdated(str(error)) from error
        if is_new:
            files.write_atomic(f"{self._folder}/{INCOMING_FOLDER}/{TABLES_FILE}", pulled.checkpoint or b"")
        return staging

    def _discard(self) -> None:
        self._env.files.remove_tree(f"{self._folder}/{INCOMING_FOLDER}")

    def _common(self, manifest: Manifest) -> frozenset[int]:
        """Segments that this node has already: their last entry is the same, and so is every byte before it."""
        own = self._own
        if own is None:
            return frozenset()
        found = []
        for segment in manifest.segments:
            if own.first_index <= segment.last_index <= own.written_index and segment.base >= own.first_position:
                try:
                    if own.head_crc_at(segment.last_index) == segment.last_crc:
                        found.append(segment.base)
                except LogDamaged:
                    continue
        return frozenset(found)

    async def _pull_chunk(self, source: str, base: int, offset: int, nbytes: int) -> bytes:
        """A chunk in small requests, two of them under way. The other replicas have the same bytes."""
        starts = range(offset, offset + nbytes, REQUEST_BYTES)
        parts: dict[int, bytes] = {}
        waiting = iter(starts)
        failures: list[_Failed] = []

        async def pull_parts() -> None:
            for start in waiting:
                if failures:
                    return
                try:
                    parts[start] = await self._pull_part(
                        source, base, start, min(REQUEST_BYTES, offset + nbytes - start)
                    )
                except _Failed as error:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(REQUESTS_UNDER_WAY):
                nursery.start_soon(pull_parts)
        if failures:
            raise failures[0]
        return b"".join([parts[start] for start in starts])

    async def _pull_part(self, source: str, base: int, offset: int, nbytes: int) -> bytes:
        reasons = []
        is_gone = True
        for peer in [source, *(other for other in self._client.sources() if other != source)]:
            answer = await self._client.ask(peer, FetchKind.CHUNK, base, offset, nbytes)
            if answer.is_ok and len(answer.data) == nbytes:
                return answer.data
            is_gone = is_gone and answer.status is FetchStatus.GONE
            reasons.append(f"{peer}: {answer.reason}")
        failure = _Outdated if is_gone else _Failed
        raise failure(f"segment {base} from {offset}: {'; '.join(reasons)}")

    async def _pull_checkpoint(self, source: str) -> bytes | None:
        """The content of the source's checkpoint file; None where it has none."""
        parts: list[bytes] = []
        offset = identity = 0
        while True:
            answer = await self._client.ask(source, FetchKind.CHECKPOINT, offset, REQUEST_BYTES, identity)
            if answer.status is FetchStatus.ABSENT and offset == 0:
                return None
            if not answer.is_ok or not answer.data or answer.total > CHECKPOINT_BYTES_MAX:
                raise _Failed(f"checkpoint: {answer.reason or 'empty or too large'}")
            parts.append(answer.data)
            identity = answer.identity
            offset += len(answer.data)
            if offset >= answer.total:
                content = b"".join(parts)
                if crc32(content) != identity:
                    raise _Failed("its checkpoint changed on the way")
                return content


async def finish_install(env: Env, folder: str, pulled: Pulled, meta: MetaFile) -> None:
    """Verify what was pulled and put it in place of the log. Nothing may use the log meanwhile; a crash at any point
    ends in the old or the new one. Checkpoint. Raises LogDamaged, with the old log in place, where it does not fit
    together; OSError or StoreFailed where the disk fails.
    """
    staging = await env.run_in_thread(Staging.open, env.files, folder, pulled.manifest)
    try:
        await env.run_in_thread(staging.finish, pulled.checkpoint)
    finally:
        staging.close()
    await end_switch(env, folder, meta)


async def end_switch(env: Env, folder: str, meta: MetaFile) -> None:
    """Carry a switch to fetched segments through, where one has begun; before every recovery. Checkpoint.

    The durable mark is of the log that goes: over a shorter one it would be taken for damage at the end, which nobody
    may be there to supply. What the old log held behind the new end either was never committed, or its loss has been
    noted (the node is recovering). The manifest is the last thing that the switch removes, so a crash in between comes
    back here. Raises OSError or StoreFailed where the disk fails.
    """
    new_end = await env.run_in_thread(_end_of_switch, env.files, folder)
    if new_end is not None and meta.durable_mark > new_end:
        await meta.save_mark(new_end)
    await env.run_in_thread(complete_install, env.files, folder)


def _end_of_switch(files: Files, folder: str) -> int | None:
    """The last entry of the log that a switch under way leads to; None where there is none, or it is over."""
    if not files.exists(f"{folder}/{INSTALL_MARK}"):
        return None
    try:
        return staged_manifest(files, folder).segments[-1].last_index
    except FileNotFoundError:
        return None
    except ValueError:  # damaged since: what was verified is put in place all the same
        return None


def _checked(answer: Answer, segment_bytes: int) -> Manifest:
    if not answer.is_ok:
        raise _Failed(f"manifest: {answer.reason}")
    try:
        manifest = decode_manifest(answer.data)
    except ValueError as error:
        raise _Failed(str(error)) from error
    if manifest.segment_bytes != segment_bytes:
        raise _Failed(f"its segments have {manifest.segment_bytes} bytes, ours {segment_bytes}")
    return manifest
