"""The manifest: what is refused, what is ignored."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.errors import BundleError
from edgetrain.protocol.manifest import FileEntry, ParameterEntry, decode_manifest, encode_manifest, probe_signs


@pytest.fixture
def tree(tiny_bundle):
    """A good manifest as plain JSON values, to be spoiled."""
    return json.loads((tiny_bundle / "manifest.json").read_bytes())


def decode(tree):
    return decode_manifest(json.dumps(tree).encode())


def test_it_survives_a_round_trip(tiny_bundle):
    manifest = Bundle(tiny_bundle).manifest
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_a_parameter_of_a_vector_is_the_vectors_own_memory():
    vector = np.arange(10)
    entry = ParameterEntry(name="weight", shape=(2, 3), offset=3)
    assert entry.of(vector).tolist() == [[3, 4, 5], [6, 7, 8]]
    entry.of(vector)[1] = 0
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 9]
    scalar = ParameterEntry(name="bias", shape=(), offset=9)
    scalar.of(vector)[...] = 7
    assert vector[9] == 7


@pytest.mark.parametrize(("version", "remedy"), [([2, 0], "upgrade edgetrain"), ([0, 9], "export the bundle again")])
def test_another_major_version_is_refused_with_the_remedy(tree, version, remedy):
    tree["format_version"] = version
    # Whatever else such a manifest holds: the version is what the message is about.
    tree["parameters"] = "laid out quite differently"
    with pytest.raises(BundleError, match=rf"version {version[0]}\.{version[1]}.*{remedy}"):
        decode(tree)


def test_a_later_minor_version_is_read_and_its_new_fields_ignored(tree):
    good = decode(tree)
    tree["format_version"] = [1, 7]
    tree["colour"] = "blue"
    tree["parameters"][0]["sharded"] = True
    newer = decode(tree)
    assert newer.parameters == good.parameters
    assert newer.format_version == (1, 7)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format":"edgetrain-bundle"}', b"{}" * 3],
    ids=["empty", "torn", "list", "null", "not utf-8", "deep", "no version", "several"],
)
def test_what_is_no_manifest_is_a_bundle_error(data):
    with pytest.raises(BundleError, match="not an edgetrain manifest"):
        decode_manifest(data)


def test_another_format_is_named(tree):
    tree["format"] = "somebody-elses"
    with pytest.raises(BundleError, match="somebody-elses"):
        decode(tree)


def spoil(path, value):
    """A function that sets `tree[path] = value`."""

    def apply(tree):
        *parents, last = path
        for key in parents:
            tree = tree[key]
        tree[last] = value

    return apply


CONTRADICTIONS = {
    "offset": (spoil(["parameters", 1, "offset"], 3), "does not start at offset 35"),
    "negative dimension": (spoil(["parameters", 0, "shape"], [-7, -5]), "first.weight"),
    "two of a name": (spoil(["parameters", 1, "name"], "first.weight"), "first.weight.* twice"),
    "micro-batch": (spoil(["micro_batch"], 0), "micro_batch is 0"),
    "vector too short": (spoil(["initial_parameters", "size"], 4), "66 parameters"),
    "self-test": (spoil(["self_test", "gradients", 0, "name"], "x"), "self-test does not name"),
    "batch dimension": (spoil(["batch", "targets", "leaves", 0, "shape"], [5]), "micro-batch of 4"),
    "scalar leaf": (spoil(["batch", "weights", "shape"], []), "weights"),
    "self-test size": (spoil(["self_test", "file", "size"], 1), "self-test"),
    "hash too short": (spoil(["self_test", "file", "sha256"], "ab"), "hash"),
    "hash not hex": (spoil(["self_test", "file", "sha256"], "z" * 64), "hash"),
    "negative size": (spoil(["programs", 0, "graphs", "step", "file", "size"], -1), "impossible size"),
    "the manifest itself": (spoil(["self_test", "file", "file"], "manifest.json"), "manifest.json"),
    "one file, two hashes": (spoil(["self_test", "file", "file"], "parameters.bin"), "parameters.bin"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_and_named(tree, name):
    apply, message = CONTRADICTIONS[name]
    apply(tree)
    with pytest.raises(BundleError, match=message):
        decode(tree)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "a/../../x", "a\\..\\x", "", ".", "a/..", "a\0b", "C:\\x"],
)
def test_a_file_outside_the_bundle_is_refused(tree, path):
    tree["programs"][0]["graphs"]["step"]["file"]["file"] = path
    with pytest.raises(BundleError, match="points outside the bundle"):
        decode(tree)


def test_extra_files_are_checked_like_the_others(tree):
    tree["programs"][0]["graphs"]["step"]["extra_files"] = [{"file": "../x", "sha256": "0" * 64, "size": 1}]
    with pytest.raises(BundleError, match="points outside"):
        decode(tree)


@pytest.mark.parametrize("bad", [{"name": 3}, {"micro_batch": "4"}, {"programs": {}}, {"loss": None}])
def test_wrong_types_are_schema_errors(tree, bad):
    with pytest.raises(BundleError, match="breaks the schema"):
        decode(tree | bad)


def test_missing_fields_are_schema_errors(tree):
    for key in list(tree):
        if key in {"metrics", "trainable", "frozen", "trainable_storage", "notes"}:  # they have defaults
            continue
        with pytest.raises(BundleError):
            decode({other: value for other, value in tree.items() if other != key})


def test_each_file_is_listed_once_and_only_those_of_the_runtime(tree):
    tree["programs"] = tree["programs"][:1]
    other = json.loads(json.dumps(tree["programs"][0]))
    other["runtime"] = "elsewhere"
    other["graphs"]["step"]["file"] = {"file": "elsewhere/step.bin", "sha256": "0" * 64, "size": 5}
    tree["programs"].append(other)
    manifest = decode(tree)
    ours = [entry.file for entry in manifest.files("onnxruntime")]
    assert sorted(ours) == ["onnxruntime/eval.onnx", "onnxruntime/infer.onnx", "onnxruntime/step.onnx",
                            "parameters.bin", "self_test.bin"]  # fmt: skip
    assert sorted(entry.file for entry in manifest.files()) == sorted([*ours, "elsewhere/step.bin"])


def test_a_runtime_that_the_bundle_lacks_is_named_with_those_it_has(tree):
    with pytest.raises(BundleError, match="'abacus', only for: onnxruntime, "):
        decode(tree).program("abacus")


def test_probe_signs_by_hand():
    # 2654435761 = 0x9E3779B1: top bit set. Twice it: 0x13C6EF362, mod 2^32 0x3C6EF362: clear. And so on.
    expected = [(-1 if (i * 2654435761) % 2**32 >= 2**31 else 1) for i in range(1000)]
    assert expected[:3] == [1, -1, 1]
    signs = probe_signs(1000)
    assert signs.dtype == np.float32
    assert signs.tolist() == expected


def test_entries_are_values():
    entry = FileEntry(file="a", sha256="0" * 64, size=1)
    assert entry == msgspec.structs.replace(entry)
