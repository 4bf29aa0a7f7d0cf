"""`edgetrain verify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgetrain.edge_client.training.selftest import SelfTestReport


@click.command("verify")
@click.argument("bundle")
@click.option("--runtime", help="Runtime to check. [default: the first of the bundle's that is installed]")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="Threads; 0 lets it choose.")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True, help="Of products."
)
@click.option("--tolerance", type=float, help="Largest relative error that passes.")
def command(bundle: str, runtime: str | None, threads: int, precision: str, tolerance: float | None) -> None:
    """Run the self-test of BUNDLE on this machine.

    Compares loss and gradients with what eager torch computed at export. Exit status 0 if they agree, 1 if not.
    """
    from edgetrain.edge_client.runtimes import open_session
    from edgetrain.edge_client.runtimes.parts import TRUNK
    from edgetrain.edge_client.training.selftest import run_self_test
    from edgetrain.protocol.bundle import Bundle

    opened = Bundle(bundle)
    session = open_session(opened, runtime, threads=threads, precision=precision)
    reports = [("", run_self_test(opened, session, tolerance=tolerance))]
    if TRUNK in opened.manifest.program(session.runtime).graphs:
        reports.append((", trunk and head", run_self_test(opened, session, tolerance=tolerance, in_parts=True)))
    for part, report in reports:
        _show(opened.manifest.name, part, report)
    sys.exit(0 if all(report.ok for _, report in reports) else 1)


def _show(name: str, part: str, report: SelfTestReport) -> None:
    click.echo(f"{name} on {report.runtime}{part}: relative errors against eager torch")
    rows = [("loss", report.loss_error), ("weight sum", report.weight_error), *report.metric_errors.items()]
    rows += [(f"gradient of {gradient.name}", gradient.error) for gradient in report.gradients]
    width = max(len(name) for name, _ in rows)
    for what, error in rows:
        mark = "" if error <= report.tolerance else "  WRONG"
        click.echo(f"  {what:<{width}}  {error:.2e}{mark}")
    verdict = "ok" if report.ok else "FAILED"
    click.echo(f"{verdict}: largest error {report.worst:.2e}, tolerance {report.tolerance:g}")
