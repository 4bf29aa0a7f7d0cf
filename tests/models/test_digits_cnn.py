import math

import torch

from edgetrain.models import get_model
from edgetrain.models.data import digits
from support.learning import accuracy, train


def test_plain_sgd_reaches_97_percent_of_held_out_digits():
    source, data = get_model("digits-cnn"), digits()
    train(source, data.train, steps=360, batch_size=32, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert accuracy(source, data.test) >= 0.97


def test_starts_at_the_loss_of_a_guess():
    module, loss, (inputs, targets) = get_model("digits-cnn", batch_size=64)
    losses = loss(module(inputs), targets)
    assert losses.shape == (64,)
    assert abs(losses.mean().item() - math.log(10)) < 0.3
