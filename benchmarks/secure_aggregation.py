"""Secure aggregation: what it costs the coordinator, a client and the uplink, and a federation at a real broker.

    python benchmarks/secure_aggregation.py [--only scale client uplink broker] [--out benchmarks/results]

scale    1,000 clients, 1M parameters of which 5 % are summed, 30 % drop out after they have shared: the dearest moment.
         Clients live in a process of their own, so that time and memory are the coordinator's.
client   one client's cost by its number of neighbours.
uplink   bytes against the plain compressed update of the same number of values.
broker   50 real clients, a real coordinator, mosquitto; against the same federation without secure aggregation.

Prints tables and writes secure_aggregation.json. One thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgetrain.protocol import encode as encode_update
from edgetrain.protocol.blobs import blob_ref, cut
from edgetrain.protocol.enrolment import PROOF_BYTES
from edgetrain.protocol.messages import Offer, Secure, encode_message
from edgetrain.protocol.secure_aggregation import member as members
from edgetrain.protocol.secure_aggregation import server as servers
from edgetrain.protocol.secure_aggregation.arithmetic import (
    Quantizer,
    dequantize,
    finest,
    make_layout,
    quantize,
    unpack,
)
from edgetrain.protocol.secure_aggregation.graph import choose_topology
from edgetrain.protocol.secure_aggregation.masks import Masker
from edgetrain.protocol.secure_aggregation.messages import (
    BOX_BYTES,
    Agreement,
    Reveal,
    Settings,
    Shares,
    decode_from_member,
    encode,
    session_digest,
)
from edgetrain.protocol.secure_aggregation.shamir import SHARE_BYTES
from edgetrain.protocol.secure_aggregation.unmasking import unmask
from edgetrain.protocol.signing import SigningKey, seal

Row = dict[str, Any]
PARAMETERS, SHARE_SUMMED = 1_000_000, 0.05
COUNT = round(PARAMETERS * SHARE_SUMMED)


def settings_for(minimum: int, *, colluding: float, lying: bool, kind: str = "int8") -> Settings:
    quantizer = Quantizer(kind=kind, range=3e-3, max_weight=1000, octaves=True)  # type: ignore[arg-type]
    return Settings(minimum=minimum, count=COUNT, seed=1, quantizer=quantizer, colluding=colluding, lying=lying)


def key_of(client: int) -> SigningKey:
    return SigningKey(hashlib.sha256(b"benchmark %d" % client).digest())


def name_of(client: int) -> str:
    return f"client-{client:05d}"


def contribution(client: int, settings: Settings, layout: Any) -> np.ndarray:
    generator = np.random.default_rng(client)
    values = (1e-3 * generator.standard_normal(COUNT)).astype(np.float32)
    return quantize(values, int(generator.integers(1, 1000)), settings.quantizer, layout, seed=client).integers


# --- scale -----------------------------------------------------------------------------------------------------------


def clients_process(pipe: multiprocessing.connection.Connection, size: int, settings: Settings, session: bytes) -> None:
    """All clients: answers (phase, what the coordinator says) with (position, message) of each, then None."""
    encoded, own = encode(settings), {}
    keys = [key_of(client) for client in range(size)]
    total: np.ndarray | None = None
    roster = b""
    while (order := pipe.recv()) is not None:
        phase, data = order
        if phase == "advertise":
            for client in range(size):
                own[client], message = members.advertise(
                    session=session, settings=encoded, name=name_of(client), identity=keys[client].public_key,
                    sign=keys[client].sign, random=os.urandom,
                )  # fmt: skip
                pipe.send((client, encode(message)))
        elif phase == "share":
            roster = data
            for client in range(size):
                own[client], shared = members.share(own[client], roster, random=os.urandom)
                pipe.send((client, encode(shared)))
        elif phase == "mask":
            client, boxes = data
            integers = contribution(client, settings, own[client].cast.layout)
            total = integers if total is None else total + integers
            own[client], payload = members.mask(own[client], boxes, integers)
            pipe.send((client, payload))
            continue
        elif phase == "agree":
            for client in data[1]:
                own[client], agreement = members.agree(own[client], data[0], sign=keys[client].sign)
                pipe.send((client, encode(agreement)))
        elif phase == "reveal":
            client, agreements = data
            own[client], revealed = members.reveal(own[client], agreements)
            pipe.send((client, encode(revealed)))
            continue
        elif phase == "total":
            pipe.send(total)
            continue
        pipe.send(None)


class Stopwatch:
    """Processor seconds of this process, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, step: str, function: Any, /, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **options)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
        return result


def scale(size: int, dropout: float, *, colluding: float, lying: bool, kind: str) -> Row:
    """A whole session, its clients in another process."""
    settings = settings_for(size // 2, colluding=colluding, lying=lying, kind=kind)
    encoded = encode(settings)
    session = session_digest(
        federation="f", run=bytes(16), round_number=1, nonce=os.urandom(16), work=bytes(32), settings=encoded
    )
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=clients_process, args=(other, size, settings, session))
    process.start()
    watch = Stopwatch()
    server = servers.Server(session=session, settings=encoded)

    def receive(phase: str) -> None:
        nonlocal server
        while (answer := pipe.recv()) is not None:
            client, body = answer
            message = watch(phase, decode_from_member, body)
            server = watch(phase, servers.receive, server, name_of(client), key_of(client).public_key, message)
        server = watch(phase, servers.close, server, dropout=dropout)

    pipe.send(("advertise", None))
    receive("advertise")
    pipe.send(("share", server.roster))
    receive("share")
    layout = server.cast.layout
    total = Masker(layout.length, layout.bits).zeros()
    gone = set(np.random.default_rng(0).choice(size, round(dropout * size), replace=False).tolist())
    for client in sorted(server.present - gone):
        pipe.send(("mask", (client, watch("boxes", servers.boxes_for, server, client))))
        _, payload = pipe.recv()
        words = watch("sum", unpack, payload, layout)
        server = watch("sum", servers.note_masked, server, name_of(client))
        watch("sum", np.add, total, words, out=total)
    server = watch("sum", servers.close, server)
    pipe.send(("agree", (servers.survivors_message(server), sorted(server.masked))))
    receive("agree")
    for client in sorted(server.agreements):
        pipe.send(("reveal", (client, watch("agreements", servers.agreements_for, server, client))))
        _, body = pipe.recv()
        message = watch("reveal", decode_from_member, body)
        server = watch("reveal", servers.receive, server, name_of(client), key_of(client).public_key, message)
    server = watch("reveal", servers.close, server)
    words = watch("unmask", unmask, server, total)
    result = watch("unmask", dequantize, words, len(server.masked), settings.quantizer, layout)
    pipe.send(("total", None))
    plain = pipe.recv()
    pipe.send(None)
    process.join()
    return {
        "clients": size,
        "dropout": dropout,
        "lying server": lying,
        "quantizer": kind,
        "neighbours": server.cast.roster.neighbours,
        "threshold": server.cast.roster.threshold,
        "bits": layout.bits,
        "exact": bool((result.integers == plain[:COUNT]).all()),
        "survivors": len(server.masked),
        "server_seconds": round(sum(watch.seconds.values()), 2),
        "seconds_by_step": {step: round(seconds, 2) for step, seconds in watch.seconds.items()},
        "server_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


# --- one client ------------------------------------------------------------------------------------------------------


def client_cost(size: int, neighbours: int) -> Row:
    """What client 0 does, with as many neighbours."""
    settings = settings_for(2, colluding=0.0, lying=True)
    encoded = encode(settings)
    session = session_digest(
        federation="f", run=bytes(16), round_number=1, nonce=bytes(16), work=bytes(32), settings=encoded
    )
    server = servers.Server(session=session, settings=encoded)
    watch, own, keys = Stopwatch(), {}, [key_of(client) for client in range(size)]
    up = 0
    for client in range(size):
        own[client], message = watch(
            "advertise" if client == 0 else "others", members.advertise, session=session, settings=encoded,
            name=name_of(client), identity=keys[client].public_key, sign=keys[client].sign, random=os.urandom,
        )  # fmt: skip
        up += len(encode(message)) if client == 0 else 0
        server = servers.receive(server, name_of(client), keys[client].public_key, message)
    server = servers.close(server, neighbours=neighbours)
    around = [0, *server.cast.graph.neighbours(0)]
    shares = {}
    for client in around:
        own[client], shares[client] = watch(
            "share" if client == 0 else "others", members.share, own[client], server.roster, random=os.urandom
        )
    server = msgspec.structs.replace(server, phase="mask", shares=shares, present=frozenset(around))
    boxes = servers.boxes_for(server, 0)
    integers = contribution(0, settings, server.cast.layout)
    own[0], payload = watch("mask", members.mask, own[0], boxes, integers)
    server = msgspec.structs.replace(server, masked=server.present, phase="agree")
    survivors = servers.survivors_message(server)
    own[0], agreement = watch("agree", members.agree, own[0], survivors, sign=keys[0].sign)
    signed = {client: keys[client].sign(server.statement()) for client in around}
    server = msgspec.structs.replace(server, agreements=signed)
    agreements = servers.agreements_for(server, 0)
    own[0], revealed = watch("reveal", members.reveal, own[0], agreements)
    up += sum(len(encode(message)) for message in (shares[0], agreement, revealed))
    down = len(server.roster) + sum(len(encode(message)) for message in (boxes, survivors, agreements))
    steps = {step: round(1000 * seconds, 1) for step, seconds in watch.seconds.items() if step != "others"}
    return {
        "clients": size,
        "neighbours": neighbours,
        "milliseconds": round(sum(steps.values()), 1),
        "milliseconds_by_step": steps,
        "protocol_bytes_up": up,
        "masked_vector_bytes": len(payload),
        "bytes_down": down,
    }


# --- uplink ----------------------------------------------------------------------------------------------------------


def wire_bytes(key: SigningKey, bodies: list[bytes], update: bytes) -> int:
    """Everything a client sends for one update: envelopes of `Secure` messages, its offer, and chunks."""
    nonce = bytes(16)
    sent = [encode_message(Secure(run=nonce, round=1, nonce=nonce, body=body)) for body in bodies]
    sent.append(
        encode_message(Offer(run=nonce, round=1, nonce=nonce, update=blob_ref(update), num_examples=1, steps=1))
    )
    return sum(len(seal(key, "f", "client-00001", body)) for body in sent) + sum(
        map(len, cut(blob_ref(update), update))
    )


def uplink() -> list[Row]:
    """Against topk and randk of the same number of values."""
    delta = (1e-3 * np.random.default_rng(0).standard_normal(PARAMETERS)).astype(np.float32)
    key = key_of(0)
    plain = {
        codec: wire_bytes(key, [], encode_update(delta, codec))
        for codec in ("topk:0.05|int8:block=256|rice", "topk:0.05|int4:block=256|rice", "randk:0.05|int8:block=256")
    }
    reference = plain["topk:0.05|int8:block=256|rice"]
    rows: list[Row] = [{"codec": codec, "bytes": count, "ratio": round(count / reference, 3)} for codec, count in
                       plain.items()]  # fmt: skip
    for kind, most in (("int8", 14), ("int8", 0), ("int4", 0)):
        for size in (10, 30, 50, 64, 100, 300, 1000):
            largest = finest(kind, clients=size, bits=most) if most else 0  # type: ignore[arg-type]
            quantizer = Quantizer(kind=kind, range=1.0, max_weight=1000, octaves=True, largest=largest)  # type: ignore[arg-type]
            layout = make_layout(quantizer, count=COUNT, clients=size)
            for dropout in (0.1, 0.3):
                degree, threshold = choose_topology(size, dropout=dropout, colluding=0.1, lying=dropout == 0.1)
                signature = bytes(64)
                bodies = [
                    encode(
                        members.Advertise(
                            cipher_key=bytes(32), mask_key=bytes(32), signature=signature, enrolment=bytes(PROOF_BYTES)
                        )
                    ),
                    encode(Shares(roster=bytes(32), commitment=bytes(32), boxes=bytes(BOX_BYTES * degree))),
                    encode(Agreement(signature=signature)),
                    encode(Reveal(shares=bytes(SHARE_BYTES * (degree + 1)))),
                ]
                count = wire_bytes(key, bodies, bytes(layout.payload_bytes))
                rows.append(
                    {
                        "codec": f"secure {kind}", "max_bits": most, "largest": quantizer.levels, "clients": size,
                        "bits": layout.bits, "neighbours": degree,
                        "threshold": threshold, "for": f"{dropout:.0%} dropout, 10% colluding, "
                        f"{'lying' if dropout == 0.1 else 'curious'} server",
                        "protocol_bytes": count - wire_bytes(key, [], bytes(layout.payload_bytes)),
                        "bytes": count, "ratio": round(count / reference, 3),
                        "of_float32": round(count / (4 * PARAMETERS), 4),
                    }
                )  # fmt: skip
    return rows


# --- a real broker ---------------------------------------------------------------------------------------------------


def federation(bundle: Path, clients: int, rounds: int, *, secure: bool) -> Row:
    """Real clients (threads of this process), coordinator and mosquitto."""
    from edgetrain.coordinator.broker import Mosquitto, free_port
    from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig
    from edgetrain.coordinator.secure.config import SecureAggregationConfig
    from edgetrain.coordinator.serve import serve
    from edgetrain.edge_client.client import Client, connection_will, new_connection
    from edgetrain.edge_client.config import ClientConfig
    from edgetrain.edge_client.durable.state import ClientState
    from edgetrain.models.data import digits
    from edgetrain.protocol.training import TrainingConfig
    from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport

    train, test = digits(seed=7)
    with tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder), free_port()
        broker = Mosquitto(port)
        address = BrokerConfig(host="127.0.0.1", port=port)

        def take_part(number: int) -> None:
            config = ClientConfig(
                name=f"client-{number}", federation="f", data=str(path / f"{number}.npz"),
                state=str(path / f"state-{number}"), broker=address,
            )  # fmt: skip
            state = ClientState(Path(config.state))
            connection = new_connection()
            transport = MqttTransport(address, client_id=f"f/{number}", will=connection_will(config, state, connection))
            Client(config, state=state, transport=transport, connection=connection).run()
            state.close()

        for number, rows in enumerate(np.array_split(np.arange(len(train.inputs)), clients)):
            np.savez(path / f"{number}.npz", inputs=train.inputs[rows], targets=train.targets[rows])
        np.savez(path / "test.npz", inputs=test.inputs, targets=test.targets)
        threads = [threading.Thread(target=take_part, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        config = FederationConfig(
            federation="f", bundle=str(bundle), out=str(path / "run"), broker=address,
            codec="randk:0.25|int8:block=all:stochastic|packed",
            rounds=RoundsConfig(total=rounds, goal=clients, minimum=clients // 2, gather_seconds=120.0,
                                deadline_seconds=120.0),
            training=TrainingConfig(epochs=1, batch_size=16, learning_rate=0.1, momentum=0.5),
            evaluation=EvaluationConfig(data=str(path / "test.npz"), by_clients=False),
            secure_aggregation=SecureAggregationConfig(enabled=secure, phase_seconds=60.0),
        )  # fmt: skip
        summary = serve(config, lambda _event: None)
        for thread in threads:
            thread.join(60)
        broker.stop()
    return {
        "secure": secure,
        "clients": clients,
        "rounds": summary.rounds,
        "updates": summary.updates,
        "seconds_per_round": round(summary.seconds_per_round, 3),
        "bytes_up_per_update": round(summary.bytes_up / summary.updates),
        "update_bytes": round(summary.update_bytes_mean),
        "accuracy": summary.final_accuracy,
    }


def at_a_broker(clients: int, rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "digits-cnn.edge"
        command = [sys.executable, "-m", "edgetrain", "-q", "export", "digits-cnn", "--micro-batch", "16", "-o", bundle]
        subprocess.run(command, check=True, capture_output=True)
        return [federation(bundle, clients, rounds, secure=secure) for secure in (False, True)]


# --- out -------------------------------------------------------------------------------------------------------------


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ["scale", "client", "uplink", "broker"]
    parser.add_argument("--only", nargs="*", choices=sections, default=sections)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    path = arguments.out / "secure_aggregation.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    if "scale" in arguments.only:
        # The smaller first: the peak of memory only grows.
        results["scale"] = [
            scale(arguments.clients, 0.3, colluding=0.1, lying=False, kind="int4"),
            scale(arguments.clients, 0.3, colluding=0.05, lying=True, kind="int8"),
        ]
        show("The coordinator: 1M parameters, 5 % summed, 30 % dropped out after sharing", results["scale"])
    if "client" in arguments.only:
        results["client"] = [client_cost(1000, neighbours) for neighbours in (10, 20, 50, 100, 174, 314)]
        show("One client of 1,000, by its neighbours", results["client"])
    if "uplink" in arguments.only:
        results["uplink"] = uplink()
        show("Uplink of one update, everything counted", results["uplink"])
    if "broker" in arguments.only:
        results["broker"] = at_a_broker(50, 5)
        show("50 clients and mosquitto", results["broker"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
