"""Differential privacy at the coordinator: the federation's budget, and chance in who takes part."""
