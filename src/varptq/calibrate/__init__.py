"""Calibration: self-generated samples, resampling, theta under a budget, reconstruction."""
