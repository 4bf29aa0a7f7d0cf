"""The coordinator package."""
