"""Hostile tables, datasets, lists, tar files, images, galleries, caches and metrics."""

import io
import json
import os
import struct
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mutations as m
import numpy as np
import safetensors.torch
import torch
from hostile import CLUSTER, FINETUNE, PRETRAIN, STOP, Base, Call, copy, odd_file, put
from PIL import ExifTags, Image

from passreid_models import Embedder, Gallery
from passreid_models.checkpoints import zoo
from passreid_models.data.datasets import open_dataset
from passreid_models.data.images import open_image, reason
from passreid_models.data.listing import list_images
from passreid_models.data.sources import open_source
from passreid_models.evaluation.feature_cache import FeatureCache
from passreid_models.training.folder import RunFolder
from tests import reid_data


def tables(rng: Random, base: Base, work: Path) -> Call:
    """CSV files of labels."""
    separator = rng.choice(",,,;\t")
    names = sorted(path.name for path in Path(base.persons, "query").iterdir())[:4]
    splits = ("train", "query", "gallery", "test", "Train")
    rows = [("path", "pid", "camid", "split")]
    rows += [(f"{base.persons}/query/{name}", f"{i // 2}", f"c{i % 2}", rng.choice(splits)) for i, name in
             enumerate(names)]  # fmt: skip
    if rng.random() < 0.3:
        rows = [(r[0], r[1], r[3]) for r in rows]
    text = "\n".join(separator.join(row) for row in rows) + "\n"
    file = put(work / rng.choice(("x.csv", "x.tsv", "X.CSV")), m.mutate_text(rng, text))
    if rng.random() < 0.05:
        odd_file(rng, file)
    return _use_dataset(rng, base, file)


def _use_dataset(rng: Random, base: Base, data: Path) -> Call:
    out = str(data.parent / "out")
    return rng.choice(
        (
            ["data", "check", str(data), "-q"],
            ["data", "check", str(data), "--no-verify", "--json", f"{out}.json"],
            ["eval", str(data), *base.model, "-q", "--json", f"{out}.json"],
            ["eval", str(data), *base.model, "-q", "--no-cache", "--open-set", "--per-camera", "--rerank"],
            ["finetune", str(data), "--init", "random", "--out", out, *FINETUNE, *STOP],
            ["cluster", str(data), "--init", "random", "--out", out, *CLUSTER, *STOP],
            ["gallery", str(data), "-o", f"{out}.html", *base.model],
            ["train", str(data), "--out", out, *PRETRAIN, *STOP],
            partial(open_dataset, data),
        )
    )


NAMES: tuple[str | bytes, ...] = (
    "a\nb.jpg", "\x1b[2J.jpg", "é.jpg", "e\u0301.jpg", "\u202egpj.jpg", "-1_c1.jpg", "-rf.jpg", " .jpg", ".jpg",
    "0002_c1s1_000451_03.jpg", "0002_c99999999999999999999s1_1_1.jpg", "9" * 40 + "_c1s1_000001_01.jpg", "..jpg",
    b"\xff\xfe.jpg",
    "x" * 240 + ".jpg", "a.JPG", "%s%n.jpg", "$(touch x).jpg", "١٢_c1s1_1_1.jpg", "0002_c0s0_0_0.jpg", "<script>.jpg",
    "0000_c1s1_000001_01.jpg", "list_train.txt", "list_query.txt", "synthetic3d.json", "synthetic_persons.json",
)  # fmt: skip


def datasets(rng: Random, base: Base, work: Path) -> Call:
    """Folders of every layout with odd names, links, pipes, sockets and devices."""
    root = work / rng.choice(("data", "data", "d\né\x1b"))
    layout = rng.randrange(4)
    if layout == 0:
        reid_data.write(root, reid_data.MARKET)
    elif layout == 1:
        reid_data.write_msmt17(root, rng.choice((1, 2)))
    elif layout == 2:
        reid_data.write_flat(root)
    else:
        reid_data.write(root, [name.partition("/")[2] for name in reid_data.MARKET])
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())]
    for _ in range(rng.choice((1, 1, 2, 4))):
        folder = rng.choice(folders)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        kind = rng.randrange(7)
        new = os.path.join(os.fsencode(folder), os.fsencode(rng.choice(NAMES)))
        if kind == 0 and files:
            os.rename(rng.choice(files), new)
        elif kind == 1:
            content = m.mutate_bytes(rng, reid_data.jpeg(1)) if rng.random() < 0.5 else b"1 x\n"
            Path(os.fsdecode(new)).write_bytes(content)
        elif kind < 5:
            odd_file(rng, rng.choice((folder / "f.jpg", folder / "0002_c1s1_000451_09.jpg", *files)))
        elif kind == 5:
            link = folder / rng.choice(("loop", "0009", "query", "train", "x.jpg"))
            if not os.path.lexists(link):
                link.symlink_to(rng.choice((folder, root, root / "..", link)) if rng.random() < 0.2 else folder)
        else:
            for name in ("list_train.txt", "list_query.txt"):
                if (root / name).is_file():
                    put(root / name, m.mutate_text(rng, (root / name).read_text(encoding="utf-8", errors="replace")))
    if rng.random() < 0.2:
        return ["embed", str(root), "-o", str(work / "out.csv"), *base.model]
    return _use_dataset(rng, base, root)


def listings(rng: Random, base: Base, work: Path) -> Call:
    """Lists of paths and tar files: each image loads, or is an error of its own."""
    if rng.random() < 0.4:
        names = "\n".join(sorted(str(path) for path in (base.root / "images").iterdir()))
        file = put(work / "x.txt", m.mutate_text(rng, names))
    else:
        content = base.read("images.tar")
        if rng.random() < 0.5:
            at = 512 * rng.randrange(len(content) // 512)  # a field of a header, if it is one
            field = rng.choice((0, 100, 124, 124, 136, 148, 156, 257, 345))
            sizes = b"\xff" * 12, b"7" * 11 + b"\0", b"\x80" + b"\0" * 3 + b"\xff" * 8
            value = rng.choice((*sizes, b"-1\0", b"../" * 4))
            content = content[: at + field] + value + content[at + field + len(value) :]
        else:
            content = m.mutate_bytes(rng, content)
        file = put(work / "x.tar", content)
    if rng.random() < 0.05:
        odd_file(rng, file)
    if rng.random() < 0.3:
        return ["train", str(file), "--out", str(work / "out"), *PRETRAIN, *STOP]

    def load() -> None:
        source = open_source(file, work / "cache")
        again = open_source(file, work / "cache")
        assert again.fingerprint == source.fingerprint, "another listing from the cache"
        for i in range(min(len(source), 20)):
            message = ""
            try:
                assert source.load(i).mode == "RGB"
            except ValueError as e:
                message = str(e)
            assert not message or message.startswith(source.name(i)), f"{message} does not name the image"

    return load


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "PA", "La", "RGBa")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "ICO", "JPEG2000", "TGA", "PCX", "MPO", "SGI")


def images(rng: Random, base: Base, work: Path) -> Call:
    """Image files: truncated, bombs, every mode and format, EXIF."""
    picture = Image.open(base.image)
    size = rng.choice(((32, 64), (32, 64), (1, 1), (1, 3000), (3000, 1), (16, 16)))
    image = picture.resize(size)
    out = io.BytesIO()
    kind = rng.random()
    if kind < 0.15:
        content = _bomb(rng)
    else:
        options: dict[str, Any] = {}
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = rng.choice((1, 3, 6, 8, 0, 9, 65535))
        exif[rng.choice((ExifTags.Base.Make, ExifTags.Base.GPSInfo, 0x9286))] = rng.choice((1, "x" * 1000))
        try:
            image = image.convert(rng.choice(MODES))
            if rng.random() < 0.4:
                options["exif"] = exif
            if image.mode == "P" and rng.random() < 0.5:
                options["transparency"] = rng.choice((0, b"\0" * 300))
            image.save(out, rng.choice(IMAGE_FORMATS), **options)
        except Exception:  # Pillow has no such combination
            out = io.BytesIO()
            picture.save(out, "PNG")
        content = out.getvalue()
        if rng.random() < 0.7:
            content = m.mutate_bytes(rng, content)
    file = put(work / f"x{rng.choice(('.png', '.jpg', '.tiff', '.gif', '.ppm', '.webp', '.bmp'))}", content)
    if rng.random() < 0.05:
        odd_file(rng, file)
    if rng.random() < 0.3:
        return rng.choice(
            (
                ["embed", str(file), base.image, "-o", str(work / "out.npz"), *base.model],
                ["embed", str(file), "-o", str(work / "out.npz"), *base.model, "--strict"],
                ["parts", str(file), "-o", str(work / "out.png"), *base.model],
                ["train", str(work), "--out", str(work / "out"), *PRETRAIN, *STOP],
                ["data", "check", str(work), "-q"],
            )
        )

    item = file if rng.random() < 0.5 else content

    def load() -> None:
        try:
            opened = open_image(item)
        except MemoryError:
            raise
        except Exception as e:  # as its docstring says
            raise ValueError(reason(e)) from None
        assert opened.mode == "RGB"
        assert opened.width * opened.height <= 50_000_000

    return load


def _bomb(rng: Random) -> bytes:
    """Small files that declare, or hold, very many pixels."""
    side = rng.choice((8_000, 13_000, 30_000, 65_535, 2**31 - 1))
    kind = rng.randrange(4)
    if kind == 0:
        return b"P6\n%d %d\n255\n" % (side, side)
    if kind == 1:
        return struct.pack("<2sIIIIIIHH24x", b"BM", 54, 0, 54, 40, side, side, 1, 24)
    if kind == 2:
        size = struct.pack("<HH", side % 65536, side % 65536)
        return b"GIF89a" + size + b"\xf0\0\0" + bytes(6) + b"," + bytes(4) + size + b"\0\2\2L\1\0;"
    out = io.BytesIO()
    Image.new("1", (min(side, 13_000),) * 2).save(out, "PNG")
    return out.getvalue()


def galleries(rng: Random, base: Base, work: Path) -> Call:
    """Saved galleries: the same names and descriptors, or an error."""
    original = base.read("gallery.safetensors")
    if rng.random() < 0.3:
        length = int.from_bytes(original[:8], "little")
        header = json.loads(original[8 : 8 + length])
        text = json.dumps(m.mutate_value(rng, header)).encode()
        content = len(text).to_bytes(8, "little") + text + original[8 + length :]
    else:
        content = m.mutate_bytes(rng, original) if rng.random() < 0.6 else m.mutate_safetensors(rng, original)
    file = put(work / "g.safetensors", content)
    if rng.random() < 0.05:
        odd_file(rng, file)

    def load() -> None:
        loaded, written = Gallery.load(file), Gallery.load(base.root / "gallery.safetensors")
        assert loaded.names == written.names, "other names"
        assert torch.equal(loaded.descriptors, written.descriptors), "other descriptors"
        assert (loaded.pids == written.pids).all(), "other identities"

    def forged() -> None:  # its checksum is that of its content
        from passreid_models.gallery import FORMAT, _checksum

        values = {"metric": "cosine", "model": None, "names": ["a", "b"], "pids": [1, 2]}
        x = torch.eye(2, 4)
        changed = m.mutate_json(Random(seed), values)
        x = m.mutate_tensor(Random(seed + 1), x) if seed % 2 else x
        if not (isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.requires_grad
                and x.dtype == torch.float32 and x.ndim == 2 and x.is_contiguous()
                and x.device.type == "cpu" and x.numel() < 10**6):  # fmt: skip
            x = torch.eye(2, 4)
        data = torch.tensor(list(changed), dtype=torch.uint8)
        metadata = {"format": FORMAT, "sha256": _checksum(changed, x)}
        safetensors.torch.save_file({"descriptors": x, "json": data}, file, metadata)
        gallery = Gallery.load(file)
        assert len(gallery) == len(gallery.descriptors)
        assert gallery.descriptors.isfinite().all()
        gallery.search(torch.ones(1, gallery.descriptors.shape[1]), topk=3)

    seed = rng.randrange(10**9)
    return forged if rng.random() < 0.4 and file.is_file() and not file.is_symlink() else load


def caches(rng: Random, base: Base, work: Path) -> Call:
    """Caches and records of this package: what is damaged is computed again."""
    kind = rng.randrange(4)
    if kind == 0:
        content = base.read("features.safetensors")
        content = m.mutate_bytes(rng, content) if rng.random() < 0.5 else m.mutate_safetensors(rng, content)

        def features() -> None:
            embed = Embedder(str(base.export), "cpu", workers=1)
            cache = FeatureCache(embed, "images", work)
            put(cache.file, base.read("features.safetensors"))
            written = cache.load()
            put(cache.file, content)
            assert len(written) > 0
            assert all(np.array_equal(written[k], row) for k, row in cache.load().items()), "another descriptor"

        return features
    if kind == 1:
        seed = rng.randrange(10**9)

        def listing() -> None:
            os.utime(base.root / "images", (1e9, 1e9))
            expected = list_images(base.root / "images", work)
            for file in (work / "listings").glob("*.npz"):
                put(file, m.mutate_bytes(Random(seed), file.read_bytes()))
            names = list_images(base.root / "images", work).names
            assert names.fingerprint() == expected.names.fingerprint(), "another listing"

        return listing
    if kind == 2:
        record = {"name": "x", "folder": "y", "source": "z", "source_sha256": "0" * 64, "sha256": "0" * 64, "date": ""}
        name = "pass_vit_small_patch16.lup"
        put(work / "cache" / f"{name}.json", m.mutate_json(rng, record))
        return rng.choice((["weights", "verify"], ["weights", "verify", name], ["weights", "list"],
                           partial(zoo.read_record, name)))  # fmt: skip
    markers = ("synthetic3d.json", "synthetic_persons.json")
    marker = {"ids": 10, "images": 6, "cameras": 3, "seed": 0, "size": [64, 32], "generator": 2, "train_ids": 6}
    root = copy(base, "persons", work / "data", {name: m.mutate_json(rng, marker) for name in markers})
    for name in markers:
        put(root / name, m.mutate_json(rng, marker))
    if rng.random() < 0.2:
        return ["synth", "--ids", "10", "--images", "6", "--cameras", "3", "--size", "64x32", "--out", str(root)]
    return rng.choice((["data", "check", str(root), "-q"], ["eval", str(root), *base.model, "-q"]))


FOREIGN = (b"[1]", b"5", b'"epoch"', b"null", b"{", b"\xff", b"[" * 10**5, b'{"epoch": "x"}',
           b'{"epoch": 1, "loss": "x"}', b'{"step": 1e400, "epoch": NaN}', b'{"epoch": [1], "loss": 1}',
           b'{"step": 1, "epoch": null}')  # fmt: skip


def metrics(rng: Random, base: Base, work: Path) -> Call:
    """``metrics.jsonl`` with foreign lines."""
    record: dict[str, Any] = {"step": 1, "epoch": 0.5, "loss": 2.0, "lr": 0.1, "mAP": 20.0, "clusters": 3}
    lines = [json.dumps({**record, "step": i, "epoch": i / 2}).encode() for i in range(4)]
    for _ in range(rng.choice((1, 2, 3))):
        lines[rng.randrange(4)] = rng.choice((m.mutate_json(rng, record), *FOREIGN))
    file = put(work / "run" / "metrics.jsonl", b"\n".join(lines) + rng.choice((b"\n", b"")))
    if rng.random() < 0.05:
        odd_file(rng, file)

    def forget() -> None:
        run = RunFolder(file.parent)
        run.metric(1, "loss")
        run.forget_after(2)
        assert all(json.loads(line)["step"] <= 2 for line in file.read_text(encoding="utf-8").splitlines()), (
            "a later step is left"
        )

    return rng.choice((["plot", str(file.parent), "--out", str(work / "out.png")], forget))
