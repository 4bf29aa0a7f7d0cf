"""Weights in fewer bytes, and programs that read them."""
