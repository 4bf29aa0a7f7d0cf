"""What `export_bundle` writes, for a small CNN."""

import numpy as np
import pytest
import torch
from torch import nn

from edgetrain.export import (
    BatchError,
    ParityError,
    SelectionError,
    SourceError,
    UnsupportedError,
    export_bundle,
)
from edgetrain.export.graph.decompositions import common
from edgetrain.export.lowering.onnx import OnnxLowering
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.manifest import probe_signs
from support.bundles import (
    assert_step_matches,
    eager_step,
    flat_parameters,
    manifest_of,
    run_graph,
    self_test_batch,
)

LOSS = nn.CrossEntropyLoss(reduction="none")


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def batch(n=4):
    return torch.randn(n, 1, 10, 10), torch.arange(n) % 5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return export_bundle(cnn(), LOSS, batch(), out=tmp_path_factory.mktemp("b") / "cnn", name="cnn")


def test_the_step_of_fresh_data_matches_eager(exported):
    x, y = batch()
    weights = np.array([1.0, 0.0, 0.5, 2.0], np.float32)
    got = assert_step_matches(exported, cnn(), LOSS, (x, y), weights)
    right = (cnn()(x).argmax(1) == y).numpy()
    assert got["metrics.correct"] == pytest.approx(float((right * weights).sum()))


def test_weight_zero_means_absent(exported):
    x, y = batch()
    vector = flat_parameters(cnn(), manifest_of(exported))
    weights = np.array([1, 1, 0, 0], np.float32)
    other = x.clone()
    other[2:] = 100.0
    first = run_graph(exported, "step", vector, (x, y), weights)
    second = run_graph(exported, "step", vector, (other, y), weights)
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=1e-5, atol=1e-6)


def test_eval_and_infer_agree_with_the_module(exported):
    x, y = batch()
    vector = flat_parameters(cnn(), manifest_of(exported))
    ones = np.ones(4, np.float32)
    outputs = cnn()(x).detach()
    np.testing.assert_allclose(
        run_graph(exported, "infer", vector, (x, y), ones)["output"], outputs, rtol=1e-5, atol=1e-6
    )
    evaluated = run_graph(exported, "eval", vector, (x, y), ones)
    np.testing.assert_allclose(evaluated["loss_sum"], LOSS(outputs, y).sum(), rtol=1e-5)
    assert list(evaluated)[:3] == ["loss_sum", "weight_sum", "metrics.correct"]
    right = outputs.argmax(1) == y
    np.testing.assert_array_equal(evaluated["metrics.class_count"], np.bincount(y, minlength=5))
    np.testing.assert_array_equal(evaluated["metrics.class_correct"], np.bincount(y[right], minlength=5))


def test_the_manifest_describes_the_bundle(exported):
    bundle = Bundle(exported)
    bundle.verify_files()
    manifest = bundle.manifest
    module = cnn()
    assert [entry.name for entry in manifest.parameters] == [name for name, _ in module.named_parameters()]
    assert manifest.num_parameters == sum(p.numel() for p in module.parameters())
    np.testing.assert_array_equal(bundle.initial_parameters(), flat_parameters(module, manifest))
    assert manifest.micro_batch == 4
    assert manifest.batch.inputs.kind == "array"
    assert manifest.batch.weights.shape == (4,)
    assert manifest.metrics == ("correct", "class_correct", "class_count")
    assert manifest.programs[0].graphs.keys() == {"step", "eval", "infer"}
    step = manifest.programs[0].graphs["step"]
    assert [spec.name for spec in step.inputs][-3:] == ["inputs", "targets", "weights"]
    assert [spec.name for spec in manifest.programs[0].graphs["infer"].inputs][-1] == "inputs"


def test_the_self_test_holds_what_eager_computes(exported):
    values = self_test_batch(exported)
    self_test = manifest_of(exported).self_test
    x, y = torch.from_numpy(values["inputs"].copy()), torch.from_numpy(values["targets"].copy())
    total, grads = eager_step(cnn(), LOSS, (x, y), values["weights"].copy())
    assert self_test.loss_sum == pytest.approx(total, rel=1e-6)
    assert self_test.weight_sum == pytest.approx(values["weights"].sum(), rel=1e-6)
    assert len(set(values["weights"].tolist())) > 1
    for check in self_test.gradients:
        flat = grads[check.name].ravel()
        assert check.norm == pytest.approx(float(np.linalg.norm(flat)), rel=1e-4)
        assert check.projection == pytest.approx(float(flat @ probe_signs(flat.size)), rel=1e-3, abs=1e-5)


def test_same_input_same_bytes_and_no_trace_of_this_machine(tmp_path):
    data = batch()
    first = export_bundle(cnn(), LOSS, data, out=tmp_path / "a.edge")
    second = export_bundle(cnn(), LOSS, data, out=tmp_path / "b.edge")
    assert first.read_bytes() == second.read_bytes()
    assert b"/work" not in first.read_bytes()
    assert b"site-packages" not in first.read_bytes()


def test_the_micro_batch_repeats_or_cuts_the_example(tmp_path):
    size = 7
    path = export_bundle(cnn(), LOSS, batch(4), micro_batch=size, out=tmp_path / "b")
    assert manifest_of(path).micro_batch == size
    assert_step_matches(path, cnn(), LOSS, batch(size), np.ones(size, np.float32))


def test_the_users_module_is_not_changed(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(100, 5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export_bundle(module, LOSS, batch(), out=tmp_path / "b")
    assert module.training
    assert isinstance(module[1], nn.Dropout)
    assert all(p.requires_grad for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_wrong_gradient_is_refused_by_name(tmp_path, monkeypatch):
    """A rule that is off by 1 % must not get through."""

    def crooked(self):
        table = common()
        right = table[torch.ops.aten.convolution_backward.default]

        def wrong(*args):
            grad_x, grad_w, grad_b = right(*args)
            return grad_x, grad_w * 1.01, grad_b

        return table | {torch.ops.aten.convolution_backward.default: wrong}

    monkeypatch.setattr(OnnxLowering, "decompositions", crooked)
    with pytest.raises(ParityError, match=r"'(0|3)\.weight'.*2 of 6"):
        export_bundle(cnn(), LOSS, batch(), out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_bad_batches_are_refused(tmp_path):
    x, y = batch()
    nan = x.clone()
    nan[1, 0, 2, 3] = float("nan")
    for bad, message in [
        ((nan, y), r"inputs.*1 values that are NaN"),
        ((x, y[:3]), r"inputs: 4, targets: 3"),
        (x, r"pair \(inputs, targets\)"),
        ((x.to(torch.complex64), y), "complex64"),
        (([x, 3], y), r"inputs\.1.*int"),
        ((x, torch.tensor(1)), "a scalar"),
    ]:
        with pytest.raises(BatchError, match=message):
            export_bundle(cnn(), LOSS, bad, out=tmp_path / "b")
    with pytest.raises(BatchError, match="at least 1"):
        export_bundle(cnn(), LOSS, batch(), micro_batch=0, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_losses_that_are_not_per_sample_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(BatchError, match="reduction='none'"):
        export_bundle(cnn(), nn.CrossEntropyLoss(), batch(), out=tmp_path / "b")
    with pytest.raises(BatchError, match="flatten"):
        export_bundle(cnn(), lambda o, _t: o[:, None, None].abs(), batch(), out=tmp_path / "b")


def test_errors_of_the_users_code_show_its_frames(tmp_path):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x):
            return self.fc(x)

    with pytest.raises(SourceError, match=r"(?s)example inputs.*test_bundle.py.*self\.fc\(x\).*RuntimeError"):
        export_bundle(Broken(), LOSS, batch(), out=tmp_path / "b")


def test_unknown_runtimes_and_empty_selections_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"'tflite'.*onnxruntime"):
        export_bundle(cnn(), LOSS, batch(), runtimes=("tflite",), out=tmp_path / "b")
    with pytest.raises(SelectionError, match=r"matches no parameter.*0\.weight, 0\.bias"):
        export_bundle(cnn(), LOSS, batch(), trainable="decoder", out=tmp_path / "b")
    with pytest.raises(SelectionError, match="nothing to train"):
        export_bundle(nn.Flatten(), lambda o, _t: o.sum(1), batch(), out=tmp_path / "b")
