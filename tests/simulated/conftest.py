"""The simulated device is there before any test, and hears of what torch does not see."""

import pytest

from diffusers_offload.tiers.reader import Reader

from .device import THE, install

install()


@pytest.fixture(autouse=True)
def announced_reads(monkeypatch):
    """What the disk's threads write to pinned memory, from the moment at which they may."""
    request = Reader.request

    def announced(self, source, destination, distance=0):
        block = destination.untyped_storage().data_ptr()
        if block in THE.pinned:
            start = destination.data_ptr()
            THE.host_access(block, (start, start + destination.numel()), True, "read from disk")
        return request(self, source, destination, distance)

    monkeypatch.setattr(Reader, "request", announced)
