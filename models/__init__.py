"""edgetrain.models"""
