"""The environment is read when it is asked for, and not before."""

import os
import runpy

import pytest

import weights
from klora.errors import RequestError, SourceError
from klora.sources.addresses import parse_url


class Recorder(dict[str, str]):
    """An environment that knows what was asked of it."""

    def __init__(self) -> None:
        super().__init__(os.environ)
        self.asked: list[object] = []

    def __getitem__(self, name: str) -> str:
        self.asked.append(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.asked.append(name)
        return super().__contains__(name)

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]
        self.asked.append(name)
        return super().get(name, default)


def test_importing_weights_reads_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(os, "environ", recorder)
    again = runpy.run_path(weights.__file__)
    assert recorder.asked == []
    again["models_folder"]()
    assert recorder.asked[0] == "KLORA_MODELS"


@pytest.mark.parametrize(("text", "kind"), [(None, None), ("", None), ("0", None), ("1", "own"), ("float8", "float8")])
def test_blocks_are_compiled_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, text: str | None, kind: str | None
) -> None:
    monkeypatch.delenv("KLORA_COMPILE", raising=False)
    if text is not None:
        monkeypatch.setenv("KLORA_COMPILE", text)
    assert weights.compiled_blocks() == kind


@pytest.mark.parametrize("text", ["yes", "2", "fp8", "own"])
def test_another_way_to_compile_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KLORA_COMPILE", text)
    with pytest.raises(RequestError) as error:
        weights.compiled_blocks()
    assert str(error.value) == (f"KLORA_COMPILE is {text!r}. Expected 1 to compile the bases' blocks, or float8, or 0.")


WRONG = {  # what is no address: what is said of it
    "hub.example.com": "is no web address that can be read. Expected https://host/path.",
    "ftp://h": "is no web address that can be read. Expected https://host/path.",
    "https://": "is no web address that can be read. Expected https://host/path.",
    "http://[h": "is no web address that can be read. Expected https://host/path.",
    "http://h:0": "is no web address that can be read. Expected https://host/path.",
    "http://user:hunter2@h:x": "is no web address that can be read. Expected https://host/path.",
    "http://user:hunter2@h": "holds a user name before its host. Expected https://host/path; tokens go apart.",
    "http://2130706433": "names no host. Expected a name in ASCII, as in https://huggingface.co/...",
}


@pytest.mark.parametrize("address", WRONG)
@pytest.mark.parametrize("name", weights.AUTHORITIES.values())
def test_an_authority_that_is_at_no_web_address_is_refused_by_its_settings_name(
    name: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, address)
    with pytest.raises(SourceError) as refusal:
        weights.LoRAFiles()
    assert str(refusal.value) == f"{name} {WRONG[address]}"


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("http://Hub.Local", "hub.local:80"),
        ("https://10.0.0.1", "10.0.0.1:443"),
        ("https://10.0.0.1:8443/a/b/", "10.0.0.1:8443"),
        ("http://[::1]", "[::1]:80"),
    ],
)
@pytest.mark.parametrize("name", weights.AUTHORITIES.values())
def test_an_authority_elsewhere_is_trusted_on_its_port_named_or_not(
    name: str, address: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, address)
    trusted = weights._authorities().network.trusted
    assert trusted == {place}
    assert parse_url(f"{address}/models", trusted).trusted


def test_hosts_are_trusted_whatever_their_names_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_TRUSTED_HOSTS", " Store.Local:9000,, [::1]:80,10.0.0.1:443 ")
    trusted = weights._authorities().network.trusted
    assert parse_url("http://STORE.local:9000/x", trusted).trusted
    assert trusted == {"store.local:9000", "[::1]:80", "10.0.0.1:443"}


@pytest.mark.parametrize("host", ["store.local", "http://store.local:80", "store.local:80/x", "store.local:", "::1:80"])
def test_a_trusted_host_without_its_port_is_refused_and_not_quoted(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLORA_TRUSTED_HOSTS", f"10.0.0.1:80,{host}")
    with pytest.raises(RequestError) as refusal:
        weights.LoRAFiles()
    assert str(refusal.value) == (
        "KLORA_TRUSTED_HOSTS has one that is not host:port. Expected its port, as in 10.0.0.1:80."
    )
