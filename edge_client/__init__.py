"""edgetrain.edge_client"""
