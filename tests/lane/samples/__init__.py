"""Tests that are not tests: what happens in the lane to those that fail, hang or kill it.

test_plugin.py has pytest run them; by themselves they are not collected.
"""
