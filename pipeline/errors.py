"""The one kind of error that is shown to a user as a line instead of a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: an argument, a file, a server, a cluster.

    The message is one line that names what was wrong, where, and what to do about it.
    Jobs print it and exit with status 1; anything else that is raised is a defect and keeps its traceback.
    """
