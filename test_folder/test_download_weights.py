"""The program that fetches bases, run from the wheel as a build runs it, against a hub on 127.0.0.1."""

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from klora.bases.table import BASES
from test_folder.fakes.base_hub import CONFIG, FILES, INDEX, TOKEN, UNET, VAE, Hub, Server, contents, leftovers, serving
from test_folder.fakes.pget import FakePget
from test_folder.waiting import soon

ROOT = Path(__file__).resolve().parent.parent
[WHEEL] = (ROOT / "dist").glob("*.whl")
SHOWN = [BASES[name] for name in ("illustrious-xl", "flux-dev", "flux-schnell", "safety-checker")]
# What the authors of Illustrious XL have, and what a base is with the small files of SDXL.
CHECKPOINT = {"Illustrious-XL-v1.0.safetensors": FILES[VAE][::-1]}
COMPLETED = CHECKPOINT | {path: FILES[path] for path in (CONFIG, INDEX)}
PROGRAM = (
    "import os, pathlib, sys; from klora.bases.__main__ import main; "
    "sys.exit(main(sys.argv[2:], os.environ, secret=pathlib.Path(sys.argv[1])))"
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip would have put the wheel."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(WHEEL).extractall(folder)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.hub.publish(*(source for base in SHOWN for source in base.sources))
        server.hub.others = {BASES["illustrious-xl"].repository: CHECKPOINT}
        yield server


@pytest.fixture
def hub(server: Server) -> Hub:
    return server.hub


@pytest.fixture
def environment(server: Server, unpacked: Path, tmp_path: Path) -> dict[str, str]:
    """Of a machine without a token."""
    found = {"PATH": os.environ["PATH"], "PYTHONPATH": str(unpacked)}
    return found | {"HOME": str(tmp_path), "HF_ENDPOINT": server.address}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """The program, its folder tmp_path/models, its secret tmp_path/secret."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, tmp_path / "secret", "--folder", tmp_path / "models", *arguments]
        return subprocess.run(command, env=environment | settings, cwd=tmp_path, capture_output=True, text=True)

    return run


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one sentence, or the few, with which it ended."""
    [line] = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith("Error: ")
    assert TOKEN not in result.stdout + result.stderr
    return line.removeprefix("Error: ")


def test_bases_come_whole_and_sizes_and_licences_are_said_before_the_first_file(run: Run, tmp_path: Path) -> None:
    result = run("safety-checker", "illustrious-xl")
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(tmp_path / "models" / "illustrious-xl") == COMPLETED
    lines = result.stdout.splitlines()
    first_file = next(number for number, line in enumerate(lines) if " bytes in " in line)
    said = [line for line in lines[:first_file] if "licence" in line]
    assert said == [
        "safety-checker: 0.00 GB, of which 0.00 are missing; licence: CreativeML Open RAIL-M.",
        "illustrious-xl: 0.00 GB, of which 0.00 are missing; licence: CreativeML Open RAIL++-M (as far as is known).",
    ]
    assert sum(line.startswith("illustrious-xl: ") and " bytes in " in line for line in lines) == len(COMPLETED)
    assert lines[-1] == f"illustrious-xl is in {tmp_path}/models/illustrious-xl."


def test_it_needs_no_torch_and_nothing_else_of_klora(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import klora.bases.__main__, sys; print(sorted(m for m in sys.modules if m.startswith(('klora', 'torch'))))"
    seen = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    rooms = ["__main__", "hub", "install", "pget", "table"]
    assert eval(seen.stdout) == [
        "klora",
        "klora.bases",
        *(f"klora.bases.{room}" for room in rooms),
        "klora.errors",
        "klora.interruptible",
    ]


def test_as_a_module_it_is_what_the_build_runs(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "klora.bases", "--folder", "models", "safety-checker"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert INDEX in contents(tmp_path / "models" / "safety-checker")


def test_an_unknown_base_is_refused_with_the_list_and_nothing_is_asked(hub: Hub, run: Run, tmp_path: Path) -> None:
    assert refusal(run("safety-checker", "sd-1.5")) == (
        f"There is no base model 'sd-1.5'. Expected one of {', '.join(BASES)}."
    )
    assert (hub.asked, (tmp_path / "models").exists()) == ([], False)


# Tokens.

HOW = (
    "flux-dev is gated: accept the licence at huggingface.co/black-forest-labs/FLUX.1-dev and set HF_TOKEN to a token "
    "of the account that has."
)


def test_a_gated_base_without_a_token_fails_before_anything_is_fetched_and_says_how_a_build_gets_one(
    hub: Hub, run: Run
) -> None:
    assert refusal(run("safety-checker", "flux-dev")) == (
        f"{HOW} In a build: cog build --secret id=hf_token,env=HF_TOKEN, with --no-cache after one without it; or "
        "--or-at-setup in cog.yaml."
    )
    assert hub.asked == []


def test_with_or_at_setup_a_note_is_left_and_what_has_a_token_takes_it_away(run: Run, tmp_path: Path) -> None:
    note = tmp_path / "models" / "flux-dev.at-setup"
    result = run("--or-at-setup", "flux-dev", "safety-checker")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == (
        f"flux-dev is NOT fetched: there is no token. Set-up is to fetch it, says {note}."
    )
    assert note.read_text() == (
        "flux-dev is not here: the build had no token for it, and --or-at-setup left it to the server's set-up.\n"
        f"{HOW} Set-up then fetches it and takes this note away.\n"
    )
    assert sorted(path.name for path in note.parent.iterdir() if not path.name.startswith(".")) == [
        "flux-dev.at-setup", "safety-checker",
    ]  # fmt: skip
    assert run("--or-at-setup", "flux-dev", HF_TOKEN=TOKEN).returncode == 0
    assert (note.exists(), contents(tmp_path / "models" / "flux-dev")) == (False, FILES)
    assert run("--or-at-setup", "flux-dev").returncode == 0
    assert not note.exists()  # it would not be true


@pytest.mark.parametrize("where", ["environment", "secret"])
def test_the_token_is_the_environments_or_the_builds_secret(hub: Hub, run: Run, tmp_path: Path, where: str) -> None:
    if where == "secret":
        (tmp_path / "secret").write_text(f"{TOKEN}\n")
    result = run("flux-dev", **({"HF_TOKEN": TOKEN} if where == "environment" else {}))
    assert (result.returncode, contents(tmp_path / "models" / "flux-dev")) == (0, FILES)
    assert {token for kind, _, token in hub.asked if kind != "GET storage"} == {f"Bearer {TOKEN}"}
    assert TOKEN not in result.stdout


def test_a_wrong_token_is_a_sentence_and_the_right_one_then_fetches(run: Run, tmp_path: Path) -> None:
    assert refusal(run("flux-dev", HF_TOKEN="hf_mistyped")) == (
        "flux-dev cannot be fetched: Hugging Face does not know the token in HF_TOKEN. Expected a valid one."
    )
    assert run("flux-dev", HF_TOKEN=TOKEN).returncode == 0
    assert contents(tmp_path / "models" / "flux-dev") == FILES


# Disks and connections.


def test_a_checkpoint_is_not_fetched_again_where_only_the_small_files_failed(
    hub: Hub, run: Run, tmp_path: Path
) -> None:
    hub.lost = {CONFIG}
    message = refusal(run("illustrious-xl"))
    assert message.startswith("illustrious-xl cannot be fetched from stabilityai/stable-diffusion-xl-base-1.0: ")
    hub.lost, hub.asked = set(), []
    assert run("illustrious-xl").returncode == 0
    assert hub.fetched("GET storage") == []
    assert contents(tmp_path / "models" / "illustrious-xl") == COMPLETED


def test_room_for_all_is_there_before_the_first_is_fetched(hub: Hub, run: Run, tmp_path: Path) -> None:
    """Of the checker's own files, which lack the VAE's, there is room."""
    hub.listed = {VAE: {"size": 10**18}}
    message = refusal(run("safety-checker", "flux-schnell"))
    assert message.startswith("safety-checker and flux-schnell need 2000000000.0 GB more in ")
    assert message.endswith(" GB are free. Expected a disk with room for its files.")
    assert hub.fetched() == []
    hub.listed = {}
    assert run("safety-checker", "flux-schnell").returncode == 0
    assert contents(tmp_path / "models" / "flux-schnell") == FILES


def test_what_is_there_already_needs_no_room(hub: Hub, run: Run) -> None:
    run("flux-schnell")
    result = run("flux-schnell")
    assert "flux-schnell: 0.00 GB, of which 0.00 are missing" in result.stdout
    hub.listed = {VAE: {"size": 10**18}}
    assert "needs 1000000000.0 GB more" in refusal(run("flux-schnell"))


def test_a_folder_that_cannot_be_made_is_a_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    for asked, why in ((["safety-checker"], "Not a directory"), (["flux-dev", "--or-at-setup"], "File exists")):
        assert refusal(run(*asked)) == f"{tmp_path}/models cannot be written into: {why}. Expected one that can."


def test_a_damaged_base_is_mended_though_its_sizes_are_right(hub: Hub, run: Run, tmp_path: Path) -> None:
    run("flux-schnell")
    for path in (VAE, CONFIG):
        (tmp_path / "models" / "flux-schnell" / path).write_bytes(FILES[path][::-1])
    hub.asked.clear()
    assert run("flux-schnell").returncode == 0
    assert contents(tmp_path / "models" / "flux-schnell") == FILES
    assert UNET not in hub.fetched()


def test_a_download_that_breaks_off_is_a_sentence_and_goes_on(hub: Hub, run: Run, tmp_path: Path) -> None:
    hub.lost = {UNET}
    message = refusal(run("flux-schnell"))
    assert message.startswith("flux-schnell cannot be fetched from black-forest-labs/FLUX.1-schnell: ")
    assert message.endswith("What has come stays; the next attempt fetches the rest.")
    hub.lost, hub.asked = set(), []
    assert run("flux-schnell").returncode == 0
    assert VAE not in hub.fetched()
    assert contents(tmp_path / "models" / "flux-schnell") == FILES


def test_ctrl_c_says_that_the_same_command_goes_on(
    hub: Hub, environment: dict[str, str], run: Run, tmp_path: Path
) -> None:
    hub.held = {UNET}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "secret", "--folder", tmp_path / "models", "flux-schnell"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        assert soon(lambda: (tmp_path / "models" / "flux-schnell" / VAE).exists())
        process.send_signal(signal.SIGINT)
        hub.held = set()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "Stopped. What has come stays; the same command goes on from there.\n")
    hub.asked.clear()
    assert run("flux-schnell").returncode == 0
    assert VAE not in hub.fetched()
    assert contents(tmp_path / "models" / "flux-schnell") == FILES


def test_a_process_killed_in_a_checkpoint_leaves_no_base_and_the_next_one_fetches_it(
    hub: Hub, environment: dict[str, str], run: Run, tmp_path: Path
) -> None:
    hub.held = {*CHECKPOINT}
    models = tmp_path / "models"
    command = [sys.executable, "-c", PROGRAM, tmp_path / "secret", "--folder", models, "illustrious-xl"]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        assert soon(lambda: leftovers(tmp_path) != [])
        process.kill()
    assert contents(models / "illustrious-xl") == {}
    hub.held = set()
    assert run("illustrious-xl").returncode == 0
    assert (contents(models / "illustrious-xl"), leftovers(tmp_path)) == (COMPLETED, [])


# pget.


def test_pget_is_used_where_its_sha256_is_given_and_another_is_refused(
    run: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    pget = FakePget(tmp_path / "bin")
    found = {"PATH": f"{pget.path.parent}:{environment['PATH']}"}
    assert run("flux-schnell", **found, KLORA_PGET_SHA256=pget.sha256).returncode == 0
    assert len(pget.runs()) == 2
    assert f"has the SHA-256 {pget.sha256}. Expected {'ab' * 32}" in refusal(
        run("flux-schnell", **found, KLORA_PGET_SHA256="ab" * 32)
    )
    assert run("safety-checker", **found).returncode == 0
    assert len(pget.runs()) == 2
