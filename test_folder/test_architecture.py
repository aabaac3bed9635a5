"""The rules of the house, checked in the source: who may import whom, how long things are, what is never written."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

import klora

ROOT = Path(__file__).parents[1]
PROGRAMS = [ROOT / name for name in ("predict.py", "train.py", "weights.py")]
PACKAGE = sorted((ROOT / "klora").rglob("*.py"))
PLAYGROUND = sorted((ROOT / "playground").glob("*.py"))
FILES = [path for path in PROGRAMS if path.exists()] + PACKAGE + PLAYGROUND
FAMILIES = sorted({ROOT / f"{family.__module__.replace('.', '/')}.py" for family in klora.FAMILIES.values()})

# Library: the only files that may import it, by their beginning.
BORDERS = {
    "cog": ("predict.py", "train.py"),
    "diffusers": ("klora/models/", "klora/training/run.py"),
    "transformers": ("klora/models/", "klora/training/annotate.py"),
    "requests": ("playground/connection.py",),
    "gradio": tuple(f"playground/{name}.py" for name in ("app", "controls", "fusion", "training")),
    "urllib": ("klora/sources/", "weights.py", "playground/"),
    "urllib3": (),
    "http": ("klora/sources/",),
    "matplotlib": ("klora/report/picture.py",),
    "ray": ("klora/bulk/cluster.py",),
    "triton": ("klora/device.py", "klora/kernels.py"),
    "huggingface_hub": ("klora/bases/hub.py", "klora/training/card.py", "klora/training/hub.py"),
}
ROOMS = {
    room: {f"klora.{room}", *(f"klora.{room}.{path.stem}" for path in PACKAGE if path.parent.name == room)}
    for room in ("bases", "bulk", "cache", "files", "layers", "sources")
}
FILES_OF_LORAS = ROOMS["files"]
# What the lower files may import of ours; the files above them may import what they like, but for the programs.
LAYERS = {
    "klora/errors.py": set(),
    "klora/file_names.py": set(),
    "klora/device.py": {"klora.interruptible"},
    "klora/interruptible.py": set(),
    "klora/lora.py": set(),
    "klora/files/": {"klora.errors", "klora.file_names", "klora.lora", *FILES_OF_LORAS},
    "klora/fusion.py": {"klora.errors", "klora.lora"},
    "klora/kernels.py": {"klora.lora"},
    "klora/layers/": {"klora.errors", "klora.device", "klora.kernels", "klora.lora", *ROOMS["layers"]},
    "klora/generation/acting.py": {"klora.form.request", "klora.fusion", "klora.lora"},
    "klora/generation/words.py": {"klora.layers", "klora.lora"},
    "klora/sources/": {"klora.errors", "klora.file_names", *ROOMS["sources"]},
    "klora/cache/": {
        *("klora.errors", "klora.interruptible", *ROOMS["cache"]),
        *(f"klora.sources.{name}" for name in ("deadline", "download", "kinds")),
    },
    "klora/bases/": {"klora.errors", "klora.interruptible", *ROOMS["bases"]},
    "klora/form/fields.py": {"klora.errors"},
    "klora/form/options.py": set(),
    "klora/form/outputs.py": {"klora.errors"},
    "klora/bulk/": {
        *("klora.errors", "klora.form.fields", "klora.form.request", "klora.studio.provenance", *ROOMS["bulk"]),
        *("klora.interruptible", "klora.sources.kinds", "klora.sources.reference"),
    },
    "klora/form/inputs.py": {"klora.errors"},
    "klora/studio/provenance.py": {
        *("klora", "klora.errors", "klora.form.request", "klora.fusion"),
        *("klora.bases.table", "klora.sources.kinds", "klora.sources.reference"),
    },
    "klora/training/kohya.py": {"klora.errors", "klora.lora"},
    "klora/training/trainable.py": {"klora.layers", "klora.lora"},
    "klora/form/pictures.py": {"klora.errors"},
    "klora/form/request.py": {"klora.errors", "klora.form.fields", "klora.form.pictures"},
    "klora/form/pair.py": {"klora.errors", "klora.form.fields", "klora.form.request"},
    "klora/models/": {
        *("klora.errors", "klora.device", "klora.lora", "klora.form.pictures", "klora.form.request"),
        *(
            "klora.models.family",
            "klora.models.following",
            "klora.models.linears",
            "klora.models.prompts",
            "klora.interruptible",
            *FILES_OF_LORAS,
        ),
    },
    "klora/report/numbers.py": {"klora.errors", "klora.fusion", "klora.lora"},
    "klora/report/advice.py": {"klora.fusion", "klora.report.numbers"},
    "klora/report/picture.py": {"klora.report.numbers"},
    "klora/report/__init__.py": {"klora.fusion", "klora.report.advice", "klora.report.numbers"},
    "klora/models/prompts.py": {"klora.errors"},
    "klora/models/following.py": {"klora.lora"},
    "klora/models/linears.py": set(),
    "klora/models/attention.py": set(),
    "klora/models/recording.py": {"klora.layers"},
    "klora/models/pace.py": {
        *("klora.device", "klora.form.request", "klora.kernels", "klora.layers"),
        *("klora.models.attention", "klora.models.family", "klora.models.recording"),
    },
    "klora/models/compiling.py": {
        *("klora.form.request", "klora.layers", "klora.lora", "klora.models.family", "klora.models.pace")
    },
    "playground/": {"playground", *(f"playground.{path.stem}" for path in PLAYGROUND)},  # and nothing of klora
    "weights.py": {"klora.errors", *ROOMS["bases"], *ROOMS["cache"], *ROOMS["sources"]},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, also inside functions: a module, or a module and a name in it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = relative(path.parents[node.level - 1]).replace("/", ".") if node.level else ""
            module = ".".join(part for part in (package, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def modules_of(path: Path) -> set[str]:
    """Our own modules that a file imports: the longest beginning of each name that is a file or a folder."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        known = [".".join(parts[:n]) for n in range(1, len(parts) + 1) if source(".".join(parts[:n]))]
        found |= set(known[-1:])
    return found


def place_of(path: Path) -> str:
    """The most particular of LAYERS that a file is in; "" where it is in none."""
    return max(filter(relative(path).startswith, LAYERS), key=len, default="")


@cache
def source(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def each_of(paths: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of all these files, which says what is wrong in each: a test for each would be a thousand."""

    def of_all(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for path in paths:
                try:
                    rule(path)
                except AssertionError as error:
                    wrong.append(f"{relative(path)}: {error}")
            assert not wrong, "\n".join(wrong)

        return test

    return of_all


every_file, every_module = each_of(FILES), each_of(PACKAGE)


def test_the_files_are_found() -> None:
    names = {relative(path) for path in FILES}
    assert {"klora/lora.py", "klora/fusion.py", "klora/models/sdxl.py", "klora/models/flux.py", "weights.py"} <= names


def test_every_public_name_is_had() -> None:
    assert {"Flux", "LoRA", "generate"} <= set(klora.__all__) <= set(dir(klora))
    assert all(callable(getattr(klora, name)) for name in klora.__all__ if name != "FAMILIES")  # and none is a module
    assert not hasattr(klora, "nothing")


@pytest.mark.parametrize("what", ["weights, klora", "klora.cli"])
def test_who_only_fetches_files_or_asks_for_help_waits_for_no_torch(what: str) -> None:
    code = f"import sys, {what}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Who may import whom.


@every_file
def test_a_library_is_imported_at_its_border_only(path: Path) -> None:
    name = relative(path)
    closed = [library for library, files in BORDERS.items() if not name.startswith(files)]
    assert not [seen for seen in imports(path) if any(is_below(seen, library) for library in closed)]


@pytest.mark.parametrize(("place", "allowed"), LAYERS.items(), ids=LAYERS)
def test_lower_files_know_nothing_of_upper_ones(place: str, allowed: set[str]) -> None:
    table = {f"klora.models.{family.stem}" for family in FAMILIES}
    for path in (path for path in FILES if place == place_of(path)):
        lists_families = relative(path) == "klora/models/__init__.py"
        assert modules_of(path) <= (allowed | table if lists_families else allowed), path


@pytest.mark.parametrize("path", FAMILIES, ids=relative)
def test_a_family_imports_no_other_family(path: Path) -> None:
    others = {f"klora.models.{other.stem}" for other in FAMILIES if other != path}
    assert not modules_of(path) & others


def test_fusion_is_torch_and_arithmetic() -> None:
    """Nothing but torch, the low-rank pairs, the errors and the standard library."""
    allowed = {"torch", "klora"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in imports(ROOT / "klora" / "fusion.py")} <= allowed


@every_module
def test_the_package_knows_no_form(path: Path) -> None:
    """Only the command may know the programs, and of them only where bases and files are."""
    allowed = {"weights"} if path.name == "cli.py" else set()
    assert not modules_of(path) & {"predict", "train", "weights"} - allowed


@every_file
def test_the_environment_is_read_in_weights_only(path: Path) -> None:
    """In weights, in the program that fetches bases, which a build runs without it, and where matplotlib, which can be
    told in no other way, is told where to put its files."""
    if relative(path) in ("weights.py", "klora/bases/__main__.py", "klora/report/picture.py"):
        return
    named = [ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)]
    reads = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    assert not reads & {*named, *imports(path)}


# What is never written.


def raises(body: list[ast.stmt]) -> bool:
    return any(isinstance(node, ast.Raise) for statement in body for node in ast.walk(statement))


def hands_on(function: ast.AST) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "set_exception" for node in ast.walk(function))


def caught(handler: ast.ExceptHandler) -> set[str]:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind) if kind else "everything" for kind in kinds}


@every_file
def test_nothing_swallows_every_exception(path: Path) -> None:
    handlers = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ExceptHandler)]
    broad = [handler for handler in handlers if caught(handler) & {"everything", "Exception"}]
    assert not [handler.lineno for handler in broad if not raises(handler.body)]


@every_file
def test_a_cancellation_is_never_swallowed(path: Path) -> None:
    """Whoever catches BaseException raises it again before the function ends, or hands it to who waits for it."""
    for function in functions(path):
        handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
        if any("BaseException" in caught(handler) for handler in handlers):
            assert raises(function.body) or hands_on(function), function.name


@every_module
def test_nothing_is_printed_but_by_the_command(path: Path) -> None:
    calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    assert path.name == "cli.py" or "print" not in {ast.unparse(call) for call in calls}


# Sizes and names.


@every_file
def test_a_file_has_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def lines_of_code(path: Path) -> int:
    """Lines that hold neither nothing, nor a comment, nor a docstring alone."""
    strings = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Expr)]
    texts = {
        line
        for node in strings
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(bool(text.strip()) and not text.strip().startswith("#") for n, text in lines if n not in texts)


@pytest.mark.parametrize(
    ("room", "most"), [("klora", 940), ("layers", 345), ("models", 840), ("files", 780), ("report", 620), ("bulk", 500)]
)
def test_a_room_has_no_more_lines_of_code_than_fit_in_a_head(room: str, most: int) -> None:
    assert sum(lines_of_code(path) for path in PACKAGE if path.parent.name == room) < most


@every_file
def test_a_function_has_at_most_60_lines(path: Path) -> None:
    """Of predict and train only the body is counted: their arguments are the form."""
    form = path.name in ("predict.py", "train.py")
    starts = {f: f.body[0].lineno if form else f.lineno for f in functions(path)}
    assert not [f.name for f, start in starts.items() if f.end_lineno - start + 1 > 60]


@every_file
def test_nothing_is_called_utils_helpers_or_manager(path: Path) -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = [node.name for node in ast.walk(parsed(path)) if isinstance(node, kinds)]
    names = [part.lower() for part in (*path.relative_to(ROOT).with_suffix("").parts, *defined)]
    assert not [name for name in names for drawer in ("util", "helper", "manager") if drawer in name]


@every_module
def test_everything_public_says_what_it_is(path: Path) -> None:
    module = parsed(path)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(module)
    assert not [node.name for node in public if not ast.get_docstring(node)]
