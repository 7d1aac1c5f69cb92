"""The package's logger: below Diffusers' own, so that `DIFFUSERS_VERBOSITY` rules both."""

from diffusers.utils import logging

logger = logging.get_logger("diffusers.block_offload")
