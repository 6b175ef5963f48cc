"""The source obeys the import directions and habits of docs/architecture.md, as read from its syntax tree."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "psp_lightning"
FILES = sorted(SOURCE.rglob("*.py"))

# Unit (a package or a top-level module) -> units it may import. Every unit may import utils and itself.
ALLOWED = {
    "__init__": {"models"},  # the public names
    "_conf": set(),
    "cli": {"build", "_conf", "lit", "inference", "importers", "loading", "latents", "models", "losses", "metrics",
            "data", "optim", "checkpoints", "zoo", "ops"},
    "build": {"lit", "inference", "losses", "metrics", "data", "optim", "latents", "loading", "models", "checkpoints",
              "zoo"},
    "lit": {"inference", "losses", "metrics", "data", "optim", "latents", "loading", "models", "checkpoints"},
    "inference": {"loading", "models", "ops", "checkpoints", "zoo"},
    "latents": {"loading", "models", "checkpoints"},
    "losses": {"loading", "models", "checkpoints", "zoo"},
    "metrics": {"losses"},
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
# (unit, imported module): to be removed, each with the arrow that it turns around
EXCEPTIONS = {
    ("checkpoints", "importers.published"),
    ("checkpoints", "importers.detect"),
    ("checkpoints", "importers.nvidia"),
    ("zoo", "checkpoints.safetensors_io"),
    ("importers", "loading"),
    ("optim", "ops"),
}
LAZY_EXCEPTIONS = {("models/psp.py", name) for name in ("loading", "inference.fused", "inference.frozen")}  # in a function

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
    """Nodes below `if TYPE_CHECKING:`, which never run."""
    guards = [
        node for node in ast.walk(module) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {child for guard in guards for statement in guard.body for child in ast.walk(statement)}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(absolute module, line, inside a function) of every import that can run."""
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
    assert not unknown, f"say in ALLOWED what {sorted(unknown)} may import"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_import_directions(path):
    for name, line, lazy in imports(path):
        if not name.startswith("psp_lightning."):
            continue
        target = name.removeprefix("psp_lightning.")
        head = target.split(".")[0]
        if head in {"utils", unit(path)} | ALLOWED[unit(path)] or not (
            (SOURCE / head).is_dir() or (SOURCE / f"{head}.py").is_file()
        ):
            continue
        if (unit(path), target) in EXCEPTIONS or (lazy and (relative(path), target) in LAZY_EXCEPTIONS):
            continue
        pytest.fail(f"{relative(path)}:{line} imports {name}, which {unit(path)} may not know")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_frameworks_stay_in_their_places(path):
    for name, line, _ in imports(path):
        places = FRAMEWORKS.get("pytorch_lightning" if name.startswith("lightning") else name.split(".")[0])
        if places is None:
            continue
        assert relative(path).startswith(places), f"{relative(path)}:{line} imports {name}; only {places} may"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_device_choice_and_no_unsafe_reading(path):
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"{relative(path)}:{node.lineno} calls .cuda(); use .to(device)"
        for keyword in node.keywords:
            unsafe = (
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is not True
            )
            assert not unsafe, f"{relative(path)}:{node.lineno} reads with {ast.unparse(keyword)}"
        if ast.unparse(node.func) == "torch.load":
            names = {keyword.arg for keyword in node.keywords}
            assert "weights_only" in names, f"{relative(path)}:{node.lineno}: torch.load without weights_only=True"
        unpickles = ast.unparse(node.func) in {"pickle.load", "pickle.loads"}
        assert not unpickles, f"{relative(path)}:{node.lineno} unpickles"


# What a module may call while it is imported: declarations that cost nothing and change nothing outside.
DECLARATIONS = {
    "TypeVar", "ParamSpec", "frozenset", "set", "dict", "tuple", "list", "range", "len", "sorted", "zip", "enumerate",
    "Path", "re.compile", "logging.getLogger", "dataclass", "dataclasses.dataclass", "field", "dataclasses.field",
    "namedtuple", "NewType", "float", "int", "str", "MappingProxyType", "math.log2", "math.sqrt", "math.log", "cast",
    "np.array", "np.linspace", "torch.no_grad", "torch.inference_mode", "super", "object",
}  # fmt: skip
# Names of decorators and of our own declarations (records, registries).
DECLARING = ("register_", "property", "staticmethod", "classmethod", "lru_cache", "functools.")
# Methods of literals: "a b".split(), d.items(), ...
LITERAL_METHODS = {"split", "items", "keys", "values", "format", "join", "strip", "with_suffix", "with_name", "union"}


def work_at_import(module: ast.Module) -> list[ast.Call]:
    """Calls that run on import and are no declarations; function bodies do not run, decorators and defaults do."""
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
    """Names of all dataclasses in the source: building one as a constant is no work."""
    return {
        node.name
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    }


RECORDS = dataclasses_of_ours()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_import_does_no_work(path):
    for call in work_at_import(tree(path)):
        # a console script's decorator: it wraps the function, and needs the folder of the configuration to do so
        if relative(path).startswith("cli/") and ast.unparse(call.func) in {"hydra.main", "config_root"}:
            continue
        pytest.fail(f"{relative(path)}:{call.lineno} calls {ast.unparse(call.func)}() while being imported")


def test_the_rules_find_offenders(tmp_path):
    """The checks above are not vacuous."""
    bad = ast.parse("import torch\ntorch.manual_seed(0)\nX = torch.zeros(3)\ndef f(a=print()):\n    torch.rand(2)\n")
    assert [ast.unparse(call.func) for call in work_at_import(bad)] == ["torch.manual_seed", "torch.zeros", "print"]
    assert ("psp_lightning.models.irse", 13, False) not in imports(SOURCE / "utils" / "errors.py")
    found = {name for name, _, _ in imports(SOURCE / "losses" / "identity.py")}
    assert {"psp_lightning.models.irse", "psp_lightning.zoo.locate"} <= found
