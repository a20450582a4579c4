"""Lets the tests import `configs` and `tests` from the root."""
