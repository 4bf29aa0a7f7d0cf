import numpy as np
import pytest
import torch
from torch import nn

from edgetrain.edge_client import open_session
from edgetrain.export import export_bundle
from edgetrain.models import ModelError, ModelSource, get_model
from edgetrain.models.data import digits
from edgetrain.models.distil import distil, distillation_loss, teacher_logits
from edgetrain.models.losses import cross_entropy
from support.learning import accuracy, train


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_loss_is_hintons():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 4))
    labels = np.array([0, 3, 1])
    p, q = _softmax(teacher / 2), _softmax(student / 2)
    expected = 0.7 * 4 * (p * np.log(p / q)).sum(-1) - 0.3 * np.log(_softmax(student)[range(3), labels])
    loss = distillation_loss(temperature=2.0, teacher_share=0.7)
    actual = loss(torch.from_numpy(student), (torch.from_numpy(labels), torch.from_numpy(teacher)))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_no_share_for_the_teacher_is_cross_entropy():
    student, teacher, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 3, 1])
    actual = distillation_loss(teacher_share=0.0)(student, (labels, teacher))
    torch.testing.assert_close(actual, cross_entropy(student, labels))


def test_a_student_that_knows_everything_gets_no_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = distillation_loss(teacher_share=1.0)
    loss(logits, (torch.tensor([0, 1, 2]), logits.detach())).sum().backward()
    assert logits.grad.abs().max() < 1e-6


def test_student_learns_digits_without_seeing_a_label():
    teacher, data = get_model("digits-cnn"), digits()
    train(teacher, data.train, steps=150, batch_size=32, optimizer=sgd)
    torch.manual_seed(1)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    inputs = torch.from_numpy(data.train.inputs)
    known = teacher_logits(teacher.module, inputs)
    nothing = torch.zeros(len(inputs), dtype=torch.int64)
    history = distil(
        student,
        inputs,
        (nothing, known),
        loss=distillation_loss(teacher_share=1.0),
        optimizer=torch.optim.SGD(student.parameters(), 0.03, momentum=0.9),
        epochs=12,
    )
    assert history[-1] < 0.2 * history[0]
    assert accuracy(ModelSource(student, cross_entropy, None), data.test) >= 0.93
    assert accuracy(teacher, data.test) >= 0.97


def test_teacher_logits_leave_the_teachers_mode_alone():
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    assert teacher_logits(teacher, torch.randn(5, 4), batch_size=2).shape == (5, 2)
    assert teacher.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"teacher_share": 1.5}])
def test_impossible_distillation_is_refused(options):
    with pytest.raises(ModelError, match=next(iter(options))):
        distillation_loss(**options)


def test_the_loss_exports_with_the_teachers_logits_as_targets(tmp_path):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs, targets = torch.randn(4, 6), (torch.tensor([0, 2, 1, 1]), torch.randn(4, 3))
    loss = distillation_loss()
    expected = loss(student(inputs), targets).sum()
    expected.backward()
    session = open_session(export_bundle(student, loss, (inputs, targets), out=tmp_path / "student"))
    parameters = np.concatenate([p.detach().numpy().ravel() for p in student.parameters()])
    result = session.step(parameters, (inputs.numpy(), tuple(target.numpy() for target in targets)))
    assert result.loss_sum == pytest.approx(expected.item(), rel=1e-5)
    gradients = np.concatenate([p.grad.numpy().ravel() for p in student.parameters()])
    np.testing.assert_allclose(result.gradients, gradients, atol=1e-5)
