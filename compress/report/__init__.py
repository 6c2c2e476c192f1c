"""The report of one or several runs. It reads only JSON and never loads a model."""

from compress.report.gate import slow_exports
from compress.report.render import build

__all__ = ["build", "slow_exports"]
