"""The command line without a cluster: help, wrong usage, what it says where nothing runs, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import VERBS, cli
from cluster.config import default_text
from cluster.layout import Layout, UpState, write_up_state
from runtime.processes import own_process_id
from runtime.real import real_env


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    """Our own exceptions must end as one line: anything else is re-raised here."""
    result = CliRunner().invoke(cli, arguments, prog_name="quorate", input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_lists_every_verb_and_examples() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in result.output
    assert "quorate kill leader" in result.output


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"chaos"}))
def test_each_verb_has_help_with_examples(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    if verb != "version":
        assert "Examples:" in result.output
    assert VERBS[verb][1].rstrip(".").split()[0] in result.output


def test_help_imports_nothing_heavy() -> None:
    heavy = ("trio", "rich", "cattrs", "structlog", "msgspec")
    code = f"import sys; import cli.main; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_misspelt_verb_is_met_with_the_nearest() -> None:
    result = invoke("staus")
    assert result.exit_code == 2
    assert "Did you mean 'status'?" in result.output


def test_version() -> None:
    document = json.loads(invoke("version", "--json").output)
    assert set(document) == {"quorate", "python", "trio"}
    assert document["quorate"] in invoke("version").output
    assert document["quorate"] in invoke("--version").output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert "_QUORATE_COMPLETE" in result.output


@pytest.mark.parametrize("verb", [["ps"], ["down"], ["status"], ["kill", "leader"], ["restart", "n1"]])
def test_nothing_runs(verb: list[str], tmp_path: Path) -> None:
    result = invoke(*verb, "--data", str(tmp_path))
    assert result.exit_code == 3
    assert f"no cluster runs in {tmp_path}; start one with `quorate up" in result.stderr
    assert result.stdout == ""
    result = invoke(*verb, "--data", str(tmp_path), "--json")
    assert result.exit_code == 3
    assert result.stdout == ""
    document = json.loads(result.stderr)
    assert document["exit_code"] == 3
    assert "no cluster runs" in document["error"]


def test_a_dead_supervisor_is_no_cluster(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    gone = type(own_process_id())(pid=ended.pid, started_ticks=1)
    state = UpState(
        supervisor=gone, namesrv="127.0.0.1:1", control="", restarts_dead_nodes=True, ephemeral=False, started_ms=0
    )
    write_up_state(real_env().files, Layout(str(tmp_path)), state)
    assert invoke("ps", "--data", str(tmp_path)).exit_code == 3


@pytest.mark.parametrize(
    "verb", [["produce", "t", "x"], ["consume", "t", "--group", "g"], ["bench"], ["topic", "list"]]
)
def test_clients_say_where_nothing_runs(verb: list[str], tmp_path: Path) -> None:
    result = invoke(*verb, "--data", str(tmp_path))
    assert result.exit_code == 3
    assert "no cluster runs in" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["produce", "t"], "nothing to send"),
        (["produce", "t", "x", "--size", "3"], "not both"),
        (["produce", "t", "x", "--count", "0"], "0 is not in the range"),
        (["consume", "t"], "--group"),
        (["topic", "delete", "t"], "--yes"),
        (["up", "--ephemeral", "--data", "/tmp/x"], "--ephemeral"),
        (["up", "--config", "/nowhere/cluster.toml"], "cannot read /nowhere/cluster.toml: No such file"),
        (["up", "--port-base", "70000"], "--port-base 70000: between"),
        (["up", "--groups", "0"], "--groups 0: between"),
        (["completion", "tcsh"], "tcsh"),
        (["produce", "t", "x", "-n", "nonsense"], "an address is host:port, not 'nonsense'"),
        (["produce", "t", "x", "-n", "127.0.0.1:1", "--key", "a b"], "a key is text without blanks"),
        (["produce", "t", "x", "-n", "127.0.0.1:1", "--tag", "a|b"], "'a|b' is no tag"),
        (["produce", "", "x", "-n", "127.0.0.1:1"], "a message needs a topic"),
        (["consume", "t", "--group", "g", "-n", "127.0.0.1:1", "--filter", "||"], "no tag in the filter '||'"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("verb", [["up"], ["up", "--detach"], ["serve", "n0"], ["ps"]])
def test_a_typo_in_the_configuration(verb: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(default_text().replace("flush =", "flsh ="))
    result = invoke(*verb, "--config", str(path))
    assert result.exit_code == 2
    assert result.stderr == f'quorate: {path}: group "broker-a": unknown key "flsh"; did you mean "flush"?\n'
    assert not (tmp_path / "data").exists()


def test_serve_names_the_nodes_there_are(tmp_path: Path) -> None:
    result = invoke("serve", "n7", "--data", str(tmp_path))
    assert result.exit_code == 2
    assert 'no node "n7" in this cluster; there are ns0, n0, n1, n2' in result.stderr


def test_unwritable_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for more in ([], ["--detach"]):
        result = invoke("up", "--data", str(tmp_path / "file"), *more)
        assert result.exit_code == 1
        assert "cannot write to data folder" in result.stderr
        assert "--data DIR" in result.stderr
