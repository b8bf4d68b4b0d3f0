"""Infinity (Han et al., CVPR 2025): text features, tokens of bits, schedules of many shapes."""
