"""The arrows of the design, section 1: who may import whom. No arrow goes up."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from tests.trees import PACKAGES, ROOT, Module, imports, parse, product_modules, within

# The longest matching entry rules. A package may always import itself, except where INWARD narrows it.
ARROWS: dict[str, frozenset[str]] = {
    "runtime": frozenset(),
    "remoting": frozenset({"runtime"}),
    "dledger": frozenset({"runtime"}),
    "dledger.core": frozenset(),
    "namesrv": frozenset({"remoting", "runtime"}),
    "broker": frozenset({"dledger", "remoting", "runtime"}),
    "quorate": frozenset({"remoting", "runtime"}),
    "cluster": frozenset({"quorate", "runtime"}),
    "chaos": frozenset({"quorate", "cluster", "runtime"}),
    "chaos.sim": frozenset({"quorate", "cluster", "runtime", "dledger", "broker", "namesrv"}),
    "cli": frozenset(PACKAGES),
}

# remoting is codecs with a trio part on top; everything else in it is a codec.
REMOTING_TRIO_PART = frozenset({"remoting.connection", "remoting.server", "remoting.client", "remoting.pool"})


def is_codec(name: str) -> bool:
    return within(name, "remoting") and not any(within(name, part) for part in REMOTING_TRIO_PART)


def faults_of(module: Module) -> list[str]:
    """Each import of one module that goes against an arrow."""
    rule = max((key for key in ARROWS if within(module.name, key)), key=len)
    faults = []
    for line, name in imports(module):
        package = name.split(".")[0]
        place = f"{module.path}:{line}: {module.name} imports {name}"
        if is_codec(module.name) or within(module.name, "dledger.core"):
            own = "remoting" if is_codec(module.name) else "dledger.core"
            if package == "trio":
                faults.append(f"{place}; {own} does no I/O")
            elif package in PACKAGES and not within(name, own):
                faults.append(f"{place}; {own} imports nothing of ours")
            elif any(within(name, part) for part in REMOTING_TRIO_PART):
                faults.append(f"{place}; a codec must not need the trio part")
        elif package in PACKAGES and package not in ARROWS[rule] and package != module.name.split(".")[0]:
            faults.append(f"{place}; {rule} may import {sorted(ARROWS[rule]) or 'nothing of ours'}")
        elif package in ("tests", "benchmarks"):
            faults.append(f"{place}; the product does not need its tests")
        if name.startswith("pysyncobj") and module.name != "namesrv.registry_pysyncobj":
            faults.append(f"{place}; namesrv.registry_pysyncobj is its only importer")
    return faults


def test_every_package_has_its_rule() -> None:
    assert {key.split(".")[0] for key in ARROWS} == set(PACKAGES)
    assert {module.name.split(".")[0] for module in product_modules()} == set(PACKAGES)


def test_imports_follow_the_arrows() -> None:
    faults = [fault for module in product_modules() for fault in faults_of(module)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dledger.driver", "import broker.topics"),
        ("dledger.driver", "def f():\n    from remoting.codes import RequestCode"),
        ("dledger.core.raft", "import trio"),
        ("dledger.core.raft", "from runtime.model import Env"),
        ("dledger.core.raft", "from dledger.store import segments"),
        ("dledger.core.raft", "from ..store import segments"),
        ("remoting.frames", "import trio"),
        ("remoting.frames", "from runtime.model import Env"),
        ("remoting.frames", "from remoting.connection import Connection"),
        ("remoting.server", "from broker import router"),
        ("namesrv.server", "from broker import router"),
        ("namesrv.server", "from namesrv import x\nimport pysyncobj"),
        ("runtime.net", "import remoting"),
        ("quorate.producer", "from dledger import group"),
        ("chaos.commands", "from broker import state"),
        ("cluster.status", "import broker"),
        ("broker.node", "import cluster.config"),
        ("broker.node", "from tests.trees import imports"),
    ],
)
def test_a_wrong_import_is_found(name: str, text: str) -> None:
    assert len(faults_of(parse(text, name))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dledger.core.raft", "from dledger.core.types import Entry\nfrom . import types"),
        ("remoting.server", "from remoting.frames import FrameReader\nimport trio\nfrom runtime.model import Env"),
        ("chaos.sim.world", "from broker.node import BrokerNode\nfrom dledger import group\nimport namesrv"),
        ("cli.serve", "from broker.node import BrokerNode"),
        ("namesrv.registry_pysyncobj", "from pysyncobj import SyncObj"),
    ],
)
def test_a_right_import_is_not(name: str, text: str) -> None:
    assert not faults_of(parse(text, name))


def test_third_party_imports_are_declared() -> None:
    """Everything imported is in the project file, so that a plain installation has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for group in project["optional-dependencies"].values() for name in group),
    ]
    declared = {re.split(r"[<>=~!;\[ ]", text)[0].lower().replace("-", "_") for text in wanted} | {"attr"}
    known = declared | set(PACKAGES) | sys.stdlib_module_names
    faults = [
        f"{module.path}:{line}: {name}"
        for module in product_modules()
        for line, name in imports(module)
        if name.split(".")[0] not in known
    ]
    assert not faults, "\n".join(faults)


def test_the_command_line_loads_packages_only_when_a_verb_needs_them() -> None:
    """The top-level imports of cli.main stay light: `quorate --help` must not load a broker."""
    program = "import sys, cli.main; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "click" in loaded
    heavy = {"broker", "dledger", "namesrv", "remoting", "quorate", "cluster", "chaos", "trio", "rich", "structlog"}
    assert not loaded & heavy


def test_no_package_hides_a_cycle() -> None:
    """Packages form layers: following the arrows never leads back."""
    reach: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for module in product_modules():
        own = module.name.split(".")[0]
        for _, name in imports(module):
            package = name.split(".")[0]
            if package in reach and package != own:
                reach[own].add(package)
    done: set[str] = set()
    while len(done) < len(reach):
        free = {package for package, needed in reach.items() if package not in done and needed <= done}
        assert free, {package: needed - done for package, needed in reach.items() if package not in done}
        done |= free


def test_trees_finds_imports_inside_functions() -> None:
    module = parse("def f():\n    import a.b\n    from c import d", "x")
    assert sorted(imports(module)) == [(2, "a.b"), (3, "c.d")]
    assert isinstance(module.tree, ast.Module)
