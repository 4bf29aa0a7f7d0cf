"""Features on disk: used when they are right, built again when they are not, done without when they do not fit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from edgetrain.edge_client import open_session
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.installation import install_bundle
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.errors import StateError
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.feature_cache import cache_features
from edgetrain.edge_client.training.frozen_part import skip_frozen_part
from edgetrain.edge_client.training.selftest import read_self_test
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.export import export_bundle
from edgetrain.protocol.blobs import blob_ref
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import BundleError
from edgetrain.protocol.training import TrainingConfig
from support.frozen import cnn_data, frozen_cnn

COUNT = 30
TRAINING = TrainingConfig(epochs=3, batch_size=7, learning_rate=0.1, momentum=0.9)
CONFIG = ClientConfig(name="c", federation="f", data="none")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cnn"
    export_bundle(*frozen_cnn(), trainable="last:2", out=out)
    return Bundle(out)


@pytest.fixture
def session(bundle):
    return open_session(bundle)


@pytest.fixture
def dataset():
    inputs, targets = cnn_data(COUNT)
    return Dataset(inputs.numpy(), targets.numpy(), np.linspace(0.5, 1, COUNT))


def cache(session, dataset, path, *, precision="float32", bundle=b"b" * 32, max_bytes=1 << 20):
    return cache_features(session, dataset, path, bundle=bundle, precision=precision, max_bytes=max_bytes)


# Of the parameters' change: nothing is rounded; 11 bits; 1/127 of each sample's largest.
@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-5), ("float16", 2e-3), ("int8", 3e-2)])
def test_training_on_kept_features_is_training(bundle, session, dataset, tmp_path, precision, allowed):
    start = bundle.initial_parameters()
    plain = train(session, start, dataset, TRAINING, seed=3)
    cached = cache(session, dataset, tmp_path / "f", precision=precision)
    head = session.head()
    kept = train(head, start, cached.dataset, TRAINING, seed=3)
    change = np.linalg.norm(plain.parameters - start)
    assert np.linalg.norm(kept.parameters - plain.parameters) <= allowed * change
    assert kept.num_examples == COUNT
    assert evaluate(head, start, cached.dataset).loss == pytest.approx(
        evaluate(session, start, dataset).loss, rel=allowed
    )


def test_the_stated_error_is_the_error(session, dataset, tmp_path):
    exact = cache(session, dataset, tmp_path / "exact")
    rounded = cache(session, dataset, tmp_path / "int8", precision="int8")
    assert exact.error == 0
    (a,), (b,) = (part.dataset.take(np.arange(COUNT))[0][0].values() for part in (exact, rounded))
    assert rounded.error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert 0 < rounded.error < 0.01
    # 12 floats each; 12 bytes and a scale; the header, and what aligns the parts.
    assert exact.size == 128 + COUNT * 48 + (-COUNT * 48) % 64
    assert rounded.size == 128 + 128 + COUNT * 12 + (-COUNT * 12) % 64


def test_tiny_and_huge_features_keep_their_bits(session, dataset, tmp_path):
    """Beyond float16's range, from 6e-8 to 65504."""
    for factor in (1e-9, 1e9):
        spread = Dataset(dataset.inputs * np.float32(factor), dataset.targets)
        assert cache(session, spread, tmp_path / "f", precision="float16").error < 2**-11


def test_a_cache_is_used_again_and_gives_the_same_bytes(session, dataset, tmp_path):
    first = cache(session, dataset, tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    assert not first.reused
    assert cache(session, dataset, tmp_path / "f").reused
    (tmp_path / "f").unlink()
    assert not cache(session, dataset, tmp_path / "f").reused
    assert (tmp_path / "f").read_bytes() == data


def test_another_bundle_data_or_precision_builds_it_again(session, dataset, tmp_path):
    path = tmp_path / "f"
    cache(session, dataset, path)
    changed = dataset.inputs.copy()
    changed[-1, 0, 0, 0] += 1
    for options, data in (
        ({"bundle": b"c" * 32}, dataset),
        ({}, Dataset(changed, dataset.targets, dataset.weights)),
        ({"precision": "int8"}, dataset),
        ({}, dataset.subset(np.arange(COUNT - 1))),
    ):
        assert not cache(session, data, path, **options).reused
        assert cache(session, data, path, **options).reused


@pytest.mark.parametrize("where", [0, 20, 50, 76, 140, -1])
def test_a_damaged_cache_is_not_trusted(session, dataset, tmp_path, where):
    path = tmp_path / "f"
    expected = cache(session, dataset, path).dataset.take(np.arange(COUNT))[0][0]["features.0"].copy()
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    again = cache(session, dataset, path)
    assert not again.reused
    np.testing.assert_array_equal(again.dataset.take(np.arange(COUNT))[0][0]["features.0"], expected)


def test_a_cut_off_cache_is_not_trusted(session, dataset, tmp_path):
    path = tmp_path / "f"
    cache(session, dataset, path)
    for length in (0, 10, 100, 200):
        path.write_bytes(path.read_bytes()[:length])
        assert not cache(session, dataset, path).reused


def skip(session, dataset, tmp_path, **options):
    config = ClientConfig(**({"name": "c", "federation": "f", "data": "none"} | options))
    return skip_frozen_part(session, dataset, None, bundle=b"b" * 32, directory=tmp_path, config=config)


def test_a_full_disk_turns_the_cache_off_and_training_goes_on(session, dataset, tmp_path, monkeypatch, caplog):
    real = os.fsync

    def full(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert skip(session, dataset, tmp_path)[0] is session
    assert "No space left" in caplog.text
    assert "goes on without" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_features_larger_than_allowed_are_not_kept(session, dataset, tmp_path, caplog):
    with pytest.raises(StateError, match=r"need 1,600 bytes, 1,000 are allowed"):
        cache(session, dataset, tmp_path / "f", max_bytes=1000)
    assert skip(session, dataset, tmp_path, max_feature_cache_bytes=800)[1] is dataset
    assert "feature cache off" in caplog.text


def test_off_is_off_and_augmented_data_is_never_kept(session, dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert skip(session, dataset, tmp_path, feature_cache="off")[0] is session
    noisy = Dataset(
        dataset.inputs, dataset.targets, dataset.weights, augment=lambda x, rng: x + rng.normal(size=x.shape)
    )
    assert skip(session, noisy.subset(np.arange(10)), tmp_path)[0] is session
    assert "changes in every epoch" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_augmentation_changes_training_the_same_way_for_the_same_seed(bundle, session, dataset):
    noisy = Dataset(
        dataset.inputs,
        dataset.targets,
        augment=lambda x, rng: x + rng.normal(size=x.shape).astype(np.float32),
    )
    start = bundle.initial_parameters()
    runs = [train(session, start, data, TRAINING, seed=seed).parameters for data, seed in
            ((noisy, 1), (noisy, 1), (noisy, 2), (dataset, 1))]  # fmt: skip
    digests = [hashlib.sha256(run.tobytes()).hexdigest() for run in runs]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_client_trains_on_the_head_alone(session, dataset, tmp_path):
    head, training, validation = skip_frozen_part(
        session, dataset, dataset.subset(np.arange(5)), bundle=b"b" * 32, directory=tmp_path, config=CONFIG
    )
    assert [leaf.name for leaf in head.manifest.batch.inputs.leaves] == ["features.0"]
    assert len(training) == COUNT
    assert len(validation) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-training.bin", "features-validation.bin"]


@pytest.mark.parametrize(("setting", "installs"), [("float16", True), ("off", False)])
def test_a_client_that_keeps_features_never_loads_the_whole_step(bundle, tmp_path, setting, installs):
    """Here the whole step is nothing that could be loaded."""
    manifest = (bundle.path / "manifest.json").read_bytes()
    files = {entry.sha256: entry.file for entry in bundle.manifest.files("onnxruntime")}

    def fetch_to(ref, path, *, limit):
        assert ref.size <= limit
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = (bundle.path / files[ref.digest.hex()]).read_bytes()
        path.write_bytes(bytes(len(whole)) if path.name == "step.onnx" else whole)

    config = msgspec.structs.replace(CONFIG, feature_cache=setting)
    with contextlib.closing(ClientState(tmp_path)) as state:
        install = partial(
            install_bundle,
            blob_ref(manifest),
            fetch=lambda ref, limit: manifest,
            fetch_to=fetch_to,
            state=state,
            config=config,
        )
        if not installs:
            with pytest.raises(BundleError, match=r"step\.onnx"):
                install()
            return
        batch, weights = read_self_test(bundle)
        start = bundle.initial_parameters()
        expected = open_session(bundle).step(start, batch, weights).gradients
        np.testing.assert_allclose(install().step(start, batch, weights).gradients, expected, rtol=1e-5, atol=1e-6)
