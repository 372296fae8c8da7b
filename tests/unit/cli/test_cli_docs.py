"""docs/cli.md and README.md say what the code says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest

from cli.main import VERBS
from cluster.config import ClusterSection, GroupSection, NamesrvSection, NodeSection

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", [ClusterSection, NamesrvSection, GroupSection, NodeSection])
def test_every_setting_is_in_the_table(section: type) -> None:
    for attribute in attrs.fields(section):
        if attribute.name != "nodes":
            assert f"| `{attribute.name}` |" in PAGE
            assert attribute.metadata["help"] in PAGE


def test_samples_are_json() -> None:
    samples = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert len(samples) > 12
    for sample in samples:
        json.loads(sample)


def test_readme_names_only_verbs_that_exist() -> None:
    named = set(re.findall(r"quorate (\w+)", README))
    words = {verb for verb in named if f"`quorate {verb}" in README or f"run quorate {verb}" in README}
    assert {"up", "kill", "produce", "consume"} <= words <= set(VERBS)


def test_readme_opens_with_the_two_commands() -> None:
    opening = README[:400]
    assert "pip install uv && uv run quorate up" in opening
    assert "uv run pytest" in opening
