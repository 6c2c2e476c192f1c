"""Run a recipe: plan it, make or reuse each artifact, and measure it."""

from compress.pipeline.inputs import Inputs
from compress.pipeline.plan import Plan, make_plan
from compress.pipeline.running import Device, Run, default_workdir, run

__all__ = ["Device", "Inputs", "Plan", "Run", "default_workdir", "make_plan", "run"]
