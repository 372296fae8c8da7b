"""Whose data folder this is (raft.md 4.6): checked against the configuration, or formatted where that is asked for."""

from __future__ import annotations

from attrs import evolve

from dledger.config import GroupConfig
from dledger.errors import FormatError
from dledger.store.format import FORMAT_FILE, Format, check_format, read_format
from dledger.store.log_store import format_folder, is_blank
from runtime.logs import Logger
from runtime.model import Env


def identify(env: Env, config: GroupConfig, log: Logger) -> Format:
    """The folder's format. Waits for the disk. Raises FormatError where this node must not use the folder."""
    folder = config.data_dir
    wanted = Format(
        cluster=config.cluster,
        cluster_uuid=config.effective_cluster_uuid,
        group=config.group,
        group_uuid=config.group_uuid,
        node_id=config.node_id,
        segment_bytes=config.segment_bytes,
    )
    found = read_format(env.files, folder)
    if found is None:
        if not is_blank(env, folder):
            raise FormatError(f"data folder {folder} holds a log but no {FORMAT_FILE}: refusing to touch it")
        if not config.format_if_empty and not config.join:
            raise FormatError(f"data folder {folder} is not formatted; start the node once with --format")
        format_folder(env, folder, wanted, recovering=config.join)
        log.info("data folder formatted", folder=folder, group_uuid=wanted.group_uuid, blank=config.join)
        return wanted
    if config.cluster_uuid is None:
        # Derived from the peers' addresses only when a folder is formatted; addresses may change later.
        wanted = evolve(wanted, cluster_uuid=found.cluster_uuid, group_uuid=found.group_uuid)
    check_format(folder, found, wanted)
    if found.segment_bytes != wanted.segment_bytes:
        log.warning(
            "segment size of the data folder differs from the configured one and stays",
            folder=folder,
            segment_bytes=found.segment_bytes,
        )
    return found
