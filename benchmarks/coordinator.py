"""The coordinator: memory, speed, and Flower's aggregation beside it.

    python benchmarks/coordinator.py [SECTION …] [--updates 10000] [--clients 1000] [--parameters 1000000]
                                     [--flower-python VENV/bin/python] [--out benchmarks/results]

Sections: fold, robust, broker, overhead, flower; all without arguments. Every measurement runs in a process of its own
and is printed; coordinator.json keeps them. `--flower-python` is an interpreter that has `flwr`; Flower is not one of
our dependencies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import psutil
from blank import write_blank_bundle
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from publishing import Publisher

from edgetrain.coordinator import events
from edgetrain.coordinator.broker import Mosquitto, free_port
from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, LimitsConfig, RoundsConfig
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.rounds.collection import Collection
from edgetrain.coordinator.rounds.folding import FixedPointSum
from edgetrain.coordinator.run.journal import RoundOpened
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.strategies import make_strategy
from edgetrain.coordinator.strategies.base import Contribution
from edgetrain.protocol.blobs import blob_ref, cut
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.codecs import Limits, SparseOrDense, decode, encode, supported_stages
from edgetrain.protocol.messages import (
    Announce,
    Hello,
    Offer,
    Plan,
    Ready,
    Welcome,
    decode_from_coordinator,
    encode_message,
)
from edgetrain.protocol.names import Topics
from edgetrain.protocol.signing import SigningKey, seal, unseal
from edgetrain.protocol.training import TrainingConfig
from edgetrain.protocol.transport import MemoryBroker
from edgetrain.protocol.transport.connection import RECEIVE_MAXIMUM_OF_MANY
from edgetrain.protocol.transport.mqtt import BrokerConfig, MqttTransport

Result = dict[str, Any]
HERE = Path(__file__).parent
PACKED, ZSTD = "dense|int8:block=256|packed", "dense|int8:block=256|packed|zstd"
TOPK, DENSE = "topk:0.01|int8:block=256|rice", "dense|int8:block=256"
# Different updates; the same ones come again under other names.
POOL = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION")
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--flower-python", default="")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    n = arguments.parameters
    sections: dict[str, list[Callable[[], Result]]] = {
        "fold": [lambda codec=codec: apart(fold, codec, arguments.updates, n) for codec in (TOPK, DENSE)],
        "robust": [lambda name=name: apart(robust, name, arguments.clients, n) for name in ("trimmed-mean", "krum")],
        "broker": [
            lambda size=size, codec=codec, workers=workers: apart(through_broker, size, codec, 3000, workers)
            for workers in ("", "processes:1", "processes:2")
            for size, codec in ((12_000, PACKED), (12_700, ZSTD), (12_700, DENSE), (640_000, TOPK))
        ],
        "overhead": [lambda size=size: apart(overhead, size) for size in (38_000, n)],
        "flower": [lambda: flower(arguments.flower_python, 256, n)],
    }
    path = arguments.out / "coordinator.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if unknown := [section for section in arguments.sections if section not in sections]:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(sections)}")
    for section in arguments.sections or sections:
        kept[section] = []
        for measure in sections[section]:
            kept[section].append(measure())
            print(section, json.dumps(kept[section][-1]), flush=True)
    kept["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")


def apart(measure: Callable[..., Result], *arguments: Any) -> Result:
    """In a fresh process: what another measurement has left in memory does not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def deltas(count: int, size: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).normal(0, 1e-3, size).astype(np.float32) for seed in range(count)]


@contextlib.contextmanager
def peak_growth() -> Iterator[list[float]]:
    """[MB by which this process has grown at most, in the body]."""
    process, peak, done = psutil.Process(), [0.0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], (process.memory_info().rss - before) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = round(peak[0], 1)


def opened_run(folder: Path, size: int, **settings: Any) -> tuple[FederationConfig, Bundle, RunDirectory]:
    bundle = Bundle(write_blank_bundle(folder / "blank", size))
    fields: dict[str, Any] = {"federation": "bench", "bundle": str(bundle.path), "out": str(folder / "run")}
    config = FederationConfig(**(fields | {"evaluation": EvaluationConfig(by_clients=False)} | settings))
    return config, bundle, RunDirectory(config, bundle.manifest, bundle.digest)


# --- memory ------------------------------------------------------------------------------------------


def fold(codec: str, updates: int, size: int) -> Result:
    """Decode, check, fold, journal; a sync for every 64, as when they come quickly."""
    payloads = [encode(delta, codec, seed=0) for delta in deltas(POOL, size)]
    refs = [blob_ref(payload) for payload in payloads]
    key = SigningKey(bytes(32))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        _, _, directory = opened_run(Path(folder), size)
        collection = Collection(make_strategy("fedavg"), size, {}, Limits(max_parameters=size), 1000)
        opened = RoundOpened(run=bytes(16), round=1, nonce=bytes(16), parameters=bytes(32), salt=bytes(16))
        collection.open(directory, opened)
        with peak_growth() as grown:
            started = time.perf_counter()
            for number in range(updates):
                offer = Offer(
                    run=bytes(16), round=1, nonce=bytes(16), update=refs[number % POOL], num_examples=10, steps=1
                )
                envelope = seal(key, "bench", f"c{number}", encode_message(offer))
                collection.accept(f"c{number}", offer, envelope, payloads[number % POOL], TrainingConfig())
                if number % 64 == 63:
                    collection.commit()
            seconds = time.perf_counter() - started
        journal = directory.journal_path(1).stat().st_size
        collection.close()
        directory.close()
    return {"codec": codec, "parameters": size, "updates": updates, "update_bytes": len(payloads[0]),
            "grown_mb": grown[0], "journal_mb": round(journal / 2**20),
            "updates_per_second": round(updates / seconds, 1)}  # fmt: skip


def robust(name: str, clients: int, size: int) -> Result:
    """A strategy that needs all dense updates at once."""
    payloads = [encode(delta, DENSE, seed=0) for delta in deltas(POOL, size)]
    strategy = make_strategy(name)
    limits = Limits(max_parameters=size)
    parameters = np.zeros(size, np.float32)
    with peak_growth() as grown:
        started = time.perf_counter()
        partial = strategy.init(size, {})
        for number in range(clients):
            update = decode(payloads[number % POOL], limits)
            partial = strategy.fold(partial, Contribution(f"c{number:05d}", 10, 1, update))
        folded = time.perf_counter() - started
        strategy.finish(partial, parameters, {})
        seconds = time.perf_counter() - started
    return {"strategy": name, "clients": clients, "parameters": size, "grown_mb": grown[0],
            "fold_seconds": round(folded, 1), "finish_seconds": round(seconds - folded, 1)}  # fmt: skip


# --- speed -------------------------------------------------------------------------------------------


def through_broker(size: int, codec: str, updates: int, workers: str = "") -> Result:
    """Updates of about 12 kB through mosquitto: paho merely receiving them, and the coordinator accepting them.

    12,000 parameters as dense int8 (decoding that costs next to nothing), 12,700 as the same with zstd or with our
    Huffman codes, or 640,000 as top-1 % int8. The messages are made before, and are published as fast as the broker
    takes them.
    """
    port = free_port()
    broker = Mosquitto(port, in_flight=RECEIVE_MAXIMUM_OF_MANY)
    try:
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            theirs, ours = context.Pipe()
            driver = context.Process(target=drive, args=(theirs, port, size, updates, codec))
            driver.start()
            result = accept_all(Path(folder), port, size, codec, updates, workers, ours)
            received = receive_all(port, updates, ours)
            driver.join()
    finally:
        broker.stop()
    rate, bare = updates / result["seconds"], updates / received
    return {"codec": codec, "parameters": size, "updates": updates, "update_bytes": result["update_bytes"],
            "workers": workers, "updates_per_second": round(rate), "paho_updates_per_second": round(bare),
            "ratio": round(rate / bare, 2), "processor_us_per_update": round(result["processor_us"])}  # fmt: skip


def accept_all(folder: Path, port: int, size: int, codec: str, updates: int, workers: str, driver: Any) -> Result:
    """Seconds from the first update to the last one that is accepted, in a real coordinator."""
    config, bundle, directory = opened_run(
        folder, size, codec=codec, broker=BrokerConfig(host="127.0.0.1", port=port), workers=workers,
        rounds=RoundsConfig(total=1, goal=updates, gather_seconds=300.0, deadline_seconds=300.0),
    )  # fmt: skip
    transport = MqttTransport(config.broker, client_id="coordinator", most_received=RECEIVE_MAXIMUM_OF_MANY)
    ended = 0.0
    # Of this process, without its workers, at the first update and at the last.
    processor: list[float] = []

    def observe(event: events.Event) -> None:
        nonlocal ended
        if isinstance(event, events.RoundStarted):
            driver.send("go")
        elif isinstance(event, events.UpdateAccepted) and event.accepted in {1, updates}:
            ended = time.perf_counter()
            processor.append(time.process_time())

    coordinator = Coordinator(config, bundle=bundle, transport=transport, directory=directory, observe=observe)
    coordinator.run()
    transport.close()
    directory.close()
    started, update_bytes = driver.recv()
    return {"seconds": ended - started, "update_bytes": update_bytes,
            "processor_us": 1e6 * (processor[-1] - processor[0]) / updates}  # fmt: skip


def receive_all(port: int, updates: int, driver: Any) -> float:
    """Seconds for the same messages in a bare paho client."""
    count, done = [0], threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="bare", protocol=MQTTProtocolVersion.MQTTv5)

    def on_message(_client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        count[0] += message.topic.endswith("/blob")
        if count[0] == updates:
            done.set()

    client.on_message = on_message
    client.on_subscribe = lambda *_: driver.send("again")
    client.on_connect = lambda client, *_: client.subscribe(Topics("bench").from_client("+", "#"), qos=1)
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert done.wait(120), f"{count[0]} of {updates}"
    ended = time.perf_counter()
    client.disconnect()
    client.loop_stop()
    return ended - driver.recv()[0]


def drive(coordinator: Any, port: int, size: int, updates: int, codec: str) -> None:
    """All clients in one process: introduces them, then publishes all their updates at once; and once more."""
    payloads = [encode(delta, codec, seed=0) for delta in deltas(POOL, size)]
    topics, names = Topics("bench"), [f"c{number:05d}" for number in range(updates)]
    keys = {name: SigningKey(name.encode().ljust(32, b".")) for name in names}
    plans: dict[str, Plan] = {}
    invited = threading.Event()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="driver", protocol=MQTTProtocolVersion.MQTTv5)
    client.max_inflight_messages_set(20)
    announced: list[bytes] = []

    def send(name: str, message: Any) -> None:
        client.publish(
            topics.from_client(name, "message"), seal(keys[name], "bench", name, encode_message(message)), qos=1
        )

    def on_message(_client: paho.Client, _data: Any, received: paho.MQTTMessage) -> None:
        if invited.is_set():
            # Verdicts.
            return
        message = decode_from_coordinator(unseal(received.payload).body)
        if isinstance(message, Announce) and message.status == "open" and not announced:
            announced.append(message.bundle.digest)
            for name in names:
                stages = tuple(supported_stages())
                send(name, Hello(public_key=keys[name].public_key, connection=bytes(16), edgetrain="0",
                                 runtimes=("onnxruntime",), stages=stages))  # fmt: skip
        elif isinstance(message, Welcome):
            name = received.topic.split("/")[-2]
            send(name, Ready(bundle=announced[0], runtime="onnxruntime", num_examples=10))
        elif isinstance(message, Plan):
            plans[received.topic.split("/")[-2]] = message
            if len(plans) == updates:
                invited.set()

    client.on_message = on_message
    client.on_connect = lambda client, *_: client.subscribe(
        [(topics.announce, 1), (topics.to_client("+", "message"), 1)]
    )
    client.connect("127.0.0.1", port)
    client.loop_start()
    assert coordinator.recv() == "go"
    assert invited.wait(120), f"{len(plans)} of {updates} plans"
    messages = []
    for number, name in enumerate(names):
        ref, plan = blob_ref(payloads[number % POOL]), plans[name]
        offer = Offer(run=plan.run, round=plan.round, nonce=plan.nonce, update=ref, num_examples=10, steps=1)
        messages.append((topics.from_client(name, "message"), seal(keys[name], "bench", name, encode_message(offer))))
        messages += [(topics.from_client(name, "blob"), chunk) for chunk in cut(ref, payloads[number % POOL])]
    client.disconnect()
    client.loop_stop()
    publisher = Publisher(port, messages, in_flight=RECEIVE_MAXIMUM_OF_MANY)
    for asked in ("", "again"):
        if asked:
            assert coordinator.recv() == asked
        coordinator.send((time.perf_counter(), len(payloads[0])))
        publisher.publish()
    publisher.close()


def overhead(size: int, *, clients: int = 20, rounds: int = 12) -> Result:
    """From the last update of a round to the invitations of the next: strategy, records, disk, plans.

    On a real disk; over the broker in memory, with clients that answer at once.
    """
    payload = encode(deltas(1, size)[0], DENSE, seed=0)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        config, bundle, directory = opened_run(
            Path(folder), size, codec=DENSE, limits=LimitsConfig(chunk_bytes=1 << 24),
            rounds=RoundsConfig(total=rounds, goal=clients, gather_seconds=60.0),
        )  # fmt: skip
        broker = MemoryBroker()
        spans: list[float] = []
        last = [0.0]

        def observe(event: events.Event) -> None:
            if isinstance(event, events.UpdateAccepted) and event.accepted == clients:
                last[0] = time.perf_counter()
            elif isinstance(event, events.RoundStarted) and last[0]:
                spans.append(time.perf_counter() - last[0])

        threading.Thread(target=answer, args=(broker, payload, clients), daemon=True).start()
        transport = broker.connect()
        Coordinator(config, bundle=bundle, transport=transport, directory=directory, observe=observe).run()
        directory.close()
    return {"parameters": size, "clients": clients, "rounds": rounds,
            "overhead_ms_median": round(1e3 * float(np.median(spans)), 1),
            "overhead_ms_max": round(1e3 * max(spans), 1)}  # fmt: skip


def answer(broker: MemoryBroker, payload: bytes, clients: int) -> None:
    """Clients that send the same update in every round."""
    topics, ref = Topics("bench"), blob_ref(payload)
    transport = broker.connect()
    keys = {f"c{number:03d}": SigningKey(str(number).encode().ljust(32)) for number in range(clients)}
    for topic in (topics.announce, topics.to_client("+", "message")):
        transport.subscribe(topic)

    def send(name: str, message: Any) -> None:
        transport.publish(topics.from_client(name, "message"), seal(keys[name], "bench", name, encode_message(message)))

    bundle, known = b"", False
    while True:
        event = transport.receive(1.0)
        if event is None or not hasattr(event, "payload"):
            continue
        message = decode_from_coordinator(unseal(event.payload).body)
        name = event.topic.split("/")[-2]
        if isinstance(message, Announce):
            if message.status == "ended":
                return
            if not known:
                known, bundle = True, message.bundle.digest
                for name, key in keys.items():
                    send(name, Hello(public_key=key.public_key, connection=bytes(16), edgetrain="0",
                                     runtimes=("onnxruntime",), stages=tuple(supported_stages())))  # fmt: skip
        elif isinstance(message, Welcome):
            send(name, Ready(bundle=bundle, runtime="onnxruntime", num_examples=10))
        elif isinstance(message, Plan):
            offer = Offer(
                run=message.run, round=message.round, nonce=message.nonce, update=ref, num_examples=10, steps=1
            )
            send(name, offer)
            for chunk in cut(ref, payload, chunk_bytes=1 << 24):
                transport.publish(topics.from_client(name, "blob"), chunk)


# --- Flower ------------------------------------------------------------------------------------------

FLOWER = """
import json, sys, threading, time
import numpy as np
from flwr.server.strategy.aggregate import aggregate
count, size = map(int, sys.argv[1:])
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
before, peak, done = resident(), [0], threading.Event()
def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], resident() - before)
thread = threading.Thread(target=watch); thread.start()
results = [([np.random.default_rng(seed).normal(0, 1e-3, size).astype(np.float32)], 10) for seed in range(count)]
started = time.perf_counter()
aggregate(results)
seconds = time.perf_counter() - started
done.set(); thread.join()
print(json.dumps({"seconds": seconds, "grown_mb": peak[0] / 2**20}))
"""


def flower(python: str, count: int, size: int) -> Result:
    """The same dense float32 updates, by Flower's aggregate and by ours."""
    mine = apart(sum_dense, count, size)
    result: Result = {"updates": count, "parameters": size, "edgetrain": mine}
    if python:
        command = [python, "-c", FLOWER, str(count), str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        theirs = json.loads(done.stdout)
        result["flower"] = {"seconds": round(theirs["seconds"], 3), "grown_mb": round(theirs["grown_mb"], 1)}
        result["time_ratio"] = round(mine["seconds"] / theirs["seconds"], 2)
        result["memory_ratio"] = round(mine["grown_mb"] / theirs["grown_mb"], 3)
    return result


def sum_dense(count: int, size: int) -> Result:
    """They are folded as they come, so the time is of the folding alone, without making them."""
    seconds = 0.0
    with peak_growth() as grown:
        total = FixedPointSum(size)
        for seed in range(count):
            values = np.random.default_rng(seed).normal(0, 1e-3, size).astype(np.float32)
            update = SparseOrDense(size, None, values)
            started = time.perf_counter()
            total.add(update, 10)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        total.mean()
        seconds += time.perf_counter() - started
    return {"seconds": round(seconds, 3), "grown_mb": grown[0]}


if __name__ == "__main__":
    main()
