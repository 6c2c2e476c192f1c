"""The command ``compress-lm``."""

from compress.cli.app import main

__all__ = ["main"]
