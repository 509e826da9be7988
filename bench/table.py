"""The rows of bench/results as markdown: `python bench/table.py bench/results/cpu.jsonl`."""

import json
import sys
from pathlib import Path
from typing import Any

HEAD = "| variant | ms (p10-p90) | tokens/s | passes | over floor | over fastpo | peak MiB | error |"
TITLE = ("bench", "device", "date")
VALUES = {"variant", "ms", "p10", "p90", "tokens_per_s", "over_fastpo", "passes", "floor_ms", "over_floor", "peak_mib"}
VALUES |= {"error", "skip", "versions"}


def tables(lines: list[str]) -> str:
    """One table per case, with the newest row of each variant, and one of whole steps, with the share of each part."""
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        if "variant" in row:
            case = tuple((key, str(value)) for key, value in row.items() if key not in VALUES | {"date"})
            cases.setdefault(case, {})[row["variant"]] = row
    found = [_table(dict(case), list(rows.values())) for case, rows in cases.items()]
    whole = {(row["bench"], row["step"]): row for row in map(json.loads, lines) if "step" in row}
    return "\n\n".join([*found, *([_steps(list(whole.values()))] if whole else [])])


def _steps(rows: list[dict[str, Any]]) -> str:
    """over, counted: time and operations over ours, of videos over those of 16 frames, both per token."""
    parts = list(rows[0]["parts"])
    head = ["step", "ms", "over", "counted", "peak MiB", *parts]
    lines = [
        [
            f"{row['bench']}: {row['step']}", row["ms"], row.get("over_fastpo", row.get("over_16")),
            row.get("counted_over_fastpo", row.get("counted_over_16")), row["peak_mib"],
            *(f"{row['parts'][part]['share']:.0%}" for part in parts),
        ]
        for row in rows
    ]  # fmt: skip
    table = [head, ["---"] * len(head), *lines]
    return "**whole steps**\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in table)


def _table(case: dict[str, str], rows: list[dict[str, Any]]) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in case.items() if key not in TITLE)
    versions = ", ".join(f"{name} {value}" for name, value in rows[-1]["versions"].items())
    title = f"**{case['bench']}**: {sizes}; {case['device']}; {versions}; {rows[-1]['date']}"
    return "\n".join([title, "", HEAD, "|" + "---|" * 8, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    if "skip" in row:
        return f"| {row['variant']} | {row['skip'].replace('|', ' ')} | | | | | | |"
    time = f"{row['ms']:g} ({row['p10']:g}-{row['p90']:g})"
    error = ", ".join(f"{key} {value:.1g}" for key, value in row["error"].items())
    cells = [row.get(key, "") for key in ("tokens_per_s", "passes", "over_floor", "over_fastpo", "peak_mib")]
    return "| " + " | ".join([row["variant"], time, *map(str, cells), error]) + " |"


if __name__ == "__main__":
    print(tables(Path(sys.argv[1]).read_text().splitlines()))
