"""Environments that come with coati, see docs/environments.md."""
