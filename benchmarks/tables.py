"""Timings become numbers, numbers become Markdown and JSON."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from types import MappingProxyType
from typing import Any

FREQUENCIES = (1, 10, 100)
PHASES = ("forward_backward_plain", "forward_backward_factor", "update_plain", "update_refresh")


@dataclass(frozen=True)
class Timing:
    """One step, in ms: either ``(forward and backward, update)`` or ``(all of it,)``."""

    factor_step: bool
    laps: tuple[float, ...]


Report = dict[str, Any]
"""What was measured on one workload.

``title``, ``machine``, ``settings``; ``rows``: numbers by contender, the baseline first, or ``absent``, why
there are none; ``rates`` of the machine, and ``floors``, extra work beside the least time that it can take.
"""


def summarise(
    timings: Mapping[str, Sequence[Timing]], absent: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Numbers by contender, the first one being what ratios are to; then those that are absent, and why."""
    rows = {label: _row(steps) for label, steps in timings.items()}
    first = next(iter(rows.values()))
    for row in rows.values():
        row["ratio_to_first"] = _ratios_to(first, row)
    return rows | {label: {"absent": why} for label, why in absent.items()}


def _ratios_to(first: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    plain, baseline = row["plain_step"], first["plain_step"]
    ratios = {"plain": plain["median"] / baseline["median"], "plain_min": plain["min"] / baseline["min"]}
    return ratios | {name: ms / baseline["median"] for name, ms in row["amortised"].items()}


def _row(steps: Sequence[Timing]) -> dict[str, Any]:
    plain = [step for step in steps if not step.factor_step]
    factor = [step for step in steps if step.factor_step]
    row: dict[str, Any] = {
        "plain_step": spread([sum(step.laps) for step in plain]),
        "factor_step": spread([sum(step.laps) for step in factor]),
    }
    row["amortised"] = {str(n): _amortised(row, n) for n in FREQUENCIES}
    row |= dict.fromkeys(PHASES)
    if len(plain[0].laps) == 2:
        values = [[step.laps[lap] for step in kind] for lap in (0, 1) for kind in (plain, factor)]
        row |= {phase: spread(times) for phase, times in zip(PHASES, values, strict=True)}
    return row


def spread(times: Sequence[float]) -> dict[str, float] | None:
    """Median, minimum and interquartile range."""
    if not times:
        return None
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {"median": median(times), "min": min(times), "iqr": high - low, "count": len(times)}


def _amortised(row: Mapping[str, Any], frequency: int) -> float:
    plain = row["plain_step"]["median"]
    factor = row["factor_step"]["median"] if row["factor_step"] else plain
    return (factor + (frequency - 1) * plain) / frequency


# --- Markdown --------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The tables of one report."""
    rows = {label: row for label, row in report["rows"].items() if "absent" not in row}
    absent = [[label, row["absent"]] for label, row in report["rows"].items() if "absent" in row]
    first = next(iter(rows))
    heads = [f"frequency {n}" for n in FREQUENCIES]
    steps = [[label, *_times(row)] for label, row in rows.items()]
    steps += [[label, why, *["-"] * 4] for label, why in absent]
    ratios = [[label, *(f"{x:.2f}" for x in row["ratio_to_first"].values())] for label, row in rows.items()]
    phases = [[label, *_phases(row)] for label, row in rows.items()]
    parts = [
        f"**{report['title']}**",
        sentence(report),
        "One step in ms: median (minimum; interquartile range). At frequency N: amortised over N steps.",
        table(["", "plain step", "factor step, with refresh", *heads], steps),
        f"Times {first}:",
        table(["", "plain step", "plain step, of minima", *heads], ratios),
        "Where a step goes, medians in ms. *Factors* and *refresh* are differences of their neighbours.",
        table(
            ["", "forward + backward", "with factors", "*factors*", "update", "with refresh", "*refresh*"],
            phases,
        ),
        *_floors(report),
    ]
    return "\n\n".join(parts) + "\n"


def _floors(report: Report) -> list[str]:
    if not report.get("floors"):
        return []
    rates, lines = report["rates"], report["floors"]
    head = ["", "work", "GFLOP", "MB", "floor ms", "measured ms", "share of the floor's rate"]
    return [
        f"Extra work beside its floor: the least time at {rates['flops'] / 1e9:.1f} GFLOP/s (a large matrix "
        f"product) and {rates['bytes'] / 1e9:.1f} GB/s (a large copy), both measured in this run.",
        table(head, [_floor(line) for line in lines], texts=2),
    ]


def _floor(line: Mapping[str, Any]) -> list[str]:
    share = "-" if line["share"] is None else f"{line['share']:.0%}"
    sizes = [f"{line[key] / unit:.3g}" for key, unit in (("flops", 1e9), ("bytes", 1e6))]
    return [line["contender"], line["work"], *sizes, f"{line['floor_ms']:.2f}", f"{line['ms']:.2f}", share]


def sentence(report: Report) -> str:
    machine, settings = report["machine"], report["settings"]
    facts = [f"{key} {value}" for key, value in {**machine, **settings}.items()]
    return "; ".join(facts) + "."


def _times(row: Mapping[str, Any]) -> list[str]:
    cells = [_spread(row["plain_step"]), _spread(row["factor_step"])]
    return cells + [f"{ms:.2f}" for ms in row["amortised"].values()]


def _phases(row: Mapping[str, Any]) -> list[str]:
    if row[PHASES[0]] is None:
        return ["one piece", *["-"] * 5]
    cells = []
    for plain, other in (PHASES[:2], PHASES[2:]):
        cells += [_median(row[plain]), _median(row[other]), _difference(row[plain], row[other])]
    return cells


def _spread(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.2f} ({value['min']:.2f}; {value['iqr']:.2f})"


def _median(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.2f}"


def _difference(plain: Mapping[str, float], other: Mapping[str, float] | None) -> str:
    return "-" if other is None else f"{other['median'] - plain['median']:.2f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table, the first ``texts`` columns of words and the rest of numbers."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))


# --- files -----------------------------------------------------------------------------------------


def publish(
    reports: Mapping[str, Report],
    folder: Path,
    json_file: Path | None,
    render: Callable[[Report], str] = markdown,
) -> None:
    """Print the newest report, and write all of them to ``json_file``, or else under ``folder``."""
    print(render(next(reversed(reports.values()))), flush=True)
    if json_file:
        json_file.write_text(as_json(reports))
    else:
        save(reports, folder, render)


def save(reports: Mapping[str, Report], folder: Path, render: Callable[[Report], str] = markdown) -> None:
    """Write every report under ``folder``, and its tables into their place in a README beside it."""
    for name, report in reports.items():
        file = f"{name}-{report['settings']['device']}"
        record(folder, file, render(report), as_json({name: report}))


def record(folder: Path, name: str, text: str, data: str, section: str | None = None) -> None:
    """Write ``name.md`` and ``name.json``, and the text, or ``section``, into its place in a README."""
    folder.mkdir(exist_ok=True, parents=True)
    readme = folder.parent / "README.md"
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(data)
    if readme.exists():
        readme.write_text(replace_section(readme.read_text(), name, text if section is None else section))


def as_json(reports: Mapping[str, Report]) -> str:
    """Reports by workload."""
    return json.dumps(reports, indent=2) + "\n"


def replace_section(document: str, name: str, text: str) -> str:
    """Put ``text`` between ``<!-- name -->`` and ``<!-- end -->``, where there is such a place."""
    place = re.compile(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda match: f"{match[1]}{text}{match[2]}", document)
