"""The shape of the package: a file imports only what stands above it, and importing it does nothing else."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tinydb

PACKAGE = Path(tinydb.__file__).parent
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))

MAY_IMPORT = {  # besides the standard library; from the bottom of the package to its top
    "config": "",
    "layers": "torch",
    "tokenizer": "torch tokenizers config",
    "clip": "torch config",
    "unet": "torch config layers",
    "vae": "torch config layers",
    "diffusion": "torch numpy config",  # no network: it takes any callable
    "weights": "torch safetensors config",
    "pictures": "torch numpy PIL",
    "report": "PIL config tokenizer weights",
    "pipeline": "torch numpy PIL config tokenizer clip unet vae diffusion weights pictures",
    "data": "torch numpy PIL config vae pictures",
    "__init__": "config pipeline",
}
DISK = ("open", "os.", "shutil.", "tempfile.", "glob.", "pathlib.", "subprocess.", "socket.")
FORBIDDEN = set("print stdout stderr input parse_args parse_known_args argv environ getenv".split())


def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{file}.py").read_text(encoding="utf-8"))


def imported(file: str) -> set[str]:
    """Packages and files of ours that a file imports, inside functions too; not the standard library."""
    modules = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}.py: relative import in line {node.lineno}"
            ours = node.module == "tinydb"
            modules |= {f"tinydb.{alias.name}" for alias in node.names} if ours else {node.module}
    names = {name.split(".")[1] if name.startswith("tinydb.") else name.split(".")[0] for name in modules}
    return names - set(sys.stdlib_module_names)


def test_every_file_has_its_row():
    assert set(FILES) == set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_upwards(file):
    assert imported(file) <= set(MAY_IMPORT[file].split())


def test_the_rows_themselves_point_upwards():
    files = list(MAY_IMPORT)
    for i, file in enumerate(files):
        assert not set(MAY_IMPORT[file].split()) & set(files[i:]), file


@pytest.mark.parametrize("file", FILES)
def test_no_printing_no_command_line_no_environment(file):
    """Those belong to the scripts."""
    field = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}
    used = {getattr(node, field[type(node)]) for node in ast.walk(tree(file)) if type(node) in field}
    assert not used & FORBIDDEN


@pytest.fixture(scope="module")
def disk_events():
    """What Python's audit hook reports while the switch is on; a hook cannot be removed."""
    events, on = [], [False]

    def hook(event: str, arguments: tuple) -> None:
        if on[0] and event.startswith(DISK):
            events.append((event, arguments))

    sys.addaudithook(hook)
    yield events, on
    on[0] = False


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__"])
def test_import_touches_no_disk_and_prints_nothing(file, disk_events, monkeypatch, capsys):
    """Run a file anew, with all that it imports there already."""
    module = ModuleType(f"again_{file}")
    code = compile(tree(file), f"{file}.py", "exec")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    events, on = disk_events
    on[0] = True
    exec(code, module.__dict__)
    on[0] = False
    assert events == []
    assert capsys.readouterr() == ("", "")
