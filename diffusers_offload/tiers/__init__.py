"""Where a unit's weights live while they are not on the device."""
