"""What the wheel holds, and that it imports from anywhere, beside Hugging Face's package named `kernels` too."""

import ast
import email
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = {"fastpo": ROOT / "fastpo", "fastpo_kernels": ROOT / "kernels/fastpo_kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built by the build backend itself, which is what pip calls, without pip's network."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.split()[-1])


@pytest.fixture(scope="module")
def requirements(wheel) -> dict[str, Requirement]:
    name = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
    found = [Requirement(text) for text in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    names = set(wheel.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        sources = {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}
        assert sources and sources == {name for name in names if name.startswith(f"{package}/")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.parametrize("where", ["another folder", "repository root"])
def test_unpacked_wheel_imports_beside_hugging_face_kernels(wheel, tmp_path, where):
    """From the root, `python -c` looks into the current folder first: fastpo/ of the checkout, and the plain folder
    kernels/, which must not hide a package of that name."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "site/kernels").mkdir()
    (tmp_path / "site/kernels/__init__.py").write_text("get_kernel = None\n")
    code = (
        "import sys; "
        f"sys.path.insert(1, {str(tmp_path / 'site')!r}); "
        "import fastpo, fastpo_kernels, kernels; "
        "assert hasattr(kernels, 'get_kernel') and fastpo_kernels.losses.LOSSES; "
        "print(fastpo.__file__, fastpo_kernels.__file__, sep='\\n')"
    )
    cwd = tmp_path if where == "another folder" else ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fastpo, fastpo_kernels = done.stdout.split()
    assert Path(fastpo_kernels).is_relative_to(tmp_path / "site")
    assert Path(fastpo).is_relative_to(tmp_path / "site" if where == "another folder" else ROOT)


def test_every_direct_dependency_is_pinned(requirements):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(text) for text in lines if text and not text.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    optional = ("convert", "flash", "wandb", "vllm")
    wanted = {n: r for n, r in requirements.items() if not any(f'extra == "{e}"' in str(r.marker) for e in optional)}
    assert set(wanted) == set(versions)
    for name, requirement in wanted.items():
        assert versions[name].startswith("==") and requirement.specifier.contains(versions[name][2:]), name
    assert versions["torch"] == "==2.13.0"


def test_every_import_is_a_declared_dependency(requirements):
    """fastpo may import what it declares; fastpo_kernels alone needs only torch (tests/test_floors.py)."""
    owners = packages_distributions()
    for path in (ROOT / "fastpo").rglob("*.py"):
        for module in _imported(path) - sys.stdlib_module_names - set(PACKAGES):
            names = {canonicalize_name(owner) for owner in owners.get(module, [module])}
            declared = [
                r for name, r in requirements.items() if name in names and 'extra == "dev"' not in str(r.marker)
            ]
            assert declared, f"{path}: {module}"


def _imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_make_targets():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets == ["check", "test", "demo", "bench", "wheel"]
