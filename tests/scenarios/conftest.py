"""`pytest tests/scenarios --rewrite`: the traces as they are now, to be read before they are committed."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write the present traces into the scenario files")
