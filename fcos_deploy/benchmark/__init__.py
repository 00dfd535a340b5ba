"""How fast a detector is, measured so that the figures can be believed."""
