"""The audit log: a million records checked, against reading them and hashing them once; and what appending costs.

    python benchmarks/audit.py [--records 1000000] [--out benchmarks/results]

Prints a table and writes audit.json. One thread. The rivals read the same file in the same run: `sha256` hashes it
whole, `json` decodes each line, `signatures` is a log with an Ed25519 signature per record instead of a chain (measured
on 2,000 records and scaled).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgetrain.coordinator.audit import AuditLog, verify_audit
from edgetrain.coordinator.audit.records import Accepted, Opened
from edgetrain.protocol.signing import SigningKey, is_signed

# As many updates as one sync of the coordinator covers at most.
BATCH = 256


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), arguments.records)
    for name, value in result.items():
        print(f"{name:24} {value}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "audit.json").write_text(json.dumps(result, indent=1) + "\n")


def measure(directory: Path, count: int) -> dict[str, Any]:
    """Seconds, and ratios to the rivals."""
    key, run = SigningKey.generate(), bytes(16)
    opened = Opened(run=run.hex(), federation="f", bundle="00" * 32, public_key=key.public_key.hex())
    log = AuditLog(directory, key=key, opened=opened)
    started = time.perf_counter()
    for number in range(count):
        digest = hashlib.sha256(number.to_bytes(8, "little")).hexdigest()
        client = f"client-{number % 1000}"
        log.append(Accepted(client=client, round=number // 1000, digest=digest, bytes=12345, num_examples=100))
        if number % BATCH == BATCH - 1:
            log.commit()
    log.close()
    append = time.perf_counter() - started
    path = directory / "audit.jsonl"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verify = seconds(lambda: verify_audit(directory, public_key=key.public_key))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    whole = seconds(lambda: hashlib.sha256(path.read_bytes()).digest())
    decode = msgspec.json.Decoder().decode
    lines = path.read_bytes().splitlines()
    parse = seconds(lambda: [decode(line) and None for line in lines])
    signed = [(line, key.sign(line)) for line in lines[:2000]]
    signatures = seconds(lambda: [is_signed(key.public_key, *pair) for pair in signed]) * len(lines) / len(signed)
    return {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "records": count,
        "lines": len(lines),
        "bytes": path.stat().st_size,
        "append_seconds": round(append, 2),
        "verify_seconds": round(verify, 2),
        "verify_memory_mb": round(grown / 1024, 1),
        "sha256_seconds": round(whole, 2),
        "json_seconds": round(parse, 2),
        "signatures_seconds": round(signatures, 1),
        "verify_to_sha256": round(verify / whole, 1),
        "verify_to_signatures": round(verify / signatures, 3),
    }


def seconds(work: Callable[[], object]) -> float:
    """Of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
