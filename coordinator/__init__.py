"""edgetrain.coordinator"""
