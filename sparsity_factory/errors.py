"""The one exception that a user's mistake raises."""


class PruningError(ValueError):
    """A request, configuration or checkpoint that cannot be used. The message is one line that
    names the culprit.
    """

    def __init__(self, message: str):
        # File names and YAML keys may hold line breaks; whoever prints the message relies on one
        # line.
        super().__init__(" ".join(message.split()))
