"""Durable state in SQLite: what the daemon needs to go on where it was killed. Standard library only.

Source: docs/durable.md.
"""
