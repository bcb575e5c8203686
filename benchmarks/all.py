"""Run the benchmarks, keep their figures in ``results.json`` and write the tables of ``docs/benchmarks.md``.

    python benchmarks/all.py                            all of them: hours
    python benchmarks/all.py --only forward.py step.py  these alone
    python benchmarks/all.py --page                     the tables alone, from what is recorded

missed          figures that miss their target, of all that are recorded
failed          scripts that failed, of those that ran

Each script runs ``--repeat`` times. ``results.json`` has for each command the machine, the date, the number of runs,
and ``[median, lowest, highest]`` of every key of the script's last line; a later call replaces them. The page is
written by hand outside of the tables.
"""

import argparse
import datetime
import json
import operator
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "benchmarks.md"


class Row(NamedTuple):
    """A row of a table: template of its figures by key, and targets, each a comparison and a number for each key."""

    what: str
    command: str
    figures: str
    target: str = "-"


TABLES = {
    "start": [
        Row("import, over `import timm`", "import_time.py", "{extra_s:.2f} s", "at most 0.3 s"),
        Row('`create_model("pass_vit_tiny_patch16", pretrained=True)`', "import_time.py", "{create_s:.2f} s",
            "at most 1.5 s"),
    ],
    "models": [
        Row("ViT-S against timm's plain ViT-S, descriptors, float32", "forward.py", "{vs_timm_fp32:.2f} times",
            "at least 1.0"),
        Row("the same, bfloat16", "forward.py", "{vs_timm_bf16:.2f} times", "at least 1.0"),
        Row("the same, all output tokens, float32", "forward.py", "{vs_timm_tokens_fp32:.2f} times", "at least 0.95"),
        Row("`Embedder` on JPEG files against the bare model on tensors", "embed.py", "{vs_bare_model:.2f} times",
            "at least 0.9"),
        Row("exports of ViT-S against PyTorch: ONNX Runtime, float32 and float16", "export.py",
            "{vs_torch_onnx:.2f}, {vs_torch_onnx_half:.2f} times"),
        Row("the same: torch.export, torchscript", "export.py",
            "{vs_torch_pt2:.2f}, {vs_torch_torchscript:.2f} times"),
    ],
    "training": [
        Row("training step of ViT-S against the plain one, float32", "step.py", "{speedup_fp32:.2f} times",
            "at least 1.25"),
        Row("training step of ViT-S in bfloat16 against the plain one in float32", "step.py",
            "{speedup_bf16:.2f} times", "at least 2.2"),
        Row("peak memory of heads and loss, share of the plain ones", "loss_memory.py --quick", "{peak_ratio:.2f}",
            "at most 0.4"),
        Row("time of heads and loss, share of the plain ones", "loss_memory.py --quick", "{time_ratio:.2f}",
            "at most 1.15"),
        Row("views, one core of the loader against torchvision on PIL, from JPEGs of 128x64 and 256x128", "views.py",
            "{worker_speedup_128x64:.1f}, {worker_speedup_256x128:.1f} times", "at least 7, 7"),
        Row("views, all stages on the CPU, likewise", "views.py",
            "{cpu_speedup_128x64:.1f}, {cpu_speedup_256x128:.1f} times", "at least 2.5, 2.2"),
        Row("views of one core of the loader, images a second, likewise", "views.py",
            "{worker_images_per_s_128x64:.0f}, {worker_images_per_s_256x128:.0f}"),
        Row("processor time to read and decode an image of 128x64: from a folder, from a tar file", "loader.py",
            "{folder_ms:.2f}, {tar_ms:.2f} ms"),
        Row("fine-tuning's loader against torchvision: a worker's time for an image; with cached images", "loader.py",
            "{worker_speedup:.1f}, {worker_speedup_cached:.1f} times"),
        Row("checkpoint of ViT-S with K = 65,536: save, size, first step after a resume", "resume.py",
            "{save_s:.1f} s, {size_mib:,.0f} MiB, {resume_s:.1f} s"),
        Row("trainings killed with `kill -9` and resumed: kills, those with other final weights than an uninterrupted "
            "run's, bit for bit", "kill.py", "{kills:.0f}, {lost:.0f}", "at least 20; at most 0"),
        Row("host time of a step of `test_pass_vit`, batch 1, share of the plain one's", "overhead.py",
            "{overhead_vs_plain:.2f}"),
        Row("colours of the views of 128 images at 64x32, share of torchvision's time on PIL images", "overhead.py",
            "{colours_vs_plain:.2f}"),
    ],
    "retrieval": [
        Row("mAP and CMC of 3,368 x 15,913 x 768 descriptors against sorting every row in numpy; memory besides the "
            "descriptors", "retrieval.py", "{speedup:.1f} times; {extra_mb:.0f} MiB", "at least 6; at most 400 MB"),
        Row("the same of 11,659 x 82,161 (MSMT17): memory in all, time", "retrieval.py",
            "{msmt17_gb:.1f} GB, {msmt17_s:.0f} s", "at most 3 GB"),
        Row("k-reciprocal re-ranking of 3,368 x 19,732: memory in all, time", "rerank.py", "{gb:.1f} GB, {s:.1f} s",
            "at most 4 GB"),
        Row("Jaccard distances and DBSCAN of 12,936 images, one run: time and memory, share of a dense implementation "
            "that sorts every row", "clustering.py", "{time_ratio:.2f}, {memory_ratio:.2f}", "at most 0.5, 0.25"),
        Row("the same of 100,000 images: memory in all, time", "clustering.py", "{gb_100000:.1f} GB, {s_100000:.0f} s",
            "at most 8 GB"),
        Row("gallery of 100,000 descriptors: one query, 100 queries", "gallery.py",
            "{one_ms:.1f}, {many_ms:.0f} ms"),
        Row("100 queries against the matrix product alone; against faiss", "gallery.py",
            "{limit:.2f}, {faiss:.2f} times"),
        Row("filling, first search, saving, loading", "gallery.py",
            "{add_s:.2f}, {prepare_s:.2f}, {save_s:.2f}, {load_s:.2f} s"),
    ],
    "synthetic": [
        Row("3-D persons at 256x128, images a second; with the start of the processes", "synth.py",
            "{images_per_s:.1f}; {images_per_s_all:.1f}", "at least 20"),
    ],
    "robustness": [
        Row("hostile files, faults of the network and of training: cases, failures", "robustness.py",
            "{cases:,.0f}, {failures:.0f}", "at least 5000, at most 0"),
        Row("of these: tracebacks, hangs, more than 2 GB, code that ran", "robustness.py",
            "{tracebacks:.0f}, {hangs:.0f}, {over_2gb:.0f}, {code_executed:.0f}", "at most 0, 0, 0, 0"),
        Row("runs killed with `kill -9`, runs that lost something", "robustness.py", "{kills:.0f}, {lost:.0f}",
            "at least 50, at most 0"),
        Row("growth of time and of memory, to 100,000 images and 1,000,000 descriptors: largest exponents of all "
            "commands", "scale.py", "{worst_time:.2f}, {worst_memory:.2f}", "at most 1.2, 1.1"),
        *(Row(f"`{words}` of 100,000 images, on top of the start: processor time, memory", "scale.py",
              f"{{{key}_s:.0f}} s, {{{key}_mb:.0f}} MiB")
          for key, words in {"embed": "passreid embed", "eval": "passreid eval", "check": "passreid data check",
                             "gallery": "passreid gallery", "train": "passreid-train", "tar": "passreid-train (tar)",
                             "finetune": "passreid finetune", "cluster": "passreid cluster"}.items()),
        Row("`Gallery` of 1,000,000 descriptors of width 16 and 100 searches: time, memory", "scale.py",
            "{search_s:.1f} s, {search_mb:.0f} MiB"),
    ],
}  # fmt: skip


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
    runs = [common.last_json([sys.executable, str(HERE / script), *options]) for _ in range(repeat)]
    values = {key: [run[key] for run in runs if run[key] is not None] for key in runs[0]}
    figures = {key: [statistics.median(v), min(v), max(v)] for key, v in values.items() if v}
    return {"machine": machine(), "date": str(datetime.date.today()), "runs": repeat, "figures": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="these scripts, such as forward.py")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each script (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    commands = list(dict.fromkeys(row.command for rows in TABLES.values() for row in rows))
    results, failed = json.loads(RESULTS.read_text(encoding="utf-8")), []
    for command in [] if args.page else commands:
        if args.only and command.split()[0] not in args.only:
            continue
        print(command, flush=True)
        try:
            results[command] = measure(command, args.repeat)
        except (subprocess.CalledProcessError, ValueError, IndexError) as e:  # a script that is not there, or fails
            failed.append(command)
            print(f"{command} failed: {e}", file=sys.stderr)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    rows = [row for rows in TABLES.values() for row in rows]
    missed = [row for row in rows
              if any(m for _, m in targets(row, results.get(row.command, {"figures": {}})["figures"]))]  # fmt: skip
    figures: dict[str, float | None] = {"missed": len(missed), "failed": len(failed)}
    common.report("benchmarks", [("missed", row.what) for row in missed] or [("missed", "none")], figures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
