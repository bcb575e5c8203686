"""Track persons in video frames with BoxMOT, by the descriptors of an exported model.

    passreid export pass_vit_small_patch16.lup_market1501 person_boxmot.onnx --input imagenet
    python examples/track_boxmot.py person_boxmot.onnx frames/ boxes.txt --out tracks.txt

Frames are images whose names sort in time. Boxes of any detector, and the tracks, are rows of the MOT challenge's text
format: frame (from 1), identity (ignored in boxes), left, top, width, height in pixels, score. Needs boxmot.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from boxmot.reid import create_reid_encoder
from boxmot.reid.config import resolve_reid_spec
from boxmot.structures import Boxes, Detections, Frame
from boxmot.trackers import TrackerSpec, create_tracker
from PIL import Image

from passreid_models.data.images import find_images


def track(model: Path, frames: list[Path], boxes: np.ndarray, tracker: str) -> np.ndarray:
    """Track boxes through the frames: rows ``[N, 7]`` in, rows ``[M, 7]`` out."""
    encoder = create_reid_encoder(resolve_reid_spec(model)[0])
    tracks, rows = create_tracker(TrackerSpec(tracker)), [np.empty((0, 7))]
    for number, file in enumerate(frames, start=1):
        pixels = np.array(Image.open(file).convert("RGB"))
        frame = Frame(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), sample_id=file.name)
        found = torch.from_numpy(boxes[boxes[:, 0] == number]).float()
        corners = torch.cat([found[:, 2:4], found[:, 2:4] + found[:, 4:6]], dim=1)
        kinds = torch.zeros(len(found), dtype=torch.int64)
        detections = Detections(Boxes(corners), found[:, 6].contiguous(), kinds, sample_id=file.name)
        (embeddings,) = encoder.encode([frame], [detections])
        result = tracks.update(replace(detections, embeddings=embeddings), frame)
        x = result.geometry.values
        columns = [torch.full((len(x),), number), result.track_ids, *x[:, :2].T, *(x[:, 2:] - x[:, :2]).T]
        rows.append(torch.stack([*columns, result.scores], dim=1).numpy())
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="file of passreid export --input imagenet")
    parser.add_argument("frames", type=Path, help="folder of images")
    parser.add_argument("boxes", type=Path, help="text file")
    parser.add_argument("--tracker", default="botsort", help="botsort, strongsort, deepocsort ... (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    args = parser.parse_args()
    boxes = np.loadtxt(args.boxes, delimiter=",", ndmin=2)[:, :7]
    rows = track(args.model, find_images(args.frames), boxes, args.tracker)
    np.savetxt(args.out, rows, fmt=["%d", "%d", "%.1f", "%.1f", "%.1f", "%.1f", "%.3f"], delimiter=",")
    print(f"{len(np.unique(rows[:, 1]))} persons in {len(np.unique(rows[:, 0]))} frames -> {args.out}")


if __name__ == "__main__":
    main()
