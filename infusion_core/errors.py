"""Errors whose message is meant for whoever chose a setting or a file."""


class InfusionError(ValueError):
    """A setting or a file is wrong; the message is one line that names it and says what would be right."""
