"""From a checkpoint to a bundle: export, quantize, prove, report."""
