"""The example scripts and four benchmarks, run end to end, and the settings of the bundled weights."""

import io
import json
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import run_all
import scale
import timm
import torch
import train_bundled
import transfer
import video_gallery
import yaml
from baselines import colours
from PIL import Image

import passreid_models
from passreid_models import Gallery, SyntheticPersons
from passreid_models.architectures import IMAGENET
from passreid_models.data.datasets import open_dataset
from passreid_models.evaluation import evaluate_model
from passreid_models.synthetic.attributes import stream
from passreid_models.synthetic.scene import draw
from tests import ROOT
from tests.tiny_runs import write_images

EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"


def test_the_tables_of_the_benchmarks_are_those_of_the_recorded_results():
    page, results = (ROOT / "docs" / "benchmarks.md").read_text(), json.loads(run_all.RESULTS.read_text())
    assert run_all.write_tables(page, results) == page
    assert page.count("<!-- table: ") == page.count("<!-- end -->") == len(run_all.TABLES)
    assert results.keys() <= {row.command for rows in run_all.TABLES.values() for row in rows}


def test_a_table_shows_median_spread_and_missed_targets():
    row = run_all.Row("a.py", "both", "{s:.1f} s; {mb:,.0f} MB", "at most 2 s; at most 900 MB")
    figures = {"s": [2.04, 2.0, 2.5], "mb": [1024, 800, 1024]}
    record = {"machine": "a CPU", "date": "2026-11-28", "runs": 3, "figures": figures}
    assert run_all.table([row], {"a.py": record}).splitlines()[2] == (
        "| both | 2.0 s; 1,024 MB (2.0 s; 800 MB to 2.5 s; 1,024 MB in 3 runs) | at most 2 s: missed; "
        "at most 900 MB: missed | `python benchmarks/a.py` | 2026-11-28, a CPU |"
    )
    assert run_all.table([row], {}).endswith("| both | not measured | at most 2 s; at most 900 MB | `python "
                                                "benchmarks/a.py` | - |")  # fmt: skip


def test_figures_of_a_benchmark_that_fails_are_recorded_and_old_ones_dropped(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("print('{\"failures\": 2}')\nraise SystemExit(1)\n")
    (tmp_path / "dies.py").write_text("print('null')\n")
    names, file, page = ["fails.py", "dies.py", "absent.py"], tmp_path / "results.json", tmp_path / "page.md"
    old = {"machine": "a CPU", "date": "2026-11-28", "runs": 1, "figures": {"failures": [0, 0, 0]}}
    file.write_text(json.dumps(dict.fromkeys(names, old)))
    page.write_text("<!-- table: t -->\n<!-- end -->\n")
    rows = {"t": [run_all.Row(name, name, "{failures:.0f}", "at most 0") for name in names]}
    for name, value in {"HERE": tmp_path, "RESULTS": file, "PAGE": page, "TABLES": rows}.items():
        monkeypatch.setattr(run_all, name, value)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--repeat", "1"])
    with pytest.raises(SystemExit) as e:
        run_all.main()
    assert e.value.code == 1
    assert {name: record["figures"] for name, record in json.loads(file.read_text()).items()} == {
        "fails.py": {"failures": [2, 2, 2]}
    }
    assert "| fails.py | 2 | at most 0: missed |" in page.read_text()
    assert page.read_text().count("not measured") == 2


def test_exponents_of_growth_are_fitted_above_the_noise():
    sizes = [1_000, 10_000, 100_000]
    assert scale.exponent(sizes, [0.5, 5.0, 50.0], 0.3) == pytest.approx(1)
    assert scale.exponent(sizes, [0.01, 1.0, 100.0], 0.3) == pytest.approx(2)
    assert scale.exponent(sizes, [0.0, -0.2, 0.2], 0.3) == 0
    assert scale.exponent(sizes, [0.0, 0.1, 3.0], 0.3) == pytest.approx(1)  # from the noise, 10 times as much


def test_the_minimal_example_trains_weights_that_load_with_their_statistics(tmp_path):
    data = "synthetic:ids=4,images=4,cameras=2,size=128x64"
    options = "--model pass_vit_tiny_patch16 --size 64 32 --epochs 1 --batch 4 --prototypes 32 --workers 0"
    command = [sys.executable, EXAMPLES / "pretrain_minimal.py", data, "--out", tmp_path / "out", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 4/4  loss" in done.stdout
    torch.manual_seed(0)
    start = timm.create_model("pass_vit_tiny_patch16").state_dict()  # the student's first backbone
    trained = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert len(passreid_models.load_report(trained).loaded) == len(start)
    changed = [k for k, v in trained.state_dict().items() if not torch.equal(v, start[k])]
    assert len(changed) == len(start)
    cfg = trained.pretrained_cfg
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == IMAGENET
    assert cfg["interpolation"] == "bicubic"
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "FileExistsError" in again.stderr  # nothing is replaced


def test_the_video_example_tells_who_is_back_and_names_who_is_new(tmp_path, capsys):
    args = Namespace(model="pass_vit_tiny_patch16", steps=3, fpir=0.05, save=tmp_path / "gallery.safetensors")
    rows = video_gallery.main(args)
    assert [camid for camid, *_ in rows] == [0] * 4 + [1] * 5
    names = {pid: {name for _, p, name in rows if p == pid} for _, pid, _ in rows}
    assert all(len(own) == 1 for own in names.values())
    assert len(set.union(*names.values())) == len(names) == 6
    assert capsys.readouterr().out.count("new: ") == 6
    assert sorted(Gallery.load(args.save).names) == sorted(name for *_, name in rows for _ in range(args.steps))


def settings_that_differ(folder: Path, settings: Path) -> dict[str, dict]:
    """Settings that packed weights were trained with and the YAML files do not have, by phase."""
    phase = json.loads((folder / "config.json").read_text())["provenance"]
    chain = [phase]
    while phase := phase.get("init_provenance"):
        chain.insert(0, phase)
    del chain[2:-1]  # earlier runs of the last phase, with other settings
    names = list(train_bundled.PHASES)[: len(chain)]
    assert train_bundled.PHASES[names[-1]].tag == folder.suffix[1:]
    differing = {}
    for name, trained in zip(names, chain, strict=True):
        expected = train_bundled.read_settings(name, settings, "data").to_dict()
        free = {"model", "fusion"}  # set by the run
        pairs = {k: (expected[k], v) for k, v in trained["config"].items() if expected[k] != v and k not in free}
        differing |= {name: pairs} if pairs else {}
    return differing


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_the_settings_are_those_of_the_bundled_weights(size):
    assert not settings_that_differ(ROOT / f"weights/pass_vit_{size}_patch16.synth_reid", train_bundled.SETTINGS)


def test_the_phases_have_the_settings_of_their_files():
    settings = {name: train_bundled.read_settings(name, train_bundled.SETTINGS, "data") for name in PHASES}
    assert [s.size for s in settings.values()] == [(128, 64), (256, 128), (128, 64)]
    assert (settings["labels"].jitter_prob, settings["variation"].jitter_prob) == (0, 0.8)  # preset: domain


def write_settings(folder: Path, **phases: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name, settings in phases.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


HEADS = dict(num_prototypes=64, hidden_dim=64, bottleneck_dim=16)
REID = dict(size=[64, 32], epochs=1, warmup_epochs=0, ids_per_batch=2, triplet_weight=0, pad=2)
PHASES = {
    "pass": dict(size=[64, 32], epochs=1, local_views=3, batch_size=16, **HEADS),
    "labels": {**REID, "lr": 0.01},
    "variation": {**REID, "preset": "domain", "lr": 0.002},
}


@pytest.mark.parametrize(
    ("words", "changed", "message"),
    [
        (["tiny", "--ids", "0"], {}, "--ids: expected 1 or more, got 0"),
        (["tiny", "--test-ids", "-1"], {}, "--test-ids: expected 1 or more, got -1"),
        (["tiny", "--minutes", "1", "-1", "1"], {}, "--minutes: expected 0 or more, got -1"),
        (["tiny", "--settings", "none"], {}, "pass.yaml: there is none"),
        (["tiny"], {"pass": {"epochs": 0}}, "epochs: expected 1 or more, got 0"),
        (["tiny"], {"labels": {"erasing": 0}}, "erasing"),
        (["tiny"], {"variation": {"preset": "domains"}}, "preset: expected one or more of"),
    ],
)
def test_bundling_reports_mistakes_before_it_draws(words, changed, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train_bundled.write_market1501", lambda *args, **more: pytest.fail("it draws"))
    settings = write_settings(tmp_path / "settings", **{**PHASES, **changed})
    with pytest.raises(SystemExit) as error:
        train_bundled.main([words[0], "--work", str(tmp_path / "work"), "--settings", str(settings), *words[1:]])
    assert error.value.code not in (None, 0)
    assert message in f"{error.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "work").exists()


def test_webp_copies_have_the_labels_and_the_marker_of_the_drawn_set(tmp_path):
    drawn = SyntheticPersons(4, 4, 2, size=(64, 32)).write_market1501(tmp_path / "drawn", train_ids=2)
    (drawn / "synthetic_persons.json").unlink()
    (drawn / "synthetic3d.json").write_text('{"generator": 2, "seed": 3}')
    words = ["tiny", "--work", str(tmp_path / "work"), "--data", str(drawn), "--held-out", str(drawn)]
    words += ["--webp", str(tmp_path / "webp")]
    train_bundled.main(words)
    original, copies = open_dataset(drawn), open_dataset(tmp_path / "webp" / "street-webp")
    for split, expected in original.splits.items():
        assert copies.splits[split].pids.tolist() == expected.pids.tolist()
        assert copies.splits[split].camids.tolist() == expected.camids.tolist()
    with Image.open(copies.query.paths[0]) as copy, Image.open(original.query.paths[0]) as image:
        assert copy.format == "WEBP"
        assert np.abs(np.asarray(copy, float) - np.asarray(image, float)).mean() < 10
    described = train_bundled.describe(tmp_path / "webp" / "held-out-webp")
    assert described["webp_quality"] == train_bundled.WEBP_QUALITY
    assert described["data"].startswith(
        "synthetic 3-D (generator 2, seed 3), held-out-webp/: 8 training images of 2 identities, 4 queries"
    )

    missing, whole = (Path(copies.query.paths[i]) for i in (0, 1))
    missing.unlink()
    before = whole.stat().st_mtime_ns
    train_bundled.main(words)
    assert missing.exists()
    assert whole.stat().st_mtime_ns == before
    Path(original.query.paths[0]).unlink()
    with pytest.raises(SystemExit, match="street-webp holds other images than"):
        train_bundled.main(words)
    assert not (tmp_path / "work").exists()


def assert_packed(work: Path, settings: Path, seen: dict[str, int]) -> dict:
    """Check the packed weights of all phases; return the figures of the last."""
    for i, (name, phase) in enumerate(train_bundled.PHASES.items(), 1):
        folder, names = work / f"pass_vit_tiny_patch16.{phase.tag}", list(PHASES)[:i]
        config = json.loads((folder / "config.json").read_text())
        assert (config["pretrained_cfg"]["tag"], config["pretrained_cfg"]["license"]) == (phase.tag, "apache-2.0")
        assert not settings_that_differ(folder, settings)
        assert list(settings_that_differ(folder, train_bundled.SETTINGS)) == names
        figures = json.loads((folder / "figures.json").read_text())
        assert list(figures) == ["held-out", *names]
        assert {name: figures[name]["images_seen"] for name in names} == {name: seen[name] for name in names}
        assert abs(figures[name]["float16"]["mAP"] - figures[name]["float32"]["mAP"]) < 2
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any(("probe_mAP" if name == "pass" else "mAP") in record for record in log)
    assert "classifier: kept, with the neck" in (work / "tiny-3-variation" / "log.txt").read_text()
    return figures


@pytest.mark.slow
def test_the_notebook_runs_from_persons_to_a_fine_tuned_model(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notebook = json.loads((EXAMPLES / "passreid.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    namespace: dict = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, cell, "exec"), namespace)
    assert namespace["x"].shape == (64, 384)
    assert namespace["maps"].last.shape == (2, 3, 4, 16, 8)
    assert namespace["folder"] == namespace["work"] / "supervised" / "export"
    assert namespace["work"].parent == tmp_path
    assert (namespace["work"] / "parts.png").is_file()


def test_the_links_of_the_notebook_lead_somewhere():
    notebook = json.loads((EXAMPLES / "passreid.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert [name for name in links if not (EXAMPLES / name).is_file()] == []


@pytest.mark.slow
def test_bundling_runs_from_drawing_to_packed_weights_that_load(tmp_path):
    settings, work = write_settings(tmp_path / "settings", **PHASES), tmp_path / "work"
    command = [sys.executable, EXAMPLES / "train_bundled.py", "tiny", "--work", work, "--settings", settings]
    command += ["--ids", "5", "--test-ids", "4", "--split"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = {"pass": 32, "labels": 40, "variation": 40}  # of 40 images, in batches of 16 and of 8
    held_out = assert_packed(work, settings, seen)["held-out"]
    assert held_out["data"].startswith("synthetic 3-D (generator 2, seed 0)")
    assert held_out["patterns"] == "held-out"
    for phase in train_bundled.PHASES.values():
        folder = work / f"pass_vit_tiny_patch16.{phase.tag}"
        pieces = sorted(folder.glob("model.safetensors.*"))
        assert all(p.stat().st_size < 2**24 for p in pieces)
        (folder / "model.safetensors").write_bytes(b"".join(p.read_bytes() for p in pieces))
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert model.patch_embed.img_size == (256, 128)


@pytest.mark.slow
def test_bundling_continues_by_phases_and_what_a_later_phase_began_from_stays(tmp_path, capsys):
    data = SyntheticPersons(6, 4, 2, size=(64, 32)).write_market1501(tmp_path / "data", train_ids=3)
    phases = {**PHASES, "labels": {**PHASES["labels"], "epochs": 9}}
    settings, work = write_settings(tmp_path / "settings", **phases), tmp_path / "work"

    def bundle(*words: str) -> str:
        sets = ["--data", str(data), "--held-out", str(data)]
        train_bundled.main(["tiny", "--work", str(work), *sets, "--settings", str(settings), *words])
        return capsys.readouterr().out

    assert "is there" not in bundle("--until", "pass")
    assert not (work / "tiny-2-labels").exists()
    output = bundle("--minutes", "0", "0.0001", "0")  # time for one step of labels
    assert output.count("is there") == 1
    figures = assert_packed(work, settings, {"pass": 16, "labels": 8, "variation": 8})
    m = figures["variation"]["float16"]["mAP"]
    gain = m - figures["labels"]["float16"]["mAP"]
    assert f"  variation: 8 images, mAP {m:.2f} ({gain:+.2f}), Rank-1" in output
    assert bundle().count("is there") == 3  # labels do not go on
    write_settings(settings, labels={**phases["labels"], "lr": 0.5})
    with pytest.raises(SystemExit, match=r"lr: 0\.5 is asked for, and .*tiny-2-labels was trained with 0\.01"):
        bundle()


def test_the_baselines_are_measured_on_any_labelled_dataset(tmp_path):
    dark_red, black = Image.new("RGB", (64, 128), (128, 0, 0)), Image.new("RGB", (64, 128))
    x = colours([dark_red, black, black])
    torch.testing.assert_close(x @ x.T, torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]]))
    command = [sys.executable, BENCHMARKS / "baselines.py", "--quick"]
    done = subprocess.run([*command, "synthetic:ids=8,size=128x64"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["pixels_mAP"] > figures["chance_mAP"] > 0
    write_images(tmp_path / "unlabelled")
    refused = subprocess.run([*command, tmp_path / "unlabelled"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_the_benchmark_of_the_gallery_reports_its_figures():
    command = [sys.executable, BENCHMARKS / "gallery.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["many_ms"] > figures["one_ms"] > 0


@pytest.mark.slow
def test_the_benchmark_of_faults_reports_its_cases(tmp_path):
    command = [sys.executable, BENCHMARKS / "kill.py", "--quick", "--kills", "1", "--case", "pretrain: a flipped byte"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    counts = ("cases", "kills", "failures", "lost", "hangs", "tracebacks")
    assert [figures[name] for name in counts] == [4, 1, 0, 0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_foreign_cameras_are_unlike_those_of_training():
    for camera in (transfer.foreign_camera(camid, seed) for seed in range(20) for camid in range(9)):
        assert camera.gamma < 0.75 or camera.gamma > 1.33
        red, _, blue = camera.gains
        assert red / blue < 0.75 or red / blue > 1.33
        assert 2 < camera.blur < 3
        assert 0.15 < camera.scale < 0.3
        assert 5 < camera.noise < 20
        assert 10 <= camera.quality < 30


def test_a_foreign_camera_gives_all_its_images_one_look_that_differs_from_other_cameras_and_shows_the_person():
    image = draw(0, 0, 0, 0)

    def shot(camid, *image_key):
        content = transfer.photograph(image, transfer.foreign_camera(camid), stream(*image_key))
        return content, Image.open(io.BytesIO(content))

    first, look = shot(0, 1)
    assert shot(0, 1)[0] == first != shot(0, 2)[0]
    assert look.size == image.size
    colour = [np.asarray(shot(camid, 1)[1], float).mean((0, 1)) for camid in range(4)]
    assert np.abs(np.asarray(shot(0, 2)[1], float).mean((0, 1)) - colour[0]).max() < 1
    assert all(np.abs(a - b).max() > 25 for a, b in combinations(colour, 2))
    gray = np.asarray(image.convert("L").resize((16, 32)), float).ravel()
    for camid in range(4):
        seen = np.asarray(shot(camid, 1)[1].convert("L").resize((16, 32)), float).ravel()
        assert np.corrcoef(gray, seen)[0, 1] > 0.85


def test_transfer_measures_models_and_baselines_on_three_sets(tmp_path, capsys, monkeypatch):
    def flat(seed, pid, camid, k, size, patterns, place):  # instead of the renderer
        return draw(seed, pid, camid, k, size)

    monkeypatch.setattr("passreid_synth3d.dataset._find_draw", lambda: flat)
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    name, work = str(tmp_path / "model"), tmp_path / "work"
    passreid_models.save_pretrained(timm.create_model("test_pass_vit"), name)
    words = [name, "--quick", "--size", "64", "32", "--work", str(work)]
    transfer.main(words)
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert figures.keys() == {
        f"{row}_{column}_{metric}"
        for row in ("pixels", "colours", "chance", "random", name)
        for column in ("held-out", "2-D", "foreign")
        for metric in ("mAP", "rank1")
    }
    command = "--ids 6 --images 8 --cameras 4 --train-ids 0 --seed 7 --patterns held-out; generator"
    assert f"held-out: passreid synth {command}" in output
    for column in ("held-out", "foreign"):
        evaluation = evaluate_model(work / f"{column}-6", name, size=(64, 32))
        assert len(evaluation.dataset.query) == len(evaluation.dataset.gallery) == 24
        assert figures[f"{name}_{column}_mAP"] == pytest.approx(100 * evaluation.metrics.mAP, abs=0.01)
    assert figures["colours_held-out_mAP"] > figures["colours_foreign_mAP"]

    before = {path: path.read_bytes() for path in work.glob("foreign-6/*/*.jpg")}
    transfer.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert {path: path.read_bytes() for path in work.glob("foreign-6/*/*.jpg")} == before

    marker = work / "held-out-6" / "synthetic3d.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"generator": 0}))
    with pytest.raises(SystemExit, match="was begun with generator=0, and now generator="):
        transfer.main(words)
    with pytest.raises(SystemExit, match="colours names a baseline"):
        transfer.main(["colours", "--quick"])
    with pytest.raises(SystemExit, match="no_such_model"):
        transfer.main(["no_such_model", "--quick"])


@pytest.mark.slow
def test_the_comparison_of_methods_reports_figures_of_each_method(tmp_path):
    command = [sys.executable, BENCHMARKS / "learning.py", "--quick", "--jobs", "2", "--out", tmp_path / "a folder"]
    command += ["--methods", "dino", "pass", "--starts", "random", "dino_parts", "pass"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    methods = ["random", "dino", "pass", "random_reid", "dino_parts_reid", "pass_reid", "pixels", "colours", "chance"]
    assert figures.keys() == {
        f"{place}{method}_{metric}" for place in ("", "studio_") for method in methods for metric in ("mAP", "rank1")
    }
    assert figures["studio_colours_mAP"] > 2 * figures["studio_chance_mAP"]
