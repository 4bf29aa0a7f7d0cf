"""Getting a bundle onto this device and proving that it works here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.host.memory import give_back_memory
from edgetrain.edge_client.runtimes import available_runtimes, check_precision, find_runtime, open_session
from edgetrain.edge_client.runtimes.base import Session
from edgetrain.edge_client.training.frozen_part import keeps_features
from edgetrain.edge_client.training.selftest import run_self_test
from edgetrain.protocol import BundleError
from edgetrain.protocol.bundle import MAX_MANIFEST_BYTES, Bundle
from edgetrain.protocol.manifest import MANIFEST_FILE, decode_manifest
from edgetrain.protocol.messages import BlobRef

logger = logging.getLogger(__name__)


class Fetch(Protocol):
    """Gets a blob from the coordinator."""

    def __call__(self, ref: BlobRef, *, limit: int) -> bytes:
        """The verified blob, of at most `limit` bytes."""
        ...


class FetchTo(Protocol):
    """Gets a blob from the coordinator, of any size, into a file."""

    def __call__(self, ref: BlobRef, path: Path, *, limit: int) -> None:
        """Returns when the file holds the verified blob, of at most `limit` bytes."""
        ...


def install_bundle(
    ref: BlobRef, *, fetch: Fetch, fetch_to: FetchTo, state: ClientState, config: ClientConfig
) -> Session:
    """Fetches what is missing of a bundle, opens it and runs its self-test.

    Only the files of one runtime are fetched. What is already here, whole, is used.

    Args:
        ref: the manifest.
        fetch: gets the manifest.
        fetch_to: gets the files; what an earlier process has of one counts.
        state: keeps them.
        config: which runtime, how many threads, how many bytes.

    Raises:
        BundleError: too large, for other runtimes, or it fails its self-test here.
        SessionError: the runtime cannot run it, or not in the precision that is asked for.
        StateError: it cannot be stored.
    """
    data = state.read_manifest(ref.digest)
    if data is None:
        data = fetch(ref, limit=MAX_MANIFEST_BYTES)
    manifest = decode_manifest(data)
    runtime = choose_runtime([program.runtime for program in manifest.programs], config.runtime)
    check_precision(find_runtime(runtime), config.precision)
    entries = manifest.files(runtime)
    total = sum(entry.size for entry in entries)
    if total > config.max_bundle_bytes:
        raise BundleError(
            f"bundle {manifest.name!r} needs {total} bytes, max_bundle_bytes allows {config.max_bundle_bytes}"
        )
    for entry in entries:
        if not state.has_file(ref.digest, entry):
            blob = BlobRef(digest=bytes.fromhex(entry.sha256), size=entry.size)
            fetch_to(blob, state.bundle_directory(ref.digest) / entry.file, limit=entry.size)
    # The manifest last: a directory that has it is whole.
    state.store_file(ref.digest, MANIFEST_FILE, data)
    bundle = Bundle(state.bundle_directory(ref.digest))
    # What starting and fetching took.
    give_back_memory()
    # What is run in parts never needs the whole step.
    session = open_session(bundle, runtime, threads=config.threads, precision=config.precision, load=False)
    in_parts = keeps_features(session, config)
    session.save_memory(in_parts=in_parts)
    run_self_test(bundle, session, in_parts=in_parts).raise_if_wrong()
    session.release()
    state.forget_bundles(but=ref.digest)
    logger.info("bundle %s runs on %s; self-test passed", manifest.name, runtime)
    return session


def choose_runtime(offered: Sequence[str], wanted: str, here: Callable[[], Sequence[str]] = available_runtimes) -> str:
    """The wanted runtime, or the first of those offered that is installed here.

    Raises:
        BundleError: there is none.
    """
    if wanted:
        if wanted not in offered:
            raise BundleError(f"the bundle has no program for runtime {wanted!r}, only for: {', '.join(offered)}")
        return wanted
    installed = here()
    for name in offered:
        if name in installed:
            return name
    raise BundleError(
        f"the bundle runs on {', '.join(offered)}; here there is: {', '.join(installed) or 'no runtime'}. "
        "Install one, e.g. pip install 'edgetrain[client]'."
    )
