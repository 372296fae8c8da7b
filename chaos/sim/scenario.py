"""A run as a text file: the plan, the faults, and what is expected to break. TOML, so that a person can edit it.

`quorate chaos replay FILE` plays one. Nothing in it depends on the seed's draw of plan and faults; the seed is still
the key of every stream of chance within the run.
"""

from __future__ import annotations

import tomllib
import types
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from attrs import asdict, fields, frozen

from chaos.sim.full.plan import FullPlan
from chaos.sim.plan import Plan, RunPlan
from chaos.sim.schedule import Fault

T = TypeVar("T")
PLANS: dict[str, type[RunPlan]] = {"core": Plan, "full": FullPlan}
"""By engine."""


class BadScenario(ValueError):
    """The file is no scenario. The message says what is wrong with it."""


@frozen
class Scenario:
    """A plan and its faults; `breaks` is the violation that the file was written for, empty when none."""

    plan: RunPlan
    faults: tuple[Fault, ...]
    breaks: str = ""

    @property
    def engine(self) -> str:
        """Which engine it is for."""
        return next(name for name, kind in PLANS.items() if type(self.plan) is kind)


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
    lines = ["# Play it with: quorate chaos replay FILE --trace", f"engine = {_text(scenario.engine)}"]
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
    engine = document.get("engine", "core")
    if engine not in PLANS:
        raise BadScenario(f"unknown engine {engine!r}; known are {', '.join(PLANS)}")
    plan = _build(PLANS[engine], document.get("plan"), "[plan]")
    faults = document.get("fault", [])
    if not isinstance(faults, list):
        raise BadScenario("[[fault]] must be a list of tables")
    built = tuple(_build(Fault, fault, f"fault {number}") for number, fault in enumerate(faults))
    for fault in built:
        if fault.kind not in plan.weights:
            raise BadScenario(f"unknown kind of fault {fault.kind!r}; known are {', '.join(plan.weights)}")
    breaks = document.get("breaks", "")
    if not isinstance(breaks, str):
        raise BadScenario("breaks must be a text")
    problem = plan.problem()
    if problem is not None:
        raise BadScenario(problem)
    return Scenario(plan, built, breaks)


def _build(kind: type[T], table: object, where: str) -> T:
    types_of = get_type_hints(kind)
    hints = {attribute.name: types_of[attribute.name] for attribute in fields(kind)}  # type: ignore[arg-type]
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
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise BadScenario(f"{where} must be one of {', '.join(get_args(hint))}")
        return value
    assert not isinstance(hint, types.UnionType)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise BadScenario(f"{where} must be of type {hint.__name__}")
    return value
