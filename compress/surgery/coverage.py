"""Counts what a step changed, so that a step that changed nothing is reported as an error."""

from __future__ import annotations

from torch import nn

from compress.errors import NothingDoneError
from compress.models.structure import stock_tensors
from compress.schema import Strict


def owners(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold parameters directly."""
    return [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]


class Coverage(Strict):
    """Numbers of modules with parameters, of distinct parameters, and of bytes of parameters and saved buffers."""

    modules_touched: int
    modules_total: int
    parameters_touched: int
    parameters_total: int
    bytes_before: int
    bytes_after: int
    note: str = ""

    def require(self, what: str) -> None:
        """Raise NothingDoneError if no module was touched. ``what`` names the step and what it was asked to do."""
        if self.modules_touched == 0:
            raise NothingDoneError(f"{what}: none of {self.modules_total} modules was touched")

    @classmethod
    def of_training(cls, model: nn.Module) -> Coverage:
        """Return the coverage of training: the modules and parameters that require a gradient."""
        owning = [list(module.parameters(recurse=False)) for module in owners(model)]
        distinct = list(model.parameters())
        size = sum(tensor.numel() * tensor.element_size() for tensor in stock_tensors(model))
        return cls(
            modules_touched=sum(any(parameter.requires_grad for parameter in own) for own in owning),
            modules_total=len(owning),
            parameters_touched=sum(parameter.numel() for parameter in distinct if parameter.requires_grad),
            parameters_total=sum(parameter.numel() for parameter in distinct),
            bytes_before=size,
            bytes_after=size,
        )
