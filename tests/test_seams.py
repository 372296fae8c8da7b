"""The seams of the design, section 6: outside `runtime` nobody touches time, chance, files, sockets or threads."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.trees import Module, parse, product_modules, within

FORBIDDEN_MODULES = frozenset(
    {
        *("time", "sched", "random", "secrets", "os", "io", "fcntl", "mmap", "glob", "shutil", "tempfile"),
        *("socket", "select", "selectors", "signal", "subprocess", "multiprocessing", "threading", "concurrent"),
        *("asyncio", "queue", "logging"),
    }
)
FORBIDDEN_NAMES = (
    "trio.sleep",
    "trio.sleep_until",
    "trio.move_on_after",
    "trio.move_on_at",
    "trio.fail_after",
    "trio.fail_at",
    "trio.current_time",
    "trio.to_thread",
    "trio.from_thread",
    "trio.socket",
    "trio.open_tcp_stream",
    "trio.open_tcp_listeners",
    "trio.serve_tcp",
    "trio.SocketStream",
    "trio.SocketListener",
    "trio.open_file",
    "trio.Path",
    "trio.run_process",
    "trio.lowlevel.open_process",
    "trio.lowlevel.spawn_system_task",
    "trio.lowlevel.wait_readable",
    "trio.lowlevel.wait_writable",
    "pathlib.Path",
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "datetime.datetime.today",
    "datetime.date.today",
    "uuid.uuid1",
    "uuid.uuid4",
)
FORBIDDEN_BUILTINS = frozenset({"open", "input"})

# What stands at the edge to the operating system by its nature. Everything else stays forbidden there too.
ALLOWED: dict[str, frozenset[str]] = {
    "cluster": frozenset({"signal", "trio.run_process", "trio.lowlevel.open_process", "subprocess", "pathlib.Path"}),
    # the command line is one process for one human; it reads its arguments' files and the environment
    "cli": frozenset(
        {"signal", "trio.run_process", "trio.lowlevel.open_process", "subprocess", "pathlib.Path", "os.environ"}
    ),
    # seeds are independent of each other: several processes may play them side by side
    "chaos.commands": frozenset({"multiprocessing"}),
    # the simulated world makes its streams of chance from the seed
    "chaos.sim": frozenset({"random.Random()"}),
    # the world of the full engine is the other side of the seams: trio's time is its own, and virtual
    "chaos.sim.full": frozenset({"trio.sleep", "trio.sleep_until", "trio.fail_after", "trio.move_on_at"}),
}
EXEMPT = ("runtime", "namesrv.registry_pysyncobj")


def uses(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every use of an imported name, resolved through aliases; builtins by their own name."""
    known: dict[str, str] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node, known)
            if name:
                yield node.lineno, name
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id not in known:
                yield node.lineno, node.func.id
            name = _dotted(node.func, known)
            if name == "random.Random":
                yield node.lineno, "random.Random()"
            if name == "trio.CancelScope" and any(
                word.arg in ("deadline", "relative_deadline") for word in node.keywords
            ):
                yield node.lineno, "trio.move_on_at"


def _dotted(node: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, known)
        return f"{base}.{node.attr}" if base else None
    return None


def faults_of(module: Module) -> list[str]:
    """Each use in one module that goes past a seam."""
    if any(within(module.name, name) for name in EXEMPT):
        return []
    allowed = frozenset[str]().union(*(names for key, names in ALLOWED.items() if within(module.name, key)))
    faults = []
    for line, name in uses(module):
        if any(within(name, permitted) for permitted in allowed) or (name == "os" and "os.environ" in allowed):
            continue
        if name in ("random", "random.Random"):  # the type, for annotations; calling it is `random.Random()`
            continue
        root = name.split(".")[0]
        if (
            root in FORBIDDEN_MODULES
            or name in FORBIDDEN_BUILTINS
            or any(within(name, forbidden) for forbidden in FORBIDDEN_NAMES)
        ):
            faults.append(f"{module.path}:{line}: {module.name} uses {name}; take it from env")
    return faults


def test_nobody_goes_past_the_seams() -> None:
    faults = [fault for module in product_modules() for fault in faults_of(module)]
    assert not faults, "\n".join(faults)


def test_what_is_allowed_is_allowed_to_somebody() -> None:
    names = [module.name for module in product_modules()]
    assert [key for key in (*ALLOWED, *EXEMPT) if not any(within(name, key) for name in names)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import time",
        "from time import monotonic",
        "import os.path",
        "def f():\n    import socket",
        "import random\nx = random.random()",
        "import random\nx = random.Random(3)",
        "from random import Random as R\nx = R()",
        "from random import randint",
        "import trio\nasync def f():\n    await trio.sleep(1)",
        "import trio as t\nasync def f():\n    await t.sleep_until(1)",
        "from trio import move_on_after",
        "import trio\nwith trio.fail_at(3): pass",
        "import trio\nwith trio.CancelScope(deadline=3): pass",
        "import trio\nnow = trio.current_time",
        "import trio\nasync def f():\n    await trio.to_thread.run_sync(print)",
        "from trio import to_thread",
        "import trio\ntrio.lowlevel.spawn_system_task",
        "x = open('file')",
        "from pathlib import Path",
        "import datetime\nx = datetime.datetime.now()",
        "from datetime import datetime\nx = datetime.now()",
        "import uuid\nx = uuid.uuid4()",
        "import threading",
        "import asyncio",
        "import signal",
        "import subprocess",
    ],
)
def test_a_way_past_a_seam_is_found(text: str) -> None:
    assert faults_of(parse(text, "broker.node"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broker.node", "import random\ndef f(rng: random.Random) -> None: ..."),
        ("broker.node", "from random import Random\ndef f(rng: Random) -> None: ..."),
        ("broker.node", "import trio\nasync def f():\n    await trio.sleep_forever()"),
        ("broker.node", "import trio\nwith trio.CancelScope(shield=True): pass"),
        ("broker.node", "def f(files):\n    return files.open('x')"),
        ("broker.node", "from uuid import UUID\nx = UUID(bytes=b'')"),
        ("chaos.sim.world", "from random import Random\nx = Random(3)"),
        ("cluster.supervisor", "import signal, trio\nx = trio.lowlevel.open_process\ny = signal.SIGKILL"),
        ("cli.main", "import os\nx = os.environ.get('NAMESRV_ADDR')"),
        ("namesrv.registry_pysyncobj", "import threading, os"),
        ("runtime.clock", "import time"),
    ],
)
def test_what_is_allowed_is_not(name: str, text: str) -> None:
    assert not faults_of(parse(text, name))
