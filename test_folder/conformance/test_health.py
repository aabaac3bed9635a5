"""What a server says of itself, in either mode."""

from datetime import datetime

from test_folder.conformance.client import Client


def test_it_is_ready_and_says_when_it_became_so(server: Client) -> None:
    server.wait_until_ready()
    setup = server.health()["setup"]
    assert setup["status"] == "succeeded"
    assert datetime.fromisoformat(setup["started_at"]) < datetime.fromisoformat(setup["completed_at"])


def test_set_up_leaves_no_traceback(server: Client) -> None:
    assert "Traceback" not in server.health()["setup"]["logs"]


def test_it_names_its_version(server: Client) -> None:
    versions = server.health()["version"]
    assert {"coglet", "python_sdk", "python"} <= versions.keys()
    assert versions["python"].startswith("3.")


def test_its_index_leads_to_every_route(server: Client) -> None:
    status, index = server.call("GET", "/")
    noun = server.mode.noun
    assert status == 200
    assert (index["healthcheck_url"], index["openapi_url"]) == ("/health-check", "/openapi.json")
    assert index[f"{noun}_url"] == f"/{noun}"
    assert index[f"{noun}_idempotent_url"] == f"/{noun}/{{{noun[:-1]}_id}}"
    assert index[f"{noun}_cancel_url"] == f"/{noun}/{{{noun[:-1]}_id}}/cancel"


def test_there_is_nothing_elsewhere(server: Client) -> None:
    assert server.call("GET", "/nowhere")[0] == 404


def test_results_cannot_be_asked_for_later(server: Client) -> None:
    """They come in the answer or by webhook."""
    assert server.call("GET", f"/{server.mode.noun}")[0] == 405
    assert server.call("GET", f"/{server.mode.noun}/some")[0] == 405


def test_results_are_not_streamed(server: Client) -> None:
    status, answer = server.post(server.mode.quick, {"Accept": "text/event-stream"})
    assert status == 406
    assert "stream" in answer["error"]


def test_what_is_unknown_cannot_be_cancelled(server: Client) -> None:
    assert server.cancel("never-asked-for") == 404
