"""The root of all errors that a user can mend."""


class UserError(ValueError):
    """Says what was wrong (the value), what is possible (the limit), and the mend.

    Commands print it as one line and exit with status 2; anything else is a defect of ours.
    """

    resumable = False
    """Whether the same command with the mend goes on from what has been done."""
