"""What a finished change does not leave behind (style.md 4)."""

from __future__ import annotations

import ast
import re

import pytest

from tests.trees import Module, parse, product_modules

LINE_LENGTH = 120
LEFT_FOR_LATER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
WIDE = frozenset({"Exception", "BaseException"})

# Functions that catch whatever there is on purpose, by name, with the reason.
WIDE_ON_PURPOSE = {
    "background_nursery": "raises it later, without the group that its nursery would put around it",
    "keep_running": "judges whatever a simulated node ends with",
    "run_handler": "calls the user's code, and decides the message's fate whatever that raised",
}


def _handler_faults(node: ast.ExceptHandler) -> str | None:
    if node.type is None:
        return "a bare except; name what is caught"
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    names = {item.id if isinstance(item, ast.Name) else getattr(item, "attr", "") for item in caught}
    if "Cancelled" in names and not isinstance(node.body[0], ast.Raise):
        return "Cancelled is trio's own; never catch it"
    if not names & WIDE:
        return None
    if isinstance(node.body[-1], ast.Raise):
        return None  # cleaning up, or giving it a better name, and passing it on catches nothing
    return f"a wide except ({', '.join(sorted(names & WIDE))}); name what is caught"


def _is_infinite(node: ast.expr) -> bool:
    return any(
        (isinstance(part, ast.Attribute) and part.attr == "inf")
        or (isinstance(part, ast.Name) and part.id == "inf")
        or (isinstance(part, ast.Constant) and part.value in ("inf", "Infinity"))
        for part in ast.walk(node)
    )


def faults_of(module: Module) -> list[str]:
    """Everything untidy in one module."""
    found: list[tuple[int, str]] = []
    for number, line in enumerate(module.text.splitlines(), 1):
        if len(line) > LINE_LENGTH:
            found.append((number, f"{len(line)} characters in a line"))
        if LEFT_FOR_LATER.search(line):
            found.append((number, "left for later"))
    on_purpose = {
        handler
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in WIDE_ON_PURPOSE
        for handler in ast.walk(node)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            fault = _handler_faults(node)
            if fault and node not in on_purpose:
                found.append((node.lineno, fault))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            values = [*node.args, *(word.value for word in node.keywords)]
            if called in ("open_memory_channel", "CapacityLimiter", "Semaphore") and any(map(_is_infinite, values)):
                found.append((node.lineno, "an unbounded channel; give it a number with a name"))
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name == "NotImplementedError":
                found.append((node.lineno, "not implemented"))
    return [f"{module.path}:{line}: {fault}" for line, fault in found]


def test_the_product_is_tidy() -> None:
    faults = [fault for module in product_modules() for fault in faults_of(module)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception:\n    if log():\n        raise",
        "try:\n    f()\nexcept (ValueError, Exception) as error:\n    log(error)",
        "try:\n    f()\nexcept BaseException:\n    log()",
        "try:\n    f()\nexcept trio.Cancelled:\n    log()\n    raise",
        "trio.open_memory_channel(math.inf)",
        "trio.open_memory_channel(float('inf'))",
        "x = 1  # TO" + "DO: later",
        "raise NotImplementedError",
        "x = '" + "y" * 120 + "'",
    ],
)
def test_an_untidy_line_is_found(text: str) -> None:
    assert len(faults_of(parse(text, "broker.node"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    f()\nexcept BaseException:\n    close()\n    raise",
        "try:\n    f()\nexcept Exception as error:\n    raise Better() from error",
        "try:\n    f()\nexcept trio.Cancelled:\n    raise",
        "try:\n    f()\nexcept* (OSError, ValueError):\n    log()",
        "trio.open_memory_channel(limit)",
        "never = math.inf",
    ],
)
def test_a_tidy_line_is_not(text: str) -> None:
    assert not faults_of(parse(text, "broker.node"))
