"""Unmodified RocketMQ clients do their daily work against the cluster."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

JAVA = ["sync", "async", "oneway", "batch", "ordered", "tag", "retry_dlq", "query", "large", "offsets"]
GO = ["sync", "async", "oneway", "batch", "ordered", "tag", "retry_dlq", "pull"]
NODE = ["sync", "async", "ordered", "tag", "retry_dlq"]
CLIENTS = {"java-4.9.8": JAVA, "java-5.3.3": JAVA, "go-2.1.2": GO, "node-3.12.0": NODE}
EVERY = [(client, scenario) for client, scenarios in CLIENTS.items() for scenario in scenarios]


@pytest.mark.parametrize(("client", "scenario"), EVERY)
def test_one_group(programs, client, scenario):
    outcome = programs.outcome(client, scenario)
    assert outcome.ok, outcome.detail


@pytest.mark.parametrize(("client", "scenario"), [pair for pair in EVERY if pair[0] != "java-4.9.8"])
def test_two_groups(programs_two_groups, client, scenario):
    outcome = programs_two_groups.outcome(client, scenario)
    assert outcome.ok, outcome.detail
