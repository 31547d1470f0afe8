"""Compressed pictures to arrays and crops, within bounds, on the CPU or the device."""
