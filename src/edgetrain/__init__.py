"""Train models on phones, Raspberry Pis and other small devices, and learn across them."""

__version__ = "0.1.0"
