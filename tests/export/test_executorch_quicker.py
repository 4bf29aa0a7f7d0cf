"""What lowering leaves out to be quicker changes no byte of a program."""

from __future__ import annotations

import pytest

pytest.importorskip("executorch")
torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgetrain.export.lowering import decomposed  # noqa: E402
from edgetrain.export.lowering.executorch import quicker  # noqa: E402
from edgetrain.export.lowering.executorch.compile import compile_module  # noqa: E402
from edgetrain.export.quiet import quiet  # noqa: E402


class Images(nn.Module):
    """Layers for which XNNPACK has passes of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv1d(6, 4, 3)
        self.slope = nn.PReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        x = self.slope(nn.functional.max_pool2d(nn.functional.pad(x, (1, 1)), 2))
        x = nn.functional.relu6(self.second(x.mean(3)))
        x = torch.cat([x, x + 1, x * 2, x - 1, x * x, -x], 2)
        return self.head(x.transpose(1, 2)).softmax(-1)


class Products(nn.Module):
    """Variable operands, views and a mask that waits as bytes."""

    def forward(self, x, weight):
        score = torch.bmm(x, weight.transpose(1, 2)).softmax(-1)
        mask = torch.clamp(score * 3e38, 0.0, 1.0).to(torch.int8).to(torch.float32)
        y = torch.mm(score[0], weight[0]) + torch.addmm(weight[0, 0], score[1], weight[1])
        return y.view(-1) * 2, mask


@pytest.mark.parametrize(
    ("module", "shapes"),
    [(Images(), [(2, 2, 8, 8)]), (Products(), [(2, 5, 4), (2, 5, 4)])],
    ids=["images", "products"],
)
def test_programs_are_the_same_to_the_byte(module, shapes, monkeypatch):
    torch.manual_seed(0)
    example = tuple(torch.randn(shape) for shape in shapes)
    module.eval()
    with quiet(), torch.no_grad(), quicker.quicker():
        module = torch.export.export(module, example, strict=False).run_decompositions({}).module(check_guards=False)
        got = compile_module(module, example)
        monkeypatch.setattr(quicker, "_NEEDED_FOR", {})
        monkeypatch.setattr(decomposed, "_is_composite", lambda _node: True)
        expected = compile_module(module, example)
    assert got == expected
