"""fcos-deploy: from a trained FCOS detector to a verified engine."""
