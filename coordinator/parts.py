"""What a coordinator is made of, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgetrain.coordinator import events
from edgetrain.coordinator.blob_server import BlobServer
from edgetrain.coordinator.chronicle import Chronicle
from edgetrain.coordinator.clients.client_reports import ClientReports
from edgetrain.coordinator.clients.enrolments import Enrolments
from edgetrain.coordinator.clients.history import History
from edgetrain.coordinator.clients.known_clients import KnownClients
from edgetrain.coordinator.clients.membership import Membership
from edgetrain.coordinator.clients.presence import Presence
from edgetrain.coordinator.clients.refusals import Refusals
from edgetrain.coordinator.config import FederationConfig
from edgetrain.coordinator.errors import StopRequested
from edgetrain.coordinator.intake import Intake
from edgetrain.coordinator.interruption import Interruption
from edgetrain.coordinator.post import COORDINATOR, Post
from edgetrain.coordinator.pump import Pump
from edgetrain.coordinator.rounds.agenda import Agenda
from edgetrain.coordinator.rounds.downlink import Downlink
from edgetrain.coordinator.rounds.gathering import Gathering
from edgetrain.coordinator.rounds.invitations import Invitations
from edgetrain.coordinator.rounds.round_opening import RoundOpening
from edgetrain.coordinator.rounds.uploads import Uploads
from edgetrain.coordinator.run.past_run import read_rows
from edgetrain.coordinator.run.requests import Request, read_request
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.signatures import Signatures
from edgetrain.coordinator.signing import Signing
from edgetrain.coordinator.strategies import Strategy
from edgetrain.coordinator.workers.lead import lead_workers
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import CodecSpec
from edgetrain.protocol.names import Topics
from edgetrain.protocol.transport import Transport


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts, each with its own job."""

    topics: Topics
    history: History
    clients: KnownClients
    blobs: BlobServer
    post: Post
    chronicle: Chronicle
    invitations: Invitations
    agenda: Agenda
    uploads: Uploads
    pump: Pump
    opening: RoundOpening
    gathering: Gathering
    reports: ClientReports
    signing: Signing


def assemble(
    config: FederationConfig,
    *,
    bundle: Bundle,
    transport: Transport,
    directory: RunDirectory,
    strategy: Strategy,
    observe: events.Observer,
    reload_broker: Callable[[], None],
    interruption: Interruption,
    clock: Callable[[], float],
) -> Parts:
    """Makes the parts; arguments as of `Coordinator`, and what may interrupt it.

    Raises:
        CodecError: the settings name a codec that there is not.
        AuthorityError: the settings name a federation directory that is none.
        RunError: the run directory is damaged.
    """
    downlink = Downlink(CodecSpec.parse(config.downlink_codec), directory.load_public())
    history = History()
    history.add(read_rows(directory.path / "clients.csv"))
    clients = KnownClients(directory, clock)
    topics = Topics(config.federation)
    blobs = BlobServer(topics, transport, config.limits.chunk_bytes)
    signing = Signing(config.federation, COORDINATOR, directory.key)
    signatures = Signatures(topics, clients.roster, signing, clock)
    post = Post(
        transport,
        topics,
        directory.key,
        run=directory.run,
        bundle=blobs.add(bundle.manifest_bytes),
        serials=directory.serials,
        signing=signing,
    )
    chronicle = Chronicle(directory.audit, post)
    enrolments = Enrolments(Path(config.enrolments)) if config.enrolments else None
    invitations = Invitations(
        config,
        strategy=strategy,
        roster=clients.roster,
        history=history,
        run=directory.run,
        bundle=bundle.digest,
        clock=clock,
    )
    max_update_bytes = config.limits.max_update_bytes or _largest_update(bundle, strategy, config)
    agenda = Agenda()
    refusals = Refusals(
        config.limits.bans,
        roster=clients.roster,
        audit=directory.audit,
        observe=observe,
        clock=clock,
        # Only with enrolments does the broker know who writes.
        attributable=enrolments is not None,
    )
    presence = Presence(
        run=directory.run,
        bundle=bundle.digest,
        agenda=agenda,
        post=post,
        roster=clients.roster,
        plan=invitations.plan,
        observe=observe,
        audit=directory.audit,
        refusals=refusals,
        enrolments=enrolments,
    )
    uploads = Uploads(
        run=directory.run,
        agenda=agenda,
        post=post,
        roster=clients.roster,
        training=invitations.training,
        come_back=lambda client: invitations.come_back_seconds(client, directory.records),
        max_update_bytes=max_update_bytes,
        directory=directory.path / "uploads",
        observe=observe,
        audit=directory.audit,
        refusals=refusals,
        clock=clock,
    )
    uploads.foreman = lead_workers(
        config,
        strategy=strategy,
        directory=directory,
        transport=transport,
        listener=uploads,
        max_update_bytes=max_update_bytes,
        clock=clock,
    )
    intake = Intake(
        topics=topics,
        agenda=agenda,
        post=post,
        blobs=blobs,
        roster=clients.roster,
        presence=presence,
        uploads=uploads,
        refusals=refusals,
        signatures=signatures,
        enrolments=enrolments,
        clock=clock,
    )
    membership = Membership(
        enrolments, presence=presence, audit=directory.audit, reload_broker=reload_broker, clock=clock
    )

    def check() -> None:
        interruption.check()
        membership.follow()
        obeyed_request(directory)

    pump = Pump(
        transport,
        post=post,
        blobs=blobs,
        agenda=agenda,
        intake=intake,
        signatures=signatures,
        uploads=uploads,
        chronicle=chronicle,
        clients=clients,
        check=check,
        clock=clock,
    )
    opening = RoundOpening(
        config,
        strategy=strategy,
        directory=directory,
        downlink=downlink,
        blobs=blobs,
        roster=clients.roster,
        max_update_bytes=max_update_bytes,
        clock=clock,
        workers=uploads.foreman.count if uploads.foreman else 0,
    )
    return Parts(
        topics=topics,
        history=history,
        clients=clients,
        blobs=blobs,
        post=post,
        chronicle=chronicle,
        agenda=agenda,
        uploads=uploads,
        invitations=invitations,
        pump=pump,
        opening=opening,
        signing=signing,
        gathering=Gathering(
            config.rounds,
            invitations=invitations,
            pump=pump,
            observe=observe,
            clock=clock,
            # Where chance chooses, it chooses among all.
            wanted=strategy.private.population if strategy.private else 0,
        ),
        reports=ClientReports(
            roster=clients.roster,
            invitations=invitations,
            blobs=blobs,
            post=post,
            agenda=agenda,
            pump=pump,
            clock=clock,
        ),
    )


def obeyed_request(directory: RunDirectory) -> Request:
    """What people ask for.

    Raises:
        StopRequested: to end.
    """
    request = read_request(directory.path)
    if request == "stop":
        raise StopRequested
    return request


def _largest_update(bundle: Bundle, strategy: Strategy, config: FederationConfig) -> int:
    """Bytes that no codec exceeds, and a little."""
    num_parameters = bundle.manifest.num_parameters
    dense = 4 * num_parameters + num_parameters // 8 + 4096
    # Masked values may take 64 bits.
    return 2 * dense if strategy.control or config.secure_aggregation.enabled else dense
