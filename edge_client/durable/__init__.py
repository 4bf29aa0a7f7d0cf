"""What the device keeps between rounds and after a power cut."""
