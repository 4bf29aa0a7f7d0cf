import copy

import pytest
import torch
from torch import nn

from edgetrain.models import ModelError, ModelSource, get_model
from edgetrain.models.data import batches, digits
from edgetrain.models.ds_cnn import SeparableBlock
from edgetrain.models.losses import cross_entropy
from edgetrain.models.prune import (
    apply_masks,
    keep_channels,
    keep_inputs,
    keep_outputs,
    magnitude_masks,
    strongest_channels,
)
from edgetrain.models.tensors import to_tensors
from support.learning import accuracy, train


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


@pytest.fixture(scope="module")
def trained():
    source = get_model("digits-cnn")
    train(source, digits().train, steps=150, batch_size=32, optimizer=sgd)
    return source


def test_masks_drop_the_smallest_weights_of_all_layers_together():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[0.1, -5.0], [0.3, -0.2]]))
        module[1].weight.copy_(torch.tensor([[0.4, -0.05]]))
        module[0].bias.fill_(0.001)
    masks = magnitude_masks(module, 0.5)
    assert masks["0.weight"].tolist() == [[False, True], [True, False]]
    assert masks["1.weight"].tolist() == [[True, False]]
    assert set(masks) == {"0.weight", "1.weight"}
    apply_masks(module, masks)
    assert module[0].weight.tolist() == [[0.0, -5.0], [pytest.approx(0.3), 0.0]]
    assert module[0].bias.tolist() == [pytest.approx(0.001)] * 2


def test_equal_weights_do_not_change_the_count():
    layer = nn.Linear(10, 10)
    nn.init.ones_(layer.weight)
    assert int(magnitude_masks(layer, 0.37)["weight"].sum()) == 63


def test_a_fifth_of_the_weights_is_enough_for_digits_after_fine_tuning(trained):
    source = ModelSource(copy.deepcopy(trained.module), cross_entropy, trained.example_batch)
    masks = magnitude_masks(source.module, 0.8)
    apply_masks(source.module, masks)
    optimizer = torch.optim.SGD(source.module.parameters(), 0.05)
    for batch in batches(digits().train, 32, epochs=2, seed=0):
        inputs, targets = to_tensors(batch)
        optimizer.zero_grad()
        source.loss(source.module(inputs), targets).mean().backward()
        optimizer.step()
        apply_masks(source.module, masks)
    weights = torch.cat([p.flatten() for p in source.module.parameters() if p.dim() >= 2])
    assert (weights == 0).float().mean().item() == pytest.approx(0.8, abs=1e-3)
    assert accuracy(source, digits().test) >= 0.95


def test_half_of_the_channels_costs_little_and_dead_channels_nothing(trained):
    old = trained.module
    channels = strongest_channels(old.conv2, 16)
    new = copy.deepcopy(old)
    new.conv2 = keep_outputs(old.conv2, channels)
    new.hidden = keep_inputs(old.hidden, channels, repeat=16)
    # Against the same network with the dropped channels silenced.
    silenced = copy.deepcopy(old)
    with torch.no_grad():
        dropped = [channel for channel in range(32) if channel not in channels.tolist()]
        silenced.conv2.weight[dropped] = 0
        silenced.conv2.bias[dropped] = 0
        images = torch.from_numpy(digits().test.inputs)
        torch.testing.assert_close(new(images), silenced(images))
    assert sum(p.numel() for p in new.parameters()) == 38_282 - 16 * (16 * 9 + 1) - 64 * 16 * 16
    source = ModelSource(new, cross_entropy, trained.example_batch)
    train(source, digits().train, steps=90, batch_size=32, optimizer=lambda p: torch.optim.SGD(p, 0.05))
    assert accuracy(source, digits().test) >= 0.95


def test_strongest_channels_are_those_with_the_largest_l1_norm():
    layer = nn.Linear(2, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, -1.0], [0.0, -2.5], [0.1, 0.1]]))
    assert strongest_channels(layer, 2).tolist() == [0, 2]


def test_depthwise_blocks_shrink_too():
    torch.manual_seed(0)
    first, block = nn.Conv2d(1, 8, 1), SeparableBlock(8).eval()
    nn.init.uniform_(block.depthwise_norm.running_mean)
    channels = torch.tensor([1, 4, 6])
    x = torch.randn(2, 1, 5, 5)
    with torch.no_grad():
        inner = torch.relu(block.depthwise_norm(block.depthwise(first(x))))
        expected = inner[:, channels]
        silenced = torch.zeros_like(inner)
        silenced[:, channels] = expected
        small = keep_channels(block.depthwise_norm, channels)(
            keep_outputs(block.depthwise, channels)(keep_outputs(first, channels)(x))
        )
        torch.testing.assert_close(torch.relu(small), expected)
        torch.testing.assert_close(keep_inputs(block.pointwise, channels)(torch.relu(small)), block.pointwise(silenced))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: magnitude_masks(nn.Linear(2, 2), 1.0), "sparsity is 1.0"),
        (lambda: magnitude_masks(nn.LayerNorm(2), 0.5), "LayerNorm has no parameter"),
        (lambda: apply_masks(nn.Linear(2, 2), {"w": torch.ones(2)}), "mask for 'w'"),
        (lambda: strongest_channels(nn.Linear(2, 2), 3), "cannot keep 3 of 2"),
        (lambda: keep_outputs(nn.Conv2d(4, 4, 1, groups=2), torch.arange(2)), "2 groups"),
        (lambda: keep_inputs(nn.Conv2d(4, 4, 1, groups=4), torch.arange(2)), "keep_outputs"),
    ],
)
def test_impossible_pruning_is_refused(call, message):
    with pytest.raises(ModelError, match=message):
        call()
