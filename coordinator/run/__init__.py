"""What a run leaves on disk, and takes up again after a stop."""
