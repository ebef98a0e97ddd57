"""The error that a user can mend."""


class UserError(ValueError):
    """What was given cannot be used. The message is one line that says what and the mend."""
