"""Drivers: ways to isolate a child, behind the contract of `mn_runner.sandbox`."""
