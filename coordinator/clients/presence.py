"""Who is here: clients that come, are ready, and go."""

from __future__ import annotations

from collections.abc import Callable

from edgetrain.coordinator import events
from edgetrain.coordinator.audit import AuditLog, records
from edgetrain.coordinator.clients.enrolments import Enrolments
from edgetrain.coordinator.clients.refusals import Kind, Refusals
from edgetrain.coordinator.clients.roster import ClientRecord, Roster
from edgetrain.coordinator.post import Post
from edgetrain.coordinator.rounds.agenda import Agenda
from edgetrain.coordinator.rounds.open_round import OpenRound
from edgetrain.coordinator.rounds.state import Part
from edgetrain.protocol.codecs import CodecSpec
from edgetrain.protocol.messages import Goodbye, Hello, Plan, Ready, Refusal, Welcome

# What a codec can always be negotiated down to.
EVERYONES_STAGES = CodecSpec().stages


class Presence:
    """Keeps the roster true. Its callers have checked signatures, but for a Hello's right to its name.

    Args:
        run: id of the run.
        bundle: digest of the bundle.
        agenda: what is open.
        post: for answers.
        roster: the clients.
        plan: makes the open round's plan for a client, for those who may have lost it.
        observe: is told what happens.
        audit: the run's log.
        refusals: keeps the books on who was refused.
        enrolments: who may take part, or None for everybody.
    """

    def __init__(
        self,
        *,
        run: bytes,
        bundle: bytes,
        agenda: Agenda,
        post: Post,
        roster: Roster,
        plan: Callable[[OpenRound, str], Plan],
        observe: events.Observer,
        audit: AuditLog,
        refusals: Refusals,
        enrolments: Enrolments | None,
    ) -> None:
        self._run = run
        self._bundle = bundle
        self._agenda = agenda
        self._post = post
        self._roster = roster
        self._plan = plan
        self._observe = observe
        self._audit = audit
        self._refusals = refusals
        self._enrolments = enrolments

    def on_hello(self, client: str, hello: Hello) -> None:
        """A client introduces itself, signed with the key that it shows."""
        record = self._roster.get(client)
        if objection := self._objection_to_hello(client, record, hello):
            kind, reason = objection
            # It signed with the key that it shows, which need not be the one that the name belongs to.
            self._refusals.message(client, kind, reason)
            self._post.send(client, Refusal(reason=reason, connection=hello.connection))
            return
        if record and hello.connection in record.earlier_connections:
            self._refusals.message(client, "replay", "a copy of the Hello of an earlier connection")
            return
        if record is None:
            record = ClientRecord(client, hello.public_key)
            self._roster.add(record)
            if not self._enrolments:
                key = hello.public_key.hex()
                self._audit.append(records.Enrolled(client=client, public_key=key, by="first use"))
        # Enrolled anew, it has another key.
        record.public_key = hello.public_key
        if record.connection != hello.connection:
            # A new process, or its first Hello; a copy of the Hello of this connection changes nothing.
            if record.ready:
                self._observe(events.ClientLeft(client, "came back anew"))
            if record.connection:
                record.earlier_connections.append(record.connection)
            record.ready = False
        record.connection = hello.connection
        record.device = hello.device
        record.stages = frozenset(hello.stages)
        record.online = True
        self._post.send(client, Welcome(run=self._run))

    def _objection_to_hello(self, client: str, record: ClientRecord | None, hello: Hello) -> tuple[Kind, str] | None:
        if self._enrolments and (objection := self._enrolments.objection(client, hello.public_key)):
            return objection
        if not self._enrolments and record and record.public_key != hello.public_key:
            return "not_enrolled", f"the name {client!r} belongs to another key in this run: choose another name"
        if missing := EVERYONES_STAGES - set(hello.stages):
            return "unfit", f"lacks codec stages that everyone has: {', '.join(sorted(missing))}"
        return None

    def dismiss(self, client: str, reason: str) -> None:
        """Sends a client away that may not take part any more; the round does not wait for it."""
        record = self._roster.get(client)
        if record is None:
            return
        if self._agenda.current:
            self._agenda.current.drop_upload(client)
        self._post.send(client, Refusal(reason=reason, connection=record.connection))
        self._left(record, reason)

    def on_ready(self, record: ClientRecord, ready: Ready) -> None:
        """A client has the bundle and its self-test passed."""
        if ready.connection is not None and not record.connection:
            # Known from an earlier process of ours: it has to say which connection this is.
            self._post.announce("open", client=record.name)
            return
        if ready.connection is not None and ready.connection != record.connection:
            self._refusals.message(record.name, "replay", "a Ready of an earlier connection", signed=True)
            return
        if ready.bundle != self._bundle:
            reason = "has another bundle than this run trains"
            self._refusals.message(record.name, "unfit", reason)
            self._post.send(record.name, Refusal(reason=reason, connection=record.connection))
            return
        if not record.ready:
            self._observe(events.ClientJoined(record.name, ready.num_examples))
        record.online = record.ready = True
        record.num_examples, record.runtime = ready.num_examples, ready.runtime
        record.state = ready.state
        current = self._agenda.current
        if current and current.state.parts.get(record.name) in {Part.INVITED, Part.TRAINING, Part.LOST}:
            # Back in the middle of a round: it may have lost the plan.
            current.state.advance(record.name, Part.INVITED)
            self._post.send(record.name, self._plan(current, record.name))
        elif current and current.secure and record.name in current.state.parts:
            current.secure.remind(record.name)
        elif self._agenda.evaluation_plan and record.name not in self._agenda.reports:
            self._post.send(record.name, self._agenda.evaluation_plan)

    def on_goodbye(self, record: ClientRecord, goodbye: Goodbye) -> None:
        """A client leaves, or its last will says so."""
        if goodbye.connection != record.connection or not record.online:
            return
        self._left(record, goodbye.reason)

    def _left(self, record: ClientRecord, reason: str) -> None:
        was_ready = record.ready
        record.online = record.ready = False
        if self._agenda.current and self._agenda.current.state.waits_for(record.name):
            self._agenda.current.state.advance(record.name, Part.LOST)
        if was_ready:
            self._observe(events.ClientLeft(record.name, reason))
