"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """What the user can mend. The message is one line that says all there is to know: the flag or
    the file, and what to set instead. Commands end with it (`megalong.command_line`); any other
    exception is a bug, and shows its traceback."""
