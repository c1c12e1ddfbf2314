"""The errors that are shown to a user as a line instead of a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: an argument, a file, a server, a cluster.

    The message is one line that names what was wrong, where, and what to do about it.
    Jobs print it and exit with status 1; anything else that is raised is a defect and keeps its traceback.
    """


class ServiceError(UserError):
    """Storage or the tracking server did not do what it was asked to: it may, if it is asked again later."""
