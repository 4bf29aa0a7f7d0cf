"""The audit log: what happened in a run, in a form that cannot be edited unnoticed.

`AuditLog.append` is the one entry point for whoever has something to record; `RunDirectory.audit` is the run's.
"""

from edgetrain.coordinator.audit.chain import AuditError
from edgetrain.coordinator.audit.log import AuditLog
from edgetrain.coordinator.audit.records import AuditRecord
from edgetrain.coordinator.audit.verify import AuditReport, verify_audit

__all__ = ["AuditError", "AuditLog", "AuditRecord", "AuditReport", "verify_audit"]
