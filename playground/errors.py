"""What a user of the playground can come upon."""


class PlaygroundError(Exception):
    """One sentence: what was wrong, what was seen, what is accepted. Holds no token."""
