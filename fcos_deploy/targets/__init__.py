"""What a device can do, and what to build for it."""
