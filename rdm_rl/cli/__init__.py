"""The command ``rdm-rl``."""
