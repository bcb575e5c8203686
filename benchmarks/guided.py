"""Coverage-guided fuzzing of one reader of files, by atheris (``pip install atheris``; it has wheels for Linux).

    python benchmarks/guided.py table --seconds 600

atheris measures which branches of this package some bytes reach, and mutates those that reach new ones. A run ends
at the first exception other than ValueError and OSError, after 60 s in one call, or at 3 GB, and names the file of
the bytes. ``robustness.py`` covers whole commands; this one goes deeper into single readers.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["passreid_models"]):
    from passreid_models.checkpoints.local_dir import read_config
    from passreid_models.checkpoints.read import read_checkpoint
    from passreid_models.data.datasets import open_dataset
    from passreid_models.data.sources import open_source
    from passreid_models.training.command import check_yaml
    from passreid_models.training.folder import RunFolder

HEAD = bytes(100) + b"0000644\0" * 3 + b"00000000000\0" * 2 + b"        0" + bytes(100) + b"ustar\00000"
READERS: dict[str, tuple[str, Callable[[Path], object], bytes]] = {
    "table": ("x.csv", open_dataset, b"path,pid,camid,split\na.jpg,1,c1,train\nb.jpg,2,c2,query\n"),
    "list": ("x.txt", open_source, b"a.jpg\n# b\n"),
    "tar": ("x.tar", open_source, HEAD.ljust(512, b"\0") + bytes(1024)),
    "config": ("config.json", lambda file: read_config(file.parent),
               json.dumps({"architecture": "test_pass_vit", "pretrained_cfg": {"mean": [0.5] * 3}}).encode()),
    "settings": ("x.yaml", check_yaml, b"a: [1, {b: c}]\n"),
    "metrics": ("metrics.jsonl", lambda file: RunFolder(file.parent).metrics(), b'{"step": 1, "epoch": 0.5}\n'),
    "checkpoint": ("x.pth", read_checkpoint, b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s."),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60, help="length of the run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the bytes of a failure")
    args = parser.parse_args()
    name, read, example = READERS[args.reader]
    with tempfile.TemporaryDirectory() as folder:
        file, corpus = Path(folder, "case", name), Path(folder, "corpus")
        file.parent.mkdir()
        corpus.mkdir()
        (corpus / "example").write_bytes(example)

        def run(content: bytes) -> None:
            file.write_bytes(content)
            with suppress(ValueError, OSError):
                read(file)

        limits = [f"-max_total_time={args.seconds}", "-timeout=60", "-rss_limit_mb=3000", "-max_len=4096"]
        atheris.Setup([sys.argv[0], str(corpus), *limits, f"-artifact_prefix={args.out}/"], run)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
