"""The device itself: its resources, its owner's rules, its service manager."""
