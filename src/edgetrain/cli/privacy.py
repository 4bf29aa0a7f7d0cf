"""`edgetrain privacy`: how much noise a budget needs (`plan`), and what is spent of it (`show`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click
import msgspec

from edgetrain.cli.privacy_show import show

if TYPE_CHECKING:
    from edgetrain.protocol.privacy.calibrate import Forecast


@click.group("privacy")
def command() -> None:
    """Work with privacy budgets."""


command.add_command(show)


@command.command("plan")
@click.option("--epsilon", type=float, required=True, help="Budget: the largest epsilon after the last round.")
@click.option("--delta", type=float, required=True, help="Of the budget; well below 1 / number of participants.")
@click.option("--rounds", type=click.IntRange(min=1), required=True, help="Rounds of the federation.")
@click.option(
    "--level",
    type=click.Choice(["client", "sample"]),
    default="client",
    show_default=True,
    help="Protect whole clients (DP-FedAvg), or the samples of one client from everybody else (DP-SGD).",
)
@click.option("--clients-per-round", type=click.IntRange(min=1), help="Client level: clients expected in a round.")
@click.option("--population", type=click.IntRange(min=1), help="Client level: clients that could be chosen.")
@click.option("--examples", type=click.IntRange(min=1), help="Sample level: local examples.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Sample level: samples expected in an optimizer step.")
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="Sample level: per round.")
@click.option(
    "--sampling",
    type=click.Choice(["poisson", "fixed", "none"]),
    default="poisson",
    show_default=True,
    help="How clients are chosen: each by its own coin, a random subset of fixed size, or in no way that may count.",
)
@click.option(
    "--noise",
    type=click.Choice(["gaussian", "discrete-gaussian"]),
    default="gaussian",
    show_default=True,
    help="discrete-gaussian: shares that clients add under secure aggregation, on a fine grid; sampling helps it less.",
)
@click.option(
    "--accountant",
    type=click.Choice(["rdp", "pld", "dp-accounting-rdp"]),
    default="rdp",
    show_default=True,
    help="Our own, or one of dp-accounting's; pld is the tightest.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def plan(
    epsilon: float,
    delta: float,
    rounds: int,
    level: str,
    clients_per_round: int | None,
    population: int | None,
    examples: int | None,
    batch_size: int | None,
    epochs: int,
    sampling: str,
    noise: str,
    accountant: str,
    form: str,
) -> None:
    """Solve for the noise multiplier that spends a budget exactly, and predict how it is spent."""
    from edgetrain.protocol.privacy import dp_accounting
    from edgetrain.protocol.privacy.calibrate import forecast
    from edgetrain.protocol.privacy.release import Mechanism, Release, Sampling

    if level == "client":
        size, total = _needed("--clients-per-round", clients_per_round), _needed("--population", population)
        per_round = 1
    else:
        size, total = _needed("--batch-size", batch_size), _needed("--examples", examples)
        size = min(size, total)
        per_round = epochs * -(-total // size)
        if sampling != "poisson":
            raise click.UsageError("--level sample: devices draw their batches by --sampling poisson only")
        if noise != "gaussian":
            raise click.UsageError("--level sample: a device adds the noise alone, --noise gaussian")
    if size > total:
        raise click.UsageError(f"--clients-per-round {size} is more than --population {total}")
    rate = 1.0 if sampling == "none" else size / total
    chosen = cast("dp_accounting.AccountantName", accountant)
    found = forecast(
        level=level,
        release=Release(
            mechanism=cast("Mechanism", noise),
            noise_multiplier=1.0,
            sampling=cast("Sampling", sampling),
            sampling_rate=rate,
        ),
        target_epsilon=epsilon,
        delta=delta,
        rounds=rounds,
        releases_per_round=per_round,
        participants=size,
        population=total,
        accountant=dp_accounting.accountant(chosen),
        accountant_name=accountant,
    )
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        click.echo(_text(found))


def _needed(option: str, value: int | None) -> int:
    if value is None:
        raise click.UsageError(f"{option} is needed for this --level")
    return value


def _text(found: Forecast) -> str:
    who = "clients" if found.level == "client" else "samples"
    per_mean = f"{found.mean_noise_per_clip_norm:.4g}"
    lines = [
        f"noise_multiplier {found.noise_multiplier:.5g}",
        f"epsilon {found.epsilon:.4g} of {found.target_epsilon:g} at delta {found.delta:g}, by {found.accountant}",
        f"{found.releases} noisy sums of {found.expected_participants} {who} expected out of {found.population}",
        f"sampling {found.sampling}, rate {found.sampling_rate:.4g}",
        f"noise per element, in clip norms: {found.noise_per_clip_norm:.4g} in a sum, {per_mean} in the mean",
        "",
        "round   epsilon",
        *(f"{number:5d}   {epsilon:7.4f}" for number, epsilon in found.course),
    ]
    return "\n".join(lines)
