"""The wheel with which the image's build fetches bases: the source's, the same each time, and never in klora's way."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import in_venv
import pytest

ROOT = Path(__file__).resolve().parent.parent
[WHEEL] = (ROOT / "dist").glob("*.whl")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return in_venv.program("wheel")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with what the program needs."""
    for name in ("script/wheel", "pyproject.toml", "klora/errors.py", "klora/interruptible.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "klora" / "bases", tmp_path / "klora" / "bases", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def run(copy: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, copy / "script" / "wheel", *options], capture_output=True, text=True)


def test_the_wheel_in_the_repository_is_the_sources(copy: Path) -> None:
    """The same bytes, made elsewhere at another time."""
    assert run(copy).stdout == f"dist/{WHEEL.name}, {WHEEL.stat().st_size} bytes\n"
    assert (copy / "dist" / WHEEL.name).read_bytes() == WHEEL.read_bytes()


def test_check_says_when_it_is_not_and_writes_nothing(copy: Path) -> None:
    said = f"dist/{WHEEL.name} is not what the source makes. Run script/wheel, and commit it.\n"
    assert (missing := run(copy, "--check")).returncode == 1 and missing.stderr == said
    assert not (copy / "dist").exists()
    run(copy)
    assert run(copy, "--check").returncode == 0
    with (copy / "klora" / "bases" / "table.py").open("a") as table:
        table.write("# changed\n")
    assert (changed := run(copy, "--check")).returncode == 1 and changed.stderr == said
    run(copy)
    assert run(copy, "--check").returncode == 0


def test_a_new_version_takes_the_place_of_the_old_one(copy: Path) -> None:
    run(copy)
    project = copy / "pyproject.toml"
    project.write_text(re.sub(r'^version = ".*"', 'version = "9.8.7"', project.read_text(), flags=re.MULTILINE))
    assert run(copy, "--check").returncode == 1
    run(copy)
    assert [path.name for path in (copy / "dist").iterdir()] == ["klora_bases-9.8.7-py3-none-any.whl"]


def test_it_holds_the_fetching_part_and_no_beginning_of_klora() -> None:
    names = [name for name in zipfile.ZipFile(WHEEL).namelist() if ".dist-info/" not in name]
    bases = sorted(path.name for path in (ROOT / "klora" / "bases").glob("*.py"))
    assert names == ["klora/errors.py", "klora/interruptible.py", *(f"klora/bases/{name}" for name in bases)]


def test_pip_installs_it_and_it_asks_for_what_it_imports(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--quiet",
        "--target",
        tmp_path,
        WHEEL,
    ]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)
    [found] = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("klora-bases", WHEEL.name.split("-")[1])
    assert {re.split(r"\W", line)[0] for line in found.requires} == {"filelock", "huggingface_hub", "tqdm"}
    recorded = {
        str(file): file for file in found.files if ".dist-info/" not in str(file) and "__pycache__" not in str(file)
    }
    assert all(file.hash.value and file.locate().stat().st_size == file.size for file in recorded.values())
    assert {str(path.relative_to(tmp_path)) for path in (tmp_path / "klora").rglob("*.py")} == set(recorded)


@pytest.mark.parametrize("first", ["the wheel", "the repository"])
def test_the_whole_package_wins_wherever_it_stands_on_the_path(tmp_path: Path, first: str) -> None:
    """As in the image, where the one is in site-packages and the other in /src. -S: without site-packages of ours."""
    zipfile.ZipFile(WHEEL).extractall(tmp_path / "site")
    (tmp_path / "src" / "klora" / "bases").mkdir(parents=True)
    for name in ("klora", "klora/bases"):
        (tmp_path / "src" / name / "__init__.py").write_text("whole = True")
    places = [str(tmp_path / "site"), str(tmp_path / "src")]
    code = (
        f"import sys; sys.path[:0] = {places if first == 'the wheel' else places[::-1]}; "
        "import klora, klora.bases; print(klora.whole, klora.bases.whole)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_the_image_installs_it_and_a_laptop_does_not() -> None:
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert f"./dist/{WHEEL.name}" in requirements
    [pattern] = re.findall(r"grep -Ev '(.*)' requirements\.txt", (ROOT / "script" / "setup").read_text())
    kept = subprocess.run(["grep", "-Ev", pattern, ROOT / "requirements.txt"], capture_output=True, text=True).stdout
    assert "dist" not in kept and "diffusers==" in kept and "torch==" not in kept


def test_lint_compares_it() -> None:
    assert "script/wheel --check" in (ROOT / "script" / "lint").read_text()
