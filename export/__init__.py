"""edgetrain.export"""
