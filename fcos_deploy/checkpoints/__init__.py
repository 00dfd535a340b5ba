"""Reading checkpoints of five ecosystems as data: no code in a file is run."""
