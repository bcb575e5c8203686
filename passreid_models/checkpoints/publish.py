"""Publishing of an exported folder on the Hugging Face Hub, with a model card."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData

from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints.download import WeightsUnavailableError, short_error
from passreid_models.checkpoints.local_dir import CLAIMS, DESCRIPTOR, FILES, is_ours, read_config
from passreid_models.checkpoints.read import read_checkpoint
from passreid_models.checkpoints.zoo import Weight, list_weights

__all__ = ["model_card", "publish"]

_logger = logging.getLogger(__name__)
PAPER = "https://arxiv.org/abs/2203.03931"
CITATION = """@inproceedings{zhu2022pass,
  title={{PASS}: Part-Aware Self-Supervised Pre-Training for Person Re-Identification},
  author={Zhu, Kuan and Guo, Haiyun and Yan, Tianyi and Zhu, Yousong and Wang, Jinqiao and Tang, Ming},
  booktitle={European Conference on Computer Vision (ECCV)},
  year={2022}
}"""


def model_card(config: dict[str, Any], repo_id: str) -> str:
    """Model card (README.md) by the conventions of the Hub and of timm, from the folder's ``config.json``."""
    cfg = config["pretrained_cfg"]
    weight = next((w for w in list_weights() if w.name == f"{config['architecture']}.{cfg.get('tag')}"), None)
    license = cfg.get("license") or "other"
    provenance = config.get("provenance", {})
    accuracy = _accuracy(weight, config)
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        model_name=name,
        eval_results=_eval_results(accuracy),
        library_name="timm",
        license=license,
        license_name="see-provenance" if license == "other" else None,
        pipeline_tag="image-feature-extraction",
        tags=["timm", "person-re-identification", "pass-reid"],
        datasets=_dataset_ids(weight.data) if weight else None,
    )
    height, width = cfg["input_size"][1:]
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
    if accuracy:
        scores = f"mAP {accuracy['mAP']:.1f}, Rank-1 {accuracy['rank1']:.1f}"
        rows["Accuracy"] = f"{scores} on {accuracy['measured_on']}, measured {accuracy['measured_by']}"
    elif provenance.get("evaluated_training_images"):
        rows["Accuracy"] = "not stated, since the run was evaluated on images that it trained on"
    details = "\n".join(f"- **{name}:** {value}" for name, value in rows.items())
    history = "\n".join(f"- {key}: `{value}`" for key, value in provenance.items() if value) or "- not recorded"
    return f"""---
{data.to_yaml()}
---

# {name}

A person re-identification model of the PASS family ([paper]({PAPER})) for timm, written by
passreid-models.

{details}

## Usage

```bash
pip install .    # in a clone of passreid-models
```

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


def _accuracy(weight: Weight | None, config: dict[str, Any]) -> dict[str, Any] | None:
    """mAP and Rank-1 in percent, on what they were measured, and by whom or when; None if they are not known."""
    provenance = config.get("provenance", {})
    if weight:
        if not _is_descriptor_of(weight, config):
            return None
        return weight.accuracy and {**weight.accuracy, "measured_by": f"by {weight.accuracy['measured_by']}"}
    if not provenance.keys() >= {"mAP", "rank1"} or provenance.get("evaluated_training_images"):
        return None
    when = "during the training; of its checkpoints, this one had the highest mAP"
    data = provenance.get("evaluation_data") or f"queries and gallery of {provenance.get('data', 'unknown data')}"
    return {**{k: provenance[k] for k in ("mAP", "rank1")}, "measured_on": data, "measured_by": when}


def _is_descriptor_of(weight: Weight, config: dict[str, Any]) -> bool:
    """Whether a folder with the weights of a tag gives the tag's descriptor, for which its accuracy holds."""
    cfg, heads = config["pretrained_cfg"], ARCHITECTURES[weight.architecture].num_heads
    own = (config["fusion"], config["neck"], config.get("model_args", {}).get("num_heads", heads))
    statistics = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k in weight.statistics}
    return (
        own == (weight.fusion, weight.model_neck, heads)
        and tuple(cfg["input_size"]) == (3, *weight.input_size)
        and statistics == weight.statistics
    )


def _eval_results(accuracy: dict[str, Any] | None) -> list[Any] | None:
    """Entries of the card's ``model-index``."""
    if accuracy is None:
        return None
    dataset = accuracy["measured_on"].partition(": ")[0]  # without its counts
    source: dict[str, Any] = {}
    if accuracy["measured_by"] == "by the authors":
        source = {"source_name": "PASS", "source_url": PAPER}
    return [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="person re-identification",
            dataset_type=re.sub(r"[^\w.-]+", "-", dataset).strip("-"),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=name,
            metric_value=round(accuracy[key], 2),
            **source,
        )
        for key, metric, name in (("mAP", "mAP", "mAP"), ("rank1", "rank-1", "Rank-1"))
    ]


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


def files_to_publish(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Files that ``publish`` pushes, by name: those of the folder, or their content where it is written for the Hub.

    The model card is the folder's README.md, else one from its ``config.json``. In a folder that timm or transformers
    saved, ``config.json`` gets the descriptor's entries, and loses the claims of a tag or a run, which may not hold for
    the weights.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If a file is damaged or of another package, or ``repo_id`` is not ``org/name``.
    """
    for name in FILES[:2]:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: publish takes a folder written by `passreid convert`, or a run's export/ or"
                " best/"
            )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"expected a repository org/name, got {repo_id!r}")
    config = read_config(folder)
    read_checkpoint(folder / "model.safetensors")  # raises for a damaged file
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES if (folder / name).is_file()}
    if not is_ours(config):
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)  # the one that users will get
        config = {k: v for k, v in config.items() if k not in ("provenance", "load_report")}
        config |= zip(DESCRIPTOR, (model.global_pool, model.neck, model.neck != "multi"), strict=True)
        args = {k: v for k, v in config.get("model_args", {}).items() if k != "num_classes"}  # transformers adds it
        config["model_args"] = {**args, "global_pool": model.global_pool, "neck": model.neck}
        cfg = {k: v for k, v in config["pretrained_cfg"].items() if k not in CLAIMS}
        config["pretrained_cfg"] = {**cfg, "license": "other"}
        files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    own_card = folder / "README.md"
    files["README.md"] = own_card if own_card.is_file() else model_card(config, repo_id).encode()
    if own_card.is_file() and own_card.stat().st_mtime + 60 < (folder / FILES[0]).stat().st_mtime:  # not of one copy
        _logger.warning(f"{own_card} is older than {FILES[0]}: does it describe these weights? If not, remove it")
    return files


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> tuple[str, dict[str, int]]:
    """Push a folder of ``save_pretrained``, ``convert_checkpoint`` or timm's ``save_for_hf`` to the Hub, with a card.

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
    files = files_to_publish(Path(folder), repo_id)
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    if dry_run:
        return "", sizes

    api = HfApi(library_name="passreid-models")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(name, file) for name, file in files.items()],
            revision=revision,
            commit_message=f"Add {repo_id.split('/')[1]}",
        )
    except Exception as e:  # their kind depends on the client's HTTP library
        status = getattr(getattr(e, "response", None), "status_code", None)
        advice = "; is HF_TOKEN set, and allowed to write?" if status in (401, 403) else ""
        raise WeightsUnavailableError(f"the Hub refused {repo_id}: {short_error(e)}{advice}") from None
    return str(commit.commit_url), sizes
