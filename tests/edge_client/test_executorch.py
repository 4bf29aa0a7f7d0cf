"""The executorch session: torch-free, without copies, and what it refuses. Numbers are eager torch's."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("executorch")
torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402

from edgetrain.edge_client import open_session  # noqa: E402
from edgetrain.edge_client.errors import DataError, SessionError  # noqa: E402
from edgetrain.edge_client.runtimes import executorch_build, find_runtime  # noqa: E402
from edgetrain.edge_client.runtimes.executorch_library import Program, ProgramError  # noqa: E402
from edgetrain.edge_client.training.selftest import run_self_test  # noqa: E402
from edgetrain.protocol.bundle import Bundle  # noqa: E402
from edgetrain.protocol.errors import BundleError  # noqa: E402
from support.bundles import eager_step, flat_parameters  # noqa: E402
from support.executorch_bundles import (  # noqa: E402
    cnn_bundle,
    cnn_problem,
    transformer_bundle,
    transformer_problem,
)

PROBLEMS = {"cnn": (cnn_bundle, cnn_problem), "transformer": (transformer_bundle, transformer_problem)}


def numpy_batch(batch):
    return tuple(half.numpy() for half in batch)


@pytest.fixture(scope="module", params=PROBLEMS)
def case(request):
    bundle, problem = PROBLEMS[request.param]
    return bundle(), problem


@pytest.fixture
def session():
    return open_session(cnn_bundle(), "executorch")


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(cnn_bundle(), tmp_path / "copy"))


def rewrite_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["programs"][0])
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_program(path, data, graph="step"):
    """Other contents, with the right hash."""
    (path / f"executorch/{graph}.pte").write_bytes(data)

    def change(program):
        program["graphs"][graph]["file"] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite_manifest(path, change)


def test_gradients_match_eager_torch_on_other_parameters_and_data(case):
    path, problem = case
    module, loss, _ = problem(seed=1)
    _, _, batch = problem(seed=2)
    manifest = Bundle(path).manifest
    session = open_session(path, "executorch")
    vector = flat_parameters(module, manifest)
    count = len(batch[0])
    weights = np.linspace(0.5, 1.5, count).astype(np.float32)
    # The statistics of the norm are frozen into the bundle.
    module.load_state_dict(dict(problem(seed=0)[0].named_buffers()), strict=False)
    shape = manifest.batch.weights.shape
    expected_weights = np.broadcast_to(weights.reshape(-1, *[1] * (len(shape) - 1)), (count, *shape[1:]))
    total, gradients = eager_step(module, loss, batch, expected_weights.copy())
    result = session.step(vector, numpy_batch(batch), weights)
    assert result.loss_sum == pytest.approx(total, rel=1e-5)
    assert result.weight_sum == pytest.approx(float(np.sum(expected_weights)), rel=1e-6)
    largest = max(np.abs(g).max() for g in gradients.values())
    for entry in manifest.parameters:
        got = entry.of(result.gradients)
        want = gradients[entry.name]
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max() + 1e-6 * largest, entry.name


def test_the_self_test_passes_on_directory_and_archive(case, tmp_path):
    path, _ = case
    archive = tmp_path / "packed.edge"
    shutil.make_archive(str(tmp_path / "packed"), "zip", path)
    (tmp_path / "packed.zip").rename(archive)
    for place in (path, archive):
        bundle = Bundle(place)
        report = run_self_test(bundle, open_session(bundle, "executorch"))
        assert report.worst < 1e-5


def test_parameters_are_read_where_they_lie_and_gradients_written_to_one_vector(session):
    bundle = Bundle(cnn_bundle())
    vector, batch = bundle.initial_parameters(), numpy_batch(cnn_problem()[2])
    first = session.step(vector, batch)
    kept = first.gradients.copy()
    vector *= 1.1
    second = session.step(vector, batch)
    assert second.gradients is first.gradients
    assert second.loss_sum != first.loss_sum
    assert np.abs(second.gradients - kept).max() > 1e-3
    vector /= np.float32(1.1)
    session.step(vector, batch)
    np.testing.assert_allclose(first.gradients, kept, rtol=1e-3, atol=1e-5)


def test_a_vector_at_the_end_of_a_page_is_copied_because_xnnpack_reads_beyond():
    import mmap

    bundle = Bundle(cnn_bundle())
    session, batch = open_session(bundle, "executorch"), numpy_batch(cnn_problem()[2])
    expected = session.step(bundle.initial_parameters(), batch).gradients.copy()
    values = bundle.initial_parameters()
    pages = mmap.mmap(-1, -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    vector = np.frombuffer(pages, np.float32)[-values.size :]
    vector[:] = values
    np.testing.assert_array_equal(session.step(vector, batch).gradients, expected)
    vector[:] = 0
    assert not np.array_equal(session.step(vector, batch).gradients, expected)


def test_a_ragged_batch_counts_only_its_own_samples(session):
    module, loss, (x, y) = cnn_problem()
    total, _ = eager_step(module, loss, (x[:3], y[:3]), np.ones(3, np.float32))
    result = session.step(Bundle(cnn_bundle()).initial_parameters(), (x[:3].numpy(), y[:3].numpy()))
    assert result.weight_sum == 3
    assert result.loss_sum == pytest.approx(total, rel=1e-5)


def test_evaluation_and_inference_match_eager_torch(session):
    module, loss, (x, y) = cnn_problem()
    module.eval()
    vector = Bundle(cnn_bundle()).initial_parameters()
    with torch.no_grad():
        logits = module(x)
    result = session.evaluate(vector, (x.numpy(), y.numpy()))
    assert result.loss_sum == pytest.approx(float(loss(logits, y).sum()), rel=1e-5)
    assert result.metrics["correct"] == float((logits.argmax(1) == y).sum())
    np.testing.assert_allclose(session.infer(vector, x[:2].numpy())["output"], logits[:2], rtol=1e-4, atol=1e-5)


def test_threads_change_no_number():
    bundle, batch = Bundle(cnn_bundle()), numpy_batch(cnn_problem()[2])
    vector = bundle.initial_parameters()
    one = open_session(bundle, "executorch", threads=1).step(vector, batch).gradients.copy()
    two = open_session(bundle, "executorch", threads=2).step(vector, batch).gradients
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_the_manifest_names_the_planned_memory_and_the_program_may_not_plan_more(copied):
    graph = Bundle(copied).manifest.program("executorch").graphs["step"]
    program = Program(memoryview((copied / graph.file.file).read_bytes()))
    assert graph.planned_memory == program.planned_bytes > 0
    rewrite_manifest(copied, lambda p: p["graphs"]["step"].update(planned_memory=graph.planned_memory - 1))
    with pytest.raises(SessionError, match="plans more memory than its manifest allows"):
        open_session(copied, "executorch")


def test_an_index_out_of_range_is_the_datas_fault():
    session = open_session(transformer_bundle(), "executorch")
    tokens, targets = numpy_batch(transformer_problem()[2])
    tokens[0, 0] = 99
    with pytest.raises(DataError, match="out of range"):
        session.step(Bundle(transformer_bundle()).initial_parameters(), (tokens, targets))


def test_a_changed_file_is_refused_by_its_hash(copied):
    path = copied / "executorch/step.pte"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="corrupt"):
        open_session(copied, "executorch")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a program at all" * 9,
        lambda data: data[: len(data) // 3],
        lambda data: data[:4] + bytes(64) + data[68:],
        lambda data: data[:4] + b"ET99" + data[8:],
    ],
    ids=["empty", "text", "cut", "zeroed", "other version"],
)
def test_a_damaged_program_with_the_right_hash_is_refused(copied, damage):
    replace_program(copied, damage((copied / "executorch/step.pte").read_bytes()))
    with pytest.raises(SessionError, match=r"step\.pte.*export it again|step\.pte.*version"):
        open_session(copied, "executorch")


def test_a_program_with_other_tensors_than_the_manifest_is_refused(copied):
    replace_program(copied, (transformer_bundle() / "executorch/step.pte").read_bytes())
    rewrite_manifest(copied, lambda p: p["graphs"]["step"].pop("planned_memory"))
    with pytest.raises(SessionError, match="inputs are not the manifest's"):
        open_session(copied, "executorch")


def test_a_bundle_for_a_later_version_names_the_remedy(copied):
    rewrite_manifest(copied, lambda p: p.update(minimum_version="9.9"))
    with pytest.raises(SessionError, match=r'needs executorch 9\.9.*pip install "executorch>=9\.9"'):
        open_session(copied, "executorch")


def test_a_program_that_needs_an_absent_kernel_names_kernel_and_remedy(copied):
    data = (copied / "executorch/step.pte").read_bytes()
    assert b"aten::as_strided_copy" in data
    data = data.replace(b"aten::as_strided_copy", b"aten::as_strided_copX")
    replace_program(copied, data)
    with pytest.raises(SessionError, match=r"as_strided_copX.*export the bundle again"):
        open_session(copied, "executorch")


def test_a_processor_that_xnnpack_does_not_know_is_named_with_the_remedy(tmp_path):
    """The function by which XNNPACK asks for the processor says that it does not know it."""
    source, library = tmp_path / "cpu.c", tmp_path / "cpu.so"
    source.write_text("int cpuinfo_initialize(void) { return 0; }\n")
    subprocess.run([executorch_build.find_compiler(), "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    code = """
import sys
from edgetrain.edge_client import open_session
from edgetrain.edge_client.errors import SessionError
try:
    open_session(sys.argv[1], "executorch")
except SessionError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(cnn_bundle())],
        capture_output=True, text=True, check=True,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )  # fmt: skip
    assert "XNNPACK does not know this processor" in ran.stdout
    assert "--runtime onnxruntime" in ran.stdout


def test_the_wheel_is_the_one_that_python_would_import():
    wheel, expected = executorch_build.find_wheel(), distribution("executorch")
    assert (wheel.root, wheel.version) == (Path(expected.locate_file("executorch")), expected.version)


def test_without_the_wheel_the_pip_line_is_named(monkeypatch, tmp_path):
    (tmp_path / "executorch_other-1.5.1.dist-info").mkdir()
    (tmp_path / "a file").touch()
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(tmp_path / "a file"), str(tmp_path / "gone")])
    reason = find_runtime("executorch").available()
    assert "not installed" in reason
    assert 'pip install --no-deps "executorch~=1.5.1"' in reason


def test_without_a_compiler_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "sudo apt install g++" in find_runtime("executorch").available()
    wheel = executorch_build.find_wheel()
    with pytest.raises(SessionError, match=r"edgetrain build-runtime executorch -o FILE"):
        executorch_build.build(wheel)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = executorch_build.find_wheel()
    broken = executorch_build.Wheel(tmp_path / "nowhere", wheel.version)
    with pytest.raises(SessionError, match=r"has no lib/libexecutorch"):
        executorch_build.check_wheel(broken)
    with pytest.raises(SessionError, match=r"could not compile .*error"):
        executorch_build.build(broken)
    assert list((tmp_path / "edgetrain").iterdir()) == []


def test_the_command_builds_and_the_result_runs_without_torch(tmp_path):
    from edgetrain.cli.build_runtime import command

    out = tmp_path / "library.so"
    done = CliRunner().invoke(command, ["executorch", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert Path(done.output.strip()) == out
    code = """
import sys
sys.modules["torch"] = None  # an import of torch fails
from edgetrain.protocol.bundle import Bundle
from edgetrain.edge_client import open_session
from edgetrain.edge_client.training.selftest import run_self_test
bundle = Bundle(sys.argv[1])
report = run_self_test(bundle, open_session(bundle, "executorch"))
assert report.worst < 1e-5, report
maps = open("/proc/self/maps").read()
print(sorted({name for name in ("libtorch", "libc10", sys.argv[2]) if name in maps}))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(cnn_bundle()), str(out)],
        capture_output=True, text=True, check=False,
        env={**__import__("os").environ, executorch_build.LIBRARY_VARIABLE: str(out), "PATH": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str([str(out)])


def test_no_flipped_bit_gets_past_the_hash(tmp_path):
    """ExecuTorch's own verification misses some that crash it: a program is loaded only when its hash is right."""
    bundle = tmp_path / "b"
    shutil.copytree(cnn_bundle(), bundle)
    file = bundle / "executorch/step.pte"
    data, rng = file.read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(BundleError, match=r"step\.pte"):
            open_session(bundle, "executorch")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_behind_the_hash_a_program_that_is_cut_short_is_refused(share):
    data = (cnn_bundle() / "executorch/step.pte").read_bytes()
    with pytest.raises(ProgramError):
        Program(memoryview(data[: int(len(data) * share)]), 1 << 24)


def test_the_error_class_of_the_library_is_not_a_crash():
    with pytest.raises(ProgramError, match="not a program"):
        Program(memoryview(b"x" * 100))
