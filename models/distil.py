"""A small model learns from a large one (Hinton, Vinyals and Dean 2015, "Distilling the knowledge").

The teacher's logits are part of the targets, computed once. So the loss exports like any other, and a device
distils without ever holding the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from edgetrain.models.errors import ModelError

DistillationLoss = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


def distillation_loss(*, temperature: float = 4.0, teacher_share: float = 0.9) -> DistillationLoss:
    """Makes a loss for targets `(labels, teacher_logits)`.

    Per sample: share * T² * KL(softmax(teacher / T) || softmax(student / T)) + (1 - share) * cross-entropy.
    T² keeps the size of the gradient when T changes.

    Args:
        temperature: T; the higher, the more the teacher's small probabilities count.
        teacher_share: 0 learns from the labels only, 1 from the teacher only.

    Returns:
        loss(student logits [B, C], (labels int64 [B], teacher logits float [B, C])) -> float [B].

    Raises:
        ModelError: `temperature` is not positive, or `teacher_share` not between 0 and 1.
    """
    if not temperature > 0:
        raise ModelError(f"temperature is {temperature}; it must be positive")
    if not 0 <= teacher_share <= 1:
        raise ModelError(f"teacher_share is {teacher_share}; it must be between 0 and 1")

    def distillation(outputs_BC: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        labels_B, teacher_BC = targets
        log_teacher_BC = F.log_softmax(teacher_BC / temperature, dim=-1)
        log_student_BC = F.log_softmax(outputs_BC / temperature, dim=-1)
        divergence_B = (log_teacher_BC.exp() * (log_teacher_BC - log_student_BC)).sum(-1)
        label_loss_B = F.cross_entropy(outputs_BC, labels_B, reduction="none")
        return teacher_share * temperature**2 * divergence_B + (1 - teacher_share) * label_loss_B

    return distillation


@torch.no_grad()
def teacher_logits(teacher: nn.Module, inputs: torch.Tensor, *, batch_size: int = 128) -> torch.Tensor:
    """The teacher's outputs for all inputs [N, …], in evaluation mode: float [N, C]."""
    was_training = teacher.training
    teacher.eval()
    logits = torch.cat([teacher(part) for part in torch.split(inputs, batch_size)])
    teacher.train(was_training)
    return logits


def distil(
    student: nn.Module,
    inputs: torch.Tensor,
    targets: tuple[torch.Tensor, torch.Tensor],
    *,
    loss: DistillationLoss,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int = 32,
    seed: int = 0,
) -> list[float]:
    """Trains the student in place, here and now; a device does the same with the exported loss.

    Args:
        student: the module that learns.
        inputs: [N, …].
        targets: (labels int64 [N], `teacher_logits` float [N, C]).
        loss: from `distillation_loss`.
        optimizer: over the student's parameters.
        epochs: passes over the inputs.
        batch_size: samples per optimizer step.
        seed: of the order of samples.

    Returns:
        The mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, logits = targets
    student.train()
    history: list[float] = []
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(inputs), generator=generator)
        for part in torch.split(order, batch_size):
            losses = loss(student(inputs[part]), (labels[part], logits[part]))
            optimizer.zero_grad()
            losses.mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += losses.sum().item()
        history.append(total / len(inputs))
    return history
