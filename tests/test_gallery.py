"""Gallery: search by name, unknown persons, removal, faiss, threads, and the file that it is kept in."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import passreid_models
from passreid_models.embed import Embedder, save_features
from passreid_models.gallery import UNKNOWN, Gallery
from passreid_models.retrieval import open_set, rank
from passreid_models.synthetic import SyntheticPersons


@pytest.fixture(scope="module")
def embed() -> Embedder:
    torch.manual_seed(0)
    return Embedder(timm.create_model("test_pass_vit"), device="cpu", workers=2)


@pytest.fixture(scope="module")
def persons() -> list[Image.Image]:
    data = SyntheticPersons(3, images_per_id=2, cameras=2, seed=3, size=(80, 40))
    return [data[i][0] for i in range(len(data))]


def random(count: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def numbered(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


def filled(x: Tensor, names: list[str] | None = None, **options: Any) -> Gallery:
    gallery = Gallery(**options)
    gallery.add(names or numbered(len(x)), x)
    return gallery


def by_hand(names: list[str], x: Tensor, query: Tensor) -> list[list[tuple[str, float]]]:
    """Every name with the cosine of its most similar image, in descending order."""
    cosines = F.normalize(query.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    ranked = []
    for row in cosines:
        best = {name: max(float(s) for n, s in zip(names, row, strict=True) if n == name) for name in names}
        ranked.append(sorted(best.items(), key=lambda item: -item[1]))
    return ranked


# ---- Search


def test_hits_of_single_images_are_those_of_rank():
    x, query = random(50), random(7, seed=1)
    names, similarities = filled(x).search(query, topk=5)
    expected = rank(query, x, topk=5)
    assert torch.equal(similarities, expected.similarities)
    assert names == [[f"n{i}" for i in row] for row in expected.indices.tolist()]


@pytest.mark.parametrize("faiss", ["", "Flat"])
@pytest.mark.parametrize("counts", [[1] * 9, [40, 1, 1, 3, 2], [5] * 6, [1, 60]])
def test_a_name_is_found_once_by_its_most_similar_image(counts, faiss):
    names = [f"n{i}" for i, count in enumerate(counts) for _ in range(count)]
    centres = random(len(counts))
    x = centres.repeat_interleave(torch.tensor(counts), 0) + 0.2 * random(len(names), seed=1)
    query = torch.cat([centres, random(5, seed=2)])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(3)).tolist()
    gallery = filled(x[order], [names[i] for i in order], faiss=faiss)
    for topk in (1, 2, len(counts)):
        found, similarities = gallery.search(query, topk)
        expected = by_hand(names, x, query)
        assert found == [[name for name, _ in row[:topk]] for row in expected]
        assert np.allclose(similarities, [[s for _, s in row[:topk]] for row in expected], atol=1e-6)


@pytest.mark.parametrize("faiss", ["", "Flat"])
def test_many_queries_are_searched_in_groups_that_fit_into_the_memory(monkeypatch, faiss):
    names, x, query = [f"n{i % 7}" for i in range(60)], random(60), random(23, seed=1)
    expected = filled(x, names, faiss=faiss).search(query, 4)
    monkeypatch.setattr("passreid_models.retrieval.similarity.CPU_CHUNK", 12 * 36 * 5)
    found = filled(x, names, faiss=faiss).search(query, 4)
    assert found.names == expected.names
    assert torch.allclose(found.similarities, expected.similarities, atol=1e-6)


def test_images_are_embedded_and_one_image_is_one_query(embed, persons, tmp_path):
    gallery = Gallery(embed)
    gallery.add(["a", "a", "b"], persons[:3])
    gallery.add("c", np.asarray(persons[4]))
    persons[5].save(tmp_path / "c2.png")
    gallery.add("c", tmp_path / "c2.png")
    assert (len(gallery), gallery.names) == (5, ["a", "a", "b", "c", "c"])
    assert torch.allclose(gallery.descriptors, embed([persons[i] for i in (0, 1, 2, 4, 5)]), atol=1e-6)
    names, similarities = gallery.search(persons[2], topk=2)
    assert names[0][0] == "b"
    assert similarities.shape == (1, 2)
    assert similarities[0, 0] == pytest.approx(1, abs=1e-5)
    assert gallery.search(embed(persons[2]), topk=2).names == names


@pytest.mark.parametrize("faiss", ["", "Flat"])
def test_descriptors_of_a_multi_neck_are_compared_by_euclidean_distance(persons, faiss):
    torch.manual_seed(0)
    embed = Embedder(timm.create_model("test_pass_vit", neck="multi"), device="cpu")
    gallery = Gallery(embed, faiss=faiss)
    gallery.add(numbered(4), persons[:4])
    x = embed(persons)
    names, similarities = gallery.search(x[4:], topk=4)
    expected = -(torch.cdist(x[4:].double(), x[:4].double()) ** 2)
    assert torch.allclose(similarities.double(), expected.sort(descending=True).values, atol=1e-4)
    assert names == [[f"n{i}" for i in row] for row in expected.argsort(descending=True).tolist()]


def test_equal_similarities_are_ordered_by_when_the_names_were_added():
    x = random(1).repeat(6, 1)
    gallery = filled(x, ["e", "b", "e", "d", "a", "b"])
    assert gallery.search(x[0], topk=4).names == [["e", "b", "d", "a"]]


@pytest.mark.parametrize("topk", [3, 10**9, 10**30])
@pytest.mark.parametrize("faiss", ["", "Flat"])
def test_hits_are_all_names_where_there_are_fewer_and_one_unknown_of_an_empty_gallery(embed, persons, faiss, topk):
    gallery = Gallery(embed, faiss=faiss)
    names, similarities = gallery.search(persons[0], topk)
    assert names == [[UNKNOWN]]
    assert similarities.tolist() == [[-torch.inf]]
    gallery.add(["a", "b", "a"], persons[:3])
    names, similarities = gallery.search(persons[:2], topk)
    assert names == [["a", "b"], ["b", "a"]]
    assert similarities.isfinite().all()
    assert gallery.search([], topk).names == []
    assert gallery.search([], topk).similarities.shape == (0, 2)


def test_faiss_finds_what_the_exact_search_finds_and_an_approximate_index_what_is_near():
    x, query = random(400, 32), random(20, 32, seed=1)
    exact = filled(x).search(query, 10)
    flat = filled(x, faiss="Flat").search(query, 10)
    assert flat.names == exact.names
    assert torch.allclose(flat.similarities, exact.similarities, atol=1e-6)
    near = filled(x, faiss="IVF8,Flat").search(x, 3)
    assert [row[0] for row in near.names] == numbered(400)
    assert (near.similarities[:, 0] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("queries", [1, 40])  # faiss takes a matrix product for 20 and more
@pytest.mark.parametrize("kind", ["copies", "two names of an image", "equal similarities of other descriptors"])
def test_faiss_orders_equal_similarities_as_the_exact_search(metric, queries, kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "copies":
        x = random(30, 37)[torch.randint(0, 10, (300,), generator=generator)]
    elif kind == "two names of an image":
        x = torch.cat([random(50, 37), random(50, 37)])
    else:  # sums of a few halves are exact in any order
        x = torch.eye(16)[torch.rand(300, 16, generator=generator).argsort(dim=1)[:, :4]].sum(dim=1) / 2
    query = (x[:40] if kind != "copies" else random(40, 37, seed=1))[-queries:]
    for names in (numbered(len(x)), [f"n{i % 23}" for i in range(len(x))]):
        exact, flat = filled(x, names, metric=metric), filled(x, names, metric=metric, faiss="Flat")
        for topk in (1, 2, 7, len(x)):
            expected, found = exact.search(query, topk), flat.search(query, topk)
            assert found.names == expected.names
            assert torch.allclose(found.similarities, expected.similarities, atol=1e-4)


def test_an_approximate_index_finds_all_names_of_an_image_in_the_order_of_adding():
    x = random(400, 32)
    gallery = filled(
        torch.cat([x, x[:200]]), [*numbered(400), *(f"copy of n{i}" for i in range(200))], faiss="IVF8,Flat"
    )
    assert gallery.search(x[:200], 2).names == [[f"n{i}", f"copy of n{i}"] for i in range(200)]


@pytest.mark.parametrize("length", [1e-18, 1e15])
def test_faiss_compares_very_short_and_very_long_descriptors_as_the_exact_search(length):
    x = random(30)
    hits = filled(length * x, faiss="Flat").search(length * x[:5], 4)
    assert hits.names == filled(x).search(x[:5], 4).names
    assert torch.allclose(hits.similarities, filled(x).search(x[:5], 4).similarities, atol=1e-6)


@pytest.mark.parametrize(("description", "word"), [("Flatt", "Flatt"), ("IVF64,Flat", "training points")])
def test_an_index_that_faiss_cannot_make_is_one_sentence(description, word):
    with pytest.raises(ValueError, match=rf"^faiss: '{description}': .*{word}") as error:
        filled(random(5), faiss=description).search(random(1))
    assert "\n" not in str(error.value)


def test_without_faiss_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install .*\[faiss\]"):
        Gallery(faiss="Flat")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="faiss searches on the CPU"):
        Gallery(faiss="Flat", device="cuda")


# ---- Unknown persons


def test_a_hit_is_accepted_where_its_similarity_reaches_the_threshold():
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    gallery = filled(x)
    similarity = float(gallery.search(x[0], 3).similarities[0, 1])
    assert gallery.search(x[0], 3, threshold=similarity).names == [["n0", "n1", UNKNOWN]]
    above = float(np.nextafter(np.float32(similarity), np.float32(1)))
    names, similarities = gallery.search(x[0], 3, threshold=above)
    assert names == [["n0", UNKNOWN, UNKNOWN]]
    assert similarities.tolist() == gallery.search(x[0], 3).similarities.tolist()
    between = similarity + 1e-10  # not in float32
    assert gallery.search(x[0], 3, threshold=between).names == [["n0", UNKNOWN, UNKNOWN]]
    assert gallery.search(x[0], 3, threshold=-np.inf).names == gallery.search(x[0], 3).names


def test_the_rates_of_open_set_identification_hold_for_the_search_at_its_threshold():
    pids = np.arange(40) % 20
    centres = F.normalize(random(20), dim=1)
    x = centres[pids] + 0.25 * random(40, seed=1)
    query_pids, query = np.arange(20), centres + 0.25 * random(20, seed=2)
    in_gallery = pids < 10
    gallery = Gallery()
    gallery.add([f"p{pid}" for pid in pids[in_gallery]], x[in_gallery], pids[in_gallery])
    result = open_set(query, gallery.descriptors, query_pids, gallery.pids)
    threshold = result.threshold(fpir=0.2)
    names = [row[0] for row in gallery.search(query, 1, threshold).names]
    assert np.mean([name != UNKNOWN for name in names[10:]]) == pytest.approx(result.fpir(threshold)) == 0.2
    right = [name == f"p{pid}" for name, pid in zip(names[:10], range(10), strict=True)]
    assert 0 < np.mean(right) == pytest.approx(1 - result.fnir(threshold))


@pytest.mark.parametrize("threshold", [float("nan"), np.float32("nan"), "0.5", [0.5]])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a number or None"):
        filled(random(2)).search(random(1), threshold=threshold)


@pytest.mark.parametrize("topk", [0, -1, 1.5, "3"])
def test_topk_is_a_whole_number_of_one_or_more(topk):
    with pytest.raises(ValueError, match="topk must be"):
        filled(random(2)).search(random(1), topk=topk)


# ---- Add and remove


def test_adding_to_a_name_gives_it_further_images_and_remove_takes_all_of_them():
    x = random(5)
    gallery = filled(x[:3], ["a", "b", "a"])
    assert gallery.search(x[3], 3).names[0].count("a") == 1
    gallery.add("b", x[3:])
    assert gallery.names == ["a", "b", "a", "b", "b"]
    assert gallery.search(x[3], 1).names == [["b"]]
    gallery.remove("b")
    assert gallery.names == ["a", "a"]
    assert "b" not in gallery
    assert torch.equal(gallery.descriptors, x[[0, 2]])
    assert gallery.search(x[3], 1).names == [["a"]]
    gallery.remove(["a"])
    assert len(gallery) == 0
    assert gallery.search(x[3], 1).names == [[UNKNOWN]]
    gallery.add("b", x[3])
    assert gallery.search(x[3], 1).names == [["b"]]


def test_removing_a_name_that_is_not_there_removes_nothing():
    gallery = filled(random(3))
    with pytest.raises(ValueError, match="not in the gallery: x, y"):
        gallery.remove(["n0", "y", "x"])
    assert len(gallery) == 3


def test_an_empty_gallery_of_which_nothing_is_removed_takes_descriptors():
    gallery, x = Gallery(), random(2)
    gallery.remove([])
    gallery.add(["a", "b"], x)
    assert torch.equal(gallery.descriptors, x)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(np.float64),
        lambda x: x.numpy().astype(">f4"),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.double().requires_grad_(),
        lambda x: list(x),
        lambda x: list(x.numpy()),
        lambda x: x.tolist(),
        lambda x: tuple(map(tuple, x.tolist())),
    ],
)
def test_descriptors_of_every_kind_are_kept_as_float32(convert):
    x = random(4)
    gallery = Gallery()
    gallery.add(numbered(4), convert(x))
    assert torch.equal(gallery.descriptors, x)
    assert gallery.search(convert(x), 1).names == [[name] for name in numbered(4)]
    assert gallery.search(convert(x)[1], 1).names == [["n1"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_descriptors_are_kept_as_float32(dtype):
    x = random(4).to(dtype)
    for given in (x, *([x.numpy()] if dtype == torch.float16 else [])):
        gallery = Gallery()
        gallery.add(numbered(4), given)
        assert gallery.descriptors.dtype == torch.float32
        assert torch.equal(gallery.descriptors, x.float())


def test_what_the_caller_does_to_descriptors_later_does_not_change_the_gallery():
    x = random(3)
    kept, gallery = x.clone(), filled(x)
    x.zero_()
    assert torch.equal(gallery.descriptors, kept)


def test_descriptors_that_embed_wrote_can_be_added(tmp_path):
    x = random(3)
    save_features(tmp_path / "d.npz", ["a", "b", "c"], x)
    file = np.load(tmp_path / "d.npz")
    gallery = Gallery()
    gallery.add(file["names"], file["descriptors"])
    assert gallery.names == ["a", "b", "c"]
    gallery.save(tmp_path / "gallery.safetensors")
    assert Gallery.load(tmp_path / "gallery.safetensors").names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "pids", "message"),
    [
        (["a", "b"], None, "2 names for 3 images"),
        (["a"], None, "1 names for 3 images"),
        (["a", 7, "c"], None, "a name must be a text that is not empty, got 7"),
        (["a", "", "c"], None, "a name must be a text that is not empty, got ''"),
        (["a", UNKNOWN, "c"], None, "'unknown' stands for hits that are not accepted"),
        (["a", "b", "c"], [1, 2], r"pids must be 3 whole numbers, got int64 \(2,\)"),
        (["a", "b", "c"], [1, 2, 0.5], r"pids must be 3 whole numbers, got float64"),
        (["a", "b", "c"], [1, 2, 2**63], r"pids must be 3 whole numbers"),
        (["a", "b", "a"], [1, 2, 3], "a name has one identity, and a has 1 and 3"),
        (["a", "old", "c"], [1, 2, 3], "a name has one identity, and old has 5 and 2"),
    ],
)
def test_names_and_identities_that_do_not_fit_are_refused_and_nothing_is_added(names, pids, message):
    gallery = Gallery()
    gallery.add("old", random(1), 5)
    with pytest.raises(ValueError, match=message):
        gallery.add(names, random(3), pids)
    assert gallery.names == ["old"]


def test_identities_are_kept_by_image_and_are_minus_one_where_none_was_given():
    gallery = Gallery()
    gallery.add(["a", "b"], random(2), torch.tensor([3, 4]))
    gallery.add("a", random(2), 3)
    gallery.add(["c", "a"], random(2))
    assert gallery.pids.tolist() == [3, 4, 3, 3, -1, 3]
    assert gallery.pids.dtype == np.int64
    gallery.remove("b")
    assert gallery.pids.tolist() == [3, 3, 3, -1, 3]


ROWS = [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0], [torch.nan, 1.0], [torch.inf, 1.0], [1e300, 0.0]]
BAD = torch.tensor(ROWS, dtype=torch.double)


def test_zero_and_not_finite_descriptors_are_refused_by_name():
    gallery = Gallery()
    with pytest.raises(ValueError, match=r"the descriptor is zero or not finite: n1, n3, n4, n5$"):
        gallery.add(numbered(6), BAD)
    assert len(gallery) == 0
    with pytest.raises(ValueError, match="zero or not finite: row 1, row 3"):
        filled(random(2, 2)).search(BAD)


def test_descriptors_without_a_width_are_refused():
    for x in (torch.ones(1, 0), torch.ones(0)):
        with pytest.raises(ValueError, match="the descriptor is zero or not finite: a"):
            Gallery().add("a", x)


def test_with_errors_the_others_are_added_and_searched():
    errors: dict[int, str] = {3: "given before"}
    gallery = Gallery()
    gallery.add(numbered(6), BAD, list(range(6)), errors=errors)
    assert gallery.names == ["n0", "n2"]
    assert gallery.pids.tolist() == [0, 2]
    assert errors.keys() == {1, 3, 4, 5}
    assert errors[1] == "n1: the descriptor is zero or not finite"
    assert errors[3] == "given before"
    errors = {}
    names, similarities = gallery.search(BAD, 1, errors=errors)
    assert names == [["n0"], [UNKNOWN], ["n2"], [UNKNOWN], [UNKNOWN], [UNKNOWN]]
    assert similarities[:, 0].isnan().tolist() == [False, True, False, True, True, True]
    assert errors[4] == "row 4: the descriptor is zero or not finite"


def test_an_unreadable_image_is_left_out_with_errors_and_loses_all_without(embed, persons, tmp_path):
    gallery = Gallery(embed)
    images = [persons[0], tmp_path / "none.jpg", persons[2]]
    with pytest.raises(ValueError, match=r"none\.jpg: no such file"):
        gallery.add(["a", "b", "c"], images)
    assert len(gallery) == 0
    errors: dict[int, str] = {}
    gallery.add(["a", "b", "c"], images, errors=errors)
    assert gallery.names == ["a", "c"]
    assert errors[1].endswith("none.jpg: no such file")
    assert gallery.search(images, 1, errors={}).names == [["a"], [UNKNOWN], ["c"]]


def test_boxes_outside_a_frame_are_unknown_and_not_added(embed, persons):
    gallery = Gallery(embed)
    frame = Image.new("RGB", (100, 90), "gray")
    frame.paste(persons[0], (0, 5))
    errors: dict[int, str] = {}
    x = embed.crops(frame, [[0, 5, 40, 85, 0.9], [200, 0, 240, 80, 0.8]], errors=errors)
    gallery.add(["inside", "outside"], x, errors=errors)
    assert gallery.names == ["inside"]
    assert errors[1].startswith("box 1 ")
    assert gallery.search(x, 1, errors=errors).names == [["inside"], [UNKNOWN]]


def test_another_width_is_refused(embed):
    with pytest.raises(ValueError, match="16 wide, those of the gallery 128: of another model"):
        Gallery(embed).add("a", random(1))
    gallery = filled(random(2))
    with pytest.raises(ValueError, match="8 wide, those of the gallery 16"):
        gallery.add("a", random(1, 8))
    with pytest.raises(ValueError, match="8 wide, those of the gallery 16"):
        gallery.search(random(1, 8))


def test_images_need_a_model(persons):
    for images in (persons[0], persons, "a.jpg", ["a.jpg"], np.zeros((8, 4, 3), np.uint8), np.zeros((8, 4), np.uint8)):
        with pytest.raises(ValueError, match="this gallery has no model"):
            Gallery().add("a", images)


def test_names_and_identities_are_checked_before_images_are_embedded(embed, persons, tmp_path, monkeypatch):
    persons[0].save(tmp_path / "a.png")
    persons[1].save(tmp_path / "b.png")
    monkeypatch.setattr(Embedder, "__call__", lambda *a, **k: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="2 names for 3 images"):
        Gallery(embed).add(["a", "b"], [tmp_path, persons[2]])
    with pytest.raises(ValueError, match="a name must be a text"):
        Gallery(embed).add([None], [persons[2]])
    with pytest.raises(ValueError, match="a name has one identity"):
        Gallery(embed).add(["a", "a"], persons[:2], [1, 2])


def test_metric_and_device_are_checked():
    with pytest.raises(ValueError, match="metric must be 'cosine' or 'euclidean', got 'dot'"):
        Gallery(metric="dot")
    with pytest.raises(ValueError, match="device: 'nowhere'"):
        Gallery(device="nowhere")


def test_repr_tells_images_names_and_model(embed):
    gallery = Gallery(embed)
    gallery.add(["a", "a", "b"], random(3, 128))
    assert repr(gallery) == "Gallery(3 images of 2 names, test_pass_vit, cosine)"


# ---- Threads


@pytest.mark.parametrize("faiss", ["", "Flat"])
def test_threads_search_add_and_remove_at_once(embed, persons, faiss):
    gallery = Gallery(embed, faiss=faiss)
    x = random(400, 128)
    gallery.add(numbered(200), x[:200])
    gallery.add("person", persons[0])

    def change(i: int) -> None:
        gallery.add(f"n{i}", x[i])
        if i % 2:
            gallery.remove(f"n{i}")

    def look(i: int) -> tuple[str, str]:
        return gallery.search(x[i], 2).names[0][0], gallery.search(persons[0], 1).names[0][0]

    with ThreadPoolExecutor(8) as pool:
        changes, looks = [], []
        for i in range(200):
            changes.append(pool.submit(change, 200 + i))
            looks.append(pool.submit(look, i))
        for future in changes:
            future.result()
        assert [future.result() for future in looks] == [(f"n{i}", "person") for i in range(200)]
    assert len(gallery) == 201 + 100
    assert sorted(gallery.names) == sorted(["person", *numbered(200), *(f"n{i}" for i in range(200, 400, 2))])
    found = gallery.search(x[200::2], 1)
    assert [row[0] for row in found.names] == [f"n{i}" for i in range(200, 400, 2)]


def test_a_search_sees_the_gallery_as_it_was_when_it_began(embed, persons, monkeypatch):
    gallery = Gallery(embed)
    gallery.add("a", persons[0])
    embed_images = Embedder.__call__

    def slow(self: Embedder, images: Any, **options: Any) -> Any:
        gallery.add("b", x)
        gallery.remove("a")
        return embed_images(self, images, **options)

    x = embed(persons[1])
    monkeypatch.setattr(Embedder, "__call__", slow)
    assert gallery.search(persons[1], 1).names == [["a"]]
    monkeypatch.undo()
    assert gallery.search(persons[1], 1).names == [["b"]]


# ---- The file


@pytest.fixture(scope="module")
def saved(embed, persons, tmp_path_factory) -> Path:
    gallery = Gallery(embed)
    gallery.add(["Zoë", "b\ud800.jpg", "Zoë"], persons[:3], [1, 2, 1])
    path = tmp_path_factory.mktemp("gallery") / "gallery.safetensors"
    gallery.save(path)
    return path


def test_a_saved_gallery_is_the_same_when_it_is_loaded(embed, persons, saved):
    gallery = Gallery.load(saved, embed)
    assert gallery.names == ["Zoë", "b\ud800.jpg", "Zoë"]
    assert gallery.pids.tolist() == [1, 2, 1]
    assert torch.allclose(gallery.descriptors, embed(persons[:3]), atol=1e-6)
    assert gallery.search(persons[1], 1).names == [["b\ud800.jpg"]]
    gallery.add("c", persons[4])
    assert gallery.search(persons[4], 1).names == [["c"]]
    other = Gallery.load(saved)
    assert other.search(embed(persons[0]), 1).names == [["Zoë"]]


def test_saving_again_replaces_the_file_and_a_gallery_loaded_without_a_model_keeps_its_fingerprint(
    embed, saved, tmp_path
):
    gallery = Gallery.load(saved)
    gallery.remove("Zoë")
    for _ in range(2):
        gallery.save(tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    again = Gallery.load(tmp_path / "copy", embed)
    assert again.names == ["b\ud800.jpg"]
    assert torch.equal(again.descriptors, gallery.descriptors)


def test_what_becomes_of_the_file_does_not_change_a_loaded_gallery(tmp_path):
    x, path = random(3), tmp_path / "g"
    filled(x).save(path)
    gallery = Gallery.load(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(gallery.descriptors, x)


def test_empty_galleries_can_be_saved(embed, persons, tmp_path):
    Gallery().save(tmp_path / "a")
    gallery = Gallery.load(tmp_path / "a")
    gallery.add("a", random(1))
    Gallery(embed).save(tmp_path / "b")
    gallery = Gallery.load(tmp_path / "b", embed)
    gallery.add("a", persons[0])
    assert gallery.search(persons[0], 1).names == [["a"]]


def test_metric_and_faiss_of_a_loaded_gallery(tmp_path):
    x = random(20) * torch.arange(1, 21)[:, None]
    gallery = filled(x, metric="euclidean")
    gallery.save(tmp_path / "g")
    for faiss in ("", "Flat"):
        loaded = Gallery.load(tmp_path / "g", faiss=faiss)
        assert loaded.metric == "euclidean"
        assert loaded.search(x[:3] + 0.1, 3).names == gallery.search(x[:3] + 0.1, 3).names


def test_a_renamed_copy_of_the_weights_is_accepted_and_other_weights_are_refused(embed, persons, saved, tmp_path):
    passreid_models.save_pretrained(embed.model, tmp_path / "renamed")
    copy = Embedder(str(tmp_path / "renamed"), device="cpu", dtype=torch.bfloat16)
    assert Gallery.load(saved, copy).search(persons[0], 1).names == [["Zoë"]]
    torch.manual_seed(1)
    other = Embedder(timm.create_model("test_pass_vit"), device="cpu")
    with pytest.raises(
        ValueError, match=r"holds descriptors of test_pass_vit, .* of test_pass_vit: they differ in weights$"
    ):
        Gallery.load(saved, other)
    changed = Embedder(deepcopy(embed.model), device="cpu", fusion="parts")
    with pytest.raises(ValueError, match=r": they differ in fusion$"):
        Gallery.load(saved, changed)


def test_descriptors_without_a_model_are_not_taken_for_those_of_one(embed, tmp_path):
    filled(random(2, 128)).save(tmp_path / "g")
    with pytest.raises(ValueError, match="saved without a model"):
        Gallery.load(tmp_path / "g", embed)


def test_a_folder_and_a_missing_file_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: there is no such file"):
        Gallery.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        Gallery.load(tmp_path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        Gallery().save(tmp_path)


def test_a_save_that_fails_leaves_the_older_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "g"
    path.write_bytes(saved.read_bytes())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("passreid_models.gallery.save_file", full)
    with pytest.raises(OSError, match="g could not be written: No space left"):
        filled(random(2)).save(path)
    assert path.read_bytes() == saved.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["g"]


def rewritten(saved: Path, path: Path, format: str | None = None, **values: Any) -> Path:
    """A copy of a gallery with other values in its JSON, and the checksum that belongs to them."""
    from passreid_models.gallery import FORMAT, _checksum

    tensors = safetensors.torch.load_file(saved)
    content = json.dumps(json.loads(tensors["json"].numpy().tobytes()) | values).encode()
    x = tensors["descriptors"]
    metadata = {"format": format or FORMAT, "sha256": _checksum(content, x)}
    tensors["json"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "passreid gallery 2"}, "of the format 'passreid gallery 2', and this version reads"),
        ({"names": ["a", "b"]}, "3 descriptors"),
        ({"names": ["a", "b", 3]}, "a name must be a text"),
        ({"names": "abc"}, "its JSON is not that of a gallery"),
        ({"pids": [1, 2]}, "pids must be 3 whole numbers"),
        ({"pids": [1, 2, 3]}, "a name has one identity"),
        ({"pids": [1, 2, {}]}, "pids must be 3 whole numbers"),
        ({"pids": [1, 2, [3]]}, "no gallery"),
        ({"metric": "dot"}, "its JSON is not that of a gallery"),
        ({"metric": ["cosine"]}, "its JSON is not that of a gallery"),
        ({"model": 3}, "its JSON is not that of a gallery"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(saved, tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Gallery.load(rewritten(saved, tmp_path / "g", **values))
    assert str(error.value).startswith(str(tmp_path / "g"))
    assert "\n" not in str(error.value)


def test_other_files_are_no_galleries(tmp_path):
    files = {"text": b"hello", "empty": b"", "zip": b"PK\x03\x04" + b"\0" * 100, "large": b"\xff" * 8}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    save_features(tmp_path / "features.safetensors", ["a"], random(1))
    safetensors.torch.save_file({"x": random(1)}, tmp_path / "weights")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=r"is damaged, or no gallery: .+") as error:
            Gallery.load(path)
        assert "\n" not in str(error.value)


def test_a_gallery_cut_short_or_with_any_bit_flipped_is_refused_in_one_sentence(saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "g"
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(header), *rng.integers(header, len(content), 200).tolist()]
    damaged = [content[:length] for length in rng.integers(0, len(content), 40).tolist()] + [content + b"\0"]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises((ValueError, OSError)) as error:
            Gallery.load(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
