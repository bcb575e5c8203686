"""Seconds to import passreid_models, against timm alone, and to create the bundled model.

    python benchmarks/import_time.py

extra_s     seconds of `import passreid_models` minus those of `import timm`, medians of new processes in turn
create_s    seconds of `timm.create_model(BUNDLED, pretrained=True)` after the imports, in a new process; null if no
            weights are bundled
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import common

from passreid_models import list_weights

ROOT = Path(__file__).parents[1]
TIMED = "import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"


def seconds(code: str, before: str = "pass") -> float:
    """Seconds of ``code`` in a new process, without the start of the interpreter and without ``before``."""
    command = [sys.executable, "-c", f"{before}; {TIMED.format(code=code)}"]
    # with cached bytecode, as for an installed package
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return common.last_json(command, cwd=ROOT, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 11")
    rounds = 2 if parser.parse_args().quick else 11

    timms, ours = [], []
    seconds("import passreid_models")  # writes missing bytecode
    for i in range(rounds):
        for name in ("timm", "passreid_models") if i % 2 else ("passreid_models", "timm"):
            (timms if name == "timm" else ours).append(seconds(f"import {name}"))
    medians = statistics.median(timms), statistics.median(ours)
    rows = [("import timm", f"{medians[0]:.3f} s"), ("import passreid_models", f"{medians[1]:.3f} s")]
    figures: dict[str, float | None] = {"extra_s": medians[1] - medians[0]}

    bundled = next((w.name for w in list_weights() if w.bundled_file), None)
    if bundled:
        create = f"timm.create_model({bundled!r}, pretrained=True)"
        created = statistics.median(seconds(create, "import timm, passreid_models") for _ in range(rounds))
        rows.append((f"create {bundled}", f"{created:.3f} s"))
        figures["create_s"] = created
    else:
        rows.append(("create the bundled model", "none bundled"))
        figures["create_s"] = None
    common.report(f"import and creation, medians of {rounds} processes each; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
