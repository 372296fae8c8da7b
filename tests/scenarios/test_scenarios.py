"""Every scenario file plays to exactly the trace it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.script import Script, files


def test_there_are_scenarios() -> None:
    assert len(files()) >= 5


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert Script().play(text) == text, "if the new trace is right: python -m tests.scenarios.script --rewrite"
