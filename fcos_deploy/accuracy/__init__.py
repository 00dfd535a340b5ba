"""Whether a deployed detector is still the same one: agreement by stage, by detection and by average precision."""
