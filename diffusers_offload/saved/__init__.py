"""Saved pipelines: their modules without weights, their weights brought to disk, and opened from there."""
