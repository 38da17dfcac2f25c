"""The roster: which site is behind which node.

Node ids are random and change when a site reconnects; names are stable. The hello binds one to the other, and a site
that does not fit the run is refused there, with a code, before anything is trained.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsugiki.common import __version__, minor
from tsugiki.common.audit import AuditLog
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import Code, NotEnoughSites, WireError
from tsugiki.common.privacy.plan import Plan
from tsugiki.common.settings import NAME_PATTERN
from tsugiki.common.wire.messages import HelloReply, HelloRequest, error_code, from_record, to_record
from tsugiki.common.wire.spec import AdapterSpec
from tsugiki.server.engines.grid import LONGEST_PAUSE_S, RETURN_S, RunGrid, Stop, exchange, wait_for_nodes
from tsugiki.server.run.replies import GONE
from tsugiki.server.run.silence import Silence

if TYPE_CHECKING:
    from flwr.app import Message


MOST_CLIENTS = 10**6
"""Most clients of one site in a run without privacy; a gateway that reports more is refused."""
GREETING_S = 5.0
"""How long nodes wait for others before they are greeted. A few gateways may have enough clients."""
HELLO_PATIENCE_S = 20.0
"""How long a round waits for the hello of a node that is new to it."""
REFUSED_AGAIN_S = 30.0
"""When a refused node is first asked again: perhaps its site was mended in the meantime."""
LONGEST_INTERVAL_S = 3600.0
"""The intervals between hellos to a node that is refused, or silent, double up to this."""
_NOTE = r"[a-z0-9-]{1,40}(:[0-9]{1,9})?"
"""A note that may be shown on a terminal; it comes from a site."""


@dataclass(frozen=True)
class Member:
    """A site that passed the hello.

    Args:
        name: of the site.
        node_id: of its node; another one after a reconnection.
        rows: number of its training rows; 0 in a private run, which withholds it.
        evaluation_rows: number of its evaluation rows; 0 in a private run.
        clients: number of its clients.
        notes: what is unusual about its rows, as `shard-texts-cut:12`.
    """

    name: str
    node_id: int
    rows: int
    evaluation_rows: int
    clients: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Retry:
    """When a node that is no member is greeted again.

    Args:
        at_s: not before this time.
        interval_s: from the last hello until then.
        returned: whether a silent node has reconnected, and was greeted early for it.
    """

    at_s: float
    interval_s: float
    returned: bool = False


@dataclass(frozen=True)
class _Verdict:
    """The verdict on a hello: the member, or the code of the refusal; and the event for the audit log."""

    entry: Member | Code
    event: str
    details: Mapping[str, Any]


class Roster:
    """The connected sites of a run, as of the last `refresh`.

    Args:
        grid: sends the hellos.
        config: of the run.
        spec: of the adapter; each site must have the same.
        plan: of a private run: it limits the clients of a site and of the run, and under secure aggregation it says
            how many sites a sum takes. None: of a run without privacy.
        audit: receives an event for every hello and every refusal.
        stop: set when the user asks to stop.
        names: returns the names under which nodes' keys are registered, by node id: no node may use another's.
            None: nodes have no keys.
        sessions: returns since when each node is connected, by node id: a node that has reconnected says hello again.
            None: a node that reconnects has another id, or is seen to be away.
    """

    def __init__(
        self,
        grid: RunGrid,
        config: RunConfig,
        spec: AdapterSpec,
        plan: Plan | None,
        audit: AuditLog,
        stop: Stop,
        names: Callable[[], Mapping[int, str]] | None = None,
        sessions: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self._grid = grid
        self._config = config
        self._spec = spec
        self._plan = plan
        self._audit = audit
        self._stop = stop
        self._names = names
        self._sessions = sessions
        # more clients than the plan's are refused: delta and the width of a sum depend on their number
        self._most_clients: int | None = None
        self._most_of_a_site = MOST_CLIENTS
        self.min_sites = 0
        if plan is not None:
            self._most_clients = plan.enrolled_clients
            self._most_of_a_site = plan.max_clients_per_site
            if plan.secure_aggregation:
                self.min_sites = plan.min_sites
        self._known: dict[int, Member | Code] = {}  # a refused node has its code here
        self._present: set[int] = set()
        self._connected: set[int] = set()
        self._since: Mapping[int, str] = {}
        self._retries: dict[int, _Retry] = {}  # nodes that were greeted and are no members
        self.silence = Silence()

    def members(self) -> dict[str, Member]:
        """Return the sites that are connected now, by name, sorted."""
        return self._members_of(self._present)

    def connected(self) -> dict[str, Member]:
        """Return the sites that were connected at the last `refresh`, silent since or not, by name, sorted."""
        return self._members_of(self._connected)

    def _members_of(self, nodes: Iterable[int]) -> dict[str, Member]:
        found = [self._known.get(node) for node in nodes]
        members = sorted((entry for entry in found if isinstance(entry, Member)), key=lambda member: member.name)
        return {member.name: member for member in members}

    def clients(self) -> int:
        """Return how many clients the connected sites have."""
        return sum(member.clients for member in self.members().values())

    def refused(self) -> dict[int, str]:
        """Return the nodes that failed the hello, with their codes."""
        return {node: entry for node, entry in self._known.items() if isinstance(entry, str)}

    def enough(self, members: Collection[Member] | None = None) -> bool:
        """Return whether these sites can make up a round; None: the connected ones."""
        if members is None:
            members = self.members().values()
        clients = sum(member.clients for member in members)
        return clients >= self._config.strategy.min_clients and len(members) >= self.min_sites

    def _complete(self) -> bool:
        """Return whether the sites to start with are there."""
        wanted = self._config.strategy.start_with
        members = self.members()
        missing = wanted > len(members) if isinstance(wanted, int) else set(wanted) - members.keys()
        return self.enough() and not missing

    def nodes_wanted(self) -> int:
        """Return how many nodes are waited for at the start, if each has one client and passes."""
        strategy = self._config.strategy
        return max(strategy.min_clients, strategy.sites_at_start, self.min_sites)

    def missing(self) -> dict[str, str]:
        """Return the sites that could be expected and are no members, by name or node, with the reason.

        Expected are the names in `strategy.start_with` and those of registered keys, and the connected nodes.
        """
        members = self.members()
        keys = self._keys()
        wanted = self._config.strategy.start_with
        names = set(keys.values()) if isinstance(wanted, int) else {*wanted, *keys.values()}
        found = {name: "not connected" for name in names - members.keys()}
        refused = self.refused()
        for node in self._connected:
            if not isinstance(self._known.get(node), Member):
                found[keys.get(node) or f"node {node}"] = refused.get(node, "no answer to the hello")
        return dict(sorted(found.items()))

    def wait(self, seen: Callable[[int], None]) -> None:
        """Wait until the sites to start with have connected and passed the hello, or the time is up.

        Raises:
            NotEnoughSites: the time is up, and they are not even a quorum.
        """
        wanted = self._config.strategy.min_clients
        timeout_s = self._config.strategy.connect_timeout_s
        if self._grid.sequential:
            timeout_s = 0.0  # all its nodes are there from the start
        ends = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, ends - time.monotonic())
            nodes = self.nodes_wanted() + len(self.refused())
            wait_for_nodes(self._grid, nodes, min(left_s, GREETING_S), self._stop, seen)
            self._greet_silent_again()
            # a silent node must not keep those that connect in the meantime from being greeted
            self.refresh(min(left_s, HELLO_PATIENCE_S) or HELLO_PATIENCE_S)
            if self._complete():
                return
            if not left_s:  # this look began after the end: it has seen all that connected in time
                break
            time.sleep(min(LONGEST_PAUSE_S, max(0.0, ends - time.monotonic())))
        if self.enough():
            return
        refusals = ", ".join(sorted(set(self.refused().values())))
        found = f"{self.clients()} of {wanted} clients"
        expected = f"strategy.min_clients = {wanted}"
        hint = "start more sites, or raise connect_timeout_s"
        if self.min_sites:
            found += f" at {len(self.members())} of {self.min_sites} sites"
            expected += f", privacy.min_sites = {self.min_sites}"
        found += f" are connected after {timeout_s:g} s"
        if refusals:
            found += f"; {len(self.refused())} refused: {refusals}"
            hint = "look at the refused sites' own logs"
        raise NotEnoughSites(found, expected, hint)

    def gather(self) -> None:
        """Refresh, after nodes that left have had time to come back: perhaps only their connection was lost."""
        ends = time.monotonic() + RETURN_S
        connected = set(self._grid.get_node_ids())
        while self._present - connected and time.monotonic() < ends:
            self._stop.check()
            time.sleep(LONGEST_PAUSE_S)
            connected = set(self._grid.get_node_ids())
        # not a second look: a node that leaves after this one is waited for in the round
        self.refresh(connected=connected)

    def wait_for_quorum(self, enough: Callable[[], bool], wait_s: float) -> None:
        """Wait until enough sites are back, for `wait_s` at most.

        Args:
            enough: returns whether the members can make up a round; some of them may have to be left out.
            wait_s: the longest wait.
        """
        ends = time.monotonic() + wait_s
        while not enough() and time.monotonic() < ends:
            self._stop.check()
            time.sleep(LONGEST_PAUSE_S)
            self.refresh()

    def drop(self, nodes: Iterable[int]) -> None:
        """Count nodes that did not answer as absent until the next `refresh`."""
        self._present -= set(nodes)

    def refresh(self, patience_s: float = HELLO_PATIENCE_S, connected: set[int] | None = None) -> None:
        """Greet the connected nodes that are new or have come back.

        A node that does not answer in `patience_s` is left alone for `connect_timeout_s`, then greeted again; a refused
        node is greeted again too. Each time the interval doubles. A node that has reconnected is greeted at once; one
        that was silent, only the first time, because its hello is waited for.

        Args:
            patience_s: for the answers.
            connected: the nodes that are connected, if the caller has just asked; None: they are asked for.
        """
        if connected is None:
            connected = set(self._grid.get_node_ids())
        now = time.monotonic()
        back = connected - self._connected
        self._present = set(connected)
        self._connected = set(connected)
        reconnected = self._reconnected()
        self._advance_retries(reconnected | back, now)
        self._forget((reconnected & self._known.keys()) | (self._known.keys() - self._present))
        new = sorted(node for node in self._present if self._is_due(node, now))
        if new:
            self._greet(new, patience_s)
            self._plan_retries(new, now)
        self._present &= set(self._known)

    def _reconnected(self) -> set[int]:
        """Return the nodes that have reconnected since the last look, under the same id."""
        if self._sessions is None:
            return set()
        since = self._sessions()
        again = {node for node, before in self._since.items() if since.get(node, before) != before}
        self._since = {node: since[node] for node in self._present if node in since}
        return again

    def _advance_retries(self, returned: set[int], now: float) -> None:
        """Let silent nodes that have reconnected be greeted at once, each one time; forget those that are long gone."""
        for node, retry in list(self._retries.items()):
            if node in self._known:
                continue
            if node in returned and not retry.returned:
                self._retries[node] = replace(retry, at_s=now, returned=True)
            elif node not in self._present and now >= retry.at_s + LONGEST_INTERVAL_S:
                del self._retries[node]

    def _forget(self, nodes: set[int]) -> None:
        """Forget the verdicts on nodes that have left or reconnected, because their sites may have changed.

        A refusal that may have been because of one of them is forgotten too.
        """
        if nodes:
            nodes = nodes | {n for n, entry in self._known.items() if entry in ("site-name-taken", "too-many-clients")}
        for node in nodes:
            self._known.pop(node, None)
            self._retries.pop(node, None)

    def _is_due(self, node: int, now: float) -> bool:
        """Return whether a connected node is to be greeted."""
        entry = self._known.get(node)
        if isinstance(entry, Member) or (entry is not None and self._grid.simulated):
            return False
        return node not in self._retries or self._retries[node].at_s <= now

    def _greet_silent_again(self) -> None:
        """Let the nodes that have not answered their hello be greeted at the next `refresh`.

        A node that is slow at its first hello keeps what it has prepared, and answers the next one sooner.
        """
        self._retries = {node: retry for node, retry in self._retries.items() if node in self._known}

    def _plan_retries(self, greeted: Iterable[int], now: float) -> None:
        """Settle when those of the greeted nodes that are no members are greeted again."""
        for node in greeted:
            entry = self._known.get(node)
            before = self._retries.pop(node, None)
            if isinstance(entry, Member):
                continue
            first_s = self._config.strategy.connect_timeout_s if entry is None else REFUSED_AGAIN_S
            interval_s = min(2 * before.interval_s, LONGEST_INTERVAL_S) if before else first_s
            returned = before is not None and before.returned
            self._retries[node] = _Retry(now + interval_s, interval_s, returned)

    def _greet(self, nodes: list[int], patience_s: float) -> None:
        from flwr.app import Message

        content = to_record(HelloRequest(self._config.for_sites(self._plan), __version__))
        if self._grid.sequential:
            seconds = self._config.strategy.round_timeout_s  # of each node: they answer one after the other
            patience_s = self.silence.timeout_s() if seconds == "auto" else seconds
        messages = [Message(content, node, "query", ttl=patience_s * 2) for node in nodes]
        replies: dict[int, Message] = {}
        for reply in exchange(self._grid, messages, patience_s, self._stop):
            if not (reply.has_error() and error_code(reply) in GONE):  # it left: treated as one that did not answer
                replies.setdefault(reply.metadata.src_node_id, reply)
        taken = set(self.members())
        clients = self.clients()
        keys = self._keys()
        verdicts: dict[int, _Verdict] = {}
        for node in nodes:  # not in the order of arrival: the faster of two nodes with one name would win
            if node not in replies:
                continue
            verdict = self._judge(node, replies[node], keys.get(node, ""), taken, clients)
            verdicts[node] = verdict
            if isinstance(verdict.entry, Member):
                self.silence.said_hello(verdict.entry.name)
                taken.add(verdict.entry.name)
                clients += verdict.entry.clients
        # one flush to the disk for all of them, and before any of these sites is asked for anything
        self._audit.write_all((verdict.event, verdict.details) for verdict in verdicts.values())
        self._known |= {node: verdict.entry for node, verdict in verdicts.items()}

    def _judge(self, node: int, reply: Message, key: str, taken: Container[str], clients: int) -> _Verdict:
        """Return the verdict on a hello.

        Args:
            node: that sent it.
            reply: the hello.
            key: the name under which the node's key is registered; empty if it has none.
            taken: the names of the sites that have passed.
            clients: how many clients they have.
        """
        if reply.has_error():
            return _refusal(node, key, error_code(reply))
        try:
            hello = from_record(HelloReply, reply.content)
        except WireError as error:
            return _refusal(node, key, error.code)
        fewest_rows = int(self._plan is None)  # a private run withholds the number of rows
        checks: dict[Code, bool] = {
            "site-name": re.fullmatch(NAME_PATTERN, hello.site) is None,
            "site-name-taken": hello.site in taken,
            "site-name-key": self._names is not None and key != hello.site,
            "version-mismatch": minor(hello.version) != minor(__version__),
            "base-mismatch": hello.base_fingerprint != self._spec.base_fingerprint,
            "spec-mismatch": hello.spec_sha256 != self._spec.sha256,
            "shard-empty": hello.rows < fewest_rows or hello.evaluation_rows < 0,
            "clients": not 1 <= hello.clients <= self._most_of_a_site,
            "too-many-clients": self._most_clients is not None and clients + hello.clients > self._most_clients,
        }
        # the first check that fails names the refusal; where two values differ, the audit log shows both
        failed = next((code for code, wrong in checks.items() if wrong), None)
        if failed:
            detail = {
                "version-mismatch": (hello.version[:32], __version__),
                "base-mismatch": (hello.base_fingerprint[:12], self._spec.base_fingerprint[:12]),
                "spec-mismatch": (hello.spec_sha256[:12], self._spec.sha256[:12]),
            }.get(failed, ())
            return _refusal(node, key, failed, *detail)
        details = {
            "site": hello.site,
            "clients": hello.clients,
            "rows": hello.rows,
            "evaluation_rows": hello.evaluation_rows,
            "version": hello.version[:32],
            "libraries": hello.libraries[:200],
            "notes": hello.notes[:200],
            "precision": hello.precision[:32],
        }
        notes = tuple(note for note in hello.notes[:200].split(",") if re.fullmatch(_NOTE, note))
        member = Member(hello.site, node, hello.rows, hello.evaluation_rows, hello.clients, notes)
        return _Verdict(member, "hello", details)

    def _keys(self) -> Mapping[int, str]:
        """Return the names under which the keys of nodes are registered."""
        if self._names is None:
            return {}
        return self._names()


def _refusal(node: int, key: str, code: Code, theirs: str = "", ours: str = "") -> _Verdict:
    return _Verdict(code, "refused", {"node": str(node), "key": key, "code": code, "theirs": theirs, "ours": ours})
