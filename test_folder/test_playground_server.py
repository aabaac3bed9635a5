"""How the playground speaks to servers: Cog's contract where the real one is hard to bring about, Replicate's API, what
is sent and what comes back. The real server is in test_playground.py."""

import base64
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from klora.form.inputs import progress_line
from playground.cog import CogServer
from playground.connection import Connection, Run
from playground.errors import PlaygroundError
from playground.form import Field, Kind, inputs_of, read_form
from playground.outputs import Output, files_of, samples_in, sorted_out
from playground.replicate import ReplicateModel

SCHEMAS = json.loads((Path(__file__).parent / "golden" / "openapi_schema.json").read_text())["components"]["schemas"]
ANSWERED = {"status": "succeeded", "output": ["data:image/png;base64,AAAA"], "metrics": {"seed": 7}}

Answer = tuple[int, Any] | tuple[int, Any, Mapping[str, str]]


@dataclass
class Fake:
    """A server on loopback that answers as told. asked: (method, path, body, token) in the order in which they came."""

    url: str
    asked: list[tuple[str, str, Any, str | None]] = field(default_factory=list)

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _, _ in self.asked if how == method]


@contextmanager
def answering(answer: Callable[[str, str, Any], Answer]) -> Iterator[Fake]:
    """A fake server. answer: (method, path, body) -> (status, JSON or bytes, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            fake.asked.append((self.command, self.path, body, self.headers["Authorization"]))
            status, said, *headers = answer(self.command, self.path, body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            kind = "application/octet-stream" if isinstance(said, bytes) else "application/json"
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **dict(*headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_one  # noqa: N815, the names that http.server calls

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = Fake(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def last(runs: Iterator[Run]) -> Run:
    return list(runs)[-1]


# Where the token goes.


@pytest.mark.parametrize("url", ["http://gpu.example:5000", "http://10.0.0.7"])
def test_a_token_travels_encrypted_or_not_at_all(url: str) -> None:
    with pytest.raises(PlaygroundError, match="unencrypted") as refused:
        Connection(url, "s3cret")
    assert "s3cret" not in str(refused.value)
    assert Connection(url).url == url


@pytest.mark.parametrize("url", ["", "ftp://x", "127.0.0.1:5000", "http://", "http://x:port", "http://me:pw@x"])
def test_an_address_is_http(url: str) -> None:
    with pytest.raises(PlaygroundError, match=r"Expected one as http://127\.0\.0\.1:5000"):
        Connection(url)


def test_the_token_goes_to_the_server_and_to_no_place_that_it_names(tmp_path: Path) -> None:
    with answering(lambda *_: (200, b"png")) as storage, answering(lambda *_: (200, {})) as server:
        way = Connection(server.url, "s3cret")
        way.call("GET", "/openapi.json")
        assert way.fetch(f"{storage.url}/a.png") == b"png"
        with pytest.raises(PlaygroundError, match="Expected one of its own"):
            way.call("GET", f"{storage.url}/predictions/1")
    assert [token for *_, token in server.asked] == ["Bearer s3cret"]
    assert [token for *_, token in storage.asked] == [None]


def test_a_redirect_is_not_followed_with_the_token() -> None:
    with answering(lambda *_: (200, {})) as elsewhere:
        moved = (302, {}, {"Location": f"{elsewhere.url}/health-check"})
        with answering(lambda *_: moved) as server, pytest.raises(PlaygroundError, match="302"):
            Connection(server.url, "s3cret").get("/health-check")
    assert elsewhere.asked == []


def test_no_login_of_the_machine_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with answering(lambda *_: (200, {})) as server:
        Connection(server.url).get("/health-check")
        Connection(server.url).fetch(f"{server.url}/file")
    assert [token for *_, token in server.asked] == [None, None]


def test_a_token_that_is_no_header_is_in_no_message() -> None:
    with pytest.raises(PlaygroundError) as refused:
        Connection("https://api.example", "s3cret\nX: y")
    assert "s3cret" not in str(refused.value)


# Cog.


def test_a_busy_server_is_waited_for_and_asked_anew() -> None:
    puts = iter([(409, {"error": "At capacity"}), (200, ANSWERED)])

    def answer(method: str, path: str, body: Any) -> Answer:
        if path == "/health-check":
            return 200, {"status": "BUSY"}
        return next(puts) if isinstance(body["input"], dict) else (422, {"detail": []})

    with answering(answer) as server:
        runs = list(CogServer(Connection(server.url)).run({"prompt": "x"}, threading.Event()))
    assert [run.status for run in runs if run.status != "starting"] == ["waiting", "succeeded"]
    assert runs[-1].output == ANSWERED["output"]
    assert len(set(server.paths("PUT"))) == 2, "each asking has a name of its own"


def test_one_that_waits_can_be_cancelled() -> None:
    def answer(method: str, path: str, body: Any) -> Answer:
        return (200, {"status": "BUSY"}) if path == "/health-check" else (409, {"error": "At capacity"})

    stop = threading.Event()
    with answering(answer) as server:
        runs = CogServer(Connection(server.url)).run({}, stop)
        assert next(run for run in runs if run.status == "waiting")
        stop.set()
        assert last(runs).status == "canceled"


def test_a_server_whose_worker_has_died_is_not_waited_for() -> None:
    def answer(method: str, path: str, body: Any) -> Answer:
        return (200, {"status": "UNHEALTHY"}) if path == "/health-check" else (409, {"error": "At capacity"})

    with answering(answer) as server, pytest.raises(PlaygroundError, match=r"UNHEALTHY\. Expected READY"):
        list(islice(CogServer(Connection(server.url)).run({}, threading.Event()), 6))


def test_whoever_stops_listening_cancels() -> None:
    ended = threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        if method == "POST":
            ended.set()
            return 200, {}
        if not isinstance(body["input"], dict):
            return 202, {"status": "processing", "logs": progress_line(3, 20)}
        ended.wait(30)
        return 200, {"status": "canceled"}

    with answering(answer) as server:
        runs = CogServer(Connection(server.url)).run({}, threading.Event())
        assert next(runs).step == (3, 20, "")
        runs.close()
    [name] = {path.removesuffix("/cancel") for path in server.paths("PUT") + server.paths("POST")}
    assert server.paths("POST") == [f"{name}/cancel"]


def test_what_is_refused_is_said_input_by_input() -> None:
    faults = [
        {"loc": ["body", "input", "seed"], "msg": '"a" is not of type "integer"', "type": "value_error"},
        {"loc": ["body", "input", "prompt"], "msg": "Field required", "type": "value_error.missing"},
    ]
    with answering(lambda *_: (422, {"detail": faults})) as server, pytest.raises(PlaygroundError) as refused:
        last(CogServer(Connection(server.url)).run({}, threading.Event()))
    assert str(refused.value) == 'seed: "a" is not of type "integer". prompt: Field required.'


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("Prediction failed: Prediction failed: RequestError: prompt is empty.", "prompt is empty."),
        ("Prediction failed: Training failed: UploadError: No picture.", "No picture."),
        ("Worker crashed", "Worker crashed"),
        ("Prediction failed: Input validation error: 404", "Input validation error: 404"),
    ],
)
def test_the_servers_sentence_is_shown_alone(error: str, sentence: str) -> None:
    assert Run.told_by({"status": "failed", "error": error}).error == sentence


def test_progress_is_what_the_log_says_last() -> None:
    logs = f"seed 7\n{progress_line(0, 20)}\n{progress_line(3, 20, 'loss 0.5')}\nmore\n"
    assert Run("processing", logs).step == (3, 20, "loss 0.5")
    assert Run("processing", "seed 7\n100% sure\n").step is None


# Replicate's API.


def test_a_model_of_replicates_api_is_asked_for_its_latest_version() -> None:
    states = iter(["processing", "succeeded"])

    def answer(method: str, path: str, body: Any) -> Answer:
        if path == "/v1/models/me/klora":
            return 200, {"latest_version": {"id": "v2", "openapi_schema": {"components": {"schemas": SCHEMAS}}}}
        urls = {"get": f"{server.url}/v1/predictions/1", "cancel": f"{server.url}/v1/predictions/1/cancel"}
        if method == "POST":
            return 201, {"status": "starting", "urls": urls}
        return 200, ANSWERED | {"status": next(states)}

    with answering(lambda *asked: answer(*asked)) as server:
        model = ReplicateModel(Connection(f"{server.url}/v1/models/me/klora", "s3cret"))
        assert read_form(*model.schemas())[0].name == "prompt"
        run = last(model.run({"prompt": "x"}, threading.Event()))
    assert run.output == ANSWERED["output"]
    posted = [(path, body) for method, path, body, _ in server.asked if method == "POST"]
    assert posted == [("/v1/predictions", {"version": "v2", "input": {"prompt": "x"}})]
    assert {token for *_, token in server.asked} == {"Bearer s3cret"}


def test_a_prediction_on_replicate_is_cancelled() -> None:
    stop, cancelled = threading.Event(), threading.Event()

    def answer(method: str, path: str, body: Any) -> Answer:
        urls = {"get": f"{server.url}/v1/predictions/1", "cancel": f"{server.url}/v1/predictions/1/cancel"}
        if path.endswith("/cancel"):
            cancelled.set()
        state = "canceled" if cancelled.is_set() else "processing"
        known = {"latest_version": {"id": "v2"}}
        return (200, known) if path.endswith("/klora") else (200, {"status": state, "urls": urls})

    with answering(lambda *asked: answer(*asked)) as server:
        runs = ReplicateModel(Connection(f"{server.url}/v1/models/me/klora")).run({}, stop)
        assert next(runs).status == "processing"
        stop.set()
        assert last(runs).status == "canceled"


# The form, and what is sent.


def test_the_form_is_the_schemas_without_what_is_deprecated() -> None:
    fields = read_form(SCHEMAS, "Input")
    by_name = {field.name: field for field in fields}
    assert [field.name for field in fields[:3]] == ["prompt", "content_lora", "style_lora"]
    assert by_name["prompt"].required
    assert "lora_weights" not in by_name
    assert by_name["pattern"].choices == ("auto", "s", "s*")
    assert by_name["hf_api_token"].kind is Kind.SECRET
    assert (by_name["image"].kind, by_name["image"].accept) == (Kind.FILE, "image/*")
    assert by_name["content_scale"].blank == 1
    assert by_name["beta"].blank is None, "it means one number for s and another for s*"
    assert (by_name["style_bias"].minimum, by_name["style_bias"].maximum) == (0, 10)


def test_blanks_stay_away_and_numbers_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    given: dict[str, Any] = {
        "prompt": "x", "content_lora": "", "model": "", "content_scale": 1, "style_scale": 2, "seed": " 7 ",
        "num_inference_steps": "", "go_fast": False, "image": str(tmp_path / "a.png"), "guidance_scale": "3.5",
        "hf_api_token": None,
    }  # fmt: skip
    fields = {field.name: field for field in read_form(SCHEMAS, "Input")}
    sent = inputs_of([fields[name] for name in given], given.values())
    image = "data:image/png;base64," + base64.b64encode(b"png").decode()
    numbers = {"style_scale": 2.0, "seed": 7, "guidance_scale": 3.5}
    assert sent == {"prompt": "x", "go_fast": False, "image": image} | numbers
    assert isinstance(sent["style_scale"], float)


def test_a_number_that_is_none_is_refused() -> None:
    seed = Field("seed", Kind.INTEGER, "", None, required=False)
    with pytest.raises(PlaygroundError, match=r"seed is 'seven'\. Expected a whole number\."):
        inputs_of([seed], ["seven"])


# What comes back.


def uri(mime: str, data: bytes = b"x") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def test_the_report_is_told_from_the_images_by_its_place_where_files_have_no_names() -> None:
    output = [uri("image/webp", b"0"), uri("image/webp", b"1"), uri("image/png", b"map"), uri("application/json")]
    made = sorted_out(files_of(output, lambda url: b""), reported=True)
    assert [image.data for image in made.images] == [b"0", b"1"]
    assert made.heat_map and made.heat_map.data == b"map"
    assert made.table and made.table.mime == "application/json"
    assert len(sorted_out(files_of(output[:1], lambda url: b""), reported=False).images) == 1


def test_the_report_is_told_by_its_name_and_uploads_are_put_in_order() -> None:
    urls = [f"https://files.example/up/{name}?sig=1" for name in ("report.png", "klora_8_1.webp", "klora_7_0.webp")]
    made = sorted_out(files_of(urls, lambda url: url.encode()), reported=True)
    assert [image.name for image in made.images] == ["klora_7_0.webp", "klora_8_1.webp"]
    assert made.heat_map and made.heat_map.name == "report.png"


def test_a_training_gives_one_file_and_its_samples_are_in_it(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in (
            ("lora.safetensors", b"w"),
            ("samples/20_0.png", b"late"),
            ("../samples/10_0.png", b"early"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    [tar_file] = files_of({"weights": uri("application/x-tar", packed.getvalue())}, lambda url: b"")
    samples = samples_in(tar_file.data)
    assert [(file.name, file.data) for file in samples] == [("10_0.png", b"early"), ("20_0.png", b"late")]
    assert Path(samples[0].saved(tmp_path)).is_relative_to(tmp_path)


def test_a_file_keeps_its_bytes(tmp_path: Path) -> None:
    assert Path(Output("klora_7_0.png", "image/png", b"png").saved(tmp_path)).read_bytes() == b"png"
