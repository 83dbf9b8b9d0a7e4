"""The one exception that carries a sentence for the user: what is wrong, and what to do about it."""


class GradLiteError(Exception):
    """Bad input. The message is one sentence that names the culprit and the remedy; the command line exits with 2."""
