"""Weights in fewer bytes: rounded, measured on calibration data, and proven in the lowered programs."""
