"""Each reference model learns through a session what the same steps learn in eager torch.

Optimizer, accumulation over micro-batches with a ragged last one, schedule, clipping and weights together:
same seed, same batches. Batch normalization keeps its statistics in both, as exported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgetrain.edge_client import available_runtimes, open_session
from edgetrain.edge_client.training.dataset import Dataset
from edgetrain.edge_client.training.schedules import learning_rate_factor
from edgetrain.edge_client.training.trainer import batches, evaluate, train
from edgetrain.protocol.bundle import Bundle
from edgetrain.protocol.training import ScheduleConfig, TrainingConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif("onnxruntime" not in available_runtimes(), reason="needs onnxruntime")

MICRO_BATCH = 8
BATCH = 20
TESTED = 120


@dataclass(frozen=True)
class Lesson:
    model: str
    steps: int
    learning_rate: float
    schedule: ScheduleConfig
    # The last tenth's mean loss is at most this share of the first tenth's, ...
    loss_share: float
    # ... and this share of the classes (of the tokens) of held-out data is right.
    accuracy: float
    # How far the two may be apart, relative to the losses and to the way that the parameters went.
    apart: float = 1e-4
    # Steps of eager torch before.
    pretraining: int = 0
    trainable: str = "all"
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


LINEAR = ScheduleConfig(name="linear", warmup_steps=5)
COSINE = ScheduleConfig(name="cosine", warmup_steps=5)
STEP = ScheduleConfig(name="step", step_size=20, gamma=0.3)
NOAM = ScheduleConfig(name="noam", warmup_steps=20)
SMALL_LM = {"length": 32, "width": 64, "layers": 2}
# Without normalization by the batch, a ReLU that flips by rounding shows in everything that follows.
ROUGH = 0.05
LESSONS = [
    Lesson("digits-cnn", 200, 0.05, COSINE, 0.1, 0.95),
    Lesson("ds-cnn", 60, 0.05, LINEAR, 0.2, 0.9, ROUGH, 40),
    Lesson("resnet-8", 40, 0.03, STEP, 0.8, 0.35, ROUGH, 40),
    Lesson(
        "mobilenet-v2",
        60,
        0.01,
        ScheduleConfig(),
        0.9,
        0.6,
        pretraining=240,
        trainable="last:6",
        options={"image_size": 32},
        data={"size": 32},
    ),
    Lesson("char-lm", 200, 0.1, NOAM, 0.7, 0.25, options=SMALL_LM, data={"length": 32}),
    Lesson("bert-tiny", 40, 0.03, LINEAR, 0.85, 0.3),
    Lesson("vit-tiny", 80, 0.05, COSINE, 0.85, 0.35),
    Lesson("seq2seq", 150, 0.1, COSINE, 0.3, 0.7),
]


def pretrain(source, samples, steps):
    """Eager torch in training mode, so that batch normalization knows its data.

    On a device its statistics stay as they are: those of a fresh model would let hardly anything learn.
    """
    from support.learning import train as train_in_place

    train_in_place(
        source,
        samples,
        steps=steps,
        batch_size=32,
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.03, momentum=0.9),
    )
    source.module.eval()


def local_data(samples, count=None):
    from edgetrain.models.data import map_leaves, token_weights

    inputs, targets = (map_leaves(lambda leaf: leaf[:count], half) for half in samples)
    return Dataset(inputs, targets, token_weights(targets) if targets.ndim == 2 else None)


def train_eagerly(source, names, dataset, config, seed):
    """The same steps by autograd and torch.optim.SGD, on whole batches; returns the mean loss of each."""
    from edgetrain.models.data import map_leaves
    from support.learning import call

    source.module.eval()
    named = dict(source.module.named_parameters())
    parameters = [named[name] for name in names]
    optimizer = torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    losses = []
    for step, indices in enumerate(batches(len(dataset), config, seed)):
        (inputs, targets), weights = dataset.take(indices)
        inputs, targets = (map_leaves(torch.from_numpy, half) for half in (inputs, targets))
        each = source.loss(call(source.module, inputs), targets)
        weights = torch.ones_like(each) if weights is None else torch.from_numpy(weights)
        loss = (each * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        factor = learning_rate_factor(config.schedule, step, config.max_steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.model)
def test_a_session_learns_what_eager_torch_learns(lesson, tmp_path):
    from edgetrain.export import export_bundle
    from edgetrain.models import get_model
    from edgetrain.models.data import get_data

    torch.set_num_threads(1)
    data = get_data(lesson.model, **lesson.data)
    source = get_model(lesson.model, batch_size=MICRO_BATCH, **lesson.options)
    if lesson.pretraining:
        pretrain(source, data.train, lesson.pretraining)
    bundle = Bundle(export_bundle(*source, trainable=lesson.trainable, out=tmp_path / "bundle"))
    train_set, test_set = local_data(data.train), local_data(data.test, TESTED)
    config = TrainingConfig(
        epochs=1000,
        max_steps=lesson.steps,
        batch_size=BATCH,
        learning_rate=lesson.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        max_grad_norm=1.0,
        schedule=lesson.schedule,
    )
    session = open_session(bundle, "onnxruntime")
    start = bundle.initial_parameters()
    progress = []
    result = train(session, start, train_set, config, seed=1, on_step=progress.append)
    names = [entry.name for entry in bundle.manifest.parameters]
    eager_losses = train_eagerly(source, names, train_set, config, seed=1)
    named = dict(source.module.named_parameters())
    eager = np.concatenate([named[name].detach().numpy().ravel() for name in names])
    losses = np.array([done.loss for done in progress])
    np.testing.assert_allclose(losses, eager_losses, rtol=lesson.apart)
    went = np.linalg.norm(eager - start)
    assert np.linalg.norm(result.parameters - eager) <= lesson.apart * went
    tenth = lesson.steps // 10
    assert losses[-tenth:].mean() <= lesson.loss_share * losses[:tenth].mean()
    reached, expected = (evaluate(session, vector, test_set) for vector in (result.parameters, eager))
    assert reached.metrics["correct"] >= lesson.accuracy
    assert reached.metrics["correct"] == pytest.approx(float(expected.metrics["correct"]), abs=0.02)
    assert reached.loss == pytest.approx(expected.loss, rel=lesson.apart)
    # Clipping was at work: the largest gradient is above the limit.
    assert max(done.gradient_norm for done in progress) > config.max_grad_norm
