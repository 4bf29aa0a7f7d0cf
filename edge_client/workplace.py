"""A bundle that is ready to be trained on this device: its session, the local data, the parameters held."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from edgetrain.edge_client.config import ClientConfig
from edgetrain.edge_client.durable.held_parameters import HeldParameters
from edgetrain.edge_client.durable.installation import install_bundle
from edgetrain.edge_client.durable.personal import PersonalParameters
from edgetrain.edge_client.durable.state import ClientState
from edgetrain.edge_client.mailbox import Mailbox
from edgetrain.edge_client.runtimes.base import Session
from edgetrain.edge_client.training.data import Dataset, load_dataset
from edgetrain.edge_client.training.frozen_part import skip_frozen_part
from edgetrain.edge_client.training.seeds import mix_seed
from edgetrain.protocol.groups import elements_of
from edgetrain.protocol.messages import BlobRef, Plan
from edgetrain.protocol.vectors import Vector


@dataclass(slots=True)
class Workplace:
    """Lasts as long as the run's bundle does."""

    bundle: bytes
    session: Session
    training_data: Dataset
    validation_data: Dataset | None
    held: HeldParameters
    state: ClientState
    # What stays on this device, where plans ask for it.
    _personal: PersonalParameters | None = field(default=None, init=False)
    _patterns: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def set_up(cls, bundle: BlobRef, *, mail: Mailbox, state: ClientState, config: ClientConfig) -> Workplace:
        """Fetches the bundle, or takes it from the disk, proves it, and loads the local data.

        Raises:
            ClientError, BundleError, BlobError: this device cannot train it; the message says why.
        """
        session = install_bundle(bundle, fetch=mail.fetch, fetch_to=mail.fetch_to, state=state, config=config)
        data = load_dataset(config.data, session.manifest)
        training, validation = split_validation(data, config.validation_fraction, config.name)
        # What features replace need not stay in memory.
        del data
        session, training, validation = skip_frozen_part(
            session, training, validation, bundle=bundle.digest, directory=state.path, config=config
        )
        held = HeldParameters(session.manifest.num_parameters)
        return cls(bundle.digest, session, training, validation, held, state)

    @property
    def num_parameters(self) -> int:
        """Length of the vector of trainable parameters."""
        return self.session.manifest.num_parameters

    def personalized(self, plan: Plan, parameters: Vector) -> Vector:
        """The round's parameters with this device's own, if the plan says that some stay here."""
        if plan.personal != self._patterns:
            self._personal = None
            if plan.personal:
                mask = elements_of(self.session.manifest, plan.personal)
                self._personal = self.state.personal_parameters(bundle=self.bundle, patterns=plan.personal, mask=mask)
            self._patterns = plan.personal
        if not self._personal:
            return parameters
        return self._personal.overlay(parameters, training=(plan.run, plan.round) if plan.task == "train" else None)

    def shared(self, change: Vector) -> Vector:
        """The part of a change that may leave the device."""
        if self._personal:
            change[self._personal.mask] = 0
        return change

    def keep_personal(self, plan: Plan, trained: Vector) -> None:
        """Stores what stays here of parameters that were trained as the plan says, if anything does.

        Raises:
            StateError: not writable.
        """
        if self._personal:
            self._personal.keep(trained, training=(plan.run, plan.round))


def split_validation(dataset: Dataset, fraction: float, name: str) -> tuple[Dataset, Dataset | None]:
    """(training, validation) parts, chosen by the client's name, so that every start chooses the same."""
    count = math.floor(len(dataset) * fraction)
    if count == 0:
        return dataset, None
    order = np.random.Generator(np.random.PCG64(mix_seed(0, name, 0))).permutation(len(dataset))
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))
