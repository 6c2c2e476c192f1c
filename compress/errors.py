"""Exceptions that users see. The command line prints their text on one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compress.problem import Problem


class CompressError(Exception):
    """A run failed for a known reason. Finished artifacts stay intact."""

    exit_code = 1

    def __init__(self, problem: Problem | str) -> None:
        super().__init__(problem if isinstance(problem, Problem) else Problem((), problem))

    @property
    def problem(self) -> Problem:
        """What is wrong and where. A handler reads it here and not in the text."""
        found: Problem = self.args[0]
        return found

    @problem.setter
    def problem(self, problem: Problem) -> None:
        self.args = (problem,)


@contextmanager
def located(*path: str | int) -> Iterator[None]:
    """Put ``path`` before the path of a problem that is raised inside."""
    try:
        yield
    except CompressError as error:
        error.problem = error.problem.inside(*path)
        raise


class UserError(CompressError):
    """The user's own mistake: a recipe, a path or an option. The text names it, its value and what is allowed."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot run. The text starts with file, line and path (``stages[1].teacher``)."""


class DataError(UserError):
    """Data that is missing, empty, malformed, or longer than the model's context."""


class ModelError(UserError):
    """A model directory that is missing or damaged, or whose family or shape does not support the request."""


class NothingDoneError(CompressError):
    """A step that should change something, but changed nothing."""


class DivergedError(CompressError):
    """A loss became NaN or infinite. The text names the step, the term and the last good checkpoint."""


class ParityError(CompressError):
    """The results of an exported graph differ from those of the model."""


class LostError(CompressError):
    """Another process of the run ended, and this one cannot continue alone."""
