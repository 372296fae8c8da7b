"""Which cluster a verb means: options shared by the verbs, and how they are resolved.

Data folder: --data, QUORATE_DATA, `data` of the configuration.
Configuration: --config, QUORATE_CONFIG, ./cluster.toml, the built-in default.
Name servers: --namesrv, QUORATE_NAMESRV, NAMESRV_ADDR, what runs in the data folder, the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import click
from attrs import frozen

from cli.exits import NOBODY_REACHED, USAGE, Failure
from cluster.config import ClusterConfig, ConfigError, default_text, parse
from cluster.layout import Layout, UpRefused, UpState, read_identity, read_up_state
from runtime.model import Files
from runtime.processes import absolute_path

CONFIG_NAME = "cluster.toml"

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _decorate(*options: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    def decorate(command: Decorated) -> Decorated:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


config_option = click.option(
    "--config",
    "config_path",
    metavar="FILE",
    envvar="QUORATE_CONFIG",
    help="cluster.toml [default: ./cluster.toml, else built in]",
)
data_option = click.option(
    "--data", "data_path", metavar="DIR", envvar="QUORATE_DATA", help="Data folder [default: as the configuration says]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
namesrv_option = click.option(
    "--namesrv",
    "-n",
    metavar="HOST:PORT[;...]",
    envvar=["QUORATE_NAMESRV", "NAMESRV_ADDR"],
    help="Name servers [default: of the cluster in the data folder]",
)

local_options = _decorate(data_option, config_option)
remote_options = _decorate(namesrv_option, data_option, config_option)


def load_config(files: Files, path: str | None) -> ClusterConfig:
    """The named file, ./cluster.toml, or the built-in default. Raises Failure."""
    try:
        if path is None and files.exists(CONFIG_NAME):
            path = CONFIG_NAME
        if path is None:
            return parse(default_text(), "built-in default")
        return _relative_to_file(parse(files.read_bytes(path).decode("utf-8"), path), path)
    except ConfigError as error:
        raise Failure(str(error), USAGE) from None
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start})", USAGE) from None
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", USAGE) from None


def _relative_to_file(config: ClusterConfig, path: str) -> ClusterConfig:
    data = absolute_path(config.cluster.data, absolute_path("..", path))
    return attrs.evolve(config, cluster=attrs.evolve(config.cluster, data=data))


def layout_of(files: Files, data_path: str | None, config_path: str | None) -> Layout:
    """The data folder a verb means. Raises Failure."""
    if data_path is None:
        data_path = load_config(files, config_path).cluster.data
    return Layout(absolute_path(data_path))


@frozen
class Running:
    """A cluster that `up` runs on this machine."""

    layout: Layout
    config: ClusterConfig
    state: UpState


def running_cluster(files: Files, data_path: str | None, config_path: str | None) -> Running:
    """What runs in the data folder. Raises Failure (3) where nothing does."""
    layout = layout_of(files, data_path, config_path)
    try:
        state = read_up_state(files, layout)
        identity = read_identity(files, layout)
    except UpRefused as error:
        raise Failure(str(error), USAGE) from None
    if state is None or identity is None or not state.is_running:
        raise Failure(
            f"no cluster runs in {layout.data}; start one with `quorate up --data {layout.data}`", NOBODY_REACHED
        )
    return Running(layout, identity.config, state)


def namesrv_of(files: Files, namesrv: str | None, data_path: str | None, config_path: str | None) -> str:
    """Name server addresses for a client, joined by semicolons. Raises Failure."""
    if namesrv:
        return namesrv
    layout = layout_of(files, data_path, config_path)
    try:
        state = read_up_state(files, layout)
    except UpRefused as error:
        raise Failure(str(error), USAGE) from None
    if state is not None:
        return state.namesrv
    if data_path is not None:
        raise Failure(
            f"no cluster runs in {layout.data}; start one with `quorate up --data {layout.data}`", NOBODY_REACHED
        )
    return ";".join(load_config(files, config_path).namesrv_addresses())
