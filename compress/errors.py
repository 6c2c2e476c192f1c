"""Exceptions that users see. The command line prints their text on one line, without a traceback."""


class CompressError(Exception):
    """A run failed for a known reason. Finished artifacts stay intact."""

    exit_code = 1


class UserError(CompressError):
    """The user's own mistake: a recipe, a path or an option. The text names it, its value and what is allowed."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot run. The text starts with the path to the field, such as ``stages[1].teacher``."""


class DataError(UserError):
    """Data that is missing, empty, malformed, or longer than the model's context."""


class ModelError(UserError):
    """A model directory that is missing or damaged, or whose family or shape does not support the request."""


class NothingDoneError(CompressError):
    """A step that should change something, but changed nothing."""


class DivergedError(CompressError):
    """A loss became NaN or infinite. The text names the step, the term and the last good checkpoint."""


class ParityError(CompressError):
    """An exported graph whose results differ from those of the model."""


class LostError(CompressError):
    """Another process of the run ended, and this one cannot continue alone."""
