"""Calibration data, activation statistics and quantizers."""
