"""What a configuration can name: losses, rewards, formats and families, one line each, with the configs that do."""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastpo.config import Run, Source, load
from fastpo.data.formats import DATASETS
from fastpo.models import FAMILIES
from fastpo.rewards import REWARDS
from fastpo_kernels.losses import LOSSES

CONFIGS = Path(__file__).parents[1] / "configs"  # of a checkout; an installed package has none
TABLES: Mapping[str, Mapping[str, Any]] = {
    "losses": LOSSES, "rewards": REWARDS, "formats": DATASETS, "families": FAMILIES,
}  # fmt: skip


def listing(configs: Path = CONFIGS) -> str:
    """Four paragraphs: name, the first line of its docstring, the files of `configs` that use it."""
    users = [(path.name, used(load(path))) for path in sorted(configs.glob("*.yaml"))]
    paragraphs = []
    for kind, table in TABLES.items():
        width = max(map(len, table)) + 2
        lines = [f"{kind}:"]
        for name, thing in table.items():
            first, *_ = (inspect.getdoc(thing) or "").splitlines()
            lines.append(f"  {name:{width}}{first}")
            if files := [file for file, names in users if (kind, name) in names]:
                lines.append(" " * (width + 2) + "configs: " + ", ".join(files))
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def used(run: Run) -> set[tuple[str, str]]:
    """(kind of TABLES, name) of everything that a configuration names."""
    given = [source for source in (run.data.train, run.data.eval) if source is not None]
    sources = [one.name for source in given for one in ((source,) if isinstance(source, Source) else source)]
    rewards: Iterable[str] = (plugin.name for plugin in run.rollout.rewards) if run.rollout else ()
    found = {"losses": [run.loss.name], "formats": sources, "families": [run.model.family], "rewards": rewards}
    return {(kind, name) for kind, names in found.items() for name in names}
