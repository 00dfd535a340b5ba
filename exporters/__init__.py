"""One module per kind of artifact: how it is made."""
