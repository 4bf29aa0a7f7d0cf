"""What cannot be exported is refused with operator, module and remedy; user code shows its frames."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.export import BatchError, SourceError, UnsupportedError, export_bundle, load_source
from edgetrain.export.prepare import prepare
from edgetrain.protocol.errors import BundleError
from support.layers import squared

BATCH = (torch.randn(3, 4), ())


class Around(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gate = gate

    def forward(self, x):
        return self.gate(self.first(x))


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Bessel(nn.Module):
    def forward(self, x):
        return x * torch.special.bessel_j0(x)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class AlwaysDropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(tmp_path):
    class NeverRun(nn.Module):
        def forward(self, x):
            raise AssertionError("the model was run")

    (tmp_path / "file").write_text("not a bundle")
    for out in (tmp_path / "file", tmp_path / "file" / "new.edge"):
        with pytest.raises(BundleError, match=r"file.*choose another -o"):
            export_bundle(NeverRun(), squared, BATCH, out=out)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Branch(), r"_local_scalar_dense in module 'gate' \(Branch\).*test_unsupported.py.*torch\.where"),
        (Bessel(), r"bessel_j0.*'gate' \(Bessel\).*Replace it"),
        (Noise(), r"random.*randn_like.*'gate' \(Noise\).*input of the batch"),
        (AlwaysDropping(), r"random.*bernoulli.*'gate' \(AlwaysDropping\).*training=self\.training"),
    ],
)
def test_refused_with_operator_module_and_remedy(gate, message, tmp_path, capfd):
    with pytest.raises(UnsupportedError, match=message):
        export_bundle(Around(gate), squared, BATCH, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert capfd.readouterr() == ("", "")


def test_batch_statistics_are_refused():
    with pytest.raises(UnsupportedError, match=r"1 \(BatchNorm1d\) keeps no running statistics"):
        prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), "all")


def test_half_precision_models_are_converted_and_said():
    prepared = prepare(nn.Linear(3, 3).half(), "all")
    assert all(tensor.dtype == torch.float32 for tensor in prepared.trainable.values())
    assert "float16" in prepared.notes[0]


def test_losses_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(Exception, match=r"loss is not finite.*inputs"):
        export_bundle(nn.Linear(4, 2), lambda o, _t: (o.sum(1) * 0).log(), BATCH, out=tmp_path / "b")


USER_FILE = """
import torch
from torch import nn
from neighbour import WIDTH

def make(classes=3):
    return (nn.Linear(WIDTH, classes), nn.CrossEntropyLoss(reduction="none"),
            (torch.ones(2, WIDTH), torch.zeros(2, dtype=torch.int64)))

def broken():
    rows = {}
    return rows["missing"]

def half():
    return nn.Linear(2, 2), None

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def test_a_users_function_with_options_and_neighbours(user_file):
    source = load_source(f"{user_file}:make", options={"classes": 5})
    assert source.module.out_features == 5
    assert source.example_batch[0].shape == (2, 4)


def test_users_mistakes_show_their_own_lines(user_file, tmp_path):
    with pytest.raises(SourceError, match=r"(?s)calling .*mine\.py:broken.*mine\.py\", line 12.*rows\[.*KeyError"):
        load_source(f"{user_file}:broken")
    with pytest.raises(SourceError, match="SystemExit: 3"):
        load_source(f"{user_file}:leaves")
    with pytest.raises(SourceError, match=r"\(module, loss, example_batch\), it returned 2 values"):
        load_source(f"{user_file}:half")
    with pytest.raises(SourceError, match=r"no function 'missing'; it has: .*make"):
        load_source(f"{user_file}:missing")
    with pytest.raises(SourceError, match="no such file"):
        load_source(f"{tmp_path}/none.py:make")
    with pytest.raises(SourceError, match="name the function"):
        load_source(str(user_file))
    (tmp_path / "syntax.py").write_text("def make(:\n")
    with pytest.raises(SourceError, match=r"(?s)importing .*syntax\.py.*SyntaxError"):
        load_source(f"{tmp_path}/syntax.py:make")


def test_registered_models_and_unknown_names():
    assert isinstance(load_source("digits-cnn").module, nn.Module)
    with pytest.raises(SourceError, match=r"no model 'digit'.*digits-cnn"):
        load_source("digit")
    with pytest.raises(SourceError, match="--task belongs to hf"):
        load_source("digits-cnn", task="classification")


def test_outputs_without_tensors_are_refused(tmp_path):
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.last = None

        def forward(self, x):
            self.last = x * self.weight

    with pytest.raises((BatchError, SourceError), match="NoneType"):
        export_bundle(Nothing(), squared, BATCH, out=tmp_path / "b")
