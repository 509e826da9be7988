"""Who may import whom. The checker runs on this repository and, to prove that it sees, on trees with planted faults."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "fastpo_kernels": 0,
    "fastpo": 0,
    "fastpo.config": 1,
    "fastpo.sample": 1,
    "fastpo.plugins": 2,
    "fastpo.data": 2,
    "fastpo.rewards": 2,
    "fastpo.metrics": 2,
    "fastpo.models": 3,
    "fastpo.reference": 4,
    "fastpo.rollout": 4,
    "fastpo.reward_model": 4,
    "fastpo.engine": 4,
    "fastpo.step": 4,
    "fastpo.checkpoint": 4,
    "fastpo.fit": 5,
    "fastpo.dryrun": 5,
    "fastpo.train": 5,
    "fastpo.merge": 5,
    "fastpo.answers": 5,
    "fastpo.endpoint": 5,
    "fastpo.convert": 5,
    "fastpo.generate": 5,
    "fastpo.score": 5,
    "fastpo.evaluate": 5,
    "fastpo.mine": 5,
    "fastpo.select": 5,
    "fastpo.demo": 5,
    "fastpo.listing": 5,
    "fastpo.adapters": 5,
    "tests": 6,
    "bench": 6,
}
WITHOUT_TORCH = ("fastpo.config", "fastpo.plugins", "fastpo.train")  # a typing error in YAML costs a second, not ten
KERNELS_MAY_USE = {"torch", "triton", "flash_attn"} | sys.stdlib_module_names
LONGEST = 400


def faults(root: Path) -> list[str]:
    modules = _modules(root)
    imports = {name: _imports(path, set(modules)) for name, path in modules.items()}
    found = ["kernels/__init__.py exists"] if (root / "kernels/__init__.py").exists() else []
    graph = {}
    for name, used in imports.items():
        where = modules[name].relative_to(root)
        lines = len(modules[name].read_text().splitlines())
        if lines >= LONGEST:
            found.append(f"{where}: {lines} lines")
        if _floor(name) is None:
            found.append(f"{where}: on no floor")
        graph[name] = {target for target in used if target in modules and target != name}
        found += [f"{where}: imports {t} from a floor above" for t in sorted(graph[name]) if _above(t, name)]
        outside = {target.partition(".")[0] for target in used}
        if "" in outside:
            found.append(f"{where}: relative import")
        if "deepspeed" in outside and str(where) != "fastpo/engine.py":
            found.append(f"{where}: imports deepspeed")
        if name.startswith("fastpo_kernels"):
            found += [f"{where}: imports {t}" for t in sorted(outside - KERNELS_MAY_USE - {"fastpo_kernels", ""})]
            if "triton" in _outside(used, at_import=True) and not where.name.startswith("kernel"):
                found.append(f"{where}: imports triton before first use")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1]))
    for name in filter(modules.__contains__, WITHOUT_TORCH):
        heavy = {"torch", "transformers", "deepspeed"} & _closure(name, imports)
        found += [f"{name}: imports {target} when imported" for target in sorted(heavy)]
    return found


def _modules(root: Path) -> dict[str, Path]:
    found = {}
    for top, base in (("fastpo", root), ("tests", root), ("bench", root), ("fastpo_kernels", root / "kernels")):
        for path in sorted((base / top).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, modules: set[str]) -> dict[str, bool]:
    """Imported module -> whether importing the file imports it too. A relative import is the name ""."""
    tree = ast.parse(path.read_text())
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [""] if node.level else [name if name in modules else str(node.module) for name in inner]
        else:
            continue
        for name in names:
            found[name] = found.get(name, False) or id(node) not in inside
    return found


def _floor(name: str) -> int | None:
    if name in FLOORS:
        return FLOORS[name]
    parent = name.rpartition(".")[0]
    return _floor(parent) if parent not in ("", "fastpo") else None


def _above(target: str, name: str) -> bool:
    mine, its = _floor(name), _floor(target)
    return mine is not None and its is not None and its > mine


def _outside(used: dict[str, bool], *, at_import: bool) -> set[str]:
    return {target.partition(".")[0] for target, top in used.items() if top or not at_import}


def _closure(name: str, imports: dict[str, dict[str, bool]]) -> set[str]:
    """Packages outside the repository that `import name` loads."""
    seen, wanted = set(), [name]
    while wanted:
        module = wanted.pop()
        if module in seen:
            continue
        seen.add(module)
        wanted += [target for target, top in imports.get(module, {}).items() if top]
        wanted += [module.rpartition(".")[0]] if "." in module and module in imports else []
    return {module.partition(".")[0] for module in seen if module not in imports}


def test_this_repository_keeps_its_floors():
    assert len(_modules(ROOT)) > 10
    assert faults(ROOT) == []


SOUND = {
    "kernels/fastpo_kernels/__init__.py": "import torch\n\nfrom fastpo_kernels import losses\n",
    "kernels/fastpo_kernels/losses.py": "import math\n\n\ndef f():\n    import triton\n",
    "kernels/fastpo_kernels/op/kernel.py": "import triton\n",
    "fastpo/__init__.py": "",
    "fastpo/config.py": "import yaml\n",
    "fastpo/plugins.py": "from fastpo.config import Plugin\n",
    "fastpo/models/__init__.py": "from fastpo.models import one\n",
    "fastpo/models/one.py": "from fastpo.models import two\nfrom fastpo_kernels import Tree\n",
    "fastpo/models/two.py": "import transformers\n",
    "fastpo/engine.py": "import deepspeed\n\nfrom fastpo.models import FAMILIES\n",
    "fastpo/train.py": "from fastpo import config\n\n\ndef main():\n    from fastpo import engine\n",
    "tests/test_x.py": "import fastpo.train\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_sound_tree_has_no_faults(tmp_path):
    plant(tmp_path, SOUND)
    assert faults(tmp_path) == []


@pytest.mark.parametrize(
    "file, text, fault",
    [
        (
            "fastpo/sample.py",
            "from fastpo.models import one\n",
            "fastpo/sample.py: imports fastpo.models.one from a floor above",
        ),
        (
            "fastpo/sample.py",
            "def f():\n    import fastpo.engine\n",
            "fastpo/sample.py: imports fastpo.engine from a floor",
        ),
        (
            "fastpo/data/pack.py",
            "from fastpo.models import Family\n",
            "fastpo/data/pack.py: imports fastpo.models from a floor",
        ),
        ("fastpo/fit.py", "import tests.test_x\n", "fastpo/fit.py: imports tests.test_x from a floor above"),
        ("fastpo/models/two.py", "import fastpo.models.one\n", "circle: "),
        ("fastpo/models/two.py", "from fastpo.models import FAMILIES\n", "circle: "),
        ("fastpo/models/two.py", "from . import one\n", "fastpo/models/two.py: relative import"),
        ("fastpo/new.py", "", "fastpo/new.py: on no floor"),
        ("fastpo/config.py", "from torch import Tensor\n", "fastpo.train: imports torch when imported"),
        ("fastpo/plugins.py", "import transformers.utils\n", "fastpo.plugins: imports transformers when imported"),
        ("fastpo/train.py", "if True:\n    import fastpo.engine\n", "fastpo.train: imports deepspeed when imported"),
        ("fastpo/__init__.py", "import torch\n", "fastpo.config: imports torch when imported"),
        (
            "fastpo/models/two.py",
            "def f():\n    from deepspeed import zero\n",
            "fastpo/models/two.py: imports deepspeed",
        ),
        ("tests/test_x.py", "import deepspeed.comm\n", "tests/test_x.py: imports deepspeed"),
        ("kernels/__init__.py", "", "kernels/__init__.py exists"),
        ("kernels/fastpo_kernels/x.py", "def f():\n    import transformers\n", "x.py: imports transformers"),
        ("kernels/fastpo_kernels/x.py", "from fastpo import config\n", "x.py: imports fastpo"),
        ("kernels/fastpo_kernels/x.py", "import triton\n", "x.py: imports triton before first use"),
        ("bench/bench_x.py", "\n" * 400, "bench/bench_x.py: 400 lines"),
    ],
)
def test_planted_faults_are_found(tmp_path, file, text, fault):
    plant(tmp_path, SOUND | {file: text})
    assert any(fault in found for found in faults(tmp_path)), faults(tmp_path)
