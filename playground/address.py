"""An address -> the server there. Knows no page, so that whoever is told that none answers need not wait for one."""

from playground.cog import CogServer
from playground.connection import Connection
from playground.progress import Server
from playground.replicate import ReplicateModel


def server_at(url: str, token: str | None) -> Server:
    """A model of Replicate's API, as its address tells, or Cog's own server. Raises PlaygroundError."""
    connection = Connection(url, token)
    return ReplicateModel(connection) if "/v1/models/" in url else CogServer(connection)


def trainer_at(url: str, token: str | None) -> Server:
    """A Cog server in train mode. Raises PlaygroundError."""
    return CogServer(Connection(url, token), "trainings")
