"""The compressed way down: a chain of public parameters that cannot drift."""

import itertools

import numpy as np
import pytest

from edgetrain.coordinator.rounds.downlink import KEEP_PATCHES, Downlink
from edgetrain.edge_client.durable.held_parameters import HeldParameters
from edgetrain.protocol import BlobError, CodecError
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.codecs import CodecSpec, Limits, decode, encode
from edgetrain.protocol.messages import Patch, Plan
from edgetrain.protocol.vectors import vector_digest

N = 1000
INT8 = CodecSpec.parse("dense|int8:block=64")


def walk(rounds, size=0.1):
    """True parameters of successive rounds."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(N).astype(np.float32)
    for _ in range(rounds):
        yield vector
        vector = vector + size * rng.standard_normal(N).astype(np.float32)


def plan_of(release, number):
    patches = tuple(Patch(base=patch.base, blob=blob_ref(patch.data)) for patch in release.patches)
    return Plan(
        run=bytes(16),
        round=number,
        nonce=bytes(16),
        bundle=bytes(32),
        vector=release.digest,
        parameters=blob_ref(release.whole),
        patches=patches,
        deadline_seconds=1.0,
    )


class Fetcher:
    """Serves a release's blobs and counts their bytes."""

    def __init__(self, release):
        blobs = (release.whole, *(patch.data for patch in release.patches))
        self.blobs = {blob_ref(data).digest: data for data in blobs}
        self.bytes = 0

    def __call__(self, ref, *, limit):
        data = self.blobs[ref.digest]
        assert len(data) <= limit
        self.bytes += len(data)
        return data


def test_the_public_parameters_stay_as_near_after_many_rounds_as_after_one():
    downlink = Downlink(INT8)
    errors = [np.abs(downlink.release(vector, seed=1).public - vector).max() for vector in walk(200)]
    # One int8 step of a change of about 0.1 x 5 sigma, however many rounds there have been.
    assert errors[0] == 0
    assert max(errors) < 0.1 * 5 / 127
    assert max(errors[150:]) < 2 * max(errors[1:50])


def test_without_feedback_the_error_would_grow():
    """What the chain avoids: encoding each round's change by itself adds up the errors."""
    vectors = list(walk(200))
    naive = vectors[0].copy()
    for before, after in itertools.pairwise(vectors):
        decode(encode(after - before, INT8), Limits(max_parameters=N)).add_to(naive)
    downlink = Downlink(INT8)
    for vector in vectors:
        release = downlink.release(vector, seed=1)
    drift = np.abs(naive - vectors[-1]).mean()
    assert drift > 4 * np.abs(release.public - vectors[-1]).mean()


def test_a_client_follows_the_chain_by_patches_to_the_same_bits():
    downlink, held = Downlink(INT8), HeldParameters(N)
    for number, vector in enumerate(walk(5), 1):
        release = downlink.release(vector, seed=number)
        fetch = Fetcher(release)
        got = held.advance(plan_of(release, number), fetch)
        assert got.tobytes() == release.public.tobytes()
        assert fetch.bytes == (len(release.whole) if number == 1 else len(release.patches[-1].data))
    assert fetch.bytes < 0.3 * len(release.whole)


def test_a_client_that_was_away_applies_several_patches_or_takes_the_whole():
    downlink, held = Downlink(INT8), HeldParameters(N)
    vectors = list(walk(KEEP_PATCHES + 5))
    first = downlink.release(vectors[0], seed=0)
    held.advance(plan_of(first, 1), Fetcher(first))
    for vector in vectors[1:4]:
        release = downlink.release(vector, seed=0)
    fetch = Fetcher(release)
    assert held.advance(plan_of(release, 4), fetch).tobytes() == release.public.tobytes()
    assert fetch.bytes == sum(len(patch.data) for patch in release.patches)
    for vector in vectors[4:]:
        release = downlink.release(vector, seed=0)
    assert len(release.patches) == KEEP_PATCHES
    fetch = Fetcher(release)
    assert held.advance(plan_of(release, 9), fetch).tobytes() == release.public.tobytes()
    assert fetch.bytes == len(release.whole)


def test_a_release_is_the_same_whether_it_is_made_by_one_thread_or_two(monkeypatch):
    releases = []
    for worth in (0, N + 1):
        monkeypatch.setattr("edgetrain.coordinator.rounds.downlink.WORTH_A_THREAD", worth)
        downlink = Downlink(INT8)
        releases.append([downlink.release(vector, seed=number) for number, vector in enumerate(walk(4))])
    for one, other in zip(*releases, strict=True):
        assert (one.digest, one.whole, one.patches) == (other.digest, other.whole, other.patches)
        assert (one.digest, one.whole_ref) == (vector_digest(one.public), blob_ref(one.whole))
        assert [patch.ref for patch in one.patches] == [blob_ref(patch.data) for patch in one.patches]


def test_the_same_plan_again_fetches_nothing():
    release = Downlink(INT8).release(next(walk(1)), seed=0)
    held, fetch = HeldParameters(N), Fetcher(release)
    first = held.advance(plan_of(release, 1), fetch)
    first += 1  # what the caller does with it must not matter
    spent = fetch.bytes
    assert held.advance(plan_of(release, 1), fetch).tobytes() == release.public.tobytes()
    assert fetch.bytes == spent


def test_a_patch_that_leads_elsewhere_is_not_trusted():
    downlink, held = Downlink(INT8), HeldParameters(N)
    vectors = list(walk(3))
    first = downlink.release(vectors[0], seed=0)
    held.advance(plan_of(first, 1), Fetcher(first))
    good = downlink.release(vectors[1], seed=0)
    other = Downlink(INT8, vectors[0]).release(vectors[2], seed=0)
    fetch = Fetcher(good)
    fetch.blobs[blob_ref(good.patches[-1].data).digest] = other.patches[-1].data
    assert held.advance(plan_of(good, 2), fetch).tobytes() == good.public.tobytes()
    fetch.blobs[blob_ref(good.whole).digest] = other.whole
    with pytest.raises(CodecError, match="not those that the plan names"):
        HeldParameters(N).advance(plan_of(good, 2), fetch)


def test_a_failed_fetch_leaves_what_is_held():
    downlink, held = Downlink(INT8), HeldParameters(N)
    vectors = list(walk(2))
    first = downlink.release(vectors[0], seed=0)
    held.advance(plan_of(first, 1), Fetcher(first))
    second = downlink.release(vectors[1], seed=0)

    def fail(ref, *, limit):
        raise BlobError("gone")

    with pytest.raises(BlobError):
        held.advance(plan_of(second, 2), fail)
    assert held.advance(plan_of(second, 2), Fetcher(second)).tobytes() == second.public.tobytes()


def test_a_restarted_coordinator_goes_on_from_the_kept_link():
    vectors = list(walk(3))
    downlink = Downlink(INT8)
    downlink.release(vectors[0], seed=0)
    kept = downlink.release(vectors[1], seed=0).public
    again = Downlink(INT8, kept)
    assert again.holds(vector_digest(kept))
    assert again.current().public is kept
    assert again.release(vectors[2], seed=0).patches[0].base == vector_digest(kept)


def test_dense_float32_sends_the_parameters_themselves():
    downlink = Downlink(CodecSpec.parse("dense|float32"))
    for vector in walk(3):
        release = downlink.release(vector, seed=0)
        assert release.public is vector
        assert release.patches == ()
