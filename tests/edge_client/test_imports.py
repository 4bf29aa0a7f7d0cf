"""What importing and using the device side does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgetrain.edge_client import available_runtimes
from support.tiny_bundle import write_tiny_bundle

IMPORT_ALL = """
import importlib, pkgutil, sys
import edgetrain.edge_client, edgetrain.protocol
for package in (edgetrain.edge_client, edgetrain.protocol):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(sorted({"torch", "onnx", "onnxruntime", "executorch"} & set(sys.modules)))
"""

TRAIN = """
import sys
import numpy as np
from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.training.data import Dataset
from edgetrain.edge_client.training.trainer import evaluate, train
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import TrainingConfig
bundle = Bundle(sys.argv[1])
session = open_session(bundle)
data = Dataset(np.ones((9, 5), np.float32), np.zeros(9, np.int64))
result = train(session, bundle.initial_parameters(), data, TrainingConfig(), seed=0)
assert evaluate(session, result.parameters, data).loss < result.loss
available_runtimes()
print(session.runtime, "torch" in sys.modules)
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_every_module_imports_no_runtime():
    assert run(IMPORT_ALL) == "[]"


@pytest.mark.skipif(not available_runtimes(), reason="needs a runtime")
def test_training_imports_no_torch(tmp_path):
    runtime, torch_is_there = run(TRAIN, write_tiny_bundle(tmp_path / "tiny")).split()
    assert runtime in available_runtimes()
    assert torch_is_there == "False"
