"""Finds endpoints, agrees on mechanisms, and programs the kernel of its node."""
