"""What the tests about the code itself share: every module of the product, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "remoting", "dledger", "namesrv", "broker", "quorate", "cluster", "chaos", "cli")


@frozen
class Module:
    """One source file of the product."""

    name: str
    path: str
    tree: ast.Module
    text: str


def parse(text: str, name: str, path: str = "") -> Module:
    """A module from its text."""
    return Module(name, path or name.replace(".", "/") + ".py", ast.parse(text), text)


@lru_cache(maxsize=1)
def product_modules() -> tuple[Module, ...]:
    """All modules of all packages, in order of their path."""
    return tuple(
        parse(path.read_text(encoding="utf-8"), _name_of(path), str(path.relative_to(ROOT)))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    )


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports, at its top or inside a function.

    `from a import b` gives `a.b`, which may be a module or a name in one; a prefix test fits both.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.name.split(".")
                if not module.path.endswith("__init__.py"):
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def within(name: str, package: str) -> bool:
    """Whether a dotted name is a package or lies in it."""
    return name == package or name.startswith(package + ".")
