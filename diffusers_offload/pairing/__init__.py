"""Guidance passes of a denoising step, run unit by unit for one load of the weights."""
