"""Tests on several devices: each module runs with eight simulated CPU devices."""

from simulated_devices import eight_devices

__all__ = ["eight_devices"]
