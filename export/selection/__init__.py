"""What may learn: selections as text, and the adapters and slices that they add."""
