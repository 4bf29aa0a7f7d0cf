"""Everything that networks are made of, differentiated in onnxruntime and in eager torch."""

import pytest
import torch
from torch import nn

from support.layers import CASES, LOSSES, groups, squared, squared_together, together
from support.steps import Step


@pytest.mark.parametrize("names", groups(12), ids=lambda names: f"{names[0]} to {names[-1]}")
def test_layers(names):
    module, inputs = together(names)
    Step(module, squared_together, (inputs, ())).assert_matches_eager()


@pytest.mark.parametrize("name", ["two inputs and a mask", "transformer with padding"])
def test_several_inputs(name):
    module, inputs = CASES[name]()
    Step(module, squared, (inputs, ())).assert_matches_eager()


NAMES = ["conv circular", "in place", "tied", "shared", "causal attention", "max pool 3d", "upsample bicubic"]


def test_the_second_way_by_torch_export():
    module, inputs = together(NAMES)
    Step(module, squared_together, (inputs, ()), functional=True).assert_matches_eager()


class AllLosses(nn.Module):
    """One linear layer per loss, so that each loss shows in gradients of its own."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({name.replace(" ", "_"): nn.Linear(7, 5) for name in LOSSES})

    def forward(self, x):
        return tuple(part(x) for part in self.parts.values())


def test_losses():
    def loss(outputs, _targets):
        values = [one(output, target) for output, (one, target) in zip(outputs, LOSSES.values(), strict=True)]
        return torch.stack([value.flatten(1).sum(1) if value.ndim > 1 else value for value in values]).sum(0)

    Step(AllLosses(), loss, (torch.randn(3, 7), ())).assert_matches_eager()
