"""Exceptions a user can meet. The command line prints their text as one line and never a traceback."""


class CompressError(Exception):
    """A run failed for a reason that can be named; finished artifacts stay whole."""

    exit_code = 1


class UserError(CompressError):
    """The user's own mistake: a recipe, a path or an option. The text names it, its value and what is allowed."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot run; the text starts with the path to the field, such as ``stages[1].teacher``."""


class DataError(UserError):
    """Data that is missing, empty, malformed, or longer than the model's context."""


class ModelError(UserError):
    """A model directory that is missing, broken, or of a family or shape that cannot do what was asked."""


class NothingDoneError(CompressError):
    """A step that was asked for something and touched nothing."""


class DivergedError(CompressError):
    """A loss became NaN or infinite; the text names the step, the term and the last good checkpoint."""


class ParityError(CompressError):
    """An exported graph that does not compute what the model computes."""


class LostError(CompressError):
    """Another process of the run ended, and this one cannot go on alone."""
