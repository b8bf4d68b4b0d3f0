"""The rules of the source tree that no linter knows, read off the syntax tree of every file.

One direction of dependency (models <- quant <- calibrate, quant <- artifact <- runtime, the command
line on top), sizes a reader can take in, a docstring per file, and no printing, pickle or global
random state in the library. Each rule also runs on snippets that break it: a blind rule fails.
Where tests stand is the matter of test_layout.py.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

# What each part may import of the others, besides itself. A part without a row stands above them:
# it may import anything but the ways in, and no part with a row may import it.
BASE = {"errors", "files", "progress", "readable", "settings", "torch_state"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "hub": {"errors", "files", "readable"},
    "busy": set(),
    "locks": set(),
    "progress": {"errors"},
    "readable": set(),
    "settings": {"errors"},
    "torch_state": {"busy"},
    "distributed": {"errors"},
    "work": {"errors", "files", "locks", "progress", "distributed"},
    "models": BASE | {"hub"},
    "quant": BASE | {"models"},
    "calibrate": BASE | {"models", "quant", "distributed", "work"},
    "artifact": BASE | {"hub", "models", "quant"},
    "native": {"errors"},
    "runtime": BASE | {"models", "quant", "artifact", "native"},
    "pictures": BASE,
    "reading": {"errors"},
    "editing": BASE | {"models", "pictures", "reading"},
    "evaluate": BASE | {"models", "quant", "pictures", "reading", "distributed", "work"},
    "analyze": BASE | {"models", "quant", "calibrate", "artifact", "evaluate"},
}
# The ways in for people, and who may import them.
WAYS_IN: dict[str, set[str]] = {"__main__": set(), "cli": {"__main__"}, "web": {"cli"}}

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Drawn from the global state of torch unless they are given a generator...
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "normal", "bernoulli"}
TENSOR_DRAWS = {
    *("multinomial", "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_"),
    *("log_normal_", "normal_", "random_", "uniform_", "trunc_normal_"),
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
}
# ...and these always, on some torch version we support.
GLOBAL_STATE = {
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state"),
    *("rand_like", "randn_like", "randint_like"),
}
# What makes a tensor in the default dtype, on the default device, unless it is told...
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
# ...and layers that make theirs with it.
LAYERS = {"BatchNorm2d", "Conv2d", "Embedding", "GroupNorm", "LayerNorm", "Linear"}
NUMPY_GENERATORS = {"default_rng", "Generator", "SeedSequence", "Philox", "PCG64"}


@dataclass(frozen=True)
class Module:
    """One parsed file; `name` is dotted, e.g. "varptq.models.var"."""

    name: str
    is_package: bool
    text: str

    @classmethod
    def read(cls, path: Path) -> Module:
        parts = path.relative_to(SRC).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        return cls(".".join(parts[:-1] if is_package else parts), is_package, path.read_text())

    @property
    def part(self) -> str:
        """First name below varptq: the package or module that the rules speak about."""
        return part_of(self.name)

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text))

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of every import, also inside functions; relative ones resolved."""
        for node in self.nodes():
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    up = node.level - self.is_package
                    parents = self.name.split(".")[: -up or None]
                    base = ".".join([*parents, base] if base else parents)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def part_of(dotted: str) -> str:
    names = dotted.split(".")
    return names[1] if len(names) > 1 else "__init__"


def parts_on_disk() -> set[str]:
    return {p.stem for p in (SRC / "varptq").iterdir() if p.is_dir() or p.suffix == ".py"}


def forbidden_imports(module: Module) -> Iterator[str]:
    for line, name in module.imports():
        if name.split(".")[0] != "varptq":
            continue
        target = part_of(name)
        if target not in {*MAY_IMPORT, *WAYS_IN, *parts_on_disk()}:
            target = "__init__"  # a public name: from varptq import generate
        if target == module.part:
            continue
        if module.part in MAY_IMPORT:
            allowed = target in MAY_IMPORT[module.part]
        else:
            allowed = target not in WAYS_IN or module.part in WAYS_IN[target]
        if not allowed:
            yield f"line {line}: {module.part} imports {name}"


def family_imports(module: Module) -> Iterator[str]:
    """Above `models`, and in its flat files but for the table of families, nobody knows a family:
    those are its folders."""
    if module.name.startswith("varptq.models.") and (
        module.name.count(".") > 2 or module.name == "varptq.models.families"
    ):
        return
    folders = {path.name for path in (SRC / "varptq" / "models").iterdir() if path.is_dir()}
    for line, name in module.imports():
        if name.startswith("varptq.models.") and name.split(".")[2] in folders:
            yield f"line {line}: {module.name} imports {name}, which is a family"


def long_module(module: Module) -> Iterator[str]:
    lines = len(module.text.splitlines())
    if lines > MAX_MODULE_LINES:
        yield f"{lines} lines, at most {MAX_MODULE_LINES}"


def long_functions(module: Module) -> Iterator[str]:
    for node in module.nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines"


def missing_docstring(module: Module) -> Iterator[str]:
    if not ast.get_docstring(ast.parse(module.text)):
        yield "no docstring at the top of the file"


def prints(module: Module) -> Iterator[str]:
    if module.part == "cli":
        return
    for node in module.nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield f"line {node.lineno}: print outside cli"


def pickles(module: Module) -> Iterator[str]:
    for line, name in module.imports():
        if name.split(".")[0] in PICKLES:
            yield f"line {line}: imports {name}"
    for node in module.nodes():
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        safe = any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
        )
        if function == "torch.save" or (function == "torch.load" and not safe):
            yield f"line {node.lineno}: {function} runs pickle (weights_only=True loads without)"


def global_randomness(module: Module) -> Iterator[str]:
    for line, name in module.imports():
        if name.split(".")[0] == "random":
            yield f"line {line}: imports {name}"
    for node in module.nodes():
        if isinstance(node, ast.Call) and draws_from_global_state(node):
            yield f"line {node.lineno}: {ast.unparse(node)[:60]} uses global random state"


def draws_from_global_state(call: ast.Call) -> bool:
    owner, _, name = ast.unparse(call.func).rpartition(".")
    seeded = any(keyword.arg == "generator" for keyword in call.keywords)
    if owner in {"np.random", "numpy.random"}:
        return name not in NUMPY_GENERATORS or not (call.args or call.keywords)
    if owner in {"torch", "torch.cuda", "torch.random"}:
        return name in GLOBAL_STATE or (name in TORCH_DRAWS and not seeded)
    return bool(owner) and name in TENSOR_DRAWS and not seeded


def ambient_types(module: Module) -> Iterator[str]:
    """Tensors and layers whose dtype is whatever the caller's program has set. So is their device,
    but for those that an `__init__` makes: a module is built on the meta device that way."""
    tree = ast.parse(module.text)
    built = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from layers_of_no_dtype(node)
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        named = {keyword.arg for keyword in node.keywords}
        factory = owner == "torch" and name in FACTORIES
        layer = owner in {"nn", "torch.nn"} and name in LAYERS
        if (factory or layer) and "dtype" not in named:
            yield f"line {node.lineno}: {ast.unparse(node)[:60]} names no dtype"
        if factory and "device" not in named and id(node) not in built:
            yield f"line {node.lineno}: {ast.unparse(node)[:60]} names no device"


def layers_of_no_dtype(node: ast.ClassDef) -> Iterator[str]:
    """A layer derived from one of torch's, without telling it a dtype."""
    if not {ast.unparse(base).removeprefix("torch.") for base in node.bases} & {
        f"nn.{name}" for name in LAYERS
    }:
        return
    told = (
        any(keyword.arg == "dtype" for keyword in call.keywords)
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"
    )
    if not any(told):
        yield f"line {node.lineno}: {node.name} tells {ast.unparse(node.bases[0])} no dtype"


RULES: tuple[Callable[[Module], Iterator[str]], ...] = (
    forbidden_imports,
    family_imports,
    long_module,
    long_functions,
    missing_docstring,
    prints,
    pickles,
    global_randomness,
    ambient_types,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Callable[[Module], Iterator[str]]) -> None:
    files = sorted((SRC / "varptq").rglob("*.py"))
    assert files
    problems = [f"{p.relative_to(SRC)}: {text}" for p in files for text in rule(Module.read(p))]
    assert not problems, "\n".join(problems)


def test_the_table_of_imports_has_no_cycle() -> None:
    placed: set[str] = set()
    while ready := {part for part in MAY_IMPORT if MAY_IMPORT[part] <= placed} - placed:
        placed |= ready
    assert placed == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (forbidden_imports, "varptq.models.var", "from varptq.quant import affine"),
        (forbidden_imports, "varptq.models.var", "import varptq.quant.affine"),
        (forbidden_imports, "varptq.models.var", "from ..quant.affine import quantize"),
        (forbidden_imports, "varptq.models.var", "from .. import quant"),
        (forbidden_imports, "varptq.models.var", "from varptq import quant"),
        (forbidden_imports, "varptq.models.var", "from varptq import generate"),
        (forbidden_imports, "varptq.models.var", "def f():\n    from varptq.quant import affine"),
        (forbidden_imports, "varptq.quant.layers", "import varptq.calibrate.theta"),
        (forbidden_imports, "varptq.calibrate.theta", "from varptq.artifact import save"),
        (forbidden_imports, "varptq.artifact.save", "from varptq.calibrate import methods"),
        (forbidden_imports, "varptq.artifact.load", "from varptq.runtime import resolve"),
        (forbidden_imports, "varptq.runtime.resolve", "from varptq.calibrate import methods"),
        (forbidden_imports, "varptq.quant.layers", "from varptq.edit import mask"),
        (forbidden_imports, "varptq.edit", "from varptq.cli import main"),
        (forbidden_imports, "varptq.web.app", "from varptq.cli import tables"),
        (forbidden_imports, "varptq.errors", "from varptq import settings"),
        (family_imports, "varptq.quant.convert", "from varptq.models.var.transformer import VAR"),
        (family_imports, "varptq.models.pipeline", "from varptq.models.var import checkpoint"),
        (family_imports, "varptq.cli.info", "def f():\n    import varptq.models.var.vqvae"),
        (long_module, "varptq.edit", "\n" * (MAX_MODULE_LINES + 1)),
        (long_functions, "varptq.edit", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (missing_docstring, "varptq.edit", "x = 1"),
        (prints, "varptq.models.var", "def f():\n    print(1)"),
        (pickles, "varptq.models.var", "import pickle"),
        (pickles, "varptq.models.var", "torch.save(x, path)"),
        (pickles, "varptq.models.var", "torch.load(path)"),
        (pickles, "varptq.models.var", "torch.load(path, weights_only=False)"),
        (global_randomness, "varptq.models.var", "torch.manual_seed(0)"),
        (global_randomness, "varptq.models.var", "torch.rand(3)"),
        (global_randomness, "varptq.models.var", "torch.randn_like(x)"),
        (global_randomness, "varptq.models.var", "probs.multinomial(1)"),
        (global_randomness, "varptq.models.var", "torch.empty(3).exponential_()"),
        (global_randomness, "varptq.models.var", "nn.init.normal_(w)"),
        (global_randomness, "varptq.models.var", "np.random.rand(3)"),
        (global_randomness, "varptq.models.var", "np.random.default_rng()"),
        (global_randomness, "varptq.models.var", "from random import shuffle"),
        (ambient_types, "varptq.models.var", "torch.zeros(3, device=x.device)"),
        (ambient_types, "varptq.models.var", "torch.zeros(3, dtype=torch.float32)"),
        (ambient_types, "varptq.models.var", "torch.randint(3, (2,), generator=g)"),
        (ambient_types, "varptq.models.var", "def __init__(self):\n    torch.zeros(3)"),
        (ambient_types, "varptq.models.var", "nn.Linear(3, 3)"),
        (ambient_types, "varptq.models.var", "torch.nn.Conv2d(3, 3, 1, bias=False)"),
        (ambient_types, "varptq.models.var", "class Mine(nn.Linear):\n    pass"),
    ],
)
def test_a_rule_sees_what_breaks_it(
    rule: Callable[[Module], Iterator[str]], name: str, text: str
) -> None:
    assert list(rule(Module(name, False, text)))


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (forbidden_imports, "varptq.quant.layers", "from ..models import var"),
        (forbidden_imports, "varptq.quant.layers", "from .affine import quantize"),
        (forbidden_imports, "varptq.quant.layers", "from varptq.errors import ConfigError"),
        (forbidden_imports, "varptq.models.var", "import torch.nn.quantized"),
        (forbidden_imports, "varptq.cli.quantize", "from varptq import quantize"),
        (forbidden_imports, "varptq.cli.serve", "from varptq.web import app"),
        (
            family_imports,
            "varptq.quant.convert",
            "from varptq.models.transformer import Transformer",
        ),
        (
            family_imports,
            "varptq.models.families",
            "from varptq.models.var.family import VAR_FAMILY",
        ),
        (family_imports, "varptq.models.var.family", "from varptq.models.var import checkpoint"),
        (prints, "varptq.cli.main", "print(1)"),
        (pickles, "varptq.models.var", "torch.load(path, weights_only=True)"),
        (global_randomness, "varptq.models.var", "torch.rand(3, generator=g)"),
        (global_randomness, "varptq.models.var", "x.exponential_(generator=g)"),
        (global_randomness, "varptq.models.var", "g.manual_seed(0)"),
        (global_randomness, "varptq.models.var", "np.random.default_rng(0).normal()"),
        (ambient_types, "varptq.models.var", "torch.ones(3, dtype=x.dtype, device=x.device)"),
        (ambient_types, "varptq.models.var", "torch.ones_like(x)"),
        (ambient_types, "varptq.models.var", "nn.Linear(3, 3, dtype=torch.float32)"),
        (
            *(ambient_types, "varptq.models.var"),
            "def __init__(self):\n    torch.zeros(3, dtype=torch.float32)",
        ),
        (
            *(ambient_types, "varptq.models.var"),
            "class Mine(nn.Linear):\n    def __init__(self):\n"
            "        super().__init__(3, 3, dtype=torch.float32)",
        ),
    ],
)
def test_a_rule_lets_pass_what_keeps_it(
    rule: Callable[[Module], Iterator[str]], name: str, text: str
) -> None:
    assert not list(rule(Module(name, False, text)))
