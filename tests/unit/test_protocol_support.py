"""docs/protocol-support.md names exactly the request codes that the code serves."""

from __future__ import annotations

import re
from pathlib import Path

from remoting.codes import RequestCode

ROOT = Path(__file__).resolve().parents[2]
HOT = {"SEND_MESSAGE", "SEND_MESSAGE_V2", "SEND_BATCH_MESSAGE", "PULL_MESSAGE", "LITE_PULL_MESSAGE"}


def served(path: str) -> set[str]:
    """Names in the dict from request codes to handlers of a module."""
    return set(re.findall(r"^\s+RequestCode\.(\w+): ", (ROOT / path).read_text(), re.MULTILINE))


def documented(part: str) -> set[str]:
    text = (ROOT / "docs/protocol-support.md").read_text()
    section = text.split(f"## {part}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", section, re.MULTILINE)
    for code, name in rows:
        assert RequestCode[name] == int(code)
    assert len(rows) == len({name for _, name in rows}), "a code is listed twice"
    return {name for _, name in rows}


def test_the_page_lists_what_a_broker_serves() -> None:
    assert documented("Brokers") == served("broker/handlers.py") | HOT


def test_the_page_lists_what_a_name_server_serves() -> None:
    assert documented("Name servers") == served("namesrv/processors.py")
