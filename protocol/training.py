"""How a client trains: the part of a plan that the local trainer reads."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Learning rate over optimizer steps: `learning_rate * factor(step)`, steps counted from 0."""

    # constant: 1. step: `gamma` to the power of step // step_size. cosine: half a cosine from 1 to 0 over
    # `total_steps`. linear: a line from 1 to 0 over `total_steps`. noam: min(s^-0.5, s * warmup^-1.5) scaled
    # so that its peak, at the end of the warm-up, is 1 (Vaswani et al. 2017, section 5.3; s = step + 1).
    name: Literal["constant", "step", "cosine", "linear", "noam"] = "constant"
    # Steps of linear warm-up from 0, before (and not counted by) the named schedule; 0 for none.
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    step_size: PositiveInt = 1
    gamma: NonNegative = 0.1
    # 0: the number of steps of this local training.
    total_steps: Annotated[int, msgspec.Meta(ge=0)] = 0


class SamplePrivacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[training.privacy]: DP-SGD on the device (Abadi et al. 2016), so that nobody else learns about one sample."""

    # Largest L2 norm of a sample's gradient; longer ones are scaled down.
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    # Standard deviation of the noise in the sum of a step's gradients, in clip norms.
    noise_multiplier: Annotated[float, msgspec.Meta(gt=0)]


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One local training."""

    # Passes over the local data.
    epochs: PositiveInt = 1
    # Samples per optimizer step; made of micro-batches of the bundle's size, the last one padded.
    batch_size: PositiveInt = 32
    # Stop after so many optimizer steps; 0 for no limit.
    max_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    learning_rate: NonNegative = 0.1
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    # Sutskever et al. 2013, in the form of torch.optim.SGD.
    nesterov: bool = False
    # L2 penalty added to the gradient, as in torch.optim.SGD.
    weight_decay: NonNegative = 0.0
    schedule: ScheduleConfig = ScheduleConfig()
    # Clip the global norm of each step's mean gradient to this; 0 for no clipping.
    max_grad_norm: NonNegative = 0.0
    # FedProx: adds mu * (parameters - received parameters) to the gradient; 0 for FedAvg.
    proximal_mu: NonNegative = 0.0
    # Train with DP-SGD: batches are Poisson samples of `batch_size` expected. Needs a bundle with per-sample clipping.
    privacy: SamplePrivacy | None = None
    # Clip the whole update (delta and what is left of earlier ones) to this L2 norm; 0 for no clipping.
    max_delta_norm: NonNegative = 0.0


def count_steps(num_examples: int, config: TrainingConfig) -> int:
    """Optimizer steps of a whole local training."""
    steps = config.epochs * -(-num_examples // config.batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps
