"""Check of a dataset: counts beside the published ones, errors and remarks.

An error makes training or evaluation wrong or impossible; a remark does not.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from passreid_models.data.datasets import Split, open_dataset
from passreid_models.data.findings import PUBLISHED, PUBLISHED_JUNK, Finding, file_findings, label_findings
from passreid_models.data.images import count
from passreid_models.synthetic.recipe import PREFIX

__all__ = ["PUBLISHED", "Check", "Finding", "check_dataset"]


@dataclass(frozen=True)
class Check:
    """Counts of the splits, errors and remarks, as ``passreid data check`` prints them."""

    name: str
    description: str
    counts: dict[str, dict[str, int]]
    """``images``, ``identities``, ``cameras``, ``junk`` and ``distractors`` of each split."""
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether there are no errors; there may be remarks."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dictionaries, for JSON."""
        return {**asdict(self), "ok": self.ok, "published": PUBLISHED.get(self.name)}

    def __str__(self) -> str:
        lines = [self.description, ""] if self.description else []
        if self.counts:
            published = PUBLISHED.get(self.name, {})
            columns = ("images", "identities", "cameras")
            head = [f"{column:>12}" + (f"{'published':>11}" if published else "") for column in columns]
            lines.append(f"{'':<13}{''.join(head)}")
            for split, counts in self.counts.items():
                cells = [f"{counts[column]:>12,}" for column in columns]
                if published:
                    cells = [f"{cell}{n:>11,}" for cell, n in zip(cells, published[split], strict=True)]
                lines.append(f"{split:<13}{''.join(cells)}")
            junk = PUBLISHED_JUNK.get(self.name)
            for row, kind in enumerate(("junk", "distractors")):
                if junk or self.counts["gallery"][kind]:
                    lines.append(
                        f"{f'  {kind}':<13}{self.counts['gallery'][kind]:>12,}" + (f"{junk[row]:>11,}" if junk else "")
                    )
            lines.append("")
        lines += map(str, self.findings)
        errors = sum(finding.level == "error" for finding in self.findings)
        remarks = len(self.findings) - errors
        summary = f"{count(errors, 'error')}, {count(remarks, 'remark')}"
        lines.append(summary if self.findings else "no errors, no remarks")
        return "\n".join(lines)


def check_dataset(data: str | Path, verify: bool = True, progress: bool = True) -> Check:
    """Check the layout and the labels of a dataset and, with ``verify``, every image.

    Args:
        data: Dataset, as ``open_dataset`` takes it.
        verify: Open every image, and find duplicates.
        progress: Show a bar, on a terminal.

    Raises:
        FileNotFoundError: If ``data`` does not exist.
    """
    if not str(data).startswith(PREFIX) and not os.path.exists(data):
        open_dataset(data)  # raises, with the layouts that are expected
    try:
        dataset = open_dataset(data)
    except (ValueError, OSError) as e:
        return Check("unknown layout", "", {}, [Finding("error", "layout", str(e))])
    findings = [*label_findings(dataset), *(file_findings(dataset, progress) if verify else [])]
    findings.sort(key=lambda finding: finding.level)
    return Check(dataset.name, dataset.description, {k: _count_split(v) for k, v in dataset.splits.items()}, findings)


def _count_split(split: Split) -> dict[str, int]:
    return {
        "images": len(split),
        "identities": split.num_ids,
        "cameras": split.num_cameras,
        "junk": int((split.pids == -1).sum()),
        "distractors": int((split.pids == 0).sum()),
    }
