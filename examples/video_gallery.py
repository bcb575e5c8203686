"""Who is back? Video frames with boxes of persons -> tracks -> a gallery that knows, or learns, each track's person.

    python examples/video_gallery.py --save gallery.safetensors

The frames are generated persons who walk past two cameras; three of them are seen by both. For a video of your own
take a detector's boxes and a tracker's numbers instead of `walk` and `find_tracks`, which never ends a track, and
measure the threshold for a gallery of your size.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np

from passreid_models import Embedder, Gallery
from passreid_models.gallery import UNKNOWN
from passreid_models.retrieval import open_set
from passreid_models.synthetic import draw

HEIGHT, WIDTH, LANE, SEED = 128, 64, 80, 0
CAMERAS = {0: [0, 1, 2, 3], 1: [1, 4, 3, 2, 5]}  # persons who walk past each


@dataclass(eq=False)
class Track:
    """Boxes of one person in successive frames, and their descriptors `[C]`."""

    boxes: list = field(default_factory=list)
    descriptors: list = field(default_factory=list)


def walk(camid, pids, steps):
    """Frames `[H, W, 3]` of one camera, and boxes x1, y1, x2, y2, score of a detector that gives them in any order."""
    rng = np.random.default_rng(camid)
    for step in range(steps):
        frame = np.full((HEIGHT + 20, LANE * len(pids), 3), 110, np.uint8)
        boxes = [[-40, 10, -8, 100, 0.3]]  # detectors give such boxes, too
        for lane, pid in enumerate(pids):
            x = lane * LANE + step * (LANE - WIDTH) // steps
            frame[10 : 10 + HEIGHT, x : x + WIDTH] = draw(SEED, pid, camid, step, (HEIGHT, WIDTH), "studio")
            boxes.append([x, 10, x + WIDTH, 10 + HEIGHT, 0.9])
        yield frame, rng.permutation(boxes)


def overlap(box, other):
    """Intersection over union of two boxes."""
    width, height = np.minimum(box[2:4], other[2:4]) - np.maximum(box[:2], other[:2])
    shared = max(0, width) * max(0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return shared / (sum(areas) - shared)


def find_tracks(clip, embed):
    """Tracks of a clip: a box continues the track whose last box it overlaps most, or begins one."""
    tracks = []
    for frame, boxes in clip:
        errors = {}  # boxes outside the frame
        descriptors = embed.crops(frame, boxes, errors=errors).numpy()
        waiting = list(tracks)
        for i, box in enumerate(boxes):
            if i in errors:
                continue
            best = max(waiting, key=lambda track: overlap(track.boxes[-1], box), default=None)
            if best is None or overlap(best.boxes[-1], box) < 0.3:
                tracks.append(best := Track())
            else:
                waiting.remove(best)
            best.boxes.append(box)
            best.descriptors.append(descriptors[i])
    return tracks


def pick_threshold(embed, fpir):
    """Similarity that this share of unknown persons reaches, measured on other persons with a gallery like ours."""
    person, size = SEED + 1, (HEIGHT, WIDTH)
    gallery = embed([draw(person, pid, 0, k, size, "studio") for pid in range(4) for k in range(4)])
    query = embed([draw(person, pid, 1, 0, size, "studio") for pid in range(40)])
    return open_set(query, gallery, np.arange(40), np.arange(16) // 4).threshold(fpir)


def main(args):
    embed = Embedder(args.model)
    threshold = pick_threshold(embed, args.fpir)
    gallery, rows = Gallery(embed), []
    for camid, pids in CAMERAS.items():
        for number, track in enumerate(find_tracks(walk(camid, pids, args.steps), embed)):
            names, similarities = gallery.search(np.mean(track.descriptors, axis=0), 1, threshold)
            name = names[0][0]
            if is_new := name == UNKNOWN:
                name = f"person {len(set(gallery.names)) + 1}"
            gallery.add(name, track.descriptors)
            rows.append((camid, pids[int(track.boxes[0][0]) // LANE], name))
            found = f"{'new: ' if is_new else ''}{name}, best similarity {similarities[0, 0]:.2f}"
            print(f"camera {camid + 1}, track {number + 1}, {len(track.boxes)} boxes: {found}")
    print(f"{gallery}, threshold {threshold:.2f}")
    if args.save:
        gallery.save(args.save)  # Gallery.load(FILE, embed) goes on with it
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="pass_vit_tiny_patch16")
    parser.add_argument("--steps", type=int, default=6, help="frames of each camera")
    parser.add_argument("--fpir", type=float, default=0.05, help="share of unknown persons who are taken for somebody")
    parser.add_argument("--save", help="file for the gallery")
    main(parser.parse_args())
