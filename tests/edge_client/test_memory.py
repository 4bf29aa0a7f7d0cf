"""Less memory: rows that are read and not mapped, samples that are chosen and not copied, one graph at a time."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgetrain.edge_client import open_session
from edgetrain.edge_client.errors import DataError
from edgetrain.edge_client.host.memory import MappedRows, forget_code, map_rows, only_of_files
from edgetrain.edge_client.runtimes.onnxruntime import OnnxGraph
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.selftest import read_self_test
from edgetrain.protocol.bundle import Bundle
from support.tiny_bundle import make_data, write_tiny_bundle

ARRAY = np.arange(7 * 3 * 2, dtype=np.float32).reshape(7, 3, 2)


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bytes(12) + ARRAY.tobytes() + b"behind")
    return map_rows(path, np.float32, 12, ARRAY.shape)


@pytest.mark.parametrize("indices", [[], [0], [6], [2, 3, 4], [5, 5, 0, 1, 6], range(7)])
def test_rows_are_those_of_the_array(mapped, indices):
    indices = np.array(indices, np.int64)
    np.testing.assert_array_equal(mapped.rows(indices), ARRAY[indices])
    assert type(mapped.rows(indices)) is np.ndarray


def test_columns_first_and_views_are_right_too(tmp_path, mapped):
    path = tmp_path / "columns"
    path.write_bytes(ARRAY.tobytes("F"))
    turned = map_rows(path, np.float32, 0, ARRAY.shape, "F")
    np.testing.assert_array_equal(turned.rows(np.array([4, 1])), ARRAY[[4, 1]])
    part = mapped[2:5]
    assert isinstance(part, MappedRows)
    np.testing.assert_array_equal(part.rows(np.array([1])), ARRAY[3:4])


def test_the_file_is_open_as_long_as_the_array(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(ARRAY.tobytes())

    def opened():
        return str(path) in [file.path for file in psutil.Process().open_files()]

    array = map_rows(path, np.float32, 0, ARRAY.shape)
    assert opened()
    del array
    gc.collect()
    assert not opened()


def test_data_that_is_cut_short_is_an_error_and_not_the_end_of_the_process(tmp_path):
    bundle = Bundle(write_tiny_bundle(tmp_path / "tiny"))
    x, y = make_data(200)
    np.savez(tmp_path / "data.npz", inputs=x, targets=y)
    dataset = load_dataset(tmp_path / "data.npz", bundle.manifest)
    np.testing.assert_array_equal(dataset.take(np.array([199, 3]))[0][0], x[[199, 3]])
    os.truncate(tmp_path / "data.npz", 500)
    with pytest.raises(DataError, match="can no longer be read: .*is shorter than it was"):
        dataset.take(np.array([199]))


def test_chosen_samples_are_those_of_a_copy():
    whole = Dataset(np.arange(10.0), np.arange(10), np.linspace(1, 2, 10))
    chosen, copied = whole.select(np.array([7, 1, 4])), whole.subset(np.array([7, 1, 4]))
    assert len(chosen) == len(copied) == 3
    assert chosen.inputs is whole.inputs
    for one, other in ((chosen, copied), (chosen.select(np.array([2, 0])), copied.subset(np.array([2, 0])))):
        everything = np.arange(len(other))
        (inputs, targets), weights = one.take(everything)
        (expected, expected_targets), expected_weights = other.take(everything)
        np.testing.assert_array_equal(inputs, expected)
        np.testing.assert_array_equal(targets, expected_targets)
        np.testing.assert_array_equal(weights, expected_weights)
    noisy = Dataset(np.zeros(10), np.arange(10), augment=lambda x, rng: x + rng.normal(size=x.shape))
    (inputs, targets), _ = noisy.select(np.array([7, 1])).augmented(np.random.default_rng(0)).take(np.array([1]))
    assert targets.tolist() == [1]
    assert inputs[0] != 0


def test_a_session_that_saves_memory_gives_the_same_and_holds_one_graph(tmp_path):
    bundle = Bundle(write_tiny_bundle(tmp_path / "tiny"))
    batch, weights = read_self_test(bundle)
    start = bundle.initial_parameters()
    plain = open_session(bundle)
    expected, evaluated = plain.step(start, batch, weights), plain.evaluate(start, batch, weights)
    others = loaded_graphs()
    saving = open_session(bundle)
    saving.save_memory(in_parts=True)
    for _ in range(2):
        np.testing.assert_array_equal(saving.step(start, batch, weights).gradients, expected.gradients)
        assert loaded_graphs() == others + 1
        assert saving.evaluate(start, batch, weights) == evaluated
        assert loaded_graphs() == others + 1
    saving.release()
    assert loaded_graphs() == others
    assert saving.step(start, batch, weights).loss_sum == expected.loss_sum


def loaded_graphs():
    """How many are in memory, whichever session they belong to."""
    gc.collect()
    return sum(type(found) is OnnxGraph for found in gc.get_objects())


FREEING = """
import os, sys
from edgetrain.edge_client.host.memory import return_what_is_freed, trim

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

if sys.argv[1] == "told":
    return_what_is_freed()
# Once a block of this size was freed, the C library keeps those that are not larger for later, unless it was told.
large = b"x" * (24 << 20)
del large
before = resident()
blocks = [b"x" * (8 << 20) for _ in range(8)]
behind = b"x" * (1 << 17)
del blocks
freed = resident()
trim()
print(freed - before, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_what_is_freed_goes_back_to_the_system():
    """64 MB in blocks: at once by the setting, without it when they are asked for."""
    kept = {}
    for case in ("told", "left alone"):
        ran = subprocess.run([sys.executable, "-c", FREEING, case], capture_output=True, text=True, check=True)
        kept[case] = [int(megabytes) for megabytes in ran.stdout.split()]
    assert max(kept["told"]) < 8
    assert kept["left alone"][0] > 48
    assert kept["left alone"][1] < 8


SMAPS = b"""\
55b0b5cc9000-55b0b5cca000 r--p 00000000 fe:00 10      /usr/bin/some thing
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd mr mw me
55b0b5cca000-55b0b5ccc000 r--p 00001000 fe:00 10      /usr/bin/relocated
Anonymous:             4 kB
Swap:                  0 kB
55b0b5ccc000-55b0b5ccd000 rw-p 00001000 fe:00 10      /usr/bin/written
Anonymous:             0 kB
Swap:                  0 kB
7fe0c9000000-7fe0c9002000 r-xp 00000000 fe:00 11      /usr/lib/code.so
Anonymous:             0 kB
Swap:                  4 kB
7fe0c9100000-7fe0c9104000 r-xp 00000000 fe:00 12      /usr/lib/more.so
Size:                 16 kB
Anonymous:             0 kB
LazyFree:              0 kB
Swap:                  0 kB
7fe0c9200000-7fe0c9204000 r--p 00000000 00:00 0
Anonymous:             0 kB
Swap:                  0 kB
7fe0c9300000-7fe0c9304000 r--s 00000000 fe:00 13      /data
Anonymous:             0 kB
Swap:                  0 kB
7fe0c9400000-7fe0c9404000 r-xp 00000000 00:00 0       [vdso]
Anonymous:             0 kB
Swap:                  0 kB
"""


def test_only_what_a_file_holds_is_forgotten():
    assert only_of_files(SMAPS) == [(0x55B0B5CC9000, 0x55B0B5CCA000), (0x7FE0C9100000, 0x7FE0C9104000)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux")
def test_code_comes_back_when_it_is_needed():
    def of_files():
        return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0])

    matrix = np.random.default_rng(0).normal(size=(50, 50))
    expected = np.linalg.inv(matrix)
    before = of_files()
    forget_code()
    # Python, numpy and onnxruntime are tens of megabytes.
    assert of_files() < before - 10_000
    np.testing.assert_array_equal(np.linalg.inv(matrix), expected)
