"""The shape of the package: a file imports only what stands above it, and importing it does nothing else."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tinydb

PACKAGE = Path(tinydb.__file__).parent
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# Every file, from the bottom of the package to its top: the book, with the tool's rooms among it where it enters them.
ORDER = ("config cli storage pictures tokenizer layers clip unet vae diffusion pipeline data attention report run "
         "class_images __init__").split()
PARSES_ARGUMENTS = {"cli"}
DISK = ("open", "os.", "shutil.", "tempfile.", "glob.", "pathlib.", "subprocess.", "socket.")


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


def test_every_file_has_its_place():
    assert set(FILES) == set(ORDER)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_upwards(file):
    assert imported(file) & set(ORDER) <= set(ORDER[: ORDER.index(file)])


@pytest.mark.parametrize("file", sorted(set(FILES) - PARSES_ARGUMENTS))
def test_only_the_command_line_parses_arguments(file):
    assert "argparse" not in {name for node in ast.walk(tree(file)) if isinstance(node, ast.Import)
                              for name in [alias.name for alias in node.names]}


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
