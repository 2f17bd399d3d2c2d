"""The shape of the package: a file imports only what stands before it, and importing it does nothing else."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import tinydb

PACKAGE = Path(tinydb.__file__).parent
# Each file may import those before it. The mathematics of diffusion comes before the networks: it knows none of them.
ORDER = ("config cli storage tokenizer prompts pictures lora_files diffusion layers clip unet lora vae pipeline data "
         "attention report run class_images scores __init__").split()
DISK = ("open", "os.", "shutil.", "tempfile.", "glob.", "pathlib.", "subprocess.", "socket.")  # audit events


def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{file}.py").read_text(encoding="utf-8"))


def imported(file: str) -> set[str]:
    """The modules that a file imports, inside functions too: "torch", "tinydb.config"."""
    modules = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}.py: relative import in line {node.lineno}"
            modules |= {f"tinydb.{alias.name}" for alias in node.names} if node.module == "tinydb" else {node.module}
    return modules


def test_every_file_has_its_place():
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(ORDER)


def test_a_file_imports_only_what_stands_before_it():
    for i, file in enumerate(ORDER):
        ours = {module.removeprefix("tinydb.") for module in imported(file) if module.startswith("tinydb")}
        assert ours <= set(ORDER[:i]), file


def test_only_cli_parses_arguments():
    assert [file for file in ORDER if "argparse" in imported(file)] == ["cli"]


def test_import_touches_no_disk_and_prints_nothing(monkeypatch, capsys):
    """Run each file anew, when all that it imports is there already."""
    events, watching = [], False

    def hook(event: str, arguments: tuple) -> None:
        if watching and event.startswith(DISK):
            events.append((file, event, arguments))

    sys.addaudithook(hook)  # for good: Python cannot remove one
    for file in ORDER[:-1]:
        module, code = ModuleType(f"again_{file}"), compile(tree(file), f"{file}.py", "exec")
        module.__file__ = f"{file}.py"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        watching = True
        exec(code, vars(module))
        watching = False
    assert events == []
    assert capsys.readouterr() == ("", "")
