"""Every scenario file plays to exactly the trace it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.script import Script, files


def test_there_are_scenarios() -> None:
    assert len(files()) >= 15


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_scenario(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    played = Script().play(text)
    if request.config.getoption("--rewrite", default=False):
        path.write_text(played, encoding="utf-8")
    else:
        assert played == text, "if the new trace is right: pytest tests/scenarios --rewrite"


def test_a_changed_trace_is_found() -> None:
    text = "group n0= n1= n2=\n----\nok\n\ntick n0\n----\nn0 LEADER term=1: nobody asked\n"
    played = Script().play(text)
    assert played != text and "PRE_CANDIDATE" in played
    assert Script().play(played) == played
