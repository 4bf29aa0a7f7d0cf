"""The edge_client package."""
