"""Arrows run one way, and no device ever loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgetrain
from support.tiny_bundle import make_data

ROOT = Path(edgetrain.__file__).parent

# Which of our packages a folder may import, as in DESIGN: folder -> prefixes. A package may always import itself.
RULES = {
    "protocol": (),
    "edge_client": ("protocol",),
    "coordinator": ("protocol", "edge_client"),
    "models": ("protocol.errors",),
    "export": ("protocol", "models"),
    "simulation": ("protocol", "edge_client", "coordinator"),
}
# On a device and on a coordinator these are not installed. A runtime may name what it drives.
FOREIGN = {"torch", "onnx", "onnxscript", "executorch", "torchao", "sklearn", "transformers", "matplotlib", "rich"}


def imports(path):
    """(line, dotted name) of every import of a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("folder", [name for name in RULES if (ROOT / name).exists()])
def test_a_folder_imports_only_what_it_may(folder):
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        for line, name in imports(path):
            package, _, inner = name.partition(".")
            if package == "edgetrain" and inner not in {"", "__version__"}:
                allowed = (folder, *RULES[folder])
                if not any(f"{inner}.".startswith(f"{prefix}.") for prefix in allowed):
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            elif package in RULES:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} by its bare folder name")
    assert wrong == []


@pytest.mark.parametrize("folder", ["protocol", "edge_client", "coordinator"])
def test_no_import_of_what_a_device_has_not(folder):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "runtimes"
        for line, name in imports(path)
        if name.partition(".")[0] in FOREIGN
    ]
    assert wrong == []


def test_every_folder_has_its_rule():
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"cli"}
    assert folders <= RULES.keys()


# Runs in a process of its own in which torch cannot be imported: importing all modules, opening a bundle, a
# training step, and a whole federation of two clients.
SCRIPT = """
import importlib, pkgutil, sys, threading
from pathlib import Path

class Installed:
    # What a device has.

    finders = sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FOREIGN:
            return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

FOREIGN = set(sys.argv[1].split(","))
sys.meta_path[:] = [Installed()]
bundle, data, out = map(Path, sys.argv[2:])

import numpy as np
modules = []
for package in ("protocol", "edge_client", "coordinator"):
    root = importlib.import_module(f"edgetrain.{package}")
    for info in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if info.name.rpartition(".")[0] != "edgetrain.edge_client.runtimes":
            modules.append(importlib.import_module(info.name))
assert len(modules) > 40, len(modules)

from edgetrain.coordinator.config import EvaluationConfig, FederationConfig, RoundsConfig
from edgetrain.coordinator.coordinator import Coordinator
from edgetrain.coordinator.run.run_directory import RunDirectory
from edgetrain.coordinator.serve import Evaluator
from edgetrain.edge_client import open_session
from edgetrain.edge_client.client import Client, connection_will, new_connection
from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.training.data import load_dataset
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.transport import MemoryBroker

opened = Bundle(bundle)
session = open_session(opened)
batch = load_dataset(data, opened.manifest).take(np.arange(4))
assert np.isfinite(session.step(opened.initial_parameters(), *batch).loss_sum)
assert np.isfinite(session.evaluate(opened.initial_parameters(), *batch).loss_sum)

broker = MemoryBroker()

def client(name):
    state = ClientState(out / name)
    config = ClientConfig(name=name, federation="f", data=str(data))
    connection = new_connection()
    transport = broker.connect(will=connection_will(config, state, connection))
    Client(config, state=state, transport=transport, connection=connection).run()
    state.close()

threads = [threading.Thread(target=client, args=(name,)) for name in ("a", "b")]
for thread in threads:
    thread.start()
config = FederationConfig(
    federation="f", bundle=str(bundle), out=str(out / "run"),
    rounds=RoundsConfig(total=3, goal=2, idle_timeout_seconds=20), evaluation=EvaluationConfig(data=str(data)),
)
directory = RunDirectory(config, opened.manifest, opened.digest)
summary = Coordinator(
    config, bundle=opened, transport=broker.connect(), directory=directory, evaluate=Evaluator(opened, config)
).run()
for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
directory.close()
assert summary.rounds == 3 and summary.clients == 2, summary
losses = [record.loss for record in directory.records]
assert losses[-1] < losses[0], losses
loaded = sorted(name for name in FOREIGN if name in sys.modules)
assert not loaded, loaded
print("done")
"""


def test_importing_and_running_everything_needs_no_torch(tiny_bundle, tmp_path):
    x, y = make_data(60, seed=5)
    np.savez(tmp_path / "data.npz", inputs=x, targets=y)
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        SCRIPT,
        ",".join(FOREIGN),
        tiny_bundle,
        tmp_path / "data.npz",
        tmp_path,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["client", "--help"], ["coordinator", "--help"],
                                       ["inspect", "--help"], ["verify", "--help"]])  # fmt: skip
def test_help_is_light(arguments):
    """Nobody waits for torch or a runtime to read a help text."""
    code = (
        "import sys\n"
        "from edgetrain.cli import main\n"
        f"sys.argv = ['edgetrain', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as error:\n    assert error.code == 0, error.code\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'executorch', 'sklearn', 'matplotlib', 'amqtt'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_exporting_needs_no_executorch():
    """It is imported by who lowers for it: a laptop may go without, and it takes seconds."""
    code = "import sys; sys.modules['executorch'] = None; import edgetrain.export, edgetrain.export.lowering"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
