"""Publishing of an exported folder on the Hugging Face Hub, with a model card."""

import re
import tempfile
from pathlib import Path
from typing import Any

from passreid_models.checkpoints.local_dir import read_config
from passreid_models.checkpoints.read import read_checkpoint
from passreid_models.checkpoints.zoo import WeightsUnavailableError, list_weights, short_error

__all__ = ["model_card", "publish"]

PUBLISHED = ("model.safetensors", "config.json", "extras.safetensors")
CITATION = """@inproceedings{zhu2022pass,
  title={{PASS}: Part-Aware Self-Supervised Pre-Training for Person Re-Identification},
  author={Zhu, Kuan and Guo, Haiyun and Yan, Tianyi and Zhu, Yousong and Wang, Jinqiao and Tang, Ming},
  booktitle={European Conference on Computer Vision (ECCV)},
  year={2022}
}"""


def model_card(config: dict[str, Any], repo_id: str) -> str:
    """Model card (README.md) by the conventions of the Hub and of timm, from the folder's ``config.json``."""
    from huggingface_hub import ModelCardData

    cfg = config["pretrained_cfg"]
    weight = next((w for w in list_weights() if w.name == f"{config['architecture']}.{cfg.get('tag')}"), None)
    license = cfg.get("license") or "other"
    data = ModelCardData(
        library_name="timm",
        license=license,
        license_name="see-provenance" if license == "other" else None,
        pipeline_tag="image-feature-extraction",
        tags=["timm", "person-re-identification", "pass-reid"],
        datasets=_dataset_ids(weight.data) if weight else None,
    )
    height, width = cfg["input_size"][1:]
    provenance = config.get("provenance", {})
    data_steps, methods = _training(provenance, config["architecture"])
    rows = {
        "Architecture": f"`{config['architecture']}`, {height}x{width}",
        "Descriptor": f"fusion `{config['fusion']}`, neck `{config['neck'] or 'none'}`, "
        + ("L2-normalised" if config["l2_normalize"] else "not L2-normalised"),
        "Preprocessing": f"squash to {height}x{width}, {cfg['interpolation']}, mean {cfg['mean']}, std {cfg['std']}",
        "Training data": weight.data if weight else "; then ".join(data_steps) or "not stated",
        "Task": weight.task if weight else ", then ".join(methods) or "not stated",
        "Licence of the weights": f"{license}" + (f": {weight.license_note}" if weight else ""),
    }
    if weight and weight.accuracy:
        accuracy = weight.accuracy
        rows["Accuracy"] = f"mAP {accuracy['mAP']}, Rank-1 {accuracy['rank1']}, measured by {accuracy['measured_by']}"
    elif not weight and provenance.keys() >= {"mAP", "rank1"}:
        rows["Accuracy"] = (
            f"mAP {provenance['mAP']:.1f}, Rank-1 {provenance['rank1']:.1f}, measured during the training; of its "
            "checkpoints, this one had the highest mAP"
        )
    details = "\n".join(f"- **{name}:** {value}" for name, value in rows.items())
    history = "\n".join(f"- {key}: `{value}`" for key, value in provenance.items() if value) or "- not recorded"
    return f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A person re-identification model of the PASS family ([paper](https://arxiv.org/abs/2203.03931)) for timm, written by
passreid-models.

{details}

## Usage

```python
import timm, torch
import passreid_models  # registers the models

model = timm.create_model("hf-hub:{repo_id}", pretrained=True, num_classes=0).eval()
descriptor = model(torch.randn(1, 3, {height}, {width}))  # preprocessed images

from passreid_models import Embedder
descriptors = Embedder("hf-hub:{repo_id}")(["a.jpg", "b.jpg"])
```

## Provenance

{history}

## Citation

```bibtex
{CITATION}
```
"""


def _training(provenance: dict[str, Any], architecture: str) -> tuple[list[str], list[str]]:
    """Data and methods of a run and of the weights it began with, the earliest first."""
    if not provenance.get("data"):
        return [], []
    init, earlier = provenance.get("init", ""), provenance.get("init_provenance", {})
    data, methods = _training(earlier, architecture)
    if not data and init not in ("", "random"):
        weight = next((w for w in list_weights(architecture) if init in (w.name, w.tag)), None)
        data, methods = ([weight.data], [weight.task]) if weight else ([f"not stated for the weights `{init}`"], [])
    return [*data, provenance["data"]], [*methods, *filter(None, [provenance.get("method")])]


def _dataset_ids(data: str) -> list[str]:
    """Dataset names of a description such as ``LUPerson (4.18M images), MSMT17``, in the form of the Hub's metadata."""
    return ["-".join(name.split()) for name in re.sub(r"\(.*?\)", "", data).split(",")]


def card_of(folder: Path, repo_id: str) -> str:
    """Model card that ``publish`` pushes: the folder's README.md, else one from its ``config.json``.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If ``config.json`` is damaged, or ``repo_id`` is not ``org/name``.
    """
    for name in PUBLISHED[:2]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: publish takes a folder written by `passreid convert`")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"expected a repository org/name, got {repo_id!r}")
    try:
        card = model_card(read_config(folder), repo_id)
    except KeyError as e:
        raise ValueError(f"{folder / 'config.json'} was not written by this package: it has no {e}") from None
    own_card = folder / "README.md"
    return own_card.read_text(encoding="utf-8") if own_card.is_file() else card


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> tuple[str, dict[str, int]]:
    """Push a folder of ``save_pretrained`` or ``convert_checkpoint`` to the Hub, with a model card.

    A README.md in the folder is used as it is; otherwise one is written.

    Args:
        folder: Folder with ``model.safetensors`` and ``config.json``.
        repo_id: ``org/name``; created if it does not exist.
        private: Visibility of a new repository.
        revision: Branch to push to.
        dry_run: Return what would be pushed, without contacting the Hub.

    Returns:
        Address of the commit (empty after a dry run), and the files with their sizes in bytes.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If a file is damaged, or ``repo_id`` is not ``org/name``.
        WeightsUnavailableError: If the Hub refuses.
    """
    folder = Path(folder)
    card = card_of(folder, repo_id)
    read_checkpoint(folder / "model.safetensors")  # raises for a damaged file
    names = [name for name in PUBLISHED if (folder / name).is_file()]
    sizes = {name: (folder / name).stat().st_size for name in names} | {"README.md": len(card.encode())}
    if dry_run:
        return "", sizes

    from huggingface_hub import HfApi

    api = HfApi(library_name="passreid-models")
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            (Path(work) / name).symlink_to((folder / name).resolve())
        (Path(work) / "README.md").write_text(card, encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=work, revision=revision, commit_message=f"Add {repo_id.split('/')[1]}"
            )
        except Exception as e:  # their kind depends on the client's HTTP library
            status = getattr(getattr(e, "response", None), "status_code", None)
            advice = "; is HF_TOKEN set, and allowed to write?" if status in (401, 403) else ""
            raise WeightsUnavailableError(f"the Hub refused {repo_id}: {short_error(e)}{advice}") from None
    return str(commit.commit_url), sizes
