"""One module per runtime: how an artifact is run."""
