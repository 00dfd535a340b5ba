"""The TensorRT code fits the bindings of every version that runs it, none of which but TensorRT-RTX is installed here.

Names and keywords: the tables in ``data/tensorrt_api`` were read from the real bindings; the code is read as a syntax
tree, with the types of names inferred from annotations and from the tables themselves. Types: mypy with the published
stubs of 10.13 (``pip install tensorrt-stubs``).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import exporters._tensorrt_options
import exporters.tensorrt
import runtimes._tensorrt_library
import runtimes.tensorrt

TABLES = {
    path.stem: json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "data/tensorrt_api").glob("*.json")
}
RTX = ["rtx_1.7.1"]
EIGHT = ["8.6.1"]
TEN = ["10.3.0", "10.13.3.9", "10.16.1.11"]
ELEVEN = ["11.0.0.114", "11.4.0.106"]
ALL = [*EIGHT, *TEN, *ELEVEN, *RTX]

MODULES = [
    (runtimes._tensorrt_library, ALL),
    (runtimes.tensorrt, ALL),
    (exporters.tensorrt, ALL),
    (exporters._tensorrt_options, ALL),
]
GENERATIONS = [
    (exporters._tensorrt_options.Tensorrt8, EIGHT),
    (exporters._tensorrt_options.Tensorrt10, TEN),
    (exporters._tensorrt_options.Tensorrt11, ELEVEN),
    (exporters._tensorrt_options.TensorrtRtx, RTX),
]
# Definitions of these modules that some versions never reach.
FEWER_VERSIONS = {
    "BuildMonitor": [*TEN, *ELEVEN, *RTX],
    "save_timing_cache": [*EIGHT, *TEN, *ELEVEN],
    "place_on_dla": [*EIGHT, *TEN, *ELEVEN],
    **dict.fromkeys(("_TensorrtRtx", "_RuntimeCache"), RTX),
    # The generations are read with what they inherit.
    **dict.fromkeys(("Generation", "_WeaklyTyped", *(owner.__name__ for owner, _ in GENERATIONS)), ()),
}
# Methods that a generation inherits and refuses options for before they are reached.
NOT_REACHED = {"TensorrtRtx": {"set_timing_cache"}}
MODULE_NAMES = {"library", "rtx"}
MODULE_ATTRIBUTES = {"trt", "_trt"}


@dataclass(frozen=True)
class Kind:
    """What an expression is: the ``module``, a ``class`` of it, an ``object`` or a ``method`` of a class."""

    form: str
    name: str = ""
    method: str = ""


@dataclass
class Reader(ast.NodeVisitor):
    """Walks code and collects names that a table lacks."""

    table: dict[str, Any]
    names: dict[str, Kind] = field(default_factory=dict)
    attributes: dict[str, Kind] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    checked: int = 0
    resolved: set[str] = field(default_factory=set)  # expressions whose owner's class is known

    def kind(self, node: ast.expr) -> Kind | None:
        if isinstance(node, ast.Name):
            return Kind("module") if node.id in MODULE_NAMES else self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
            for generator in node.generators:
                self._bind(generator.target, self.kind(generator.iter))
            return self.kind(node.elt)
        return None

    def _attribute(self, node: ast.Attribute) -> Kind | None:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return Kind("module") if node.attr in MODULE_ATTRIBUTES else self.attributes.get(node.attr)
        owner = self.kind(node.value)
        if owner is None or owner.form == "method" or node.attr in ("__members__", "__name__", "__version__"):
            return None
        self.checked += 1
        self.resolved.add(ast.unparse(node))
        if owner.form == "module":
            return Kind("class", node.attr) if self._known(node.attr in self.table, node.attr) else None
        entry = self.table[owner.name]
        if "enum" in entry:
            if node.attr in ("name", "type"):
                return None
            self._known(node.attr in entry["enum"], f"{owner.name}.{node.attr}")
            return Kind("object", owner.name)
        if not self._known(node.attr in entry["members"], f"{owner.name}.{node.attr}"):
            return None
        return Kind("method", owner.name, node.attr) if entry["members"][node.attr] is not None else None

    def _call(self, node: ast.Call) -> Kind | None:
        if isinstance(node.func, ast.Name) and node.func.id == "cast":
            return self.kind(node.args[1])
        callee = self.kind(node.func)
        if callee is None or callee.form == "object":
            return None
        if callee.form == "class":
            return Kind("object", callee.name)
        return self._check_arguments(node, callee)

    def _check_arguments(self, node: ast.Call, callee: Kind) -> Kind | None:
        if callee.method == "__init__":
            return None
        overloads = self.table[callee.name]["members"][callee.method]
        keywords = {keyword.arg for keyword in node.keywords}
        fits = [
            o
            for o in overloads
            if keywords <= set(o["parameters"]) and len(node.args) + len(keywords) <= len(o["parameters"])
        ]
        self._known(bool(fits), f"{callee.name}.{callee.method}({len(node.args)} arguments, {sorted(keywords)})")
        returned = fits[0]["returns"] if fits else ""
        return Kind("object", returned) if returned in self.table else None

    def _known(self, there: bool, what: str) -> bool:
        if not there:
            self.problems.append(what)
        return there

    def _bind(self, target: ast.expr, kind: Kind | None) -> None:
        if isinstance(target, ast.Name):
            self.names.pop(target.id, None)
            if kind is not None:
                self.names[target.id] = kind
        elif isinstance(target, ast.Attribute) and kind is not None:
            self.attributes[target.attr] = kind

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            name = annotation.removeprefix("trt.").removesuffix(" | None")
            self.names.pop(argument.arg, None)
            if annotation.startswith("trt.") and self._known(name in self.table, f"{node.name}: {annotation}"):
                self.names[argument.arg] = Kind("object", name)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, self.kind(node.value))
            self.visit(node.value)
        name = ast.unparse(node.annotation).removeprefix("type[trt.").removesuffix("]")
        if ast.unparse(node.annotation).startswith("type[trt."):
            self.checked += 1
            self._known(name in self.table, name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, self.kind(node.value))
            self.kind(target)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self.kind(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, self.kind(node.iter))
        self.generic_visit(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self.kind(node)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self.kind(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.kind(node) is None:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        self.kind(node)
        self.generic_visit(node)


def read(source: str, version: str) -> Reader:
    tree = ast.parse(textwrap.dedent(source))
    reader = Reader(TABLES[version])
    reader.visit(tree)
    again = Reader(TABLES[version], attributes=reader.attributes)  # attributes are known from the first reading
    again.visit(tree)
    return again


def all_methods(owner: type) -> dict[str, str]:
    """Source of each method that the class has or inherits, the one that it runs."""
    functions = inspect.getmembers(owner, inspect.isfunction)
    return {name: inspect.getsource(function) for name, function in functions}


@pytest.mark.parametrize(
    ("module", "version"),
    [(m, v) for m, versions in MODULES for v in versions],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_names_of_shared_code_exist(module: ModuleType, version: str) -> None:
    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if version in FEWER_VERSIONS.get(getattr(node, "name", ""), ALL)]
    assert read(ast.unparse(tree), version).problems == []


@pytest.mark.parametrize(("owner", "version"), [(g, v) for g, versions in GENERATIONS for v in versions])
def test_names_of_a_generation_exist(owner: type, version: str) -> None:
    for name, source in all_methods(owner).items():
        if name not in NOT_REACHED.get(owner.__name__, set()):
            assert read(source, version).problems == [], f"{owner.__name__}.{name}"


# Members that words of Python and of ours share with the bindings: only of these may an occurrence be somebody else's.
COMMON_WORDS = {"name", "type", "shape", "close", "dtype", "reset", "serialize", "deserialize", "log", "report"}


# What else such words hang on: annotations (read as types elsewhere), and objects of ours.
OURS = {
    *("trt", "super()", "self", "monitor"),
    *("options", "contract", "self._contract", "self._generation"),
}


def library_words(table: dict[str, Any]) -> set[str]:
    """Every name in a table: classes, members of enumerations and of classes."""
    members = {word for entry in table.values() for word in entry.get("enum", entry.get("members"))}
    return {*table, *members} - COMMON_WORDS


@pytest.mark.parametrize("module", [module for module, _ in MODULES], ids=lambda m: m.__name__)
def test_no_use_of_the_bindings_escapes_the_reading(module: ModuleType) -> None:
    """A word of the bindings behind a dot was looked up in the tables, or what it hangs on is none of theirs."""
    words = {word for table in TABLES.values() for word in library_words(table)}
    source = inspect.getsource(module)
    resolved = set().union(*(read(source, version).resolved for version in ALL))
    escaped = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in words
        and ast.unparse(node) not in resolved
        and ast.unparse(node.value) not in OURS
    }
    assert escaped == set()


def test_reading_finds_what_there_is_to_check() -> None:
    counts = {module.__name__: read(inspect.getsource(module), versions[-1]).checked for module, versions in MODULES}
    assert counts["exporters.tensorrt"] >= 20
    assert counts["runtimes.tensorrt"] >= 13


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def f(config: trt.IBuilderConfig): config.int8_calibrator = 1", "IBuilderConfig.int8_calibrator"),
        ("def f(library): return library.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("def f(library): library.Builder(1).create_network(flag=1)", "Builder.create_network(0 arguments, ['flag'])"),
        (
            "def f(network: trt.INetworkDefinition):\n layer = network.get_layer(0)\n return layer.colour",
            "ILayer.colour",
        ),
        (
            "def f(network: trt.INetworkDefinition):\n return [t.size for t in (network.get_input(i) for i in 'ab')]",
            "ITensor.size",
        ),
        (
            "class A:\n def __init__(self, c: trt.IExecutionContext): self._c = c\n def f(self): self._c.go()",
            "IExecutionContext.go",
        ),
    ],
)
def test_a_name_that_11_lacks_is_found(code: str, problem: str) -> None:
    assert problem in read(code, "11.4.0.106").problems


def test_the_installed_tensorrt_rtx_is_the_one_of_the_table() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    for name, entry in TABLES[RTX[0]].items():
        missing = [
            member for member in entry.get("enum", entry.get("members")) if not hasattr(getattr(library, name), member)
        ]
        assert missing == [], name


ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("exporters/*tensorrt*.py", "runtimes/*tensorrt*.py")
    for path in ROOT.glob(pattern)
)
# Only the two packages of the stubs are looked up there, so that mypy reads them as its own.
CONFIG = """
[mypy]
strict = True
python_version = 3.11
follow_imports = silent
warn_unused_ignores = False
[mypy-tensorrt.*,tensorrt_bindings.*]
ignore_errors = True
[mypy-tensorrt_libs.*,onnxruntime.*,openvino.*,cuda.*,cv2.*,tensorrt_rtx.*,torch.*,numpy.*]
ignore_missing_imports = True
"""


def stubs_folder() -> Path | None:
    found = importlib.util.find_spec("tensorrt_stubs")
    return Path(found.origin).parents[1] if found is not None and found.origin else None


def repaired(text: str) -> str:
    """The stubs with the signatures that are no Python (defaults printed as ``<...>``) made to accept anything.

    ``bool`` as a module's name for a data type hides the built-in that the signatures mean, so it goes.
    """
    lines = [line for line in text.splitlines() if not line.startswith("bool: ")]
    while (broken := first_broken_line(lines)) is not None:
        definition = re.match(r"(\s*def \w+)\(", lines[broken])
        assert definition is not None, lines[broken]
        lines[broken] = f"{definition[1]}(self, *arguments: typing.Any, **keywords: typing.Any) -> typing.Any:"
    return "\n".join(lines)


def first_broken_line(lines: list[str]) -> int | None:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mypy")
    folder = stubs_folder()
    if folder is None:
        pytest.skip("tensorrt-stubs is not installed")
    copy = tmp_path_factory.mktemp("stubs")
    for path in [*folder.glob("tensorrt/*.pyi"), *folder.glob("tensorrt_bindings/*.pyi")]:
        target = copy / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_text(repaired(path.read_text()))
    (copy / "mypy.ini").write_text(CONFIG)
    return copy


def run_mypy(stubs: Path, *files: str) -> str:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(stubs / "mypy.ini"),
        "--cache-dir",
        str(stubs / ".cache"),
    ]
    environment = {"MYPYPATH": f"{stubs}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_code_fits_the_stubs(stubs: Path) -> None:
    assert len(SOURCES) >= 4
    output = run_mypy(stubs, *SOURCES)
    assert "Success" in output, output


@pytest.mark.slow
def test_a_wrong_call_does_not_fit_the_stubs(stubs: Path) -> None:
    wrong = stubs / "wrong.py"
    wrong.write_text(
        "import tensorrt as trt\n"
        "def f(config: trt.IBuilderConfig) -> None:\n"
        "    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 'many')\n"
        "    config.no_such_name()\n"
    )
    output = run_mypy(stubs, str(wrong))
    assert "arg-type" in output
    assert "attr-defined" in output
