"""The state of a run in SQLite: closed rounds, clients, evaluations."""

from edgetrain.coordinator.run.database.database import RunDatabase as RunDatabase
