"""What Cog is told: keys that it knows, commands that it can run, and a build context without weights and secrets."""

import re
import subprocess
from fnmatch import translate
from pathlib import Path
from typing import Any

import pytest
import yaml  # comes with huggingface_hub

from klora.bases.__main__ import SECRET
from klora.bases.table import BASES
from klora.form.request import MODELS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cog.yaml").read_text()
COG: dict[str, Any] = yaml.safe_load(TEXT)
BUILD: dict[str, Any] = COG["build"]
ITEMS: list[dict[str, Any]] = [item if isinstance(item, dict) else {"command": item} for item in BUILD["run"]]
FETCH = re.compile(r"python -m klora\.bases --folder /models ((?:[a-z-]+ ?)+)")
# Names that Cog refuses in `environment`; those that end in _ are beginnings.
DENIED = {
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "LIBRARY_PATH", "HF_ENDPOINT"),
    *("HF_HUB_ENABLE_HF_TRANSFER", "R8_", "REPLICATE_", "CUDA_", "NVIDIA_", "NV_", "PGET_", "KUBERNETES_"),
}


def fetched(text: str) -> list[str]:
    return [name for found in FETCH.findall(text) for name in found.split()]


def test_every_key_is_one_that_cog_knows() -> None:
    assert COG.keys() <= {"build", "image", "predict", "train", "concurrency", "environment"}
    assert BUILD.keys() <= {
        *("gpu", "cuda", "cudnn", "python_version", "python_requirements", "system_packages", "run", "sdk_version")
    }


def test_versions_are_those_of_one_row_of_cogs_table() -> None:
    """torch 2.11.0 goes with CUDA 12.6 to 13.0 and Python 3.10 to 3.14."""
    requirements = (ROOT / BUILD["python_requirements"]).read_text().splitlines()
    pinned = dict(line.split("==") for line in requirements if "==" in line)
    assert (BUILD["gpu"], BUILD["cuda"], BUILD["python_version"]) == (True, "12.8", "3.11")
    assert pinned["torch"] == "2.11.0"
    assert BUILD["sdk_version"] == pinned["cog"] == pinned["coglet"]


def test_predictor_and_trainer_are_there() -> None:
    for key, kind in (("predict", "class"), ("train", "def")):
        file, name = COG[key].split(":")
        assert re.search(rf"^{kind} {name}\b", (ROOT / file).read_text(), re.MULTILINE)


def test_the_environment_has_names_that_cog_takes_and_nothing_that_stops_the_build_from_fetching() -> None:
    given = dict(line.split("=", 1) for line in COG["environment"])
    assert not [name for name in given for bad in DENIED if name == bad or (bad.endswith("_") and name.startswith(bad))]
    assert not [value for value in given.values() if re.search(r"\s", value)]
    assert not {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"} & given.keys()
    assert all(f"--folder {given['KLORA_MODELS']} " in item["command"] for item in ITEMS)


def test_every_command_is_one_line_and_fetches_bases_of_the_table() -> None:
    assert not [item for item in ITEMS if "\n" in item["command"] or item.keys() - {"command", "mounts"}]
    assert all(FETCH.fullmatch(item["command"]) for item in ITEMS)
    assert set(fetched(TEXT)) == set(BASES)


def test_each_base_is_a_layer_of_its_own_and_the_large_ones_come_last() -> None:
    assert [fetched(item["command"]) for item in ITEMS] == [["safety-checker"], ["sdxl"], ["flux-dev"]]


def test_what_is_opt_in_is_the_same_command_in_a_comment() -> None:
    lines = [line.strip().removeprefix("# - ") for line in TEXT.splitlines() if line.strip().startswith("# - python")]
    assert [fetched(line) for line in lines] == [["illustrious-xl"], ["flux-schnell"], ["captioner", "segmenter"]]
    assert set(MODELS) <= set(fetched(TEXT))


def test_gated_bases_and_no_others_are_given_the_secret_and_fail_without_it() -> None:
    mounted = {name for item in ITEMS if "mounts" in item for name in fetched(item["command"])}
    assert mounted == {name for name, base in BASES.items() if base.gated}
    mounts = [mount for item in ITEMS for mount in item.get("mounts", [])]
    assert mounts == [{"type": "secret", "id": "hf_token", "target": str(SECRET)}]
    assert not any("--or-at-setup" in item["command"] for item in ITEMS)


# The build context.


def in_context(path: str) -> bool:
    """Whether Docker would send a file: no pattern of .dockerignore matches it or a folder above it."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    above = [path, *map(str, Path(path).parents)][:-1]
    return not any(ignores(pattern, place) for pattern in lines for place in above)


def ignores(pattern: str, place: str) -> bool:
    """Docker's rule: a pattern begins at the root unless **/ stands before it, and * crosses no folder."""
    if pattern.startswith("**/"):
        return re.fullmatch(translate(pattern[3:]), Path(place).name) is not None
    return place.count("/") == pattern.count("/") and re.fullmatch(translate(pattern), place) is not None


def test_the_image_gets_what_it_runs() -> None:
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "klora").rglob("*.py")]
    programs = ["predict.py", "train.py", "weights.py", "requirements.txt", "LICENSE"]
    wheels = [str(path.relative_to(ROOT)) for path in (ROOT / "dist").iterdir()]
    assert wheels and all(map(in_context, [*modules, *programs, *wheels]))


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", ".cache/toy/sdxl.pt", "klora/__pycache__/lora.cpython-311.pyc"),
        *("examples/toy/sdxl/unet/diffusion_pytorch_model.safetensors", "test_folder/tiny.py", "out/demo.png"),
        *("dog.safetensors", "loras/dog.safetensors", "models/flux-dev/ae.safetensors", "trained_model.tar"),
        *(".env", "deploy/.env.local", "token.txt", "my_token.txt", "secrets/hf_token", ".hypothesis/unicode_data/x"),
    ],
)
def test_weights_caches_and_secrets_stay_at_home(path: str) -> None:
    assert not in_context(path)


def test_git_keeps_the_wheel() -> None:
    wheel = next((ROOT / "dist").iterdir())
    assert subprocess.run(["git", "check-ignore", "-q", wheel], cwd=ROOT).returncode == 1
