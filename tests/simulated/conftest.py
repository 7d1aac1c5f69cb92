"""The simulated device is there before any test."""

from .device import install

install()
