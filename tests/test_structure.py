"""The rules of the house that a parser can check: import order, pure mathematics, one file per variant, file sizes."""

import ast
import graphlib
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "rltrain").rglob("*.py"))

# A module imports its own room and those before it in this table: files of the root by name, folders with a slash.
LAYERS = [
    {"types", "errors"},
    {"runtime/"},
    {"registry"},
    {"losses/"},
    {"config"},
    {"kernels/", "loss", "options/"},
    {"cli"},
    {"batching/", "engine/"},
    {"policy/"},
    {"data/", "rollout/", "runs/"},
    {"advantages/"},
    {"rewards/"},
    {"environments/"},
    {"early_exit"},
    {"evaluate", "sft"},
    {"build"},
    {"update"},
    {"trainer"},
    {"__main__", "train", "audit", "compress", "traces", "compare/", "report/", "export/", "plan/", "compat/"},
    {"api", "commands/"},
]
LAYER_OF = {name.removesuffix("/"): level for level, names in enumerate(LAYERS) for name in names}
PURE = {"advantages", "rewards", "kernels", "loss", "losses", "batching"}
ENGINES = {"deepspeed", "vllm", "hydra"}
TOP_LEVEL = {"rltrain", "configs", "scripts", "slurm", "tests", "docs", ".ci", ".gitignore", ".pre-commit-config.yaml"}
TOP_LEVEL |= {"pyproject.toml", "requirements.lock", "requirements-vllm.lock", "Makefile"}
TOP_LEVEL |= {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"}
TOP_LEVEL |= {"CITATION.cff", "containers", ".github"}  # how to cite, images for Docker and Apptainer, hosted CI
EVALUATORS = {"eval", "sympify", "parse_expr"}
SANDBOX = "rltrain.rewards.sandbox.child"  # the killable process in which submitted programs run


# Files that read attributes which a library may or may not set, and how often. Our own records have fields instead.
OPTIONAL_ATTRIBUTES = {
    "registry": 1,  # of a function of a user's
    "compat.trl": 1,
    "engine.zero_shards": 1,
    "policy.capabilities": 15,
    "policy.load": 3,
    "rollout.llama_step": 1,
    "rollout.vllm_weights": 1,
    "runtime.dist": 1,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def runtime_nodes(node: ast.AST):
    """All nodes but those under ``if TYPE_CHECKING``, which never run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from runtime_nodes(child)


def imports(nodes) -> set[str]:
    """Names of the imported modules; ``from a import b`` counts as ``a.b`` where that is a module of ours."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in full}
    return names


def registrations(tree: ast.Module) -> set[str]:
    """The names given by ``@register(group, name, …)`` in this file."""
    return {
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and getattr(call.func, "id", None) == "register"
        and len(call.args) >= 2
        and isinstance(call.args[1], ast.Constant)
    }


def top(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", [name for name in MODULES if top(name)])
def test_imports_go_one_way(name):
    assert top(name) in LAYER_OF, f"{name}: give it a layer in tests/test_structure.py"
    used = {top(used) for used in imports(runtime_nodes(TREES[name])) if used.startswith("rltrain.")}
    upwards = {other for other in used if LAYER_OF[other] > LAYER_OF[top(name)]}
    assert not upwards, f"{name} imports {upwards}, which lie above it"


def test_no_import_cycles():
    graph = {name: imports(runtime_nodes(tree)) & MODULES.keys() - {name} for name, tree in TREES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_cycles_between_folders():
    graph = defaultdict(set)
    for name, tree in TREES.items():
        used = {top(other) for other in imports(runtime_nodes(tree)) & MODULES.keys()}
        graph[top(name)] |= used - {top(name), ""}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) in PURE])
def test_mathematics_imports_no_engine(name):
    engines = {used.split(".")[0] for used in imports(ast.walk(TREES[name]))} & ENGINES
    assert not engines, f"{name} imports {engines}"


@pytest.mark.parametrize("name", [name for name, tree in TREES.items() if registrations(tree)])
def test_plug_in_files_import_torch_at_most(name):
    """Heavier libraries are imported where they are used, so that ``--help`` and config errors stay fast."""
    at_import = {used.split(".")[0] for used in imports(TREES[name].body)}
    assert at_import <= sys.stdlib_module_names | {"torch", "rltrain"}


def test_a_variant_is_named_in_its_own_file_only():
    """Quoted strings only: a name such as "group" is also an English word, and a module may share its part's name."""
    owners = defaultdict(set)
    for module, tree in TREES.items():
        for name in registrations(tree):
            owners[name].add(module)
    mentions = [
        f"{module}:{node.lineno} mentions {node.value!r}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value in owners and module not in owners[node.value]
        if node.value != "traces"  # a command, too: rltrain traces
    ]
    assert not mentions


def test_a_class_name_means_one_thing():
    places = defaultdict(set)
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(f"{module}:{node.lineno}")
    assert {name: sorted(defined) for name, defined in places.items() if len(defined) > 1} == {}


def test_attributes_are_fields():
    """``getattr`` with a default, by file: it hides what one module expects of another."""
    counts = {}
    for module, tree in TREES.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) == 3]
        if count := sum(getattr(call.func, "id", None) == "getattr" for call in calls):
            counts[module.removeprefix("rltrain.")] = count
    assert {name: count for name, count in counts.items() if count > OPTIONAL_ATTRIBUTES.get(name, 0)} == {}


def test_nothing_is_evaluated():
    """A model's output is text to parse, never an expression to run."""
    calls = [
        f"{module}:{node.lineno} {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        if module != SANDBOX
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id in EVALUATORS)
            or (isinstance(node.func, ast.Attribute) and node.func.attr in EVALUATORS - {"eval"})
        )
    ]
    assert not calls


def test_files_are_short_and_named_for_what_they_do():
    files = [path for folder in ("rltrain", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) >= 500] == []
    assert [path for path in files if path.name == "utils.py"] == []


def test_nothing_else_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} <= TOP_LEVEL


def test_config_and_records_need_no_torch():
    code = "import rltrain.config, rltrain.types, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_the_wheel_carries_the_yaml(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".yaml")}
    assert packed == {f"rltrain/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
