"""A run as a text file: the plan, the faults, and what is expected to break. TOML, so that a person can edit it.

`quorate chaos replay FILE` plays one. Nothing in it depends on the seed's draw of plan and faults; the seed is still
the key of every stream of chance within the run.
"""

from __future__ import annotations

import tomllib
import types
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from attrs import asdict, frozen

from chaos.sim.plan import KINDS, Plan
from chaos.sim.schedule import Fault

T = TypeVar("T")


class BadScenario(ValueError):
    """The file is no scenario. The message says what is wrong with it."""


@frozen
class Scenario:
    """A plan and its faults; `breaks` is the violation that the file was written for, empty when none."""

    plan: Plan
    faults: tuple[Fault, ...]
    breaks: str = ""


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(char if char.isprintable() else " " for char in escaped) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(one) for one in value) + "]"
    return repr(value)


def write_scenario(scenario: Scenario) -> str:
    """The text of a scenario file."""
    lines = ["# Play it with: quorate chaos replay FILE --trace"]
    if scenario.breaks:
        lines.append(f"breaks = {_text(scenario.breaks)}")
    lines += ["", "[plan]"]
    lines += [f"{name} = {_text(value)}" for name, value in asdict(scenario.plan).items()]
    for fault in scenario.faults:
        lines += ["", "[[fault]]"]
        lines += [f"{name} = {_text(value)}" for name, value in asdict(fault).items()]
    return "\n".join(lines) + "\n"


def read_scenario(text: str) -> Scenario:
    """Raises BadScenario."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadScenario(f"not TOML: {error}") from error
    plan = _build(Plan, document.get("plan"), "[plan]")
    faults = document.get("fault", [])
    if not isinstance(faults, list):
        raise BadScenario("[[fault]] must be a list of tables")
    built = tuple(_build(Fault, fault, f"fault {number}") for number, fault in enumerate(faults))
    for fault in built:
        if fault.kind not in KINDS:
            raise BadScenario(f"unknown kind of fault {fault.kind!r}; known are {', '.join(KINDS)}")
    breaks = document.get("breaks", "")
    if not isinstance(breaks, str):
        raise BadScenario("breaks must be a text")
    if not 1 <= plan.nodes <= 9 or not 0 <= plan.spares <= 9 or plan.clients < 1 or plan.segment_bytes < 4096:
        raise BadScenario("1 to 9 nodes, 0 to 9 spares, at least one client, segments of at least 4096 bytes")
    return Scenario(plan, built, breaks)


def _build(kind: type[T], table: object, where: str) -> T:
    hints = get_type_hints(kind)
    if not isinstance(table, dict):
        raise BadScenario(f"{where} is missing")
    if table.keys() != hints.keys():
        wrong = ", ".join(sorted(table.keys() ^ hints.keys()))
        raise BadScenario(f"{where}: missing or unknown: {wrong}")
    return kind(**{name: _value(hints[name], table[name], f"{where}: {name}") for name in hints})


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise BadScenario(f"{where} must be a list")
        return tuple(_value(get_args(hint)[0], one, where) for one in value)
    assert not isinstance(hint, types.UnionType)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise BadScenario(f"{where} must be of type {hint.__name__}")
    return value
