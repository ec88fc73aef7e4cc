"""How the package is built: imports run downwards only, every function is annotated, and importing does nothing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lowmem_rmu"
LAYERS = (
    "app",
    "lowmem_rmu.__main__",
    "lowmem_rmu.run",
    "lowmem_rmu.cli.audit",
    "lowmem_rmu.cli.export",
    "lowmem_rmu.cli.evaluate",
    "lowmem_rmu.cli.chat",
    "lowmem_rmu.cli.neighbors",
    "lowmem_rmu.cli.run",
    "lowmem_rmu.cli",
    "lowmem_rmu.measure",
    "lowmem_rmu.pipeline",
    "lowmem_rmu.inputs",
    "lowmem_rmu.ui",
    "lowmem_rmu.audit",
    "lowmem_rmu.report",
    "lowmem_rmu.export",
    "lowmem_rmu.evaluation",
    "lowmem_rmu.unlearning",
    "lowmem_rmu.neighbors",
    "lowmem_rmu.chat",
    "lowmem_rmu.data",
    "lowmem_rmu.memory",
    "lowmem_rmu.model",
    "lowmem_rmu.weights",
    "lowmem_rmu.distributed",
    "lowmem_rmu.runs",
    "lowmem_rmu.config",
    "lowmem_rmu.parsing",
    "lowmem_rmu.console",
    "lowmem_rmu.errors",
    "lowmem_rmu",
)
"""From top to bottom: a module imports from its own layer or from those after it. The last is the bare package: its version."""
DISTRIBUTIONS = {"yaml": "PyYAML"}
"""Modules whose distribution has another name."""
MEDDLING = {
    "print",
    "open",
    "exec",
    "eval",
    "input",
    "seed",
    "manual_seed",
    "basicConfig",
    "chdir",
    "mkdir",
    "write_text",
    "filterwarnings",
}
QUIET = "import importlib; from lowmem_rmu.cli.startup import quiet_libraries; quiet_libraries()"
"""Libraries may have notes of their own to print, which the command line keeps back."""


def find_modules() -> dict[str, ast.Module]:
    files = [*sorted((ROOT / PACKAGE).rglob("*.py")), *ROOT.glob("app.py")]
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in files}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = find_modules()


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Everything that is imported anywhere in a module, in functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of the project that a module imports."""
    own = {name for name in imported_names(tree) if name.partition(".")[0] in (PACKAGE, "app")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in own}


def layer(module: str) -> int:
    """The place of a module in LAYERS; the longest match counts."""
    matches = [
        name for name in LAYERS if name == module or (name != PACKAGE and module.startswith(f"{name}."))
    ]
    assert matches, f"{module} has no place among the layers"
    return LAYERS.index(max(matches, key=len))


def is_tiny(module: str) -> bool:
    return module.startswith(f"{PACKAGE}.tiny")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a module that run when it is imported: neither bodies of functions nor `if __name__ == "__main__"`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            parts: list[ast.AST] = [*child.decorator_list, *child.args.defaults]
            for part in parts:
                yield part
                yield from runs_at_import(part)
            continue
        yield child
        yield from runs_at_import(child)


def in_new_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_walk_sees_the_package() -> None:
    assert {"lowmem_rmu.run", "lowmem_rmu.data.corpora", "lowmem_rmu.tiny.world"} <= MODULES.keys()
    assert "lowmem_rmu.data.corpora" in own_imports(MODULES["lowmem_rmu.unlearning.trainer"])
    assert "lowmem_rmu.pipeline" in own_imports(MODULES["lowmem_rmu.cli.run"]), (
        "imports within functions count"
    )


@pytest.mark.parametrize("module", [name for name in MODULES if not is_tiny(name)])
def test_imports_run_downwards_only(module: str) -> None:
    upwards = {name for name in own_imports(MODULES[module]) if is_tiny(name) or layer(name) < layer(module)}
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))}, which lies above it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: own_imports(tree) - {name} for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_the_invented_world_needs_nothing_of_the_project() -> None:
    assert own_imports(MODULES["lowmem_rmu.tiny.world"]) == set()


@pytest.mark.parametrize("module", MODULES)
def test_every_function_says_what_it_returns_and_takes(module: str) -> None:
    missing = []
    for function in functions(MODULES[module]):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
        if function.returns is None or bare:
            missing.append(f"line {function.lineno}: {function.name}({', '.join(bare)})")
    assert not missing, f"{module}: not annotated: {'; '.join(missing)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_meddles_with_the_process_when_it_is_imported(module: str) -> None:
    for node in runs_at_import(MODULES[module]):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            assert name not in MEDDLING, f"{module}, line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Assign | ast.AugAssign):
            assert "os.environ" not in ast.unparse(node), f"{module}, line {node.lineno}: {ast.unparse(node)}"


TAG = re.compile(r"</?[a-z][a-z0-9]*(\\s[^<]*)?/?>|<[a-z][a-z0-9]* ", re.IGNORECASE)
"""What makes a text HTML."""


def holds_tag(node: ast.AST) -> bool:
    """Whether a constant of this expression is HTML."""
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and TAG.search(part.value)
        for part in ast.walk(node)
    )


def unescaped_html(tree: ast.AST) -> Iterator[ast.AST]:
    """Expressions that put values into HTML without escaping them: only `Markup(...).format` and templates do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and holds_tag(node):
            yield node
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
            # Two pieces of markup may be added: Markup escapes what is none.
            sides = [
                side for side in (node.left, node.right) if isinstance(side, ast.Constant | ast.JoinedStr)
            ]
            yield from (node for side in sides if holds_tag(side))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("format", "join")
        ):
            if isinstance(node.func.value, ast.Constant) and holds_tag(node):
                yield node
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "Markup"
            and not isinstance(node.args[0], ast.Constant)
        ):
            # What is declared safe without being written here: charts alone, which this program draws.
            yield node


@pytest.mark.parametrize("module", [name for name in MODULES if not is_tiny(name)])
def test_whatever_is_put_into_html_is_escaped(module: str) -> None:
    found = [f"line {node.lineno}: {ast.unparse(node)}" for node in unescaped_html(MODULES[module])]  # type: ignore[attr-defined]
    if module == "lowmem_rmu.report.charts":
        found = [each for each in found if not each.endswith(": Markup(svg)")]
    assert not found, f"{module}: {'; '.join(found)}"
    assert "html" not in set(imported_names(MODULES[module])), (
        f"{module}: escape by Markup, which cannot be forgotten"
    )


@pytest.mark.parametrize(
    ("code", "is_caught"),
    [
        ('f"<p>{mark}</p>"', True),
        ('f"<caption>{name}: {mark}"', True),
        ('"<td>{}</td>".format(mark)', True),
        ('"<p>%s</p>" % mark', True),
        ('"<p>" + mark', True),
        ('"".join(f"<td>{cell}</td>" for cell in row)', True),
        ('"".join(["<td>", cell])', True),
        ("Markup(mark)", True),
        ('Markup("<p>{}</p>").format(mark)', False),
        ('f"{a} < {b} and <|user|> and a<b> c"', True),
        ('f"<|user|>{text} 3 < {b}"', False),
    ],
)
def test_the_search_for_unescaped_html_finds_it(code: str, is_caught: bool) -> None:
    assert bool(list(unescaped_html(ast.parse(code)))) == is_caught


TEXT_CALLS = {"open", "read_text", "write_text", "NamedTemporaryFile", "fdopen"}
PROCESS_CALLS = {"run", "Popen", "check_output", "check_call"}


def names_its_encoding(call: ast.Call) -> bool:
    """Whether a call that reads or writes text says in which encoding, or is binary (or another `open` that takes no mode)."""
    name, named = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
    given = [ast.unparse(each) for each in call.args] + [
        ast.unparse(value) for key, value in named.items() if key == "mode"
    ]
    short = name.rpartition(".")[2]
    if "encoding" in named:
        return True
    if name.startswith("subprocess.") and short in PROCESS_CALLS:
        return not {"text", "universal_newlines"} & named.keys()
    if short not in TEXT_CALLS or name in ("os.open", "RunFolder.open", "SavedAdapter.open"):
        return True
    return short == "open" and any(re.fullmatch(r"'[rwxa]?b\+?'|'[rwxa]\+?b'", each) for each in given)


PROGRAMS = [
    *(ROOT / PACKAGE).rglob("*.py"),
    *ROOT.glob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
    *(ROOT / "docs").glob("*.py"),
]


@pytest.mark.parametrize("path", PROGRAMS)
def test_whatever_reads_or_writes_text_names_its_encoding(path: Path) -> None:
    calls = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    unnamed = [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if not names_its_encoding(call)]
    assert not unnamed, f"{path}: {unnamed}"


def test_a_program_prepares_its_streams_before_anything_else() -> None:
    for path in PROGRAMS:
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in text and "typer" in text:
            main = text[text.index('if __name__ == "__main__"') :]
            assert "prepare_streams()" in main or re.search(
                r"def main\(\) -> None:\n    \"\"\".*\"\"\"\n    prepare_streams\(\)", text
            ), path


def test_importing_the_command_line_is_quick_and_changes_nothing(tmp_path: Path) -> None:
    code = """
import os, signal
def state(): return {number: signal.getsignal(number) for number in signal.valid_signals()}, os.getcwd(), dict(os.environ)
before = state()
import lowmem_rmu.run, lowmem_rmu.__main__
assert state() == before
heavy = {"torch", "transformers", "datasets", "peft", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
    result = in_new_process(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_waits_for_its_turn_has_loaded_no_heavy_library(tmp_path: Path) -> None:
    code = """
from contextlib import contextmanager
from pathlib import Path
from lowmem_rmu.cli import run
from lowmem_rmu.config.loading import load_preset
@contextmanager
def device_turn(*given):
    print(sorted({"torch", "transformers", "datasets", "peft"} & sys.modules.keys()))
    raise SystemExit(3)
    yield
run.device_turn = device_turn
run.main_job("tiny", load_preset("tiny"), Path("runs"), None, "cpu", ["unlearn"], False)
"""
    result = in_new_process(code, tmp_path)
    assert (result.returncode, result.stdout) == (3, "[]\n"), result.stderr


def test_importing_every_module_prints_and_writes_nothing(tmp_path: Path) -> None:
    result = in_new_process(
        f"{QUIET}\nfor name in {sorted(MODULES)}: importlib.import_module(name)", tmp_path
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_every_library_that_is_imported_is_a_declared_requirement() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    declared = {
        re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower()
        for line in lines
        if line and not line.startswith("#")
    }
    imported = {name.partition(".")[0] for tree in MODULES.values() for name in imported_names(tree)}
    libraries = imported - set(sys.stdlib_module_names) - {PACKAGE, "app"}
    assert {"torch", "yaml"} <= libraries
    undeclared = {name for name in libraries if DISTRIBUTIONS.get(name, name).lower() not in declared}
    assert not undeclared, f"requirements.txt does not declare {', '.join(sorted(undeclared))}"


DIALECT = re.compile(
    r"\b(beside|foretell\w*|foretold|anew|whoever|is told|are told|goes on|gone on|nats a token|bits a byte|by luck)\b",
    re.IGNORECASE,
)
"""Words of the first version that no documentation of PyTorch or Hugging Face would use."""
RECORDED = {"nats a token", "foretold"}
"""Two of them that files of earlier versions hold, and readers of these files expect."""


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE).rglob("*.py")), ids=lambda path: path.name)
def test_no_module_uses_words_that_only_this_project_knew(path: Path) -> None:
    if path.name == "world.py":  # the invented world's sentences are training data
        return
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found += [f"line {number}: {word}" for word in DIALECT.findall(line) if word not in RECORDED]
    assert not found
