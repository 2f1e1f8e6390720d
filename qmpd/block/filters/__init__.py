"""Drivers that show their child's content as it is, and do something on the way."""
