"""The source obeys the import directions and habits of docs/architecture.md, as read from its syntax tree."""

import ast
import graphlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "psp_lightning"
FILES = sorted(SOURCE.rglob("*.py"))

# Unit (a package or a top-level module) -> units it may import. Every unit may import utils and itself.
ALLOWED = {
    "__init__": {"models"},  # exports the public names
    "_conf": set(),
    "cli": {"build", "_conf", "lit", "inference", "importers", "loading", "latents", "models", "losses", "metrics",
            "data", "optim", "checkpoints", "zoo", "ops"},
    "build": {"lit", "inference", "losses", "metrics", "data", "optim", "latents", "loading", "models", "checkpoints",
              "zoo"},
    "lit": {"inference", "losses", "metrics", "data", "optim", "latents", "loading", "models", "checkpoints"},
    "inference": {"loading", "models", "ops", "checkpoints", "zoo"},
    "latents": {"loading", "models", "checkpoints"},
    "losses": {"loading", "models", "checkpoints", "zoo"},
    "metrics": {"losses", "loading", "checkpoints", "models", "data"},
    "loading": {"importers", "checkpoints", "models", "zoo"},
    "importers": {"checkpoints", "models", "zoo"},
    "checkpoints": {"models", "zoo"},
    "zoo": set(),
    "models": {"ops"},
    "ops": set(),
    "data": set(),
    "optim": set(),
    "utils": set(),
}  # fmt: skip
# imports that are allowed only inside a function
LAZY_EXCEPTIONS = {("models/psp.py", name) for name in ("loading", "inference.fused", "inference.frozen")}

FRAMEWORKS = {
    "hydra": ("cli/", "build/"),
    "omegaconf": ("cli/", "build/"),
    "pytorch_lightning": ("cli/", "build/", "lit/", "data/datamodules.py"),
}


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def unit(path: Path) -> str:
    """Return the package or top-level module."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def type_checking_only(module: ast.Module) -> set[ast.AST]:
    """Return the nodes below `if TYPE_CHECKING:`, which never run."""
    guards = [
        node for node in ast.walk(module) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {child for guard in guards for statement in guard.body for child in ast.walk(statement)}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Return (absolute module, line, inside a function) of every import that can run."""
    module = tree(path)
    skipped = type_checking_only(module)
    lazy = {
        child
        for function in ast.walk(module)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(function)
    }
    found = []
    package = ["psp_lightning", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(module):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, node in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` names a module as well as `from package.module import thing`
            for alias in node.names:
                inner = SOURCE.joinpath(*name.split(".")[1:], alias.name) if name.startswith("psp_lightning") else None
                is_module = inner is not None and (inner.is_dir() or inner.with_suffix(".py").is_file())
                found.append((f"{name}.{alias.name}" if is_module else name, node.lineno, node in lazy))
    return found


def test_every_unit_has_a_rule():
    assert FILES, f"no source under {SOURCE}"
    unknown = {unit(path) for path in FILES} - set(ALLOWED)
    assert not unknown, f"add to ALLOWED what {sorted(unknown)} may import"


def refuse(offenders: list[str]) -> None:
    assert not offenders, "\n" + "\n".join(offenders)


def ours(path: Path) -> list[tuple[str, int, bool]]:
    """Return the imports of this package's modules, relative to it."""
    return [
        (name.removeprefix("psp_lightning."), line, lazy)
        for name, line, lazy in imports(path)
        if name.startswith("psp_lightning.")
    ]


def is_unit(head: str) -> bool:
    return (SOURCE / head).is_dir() or (SOURCE / f"{head}.py").is_file()


def test_import_directions():
    offenders = []
    for path in FILES:
        allowed = {"utils", unit(path)} | ALLOWED[unit(path)]
        for target, line, lazy in ours(path):
            head = target.split(".")[0]
            stated = lazy and (relative(path), target) in LAZY_EXCEPTIONS
            if is_unit(head) and head not in allowed and not stated:
                offenders.append(f"{relative(path)}:{line} imports {target}, which {unit(path)} may not know")
    refuse(offenders)


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_cycle():
    """Imports inside functions count too. The package's `__init__.py` is lazy."""
    modules = {module_of(path): path for path in FILES if module_of(path)}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for target, _, lazy in ours(path):
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target and target != name and not (lazy and (relative(path), target) in LAZY_EXCEPTIONS):
                graph[name].add(target)
    order = graphlib.TopologicalSorter(graph)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_are_short():
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    refuse([f"{name}: {n} lines, at most 400" for name, n in long.items() if n > 400])
    assert long["models/stylegan2.py"] <= 280


def test_frameworks_are_imported_only_where_allowed():
    offenders = []
    for path in FILES:
        for name, line, _ in imports(path):
            places = FRAMEWORKS.get("pytorch_lightning" if name.startswith("lightning") else name.split(".")[0])
            if places is not None and not relative(path).startswith(places):
                offenders.append(f"{relative(path)}:{line} imports {name}; only {places} may")
    refuse(offenders)


def test_no_device_choice_and_no_unsafe_reading():
    offenders = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                offenders += [f"{relative(path)}:{node.lineno}: {why}" for why in unsafe(node)]
    refuse(offenders)


def unsafe(call: ast.Call) -> list[str]:
    """Return the problems of a call: a fixed device, or a reader that may run code."""
    found = []
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if isinstance(call.func, ast.Attribute) and call.func.attr == "cuda":
        found.append("calls .cuda(); use .to(device)")
    given = keywords.get("weights_only")
    if isinstance(given, ast.Constant) and given.value is not True:
        found.append("reads with weights_only=False")
    if ast.unparse(call.func) == "torch.load" and "weights_only" not in keywords:
        found.append("torch.load without weights_only=True")
    if ast.unparse(call.func) in {"pickle.load", "pickle.loads"}:
        found.append("unpickles")
    return found


# Calls that a module may make during its import: declarations that are cheap and have no side effects.
DECLARATIONS = {
    "TypeVar", "ParamSpec", "frozenset", "set", "dict", "tuple", "list", "range", "len", "sorted", "zip", "enumerate",
    "Path", "re.compile", "logging.getLogger", "dataclass", "dataclasses.dataclass", "field", "dataclasses.field",
    "namedtuple", "NewType", "float", "int", "str", "MappingProxyType", "math.log2", "math.sqrt", "math.log", "cast",
    "getattr", "np.array", "np.linspace", "torch.no_grad", "torch.inference_mode", "super", "object",
}  # fmt: skip
# Names of decorators and of this library's declarations (records, registries).
DECLARING = ("register_", "property", "staticmethod", "classmethod", "lru_cache", "functools.")
# Methods of literals: "a b".split(), d.items(), ...
LITERAL_METHODS = {"split", "items", "keys", "values", "format", "join", "strip", "with_suffix", "with_name", "union"}


def work_at_import(module: ast.Module) -> list[ast.Call]:
    """Return calls that run on import and are not declarations. Decorators and defaults run, function bodies do not."""
    calls: list[ast.Call] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                visit(part)
            return
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if not (name in DECLARATIONS or name.split(".")[-1].startswith(DECLARING) or name.startswith(DECLARING)
                    or method in LITERAL_METHODS or name in RECORDS):  # fmt: skip
                calls.append(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(module)
    return calls


def dataclasses_of_ours() -> set[str]:
    """Return the names of all dataclasses in the source, because constructing one as a constant is cheap."""
    return {
        node.name
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    }


RECORDS = dataclasses_of_ours()


def test_import_does_no_work():
    offenders = []
    for path in FILES:
        for call in work_at_import(tree(path)):
            # the decorator of a console script wraps the function and needs the configuration folder for it
            if not (relative(path).startswith("cli/") and ast.unparse(call.func) in {"hydra.main", "config_root"}):
                offenders.append(
                    f"{relative(path)}:{call.lineno} calls {ast.unparse(call.func)}() while being imported"
                )
    refuse(offenders)


def test_the_rules_find_offenders(tmp_path):
    """The checks above detect offending code."""
    bad = ast.parse("import torch\ntorch.manual_seed(0)\nX = torch.zeros(3)\ndef f(a=print()):\n    torch.rand(2)\n")
    assert [ast.unparse(call.func) for call in work_at_import(bad)] == ["torch.manual_seed", "torch.zeros", "print"]
    assert ("psp_lightning.models.irse", 13, False) not in imports(SOURCE / "utils" / "errors.py")
    found = {name for name, _, _ in imports(SOURCE / "losses" / "identity.py")}
    assert {"psp_lightning.models.irse", "psp_lightning.zoo.locate"} <= found
    calls = [node for node in ast.walk(ast.parse("x.cuda()\ntorch.load(f)\npickle.load(f)\nf(weights_only=False)"))
             if isinstance(node, ast.Call)]  # fmt: skip
    assert [len(unsafe(call)) for call in calls] == [1, 1, 1, 1]
