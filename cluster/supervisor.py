"""The supervisor behind `quorate up`: one OS process per node, so that a real kill is a real kill (design §7).

All nodes start at once. Each writes JSON lines to a pipe: first `ready`, then each change of its role; that is how `up`
knows at once who leads and how long nobody did. What dies is started again after a second. An orderly stop asks brokers
first, name servers last. Children die with the supervisor, however it ends.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import trio
from attrs import define, field, frozen

from cluster.config import Address, ClusterConfig, Node
from cluster.layout import (
    ClusterError,
    ClusterIdentity,
    Layout,
    RunningNode,
    UpRefused,
    UpState,
    as_lost,
    filling_mark,
    is_node_blank,
    lock_data,
    lost_folders,
    prepare,
    write_identity,
    write_up_state,
)
from runtime.children import Child, spawn
from runtime.local_socket import serve_local, socket_path
from runtime.model import Env
from runtime.processes import (
    connected_process,
    cpu_seconds,
    describe_exit,
    listening_process,
    outgoing_ports,
    own_process_id,
)

if TYPE_CHECKING:
    from cluster.raft_groups import GroupView

RESTART_AFTER_S = 1.0
RESTART_AFTER_FAILED_STARTS_S = 10.0
FAILED_STARTS_MAX = 5
"""So many starts in a row that never got ready, and the pauses become long."""
READY_WITHIN_S = 30.0
"""So long may nothing get any further. On a busy machine, or with a long log, a start takes longer as a whole."""
PROGRESS_LOOK_S = 0.5
WORK_CPU_S = 0.5
"""CPU time that tells a node that is at work, however slowly, from one that waits for something."""
STOP_WITHIN_S = 8.0
DOUBLED_WITHIN_S = 0.5
MENDING = frozenset({"repairing", "installing"})
"""States of a log in which its node is at work, however long it takes."""
RESTART_DRAIN_S = 2.0
EVENTS_KEPT = 200
LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 4096

State = Literal["starting", "up", "down"]


class StartFailed(ClusterError):
    """A node ended before it was ready: which, and its last words."""


class NotReadyInTime(ClusterError):
    """Nodes run, but not all is as it should be."""


@frozen(kw_only=True)
class Event:
    """Something an operator wants to see."""

    at_ms: int
    kind: str
    """started, ready, blank, filled, refused, killed, exited, restarting, leader, no_leader, all_ready, stopping,
    stopped."""
    node: str | None
    text: str


@define
class _Slot:
    """One node: its process, and what it said last."""

    node: Node
    state: State = "down"
    since_ms: int = 0
    child: Child | None = None
    was_ready: bool = False
    failed_starts: int = 0
    restarts: int = 0
    stderr_bytes: int = 0
    """Size of its stderr file when the present process started."""
    is_restart_asked: bool = False
    refusal: str | None = None
    """Why it is not started, where it could be."""
    wake: trio.Event = field(factory=trio.Event)
    """Set to end a pause early: somebody asked for a restart."""
    ready: trio.Event = field(factory=trio.Event)
    """Of the present process."""


@define
class _Leadership:
    """Who leads one raft group, as its nodes reported it."""

    node: str | None = None
    term: int = 0
    lost_at: float | None = None
    """Monotonic; None before the first leader and while there is one."""
    known: trio.Event = field(factory=trio.Event)


class Supervisor:
    """Runs one cluster in one data folder. `run` holds its life; `request_stop` ends it in order."""

    def __init__(
        self,
        env: Env,
        config: ClusterConfig,
        layout: Layout,
        *,
        restarts_dead_nodes: bool = True,
        ephemeral: bool = False,
        on_event: Callable[[Event], None],
        command: Sequence[str] = (sys.executable, "-P", "-m", "cli"),
    ) -> None:
        """`command` is what runs `quorate`; a test may put another program there."""
        self.config = config
        self.layout = layout
        self.ready = trio.Event()
        """Every node is up, and a leader leads each raft group, or its nodes are mending their logs."""
        self.notice = ""
        """Which raft groups have no leader yet, although it is ready, and why."""
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._env = env
        self._restarts = restarts_dead_nodes
        self._ephemeral = ephemeral
        self._on_event = on_event
        self._command = tuple(command)
        self._slots = {node.name: _Slot(node) for node in config.nodes()}
        self._leaderships = {group.name: _Leadership() for group in config.groups}
        self._identity: ClusterIdentity | None = None
        self._unformatted: frozenset[str] = frozenset()
        self._control = ""
        self._started_ms = 0
        self._is_stopping = False
        self._stop_asked = trio.Event()
        self._stop_asked_at = 0.0
        self._now_asked = trio.Event()

    # --- what others see ---

    def state(self) -> UpState:
        nodes = tuple(
            RunningNode(
                name=slot.node.name,
                group=slot.node.group,
                kind=slot.node.kind,
                process=slot.child.id if slot.child is not None else None,
                listen=str(slot.node.listen),
                state=slot.state,
                restarts=slot.restarts,
                since_ms=slot.since_ms,
            )
            for slot in self._slots.values()
        )
        brokers_first = tuple(sorted(nodes, key=lambda node: node.kind != "broker"))
        return UpState(
            supervisor=own_process_id(),
            namesrv=";".join(self.config.namesrv_addresses()),
            control=self._control,
            restarts_dead_nodes=self._restarts,
            ephemeral=self._ephemeral,
            started_ms=self._started_ms,
            nodes=brokers_first,
        )

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    def leader_of(self, group: str) -> str | None:
        """Name of the node that leads a raft group, as last reported."""
        return self._leaderships[group].node

    def request_stop(self) -> None:
        """Stop all in order; asked again: at once. A launcher in between may double one Ctrl-C, which counts once."""
        now = self._env.clock.monotonic()
        if self._stop_asked.is_set() and now - self._stop_asked_at > DOUBLED_WITHIN_S:
            self._now_asked.set()
        if not self._stop_asked.is_set():
            self._stop_asked_at = now
        self._stop_asked.set()

    # --- life ---

    async def run(self) -> None:
        """Start all nodes, set `ready` once they are, run until `request_stop`. Checkpoint.

        Raises UpRefused before anything was started, StartFailed when a node ended before it was ready, NotReadyInTime.
        Cancelling kills the nodes.
        """
        with lock_data(self._env, self.layout):
            identity = self._identity = prepare(self._env, self.layout, self.config)
            await self._refuse_taken_ports()
            self._unformatted = frozenset(name for name, group in identity.groups.items() if not group.is_formatted)
            self._control = socket_path(self.layout.data, "up.sock")
            self._started_ms = self._env.clock.wall_ms()
            try:
                await self._run_nodes()
            finally:
                if self._env.files.exists(self.layout.up_file):
                    self._env.files.unlink(self.layout.up_file)

    async def _run_nodes(self) -> None:
        async with trio.open_nursery() as nursery:
            for slot in self._slots.values():
                nursery.start_soon(self._keep, slot)
            await nursery.start(serve_local, self._control, self._answer)
            with trio.CancelScope() as starting:
                nursery.start_soon(self._cancel_when_stop_asked, starting)
                await self._wait_ready()
                self.ready.set()
            await self._stop_asked.wait()
            await self._stop_nodes()
            nursery.cancel_scope.cancel()

    async def _cancel_when_stop_asked(self, scope: trio.CancelScope) -> None:
        await self._stop_asked.wait()
        scope.cancel()

    async def _wait_ready(self) -> None:
        """Raises NotReadyInTime; not where nodes mend their logs, which may take long and needs all of them alive."""
        if not await self._is_ready_in_time():
            self.notice = await self._why_not_ready()
        assert self._identity is not None
        self._identity = self._identity.formatted()
        self._unformatted = frozenset()
        write_identity(self._env.files, self.layout, self._identity)
        seconds = (self._env.clock.wall_ms() - self._started_ms) / 1000
        self._tell("all_ready", None, f"ready in {seconds:.1f} s" + (f"; {self.notice}" if self.notice else ""))

    async def _is_ready_in_time(self) -> bool:
        """Whether all is ready before nothing has got any further for a while."""
        clock = self._env.clock
        reached, since = self._reached(), clock.monotonic()
        while clock.monotonic() - since < READY_WITHIN_S:
            with clock.move_on_after(PROGRESS_LOOK_S):
                for slot in self._slots.values():
                    await slot.ready.wait()
                for leadership in self._leaderships.values():
                    await leadership.known.wait()
                return True
            before, reached = reached, self._reached()
            if reached != before:
                since = clock.monotonic()
        return False

    def _reached(self) -> tuple[object, ...]:
        """How far the start has come; the same twice: nobody got any further in between. A node that was ready and
        starts again does not count: it may do so for ever."""
        work = [
            int(cpu_seconds(slot.child.pid) / WORK_CPU_S)
            for slot in self._slots.values()
            if slot.child is not None and not slot.was_ready
        ]
        return work, len(self._leaderless())

    async def _why_not_ready(self) -> str:
        """Where all that is missing are leaders of raft groups whose nodes mend their logs: what these wait for.

        Else raises NotReadyInTime with what is missing.
        """
        late = [slot.node.name for slot in self._slots.values() if not slot.ready.is_set()]
        if late:
            names = ", ".join(late)
            raise NotReadyInTime(
                f"{names} not ready, and no progress seen for {READY_WITHIN_S:.0f} s\n{self._log_tail(late[0])}"
            )
        leaderless = self._leaderless()
        views = await self._views_of(leaderless)
        mending = [_what_mends(view) for view in views]
        if all(mending):
            return "; ".join(mending)
        text = f"no leader of {', '.join(leaderless)} within {READY_WITHIN_S:.0f} s; logs are in {self.layout.logs}"
        raise NotReadyInTime("\n".join([text, *_troubles_of(views)]))

    def _leaderless(self) -> list[str]:
        return [name for name, leadership in self._leaderships.items() if not leadership.known.is_set()]

    async def _views_of(self, groups: Sequence[str]) -> list[GroupView]:
        """What the nodes of raft groups say."""
        import quorate
        from cluster.raft_groups import view_groups

        nodes = self.config.nodes()
        addresses = {name: [str(node.listen) for node in nodes if node.group == name] for name in groups}
        async with quorate.connect(self.config.namesrv_addresses(), env=self._env) as client:
            return await view_groups(self._env, client, addresses)

    async def _refuse_taken_ports(self) -> None:
        """Better one sentence now than four nodes that fail. A second's grace: a killed cluster may just be leaving."""
        deadline = self._env.clock.monotonic() + 1.0
        for node in self.config.nodes():
            for address in (node.listen, node.peer):
                while address is not None:
                    try:
                        listener = await self._env.net.listen(address.host, address.port)
                    except OSError as error:
                        if self._env.clock.monotonic() < deadline:
                            await self._env.clock.sleep(0.05)
                            continue
                        raise UpRefused(_taken(node, address, error)) from None
                    await listener.aclose()
                    break

    # --- one node ---

    async def _keep(self, slot: _Slot) -> None:
        """Start a node, and start it again for as long as that is wanted."""
        while True:
            await self._wait_startable(slot)
            if self._is_stopping:
                return
            code = await self._run_once(slot)
            self._settle_leadership(slot)
            if self._is_stopping:
                return
            if not self.ready.is_set() and not slot.was_ready:
                raise StartFailed(
                    f"{slot.node.name} ended with {describe_exit(code)}\n{self._log_tail(slot.node.name)}"
                )
            slot.failed_starts = 0 if slot.ready.is_set() else slot.failed_starts + 1
            was_asked = slot.is_restart_asked
            if was_asked:
                self._tell("exited", slot.node.name, f"{slot.node.name} stopped for a restart")
            elif code < 0:
                self._tell("killed", slot.node.name, f"{slot.node.name} {describe_exit(code)}")
            else:
                self._tell("exited", slot.node.name, f"{slot.node.name} ended with {describe_exit(code)}")
            slot.wake = trio.Event()
            if not was_asked:
                pause = RESTART_AFTER_S if slot.failed_starts < FAILED_STARTS_MAX else RESTART_AFTER_FAILED_STARTS_S
                if self._restarts:
                    with self._env.clock.move_on_after(pause):
                        await slot.wake.wait()
                else:
                    await slot.wake.wait()
            if self._is_stopping:
                return
            slot.is_restart_asked = False
            slot.restarts += 1
            self._tell("restarting", slot.node.name, f"{slot.node.name} starts again")

    async def _wait_startable(self, slot: _Slot) -> None:
        """Until nothing speaks against starting a node, or the cluster stops."""
        while not self._is_stopping:
            reason = self._why_not(slot.node)
            if reason is not None and reason != slot.refusal:
                self._tell("refused", slot.node.name, reason)
            slot.refusal = reason
            if reason is None:
                return
            slot.wake = trio.Event()
            with self._env.clock.move_on_after(RESTART_AFTER_FAILED_STARTS_S):
                await slot.wake.wait()

    def _why_not(self, node: Node) -> str | None:
        """A node whose folder was lost is filled by the others; but most of a group cannot be."""
        files, layout = self._env.files, self.layout
        if node.group is None or node.group in self._unformatted or not is_node_blank(files, layout.node(node.name)):
            return None
        group = self.config.group(node.group)
        folders = {each.id: layout.node(each.name) for each in self.config.nodes() if each.group == node.group}
        lost = lost_folders(files, group, folders)
        if not lost:
            return None
        return (
            f"{node.name} is not started: {as_lost(lost)}, and the rest of {group.name} is no majority; put the data "
            "back, or wait for those that are being filled"
        )

    async def _run_once(self, slot: _Slot) -> int:
        slot.ready = trio.Event()
        stderr = self.layout.stderr(slot.node.name)
        slot.stderr_bytes = len(self._env.files.read_bytes(stderr)) if self._env.files.exists(stderr) else 0
        child = slot.child = spawn(
            self._arguments(slot.node),
            stderr_path=stderr,
            event_fd_option="--event-fd",
            bytecode=self.layout.bytecode,
        )
        self._enter(slot, "starting")
        self._tell("started", slot.node.name, f"{slot.node.name} started, pid {child.pid}")
        try:
            async with child.events:
                await self._listen(slot, child)
            code = await child.wait()
        except BaseException:
            child.send_signal(signal.SIGKILL)
            with trio.CancelScope(shield=True):  # ends within milliseconds, and no zombie is left
                await child.wait()
            raise
        slot.child = None
        self._enter(slot, "down")
        return code

    def _arguments(self, node: Node) -> list[str]:
        arguments = [
            *self._command,
            "serve",
            node.name,
            "--data",
            self.layout.data,
            "--managed",
            str(own_process_id().pid),
        ]
        if node.group is None:
            return arguments
        folder = self.layout.node(node.name)
        is_founder = node.id in {founder.name for founder in self.config.group(node.group).founders}
        if is_founder and node.group in self._unformatted:
            arguments.append("--format")
        elif is_node_blank(self._env.files, folder):
            arguments.append("--join")
            self._env.files.make_dirs(folder)
            self._env.files.write_atomic(filling_mark(folder), b"")
            self._tell("blank", node.name, f"{node.name} has no data; the rest of its raft group will fill it")
        elif self._env.files.exists(filling_mark(folder)):
            arguments.append("--join")  # it ended before it had all: it is to say when it has
        return arguments

    async def _listen(self, slot: _Slot, child: Child) -> None:
        """Take its event lines until it ends."""
        pending = b""
        async for chunk in child.events:
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._take(slot, json.loads(line))

    def _take(self, slot: _Slot, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "ready":
                slot.was_ready = True
                slot.ready.set()
                self._enter(slot, "up")
                self._tell("ready", slot.node.name, f"{slot.node.name} ready on {slot.node.listen}")
            case "filled":
                mark = filling_mark(self.layout.node(slot.node.name))
                if self._env.files.exists(mark):
                    self._env.files.unlink(mark)
                    self._tell("filled", slot.node.name, f"{slot.node.name} has the data of its raft group")
            case "role" if slot.node.group is not None and not self._is_stopping:
                self._take_role(slot.node.group, slot.node.name, event)

    def _take_role(self, group: str, name: str, event: dict[str, Any]) -> None:
        leadership = self._leaderships[group]
        term = int(event["term"])
        if event["role"] == "leader" and event["ready"]:
            if term < leadership.term or (leadership.node, leadership.term) == (name, term):
                return
            text = f"{name} leader elected, term {term}"
            if leadership.lost_at is not None:
                text += f", {self._env.clock.monotonic() - leadership.lost_at:.2f} s without leader"
            leadership.node, leadership.term, leadership.lost_at = name, term, None
            leadership.known.set()
            self._tell("leader", name, text)
        elif leadership.node == name and event["role"] != "leader":
            leadership.node, leadership.lost_at = None, self._env.clock.monotonic()
            self._tell("no_leader", name, f"{name} gave up leadership of {group}, term {term}")

    def _settle_leadership(self, slot: _Slot) -> None:
        """A process that ended leads nobody."""
        for leadership in self._leaderships.values():
            if leadership.node == slot.node.name:
                leadership.node, leadership.lost_at = None, self._env.clock.monotonic()

    def _enter(self, slot: _Slot, state: State) -> None:
        slot.state = state
        slot.since_ms = self._env.clock.wall_ms()
        write_up_state(self._env.files, self.layout, self.state())

    # --- stopping ---

    async def _stop_nodes(self) -> None:
        self._is_stopping = True
        self._tell("stopping", None, "stopping")
        for slot in self._slots.values():
            slot.wake.set()
        for kind in ("broker", "namesrv"):  # a broker signs off at the name servers, so these go last
            slots = [slot for slot in self._slots.values() if slot.node.kind == kind]
            # One that is still loading has no handlers yet: SIGINT would leave a traceback in its stderr.
            self._signal([slot for slot in slots if slot.ready.is_set()], signal.SIGINT)
            self._signal([slot for slot in slots if not slot.ready.is_set()], signal.SIGTERM)
            with self._env.clock.move_on_after(STOP_WITHIN_S):
                await self._wait_ended(slots)
            self._signal(slots, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await self._wait_ended(slots)
        self._tell("stopped", None, "stopped")

    def _signal(self, slots: Sequence[_Slot], number: int) -> None:
        for slot in slots:
            if slot.child is not None:
                slot.child.send_signal(number)

    async def _wait_ended(self, slots: Sequence[_Slot]) -> None:
        while any(slot.child is not None for slot in slots):
            if self._now_asked.is_set():
                self._signal(slots, signal.SIGKILL)
            await self._env.clock.sleep(0.01)

    # --- words from the verbs ---

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """`quorate restart NODE`, and more words later. Answers when the node is ready again."""
        if request.get("do") != "restart":
            return {"error": f"unknown request {request.get('do')!r}"}
        slot = self._slots.get(str(request.get("node")))
        if slot is None:
            return {"error": f"no node {request.get('node')!r}"}
        reason = self._why_not(slot.node) if slot.child is None else None
        if reason is not None:
            return {"error": reason}
        before = slot.child.pid if slot.child is not None else None
        slot.is_restart_asked = slot.child is not None
        slot.failed_starts = 0
        ended_ready = slot.ready
        if slot.child is not None:
            slot.child.send_signal(signal.SIGTERM)
        slot.wake.set()
        with self._env.clock.move_on_after(READY_WITHIN_S):
            while slot.ready is ended_ready:
                await self._env.clock.sleep(0.01)
            begun = slot.ready
            while not begun.is_set() and slot.ready is begun and slot.failed_starts == 0:
                await self._env.clock.sleep(0.01)
            if slot.child is not None and begun.is_set():
                return {"node": slot.node.name, "pid": slot.child.pid, "pid_before": before}
            return {"error": f"{slot.node.name} ended before it was ready\n{self._log_tail(slot.node.name)}"}
        return {
            "error": f"{slot.node.name} not ready again within {READY_WITHIN_S:.0f} s\n{self._log_tail(slot.node.name)}"
        }

    # --- telling ---

    def _tell(self, kind: str, node: str | None, text: str) -> None:
        event = Event(at_ms=self._env.clock.wall_ms(), kind=kind, node=node, text=text)
        self.events.append(event)
        self._on_event(event)

    def _log_tail(self, name: str) -> str:
        """The last words of a node, indented: what its present process printed, else the end of its log."""
        lines: list[str] = []
        for path, start in ((self.layout.stderr(name), self._slots[name].stderr_bytes), (self.layout.log(name), 0)):
            if not lines and self._env.files.exists(path):
                text = self._env.files.read_bytes(path)[start:][-LOG_TAIL_BYTES:].decode(errors="replace")
                lines = text.splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"  its log: {self.layout.log(name)}"])


def _what_mends(view: GroupView) -> str:
    """Which nodes of a raft group without leader mend their logs, and what they wait for; "" where none does."""
    said = [node.said for node in view.answering if node.said is not None]
    mending = [each for each in said if each["state"] in MENDING]
    if not mending:
        return ""
    nodes = ", ".join(f"{each['node_id']} is {each['state']}: {each['waits_for']}" for each in mending)
    return f"{view.name} has no leader yet ({nodes})"


def _troubles_of(views: Sequence[GroupView]) -> list[str]:
    """What the doctor has to say about raft groups without leader."""
    from cluster.doctor import check_group

    found = [finding for view in views for finding in check_group(view, None) if finding.level != "ok"]
    return [f"  {finding.about}: {finding.text}" for finding in found]


def _taken(node: Node, address: Address, error: OSError) -> str:
    if "in use" not in str(error):
        return f"{node.name}: {error}; change its address in the configuration, or use --port-base N"
    holder = listening_process(address.port)
    if holder is not None:
        return (
            f"port {address.port} ({node.name}) is taken by process {holder.pid}; stop it, or move all ports with "
            "--port-base N"
        )
    connected = connected_process(address.port)
    who = f" by a connection of process {connected.pid}" if connected is not None else ""
    return f"port {address.port} ({node.name}) is taken{who}; {_how_to_keep(address.port)}"


def _how_to_keep(port: int) -> str:
    """What to do about a port that nobody listens on."""
    outgoing = outgoing_ports()
    if outgoing is None or not outgoing[0] <= port <= outgoing[1]:
        return "start again when that has ended, or move all ports with --port-base N"
    return (
        f"this machine gives ports from {outgoing[0]} on to outgoing connections: start again, or better move all "
        "ports below with --port-base N"
    )
