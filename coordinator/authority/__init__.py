"""The federation directory: a private CA, the broker's files, who is enrolled. `edgetrain init`, `enroll`, `revoke`."""

from edgetrain.coordinator.authority.federation import FederationDirectory, InitOptions
from edgetrain.coordinator.authority.registry import AuthorityError, Enrolment, read_registry

__all__ = ["AuthorityError", "Enrolment", "FederationDirectory", "InitOptions", "read_registry"]
