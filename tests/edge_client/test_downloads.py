"""Downloads over a made-up link whose clock belongs to the test."""

from __future__ import annotations

import os
import random

import pytest

from edgetrain.edge_client.downloads import Download
from edgetrain.edge_client.durable.garbage import forget_old_bundles
from edgetrain.protocol.blobs import Assembler, blob_ref, cut, parse_chunk
from edgetrain.protocol.partial import PartialBlob, forget_partial_blobs
from edgetrain.protocol.ranges import RangeSet
from edgetrain.protocol.transport.pacing import RateMeter, TokenBucket


class Link:
    """Answers every `Want` at so many bytes per second; counts what crosses it."""

    def __init__(self, data, *, rate, cap=0.0, meter=None):
        self.data, self.ref, self.rate = data, blob_ref(data), rate
        self.now = 0.0
        self.asked = []
        self.crossed = 0
        self._waiting = []
        self.meter = meter or RateMeter()
        self.cap = TokenBucket(cap)

    def ask(self, want):
        self.asked.append(want)
        self._waiting += cut(self.ref, self.data, want.ranges, want.chunk_bytes or 60 << 10)

    def download(self, blob):
        return Download(blob, ask=self.ask, link=self.meter, cap=self.cap, now=self.now)

    def run(self, download, *, until=lambda: False, deaf=False):
        """Lets time pass until it is complete."""
        while not download.complete and not until():
            if self._waiting:
                payload = self._waiting.pop(0)
                self.now += len(payload) / self.rate
                self.crossed += len(payload) - 60
                if not deaf:
                    download.add(parse_chunk(payload), self.now)
            else:
                self.now += max(download.patience(self.now), 0.001)
            download.tick(self.now)

    def cut_off(self):
        """What was on the way is gone."""
        self._waiting.clear()


def blob_of(size):
    return random.Random(size).randbytes(size)


def test_a_slow_link_is_asked_for_little_at_a_time_in_small_chunks():
    link = Link(blob_of(200_000), rate=8000)
    download = link.download(blob := Assembler(link.ref, limit=200_000))
    link.run(download)
    assert blob.finish() == link.data
    assert link.crossed == 200_000, "nothing twice"
    later = link.asked[3:]
    assert max(want.chunk_bytes for want in later) <= 0.2 * 8000
    assert max(RangeSet(want.ranges).size for want in later) <= 2 * 8000
    # It is always busy: the time that the bytes need, with their headers, and no more.
    assert link.now == pytest.approx(200_000 * (1 + 60 / 1540) / 8000, rel=0.03)


def test_a_fast_link_asks_for_a_whole_blob_once_it_knows_itself():
    meter = RateMeter()
    first = Link(blob_of(300_000), rate=1e6, meter=meter)
    first.run(first.download(Assembler(first.ref, limit=300_000)))
    assert first.asked[0].ranges == ((0, 8192),)
    second = Link(blob_of(400_000), rate=1e6, meter=meter)
    second.run(second.download(Assembler(second.ref, limit=400_000)))
    assert [want.ranges for want in second.asked] == [()]


def test_a_small_blob_is_asked_for_whole():
    link = Link(blob_of(8000), rate=8000)
    link.run(link.download(Assembler(link.ref, limit=8000)))
    assert [want.ranges for want in link.asked] == [()]


def test_after_a_cut_only_what_was_on_the_way_is_asked_for_again():
    link = Link(blob_of(100_000), rate=8000)
    download = link.download(blob := Assembler(link.ref, limit=100_000))
    for kilobytes in (20, 40, 60, 80):
        link.run(download, until=lambda size=kilobytes: link.crossed >= 1000 * size)
        link.cut_off()
        download.repeat(link.now)
    link.run(download)
    assert blob.finish() == link.data
    assert link.crossed == 100_000


def test_what_is_lost_without_a_cut_is_asked_for_after_a_silence():
    link = Link(blob_of(50_000), rate=8000)
    download = link.download(Assembler(link.ref, limit=50_000))
    link.run(download, until=lambda: link.crossed >= 20_000)
    link.cut_off()
    before, asked = link.now, len(link.asked)
    link.run(download, until=lambda: len(link.asked) > asked)
    assert link.now - before == pytest.approx(2, abs=0.1)
    link.run(download)
    assert link.crossed == 50_000


def test_a_silent_coordinator_is_asked_less_and_less_often():
    link = Link(blob_of(50_000), rate=8000)
    download = link.download(Assembler(link.ref, limit=50_000))
    times = []
    while link.now < 200:
        link.cut_off()
        before = len(link.asked)
        download.tick(link.now)
        if len(link.asked) > before:
            times.append(round(link.now))
        link.now += 0.5
    assert times == [2, 6, 14, 30, 62, 122, 182]


def test_a_cap_holds():
    link = Link(blob_of(100_000), rate=1e6, cap=10_000)
    link.run(link.download(Assembler(link.ref, limit=100_000)))
    # But for what is asked for first.
    assert (100_000 - 20_000) / 10_000 <= link.now <= 11


def test_a_new_process_asks_for_the_rest(tmp_path):
    link = Link(blob_of(100_000), rate=8000)
    first = link.download(PartialBlob(link.ref, tmp_path, limit=100_000))
    link.run(first, until=lambda: link.crossed >= 60_000)
    link.cut_off()
    link.meter = RateMeter()
    blob = PartialBlob(link.ref, tmp_path, limit=100_000)
    link.run(link.download(blob))
    assert link.crossed == 100_000
    assert blob.finish() == link.data


# --- what is not needed any more ---------------------------------------------------------------------


def test_old_bundles_are_deleted_but_the_one_before(tmp_path):
    for number, name in enumerate("abcd"):
        (tmp_path / name / "onnxruntime").mkdir(parents=True)
        (tmp_path / name / "onnxruntime" / "step.onnx").write_bytes(bytes(100))
        (tmp_path / name / "manifest.json").write_bytes(bytes(11))
        os.utime(tmp_path / name, (number, number))
    assert forget_old_bundles(tmp_path, current=tmp_path / "b") == 2 * 111
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d"]
    assert max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime).name == "b", "now the newest"
    assert forget_old_bundles(tmp_path / "missing", current=tmp_path / "missing" / "x") == 0


def test_what_is_left_of_abandoned_transfers_is_deleted(tmp_path):
    keep, drop = blob_ref(bytes(1000)), blob_ref(bytes(2000))
    for ref in (keep, drop):
        PartialBlob(ref, tmp_path, limit=2000).add(parse_chunk(next(cut(ref, bytes(ref.size), ((0, 500),)))))
    assert forget_partial_blobs(tmp_path, keep=[keep.digest]) == 500 + 20
    assert {path.stem for path in tmp_path.iterdir()} == {keep.digest.hex()}
    assert PartialBlob(keep, tmp_path, limit=1000).missing() == [(500, 1000)]
