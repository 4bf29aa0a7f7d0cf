"""The `edgetrain` command."""


def main() -> None:
    """Entry point."""
