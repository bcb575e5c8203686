"""Run the benchmarks, keep their figures in ``results.json`` and write the tables of ``docs/benchmarks.md``.

    python benchmarks/run_all.py                            all of them: hours
    python benchmarks/run_all.py --only forward.py step.py  these alone
    python benchmarks/run_all.py --page                     the tables alone, from what is recorded

missed          figures that miss their target, of all that are recorded
failed          scripts that printed no figures, of those that ran

``tables.yaml`` has their rows. Each script runs ``--repeat`` times, those that take long once. ``results.json`` has for
each command the machine, the date, the number of runs, and ``[median, lowest, highest]`` of every key of the script's
last line, whatever its exit status; a later call replaces them, or drops them where there are none. The page is written
by hand outside of the tables.
"""

import argparse
import datetime
import json
import operator
import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
import yaml

HERE = Path(__file__).parent
ONCE = ("clustering.py", "robustness.py", "scale.py")
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "benchmarks.md"


class Row(NamedTuple):
    """A row of a table: template of its figures by key, and targets, each a comparison and a number for each key."""

    command: str
    what: str
    figures: str
    target: str = "-"


TABLES = {
    name: [Row(*row) for row in rows] for name, rows in yaml.safe_load((HERE / "tables.yaml").read_bytes()).items()
}


def targets(row: Row, figures: dict[str, list[float]]) -> Iterator[tuple[str, bool]]:
    """Clauses of a row's target, and whether a recorded figure misses it; each number is of the next key."""
    keys = iter(re.findall(r"\{(\w+)", row.figures))
    for clause in re.split(r"(?<=\d)[;,] (?=at )|; ", row.target):
        is_missed = False
        for number in re.findall(r"[\d.]+", clause):
            passes = operator.ge if clause.startswith("at least") else operator.le
            value = figures.get(next(keys))
            is_missed |= value is not None and not passes(value[0], float(number))
        yield clause, is_missed


def table(rows: list[Row], results: dict[str, Any]) -> str:
    """Rows as Markdown; a row without figures says so."""
    lines = ["| what | figure | target | command | measured |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        record = results.get(row.command, {"figures": {}})
        figures, measured = record["figures"], "-"
        keys = re.findall(r"\{(\w+)", row.figures)
        texts = ["not measured"]
        if all(figures.get(key) for key in keys):
            texts = [row.figures.format(**{key: figures[key][i] for key in keys}) for i in range(3)]
            measured = f"{record['date']}, {record['machine']}"
        runs = f" in {record['runs']} runs" if record.get("runs", 1) > 1 else ""
        spread = f" ({texts[1]} to {texts[2]}{runs})" if len(set(texts)) > 1 else ""
        target = "; ".join(clause + ": missed" * missed for clause, missed in targets(row, figures))
        lines.append(f"| {row.what} | {texts[0]}{spread} | {target} | `python benchmarks/{row.command}` | {measured} |")
    return "\n".join(lines)


def write_tables(page: str, results: dict[str, Any]) -> str:
    """The page with its tables as the results make them, each between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        page = before + begin + table(rows, results) + "\n" + end + rest.partition(end)[2]
    return page


def machine() -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.exists() else None
    return f"{cpu[1].strip() if cpu else 'CPU'}, {os.cpu_count()} cores, torch {torch.__version__.partition('+')[0]}"


def measure(command: str, repeat: int) -> dict[str, Any]:
    """Run a script several times: machine, date, runs, and median, lowest and highest of each key."""
    script, *options = shlex.split(command)
    runs = [common.last_json([sys.executable, str(HERE / script), *options], check=False) for _ in range(repeat)]
    values = {key: [run[key] for run in runs if run[key] is not None] for key in runs[0]}
    figures = {key: [statistics.median(v), min(v), max(v)] for key, v in values.items() if v}
    return {"machine": machine(), "date": str(datetime.date.today()), "runs": repeat, "figures": figures}


def main() -> None:
    rows = [row for rows in TABLES.values() for row in rows]
    scripts = sorted({row.command.split()[0] for row in rows})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=scripts, metavar="SCRIPT", help="these, such as forward.py")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each script (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    results, failed = json.loads(RESULTS.read_text(encoding="utf-8")), []
    for command in [] if args.page else dict.fromkeys(row.command for row in rows):
        if args.only and command.split()[0] not in args.only:
            continue
        print(command, flush=True)
        try:
            results[command] = measure(command, 1 if command in ONCE else args.repeat)
        except (ValueError, IndexError, KeyError, TypeError) as e:  # no script, no last line, no figures, other keys
            failed.append(command)
            results.pop(command, None)
            print(f"{command} failed: {e}", file=sys.stderr)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    recorded = {row: results.get(row.command, {"figures": {}})["figures"] for row in rows}
    missed = [row for row in rows if any(is_missed for _, is_missed in targets(row, recorded[row]))]
    figures: dict[str, float | None] = {"missed": len(missed), "failed": len(failed)}
    common.report("benchmarks", [("missed", row.what) for row in missed] or [("missed", "none")], figures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
