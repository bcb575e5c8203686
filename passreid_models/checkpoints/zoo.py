"""Known weights (the manifest), and the search for the file of a tag.

A tag is searched in this order: bundled file, local cache, Hugging Face Hub, the authors' Google Drive.

    $PASSREID_CACHE (default: passreid/ beside the Hub's cache)
        pass_vit_small_patch16.lup.json             the record: folder, SHA-256 of source and result, date
        pass_vit_small_patch16.lup-0123456789ab/    model.safetensors, config.json, extras.safetensors
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from passreid_models.architectures import STATISTICS
from passreid_models.checkpoints.convert import Converted, convert_file
from passreid_models.checkpoints.download import WeightsUnavailableError
from passreid_models.checkpoints.drive import download_drive
from passreid_models.checkpoints.hub import download_hub
from passreid_models.checkpoints.local_dir import MAX_CONFIG_BYTES, write_converted
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.runtime import cache_dir, did_you_mean, lock, read_bytes, sha256, write_json

__all__ = ["Weight", "WeightsUnavailableError", "get_weight", "list_weights", "pull", "resolve", "verify"]


TRAIN_IDENTITIES = {"Market-1501": 751, "MSMT17": 1_041, "DukeMTMC-reID": 702}  # rows of a supervised classifier


@dataclass(frozen=True)
class Weight:
    """One row of the manifest: a published or bundled checkpoint.

    ``fusion`` and ``neck`` are those of the published descriptor, ``feature`` says where it is taken (``tokens``,
    ``before neck``, ``after neck``), ``accuracy`` has mAP and Rank-1 in percent, and who measured them on what,
    ``mean_std`` is ``imagenet`` or ``0.5``, sizes are height x width in pixels.
    """

    name: str
    task: str
    data: str
    license: str
    license_note: str
    input_size: tuple[int, int]
    fusion: str
    neck: str
    feature: str
    l2_normalize: bool
    mean_std: str
    interpolation: str
    accuracy: dict[str, Any] | None
    source: dict[str, Any]

    @property
    def architecture(self) -> str:
        """Name before the dot, such as ``pass_vit_small_patch16``."""
        return self.name.split(".")[0]

    @property
    def tag(self) -> str:
        """Name behind the dot, such as ``lup``."""
        return self.name.split(".")[1]

    @property
    def statistics(self) -> dict[str, Any]:
        """``mean``, ``std`` and ``interpolation`` of its images."""
        mean, std = STATISTICS[self.mean_std]
        return {"mean": mean, "std": std, "interpolation": self.interpolation}

    @property
    def model_neck(self) -> str:
        """Neck of the model; none if the descriptor is taken before it."""
        return self.neck if self.feature == "after neck" else ""

    @property
    def bundled_file(self) -> Path | None:
        """Bundled file, or None."""
        return weights_dir() / self.name / "model.safetensors" if self.source.get("bundled") else None

    @property
    def url(self) -> str | None:
        """Address of the file that the authors published, or None."""
        drive_id = self.source.get("drive_id")
        return f"https://drive.google.com/file/d/{drive_id}/view" if drive_id else None

    @property
    def hub_id(self) -> str | None:
        """Repository on the Hub: that of the manifest, else the one of this name under ``PASSREID_HUB_NAMESPACE``."""
        namespace = os.environ.get("PASSREID_HUB_NAMESPACE")
        return self.source.get("hub_id") or (f"{namespace}/{self.name}" if namespace else None)


def weights_dir() -> Path:
    """Folder of the manifest and the bundled weights, in an installed wheel or in a checkout."""
    package = Path(__file__).parents[1]
    return package / "_weights" if (package / "_weights").is_dir() else package.parent / "weights"


@cache
def _manifest() -> dict[str, Weight]:
    rows = json.loads((weights_dir() / "manifest.json").read_text(encoding="utf-8"))
    return {row["name"]: Weight(**{**row, "input_size": tuple(row["input_size"])}) for row in rows}


def list_weights(architecture: str = "") -> list[Weight]:
    """All known weights, or those of one architecture, in the order of the manifest."""
    return [w for w in _manifest().values() if architecture in ("", w.architecture)]


def find_weight(architecture: str, tag: str) -> Weight | None:
    """Row of a tag in the manifest, or None."""
    return _manifest().get(f"{architecture}.{tag}")


def get_weight(name: str, architecture: str = "") -> Weight:
    """Row of ``architecture.tag``, or of a tag alone, in the manifest.

    Args:
        name: ``architecture.tag``, or ``tag``.
        architecture: Architecture of the tag, needed if several have it.

    Raises:
        ValueError: If there is no such row, or several have the tag; the message lists the choices.
    """
    if name in _manifest():
        return _manifest()[name]
    rows = [w for w in list_weights() if w.tag == name]
    if not architecture and len(rows) == 1:
        return rows[0]
    if not architecture and rows:
        raise ValueError(
            f"{name} is a tag of {' and '.join(w.architecture for w in rows)}: give {' or '.join(w.name for w in rows)}"
        )
    if row := find_weight(architecture, name):
        return row
    full = ".".join(filter(None, (architecture, name)))
    first, _, tag = full.partition(".")
    rows = list_weights(first)
    if rows:  # a common architecture makes all names near
        known, nearest = f"known: {', '.join(w.name for w in rows)}", did_you_mean(tag, [w.tag for w in rows])
    else:
        names = [name for w in list_weights() for name in (w.name, w.tag)]
        known, nearest = "see `passreid weights list`", did_you_mean(name, names)
    raise ValueError(f"there are no weights {full!r}; {known}{nearest}")


# -------------------------------------------------------------------------------------------------------- resolving


def resolve(architecture: str, tag: str) -> Path:
    """Find or fetch the safetensors file of a tag: bundled, cached, from the Hub or the authors' Drive, in this order.

    Raises:
        ValueError: If there are no such weights, or the architecture has no default (an empty tag).
        WeightsUnavailableError: If no source has the file; the message lists the attempts.
        CheckpointError: If the downloaded file is damaged, or not the tag's.
    """
    if not tag:
        tags = ", ".join(w.name for w in list_weights(architecture))
        raise ValueError(
            f"{architecture} has no bundled weights, so pretrained=True needs a tag"
            + (f": {tags}" if tags else ", and none were published for it")
        )
    weight = get_weight(f"{architecture}.{tag}")
    if weight.bundled_file:
        if not weight.bundled_file.is_file():
            raise WeightsUnavailableError(
                f"the bundled file {weight.bundled_file} is missing: install the package again"
            )
        return weight.bundled_file
    if folder := cached_folder(weight.name):
        return folder / "model.safetensors"
    failures = []
    if weight.hub_id:
        try:
            return download_hub(weight.hub_id)
        except WeightsUnavailableError as e:
            failures.append(str(e))
    try:
        return pull(weight.name) / "model.safetensors"
    except WeightsUnavailableError as e:
        failures.append(str(e))
    raise WeightsUnavailableError(f"{weight.name}: " + "; ".join(failures))


def cached_folder(name: str) -> Path | None:
    """Cached folder of pulled weights, or None."""
    record = read_record(name)
    folder = cache_dir() / record["folder"] if record else None
    return folder if folder and (folder / "model.safetensors").is_file() else None


def read_record(name: str) -> dict[str, Any] | None:
    """Record of pulled weights: folder, address, SHA-256 and size of the source, SHA-256 of the result; or None."""
    path = cache_dir() / f"{name}.json"
    try:
        record = json.loads(read_bytes(path, MAX_CONFIG_BYTES)) if path.exists() else None
    except (ValueError, RecursionError):  # not written by this package: pull again
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("folder", "sha256")):
        return None
    return record if Path(record["folder"]).name == record["folder"] else None


def pull(name: str, source: str | Path | None = None, force: bool = False) -> Path:
    """Fetch the published file of a tag, verify it, convert it and record it in the cache.

    The record is replaced in one step at the end: an interrupted or parallel pull leaves the old or the new weights.

    Args:
        name: Name that ``get_weight`` takes.
        source: The authors' file, downloaded by hand; None to download it from their Drive.
        force: Fetch the weights even if they are cached.

    Returns:
        Exported folder, for ``local-dir:``.

    Raises:
        ValueError: If there are no such weights, or they are bundled and a file is given.
        WeightsUnavailableError: If the download fails; the message says what to do.
        CheckpointError: If the file has the wrong SHA-256 or does not fit the architecture.
    """
    weight = get_weight(name)
    name = weight.name
    if weight.bundled_file:
        if source is not None:
            raise ValueError(f"{name} is bundled with the package and takes no file")
        return weight.bundled_file.parent
    with lock(cache_dir() / name):
        old = cached_folder(name)
        if old and source is None and not force:
            return old
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=cache_dir()) as work:
            file = Path(source) if source else _download_drive(weight, Path(work))
            try:
                folder = _convert_into_cache(weight, file, old)
            except CheckpointError as e:
                if source:
                    raise
                what = str(e).replace(str(file), "the file from Google Drive")
                raise CheckpointError(f"{what}; {_by_hand(weight)}") from None
        _sweep(name, folder)
        return folder


def _sweep(name: str, keep: Path) -> None:
    """Remove the older folder of a name and the leftovers of killed pulls; the caller holds the lock."""
    for pattern in (f"{name}-*", f".{name}-*", f".{name}.*"):
        for path in cache_dir().glob(pattern):
            if path != keep and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _convert_into_cache(weight: Weight, file: Path, old: Path | None) -> Path:
    """Verify and convert a published file into the cache."""
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}")
    digest, expected = sha256(file), weight.source.get("sha256")
    if expected and digest != expected:
        raise CheckpointError(
            f"{file} is not {weight.name}: its SHA-256 is {digest[:12]}.., the published file's {expected[:12]}.."
        )
    converted = convert_file(file)
    _check_layout(weight, converted, file)
    folder = cache_dir() / f"{weight.name}-{digest[:12]}"
    if folder == old:  # it may be damaged, and stays until the record names the new one
        folder = folder.with_name(f"{folder.name}b")
    shutil.rmtree(folder, ignore_errors=True)  # left by a pull that was killed before its record
    write_converted(
        converted,
        folder,
        weight.name,
        source=file,
        source_sha256=digest,
        fusion=weight.fusion,
        neck=weight.model_neck,
        statistics=weight.statistics,
    )
    record = {
        "name": weight.name,
        "folder": folder.name,
        "source": weight.url,
        "source_sha256": digest,
        "source_bytes": file.stat().st_size,
        "sha256": sha256(folder / "model.safetensors"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(cache_dir() / f"{weight.name}.json", record)
    return folder


def _check_layout(weight: Weight, converted: Converted, file: Path) -> None:
    """Raise CheckpointError if the layout shows that ``file`` is not the checkpoint of the tag."""
    tasks = {"supervised": "supervised"}
    tasks |= dict.fromkeys(("unsupervised", "unsupervised domain adaptation"), "unsupervised")
    task = tasks.get(weight.task, "pretrain")
    (height, width), (file_height, file_width) = weight.input_size, converted.architecture.img_size
    differences = []
    if converted.task != task and (converted.task, task) != ("", "pretrain"):  # a bare backbone shows no task
        differences.append(f"task {converted.task or 'unknown'}, not {task}")
    if converted.neck_kind != weight.neck:
        differences.append(f"neck {converted.neck_kind or 'none'}, not {weight.neck or 'none'}")
    if converted.fusion not in ("", weight.fusion):
        differences.append(f"fusion {converted.fusion}, not {weight.fusion}")
    if file_height * width != file_width * height:
        differences.append(f"images {file_height // file_width} times as high as wide, not {height // width}")
    counts = {name: count for name, count in TRAIN_IDENTITIES.items() if name in weight.data}
    for tensor in converted.classifier.values():
        if counts and len(tensor) not in counts.values():
            trained_on = {count: f" ({name})" for name, count in TRAIN_IDENTITIES.items()}.get(len(tensor), "")
            expected = " or ".join(f"{count:,} ({name})" for name, count in counts.items())
            differences.append(f"a classifier of {len(tensor):,} identities{trained_on}, not {expected}")
    if differences:
        raise CheckpointError(f"{file} is not {weight.name}: its layout shows {'; '.join(differences)}")


def _by_hand(weight: Weight) -> str:
    return f"download {weight.url} by hand and run `passreid weights pull {weight.name} --from FILE`"


def _download_drive(weight: Weight, folder: Path) -> Path:
    by_hand = _by_hand(weight)
    if not weight.url:
        raise WeightsUnavailableError(f"{weight.name} has no published file")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise WeightsUnavailableError(f"HF_HUB_OFFLINE is set and the weights are not in the cache; {by_hand}")
    file = folder / f"{weight.source['drive_id']}.pth"  # the name goes into the provenance
    try:
        download_drive(weight.source["drive_id"], file)
    except WeightsUnavailableError as e:
        raise WeightsUnavailableError(f"{e}; {by_hand}") from None
    return file


def verify(name: str = "") -> list[tuple[str, str]]:
    """Check the SHA-256 of the bundled and pulled weights, of all or of one.

    Returns:
        Pairs of name and state: ``ok``, ``damaged``, ``missing`` (bundled) or ``not pulled``.
    """
    states = []
    for weight in [get_weight(name)] if name else list_weights():
        if weight.bundled_file:
            file, expected = weight.bundled_file, weight.source["sha256"]
        else:
            record = read_record(weight.name)
            if record is None:
                states.append((weight.name, "not pulled"))
                continue
            file, expected = cache_dir() / record["folder"] / "model.safetensors", record["sha256"]
        state = "missing" if not file.is_file() else "ok" if sha256(file) == expected else "damaged"
        states.append((weight.name, state))
    return states
