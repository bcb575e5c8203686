"""The loss of PASS: the official step, its definition written out as 44 cross-entropies, and the chunked path."""

from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.checkpoints.convert import convert_state_dict
from passreid_models.pretrain.chunked import chunked_cross_entropies
from passreid_models.pretrain.heads import ProjectionHead
from passreid_models.pretrain.loss import PASSLoss, mean_logits, mean_of_pairs, num_pairs
from passreid_models.pretrain.network import PASSNetwork, Projections
from passreid_models.pretrain.optim import update_teacher
from passreid_models.schedules import linear_epochs
from tests import GOLDEN

KINDS = ("cls", "pt1", "pt2", "pt3")
PATHS = ("plain", "chunked")
SIZES = [(parts, local_views) for parts in range(5) for local_views in (0, 1, 3)]  # P, local views an area


def compute(path: str, criterion: PASSLoss, student: Projections, teacher: Projections, temp: float = 0.05) -> Tensor:
    if path == "chunked":
        return criterion.chunked(student, teacher, temp, chunk=1)[0]
    return criterion(student.logits(), teacher.logits(), temp)


def terms_of(path: str, criterion: PASSLoss, student: Projections, teacher: Projections) -> list[Tensor]:
    if path == "chunked":
        return criterion.chunked(student, teacher, 0.05, chunk=2)[1]
    return criterion.pairs(student.logits(), teacher.logits(), 0.05)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Assert that the largest difference is within ``tolerance`` of the largest entry."""
    assert ours.shape == expected.shape, name
    error = (ours - expected).abs().max().item() / expected.abs().max().item()
    assert error <= tolerance, f"{name}: {error:.1e} of the largest entry"


# ---- Official values


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pretrain_step.safetensors")


def head_names(kind: str) -> dict[str, str]:
    """Our names of a head's tensors, by upstream's."""
    mlp = {f"head.mlp_{kind}.{i}.{p}": f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}
    return mlp | {f"head.last_layer_{kind}.weight_{p}": f"last_layer.weight_{p}" for p in "gv"}


def network(golden: dict[str, Tensor], who: str) -> PASSNetwork:
    upstream = {k.removeprefix(f"{who}."): v for k, v in golden.items() if k.startswith(f"{who}.")}
    backbone = timm.create_model("pass_vit_small_patch16", embed_dim=32, depth=2, num_heads=2)
    backbone.load_state_dict(convert_state_dict(upstream).backbone)
    net = PASSNetwork(backbone, num_prototypes=64, hidden_dim=64, bottleneck_dim=32)
    for head, kind in zip(net.heads, KINDS, strict=True):
        head.load_state_dict({ours: upstream[name] for name, ours in head_names(kind).items()})
    return net


@pytest.fixture(scope="module")
def student(golden) -> PASSNetwork:
    return network(golden, "student")


@pytest.fixture(scope="module")
def seen_by_student(golden, student) -> Projections:
    return student(golden["views.global"].float(), golden["views.local"].float())


@pytest.fixture(scope="module")
def seen_by_teacher(golden) -> Projections:
    with torch.no_grad():
        return network(golden, "teacher")(golden["views.global"].float())


@pytest.fixture
def criterion(golden) -> PASSLoss:
    criterion = PASSLoss(64)
    criterion.centers.copy_(torch.cat([golden[f"centers_before.center_{kind}"] for kind in KINDS]))
    return criterion


def test_every_output_of_the_teachers_heads_is_the_official_one(golden, seen_by_teacher):
    for z, token in zip(seen_by_teacher.logits(), ("cls", "part1", "part2", "part3"), strict=True):
        assert_near(z.flatten(0, 1), golden[f"teacher_out.{token}"], 1e-5, token)


def test_every_output_of_the_students_heads_is_the_official_one(golden, seen_by_student):
    cls, *parts = (z.detach() for z in seen_by_student.logits())
    assert [len(z) for z in (cls, *parts)] == [11, 5, 5, 5]
    assert_near(cls[:2].flatten(0, 1), golden["student_global_out.cls"], 1e-5, "cls")
    for k, part in enumerate(parts, 1):
        area = slice(3 * k - 1, 3 * k + 2)  # of the 2 + 9 views
        assert_near(part[:2].flatten(0, 1), golden[f"student_global_out.part{k}"], 1e-5, f"part {k}")
        assert_near(cls[area].flatten(0, 1), golden[f"student_local_out.area{k}.cls"], 1e-5, f"cls, area {k}")
        assert_near(part[2:].flatten(0, 1), golden[f"student_local_out.area{k}.part"], 1e-5, f"part, area {k}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_loss_is_the_official_one(golden, criterion, seen_by_student, seen_by_teacher, path, epoch):
    loss = compute(path, criterion, seen_by_student, seen_by_teacher, linear_epochs(epoch, 3, 0.04, 0.07))
    torch.testing.assert_close(loss.detach(), golden[f"loss.epoch{epoch}"], rtol=1e-6, atol=0)


def folded(gradients: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Official gradients by our names: those of the folded tokens once by the tokens, once by the positions."""
    tokens = {"cls_token", "part_token1", "part_token2", "part_token3"}
    positions = {"cls_pos", "part1_pos", "part2_pos", "part3_pos"}
    for left_out in (positions, tokens):
        kept = {k: v * (k.removeprefix("backbone.") not in left_out) for k, v in gradients.items()}
        yield {f"backbone.{k}": v for k, v in convert_state_dict(kept).backbone.items()}


@pytest.mark.parametrize("path", PATHS)
def test_every_gradient_is_the_official_one(golden, criterion, student, seen_by_teacher, path):
    official = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    assert len(official) == 65
    student.zero_grad()
    views = student(golden["views.global"].float(), golden["views.local"].float())
    compute(path, criterion, views, seen_by_teacher, linear_epochs(1, 3, 0.04, 0.07)).backward()
    ours = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}

    heads = {}
    for i, kind in enumerate(KINDS):
        names = {f"heads.{i}.{own}": name for name, own in head_names(kind).items() if name in official}
        heads |= {k.replace("weight_v", "parametrizations.weight.original1"): official[v] for k, v in names.items()}
    for backbone in folded(official):
        assert ours.keys() == backbone.keys() | heads.keys()
        for name, expected in (backbone | heads).items():
            assert_near(ours[name], expected, 1e-5, name)
    assert len(ours) == 65 - 6  # CLS with its position is one of ours, the parts with theirs another


def test_gains_of_the_last_layers_have_no_gradient_as_in_the_official_code(golden, student):
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == [f"heads.{i}.last_layer.parametrizations.weight.original0" for i in range(4)]
    assert not any("weight_g" in name for name in golden if name.startswith("grad."))


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_the_centers_after_an_update_are_the_official_ones(golden, criterion, seen_by_teacher, kind):
    criterion.update_centers(seen_by_teacher.logits() if kind == "logits" else seen_by_teacher)
    for ours, kind in zip(criterion.centers, KINDS, strict=True):
        assert_near(ours, golden[f"centers_after.center_{kind}"][0], 1e-6, kind)


# ---- The network with any number of parts


@pytest.mark.parametrize("parts", range(5))
@pytest.mark.parametrize("local_views", [None, 0, 1, 3])
def test_views_in_one_call_give_what_each_gives_alone_and_in_the_order_of_the_areas(parts, local_views):
    torch.manual_seed(0)
    net = PASSNetwork(timm.create_model("test_pass_vit", num_parts=parts), 16, 8, 4)
    views = torch.randn(2, 2, 3, 64, 32)
    local = None if local_views is None else torch.randn(max(parts, 1) * local_views, 2, 3, 32, 16)
    expected = [[net.backbone.forward_views(view)[:, t] for view in views] for t in range(1 + parts)]
    for i, view in enumerate([] if local is None else local):
        if parts:
            area = i // local_views
            cls, part = net.backbone.forward_views(view, torch.full((2,), area)).unbind(1)
            expected[1 + area].append(part)
        else:
            cls = net.backbone.forward_views(view)[:, 0]
        expected[0].append(cls)
    out = net(views, local)
    assert len(out.features) == len(out.prototypes) == 1 + parts
    for z, head, tokens in zip(out.logits(), net.heads, expected, strict=True):
        torch.testing.assert_close(z, head(torch.stack(tokens)), rtol=1e-5, atol=1e-5)


# ---- The definition, written out


def projections(parts: int, local_views: int, seed: int, student: bool = True, batch: int = 9) -> Projections:
    """Random features of 6 dimensions and 24 prototypes; CLS sees the local views of all areas."""
    generator = torch.Generator().manual_seed(seed)
    views = [2] * (1 + parts)
    if student:
        views = [2 + max(parts, 1) * local_views] + [2 + local_views] * parts

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1).requires_grad_(student)

    return Projections([unit(v, batch, 6) for v in views], [unit(24, 6) for _ in views])


def make(parts: int, local_views: int) -> tuple[PASSLoss, Projections, Projections]:
    criterion = PASSLoss(24, parts)
    criterion.centers.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return criterion, projections(parts, local_views, 0), projections(parts, local_views, 1, student=False)


def written_out(criterion: PASSLoss, student: Projections, teacher: Projections, temp: float = 0.05) -> list[Tensor]:
    terms = []
    for z, target, center in zip(student.logits(), teacher.logits(), criterion.centers, strict=True):
        for i in range(len(target)):
            for v in range(len(z)):
                if v != i:
                    q = F.softmax((target[i] - center) / temp, dim=-1)
                    terms.append(F.cross_entropy(z[v] / 0.1, q))
    return terms


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("parts", "local_views"), SIZES)
def test_the_loss_is_the_mean_cross_entropy_of_all_pairs_of_a_global_and_another_view(path, parts, local_views):
    setting = make(parts, local_views)
    expected, terms = written_out(*setting), terms_of(path, *setting)
    assert sum(map(num_pairs, terms)) == len(expected)
    off_diagonal = [t[i, v] for t in terms for i in range(2) for v in range(t.shape[1]) if i != v]
    torch.testing.assert_close(torch.stack(off_diagonal), torch.stack(expected), rtol=1e-5, atol=0)
    assert all(t.diagonal().eq(0).all() for t in terms)
    torch.testing.assert_close(compute(path, *setting), torch.stack(expected).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean_of_pairs(terms), torch.stack(expected).mean(), rtol=1e-5, atol=0)


def test_the_published_setting_has_44_terms():
    terms = terms_of("plain", *make(3, 3))
    assert [num_pairs(t) for t in terms] == [20, 8, 8, 8]
    assert sum(int((t != 0).sum()) for t in terms) == 44


# ---- Properties


@pytest.mark.parametrize("path", PATHS)
def test_the_order_of_the_samples_does_not_count_but_must_be_the_same_for_student_and_teacher(path):
    criterion, student, teacher = make(3, 3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = [Projections([x[:, order] for x in p.features], p.prototypes) for p in (student, teacher)]
    loss = compute(path, criterion, student, teacher)
    torch.testing.assert_close(compute(path, criterion, *permuted), loss, rtol=1e-6, atol=0)
    assert (compute(path, criterion, student, permuted[1]) - loss).abs() > 1e-2


@pytest.mark.parametrize("token", range(4))
def test_a_constant_added_to_the_logits_of_a_view_changes_nothing(token):
    criterion, student, teacher = make(3, 3)
    z, target = student.logits(), teacher.logits()
    loss = criterion(z, target, 0.05)
    for view in range(2):
        for logits in (z, target):
            logits[token] = logits[token].clone()
            logits[token][view] += torch.linspace(-3, 3, 9)[:, None]  # another one for each sample
    torch.testing.assert_close(criterion(z, target, 0.05), loss, rtol=1e-6, atol=0)
    z[token][1, :, 0] += 3  # not a constant
    assert (criterion(z, target, 0.05) - loss).abs() > 1e-2


def test_the_loss_is_the_entropy_of_the_teacher_when_all_agree_and_more_when_not():
    criterion, student, teacher = make(3, 3)
    same = [z[:1].expand(2, -1, -1) for z in teacher.logits()]  # both global views alike
    logits = [(z[:1] - c) * 0.1 / 0.05 for z, c in zip(same, criterion.centers, strict=True)]
    agreeing = [z.expand(len(x), -1, -1) for z, x in zip(logits, student.features, strict=True)]
    q = [F.softmax(z / 0.1, dim=-1) for z in logits]
    entropies = torch.stack([-(p * p.log()).sum(-1).mean() for p in q])
    expected = (entropies * torch.tensor([20, 8, 8, 8])).sum() / 44
    torch.testing.assert_close(criterion(agreeing, same, 0.05), expected, rtol=1e-5, atol=0)
    assert criterion(student.logits(), same, 0.05) > expected + 0.1
    for token in range(4):
        moved = list(agreeing)
        moved[token] = agreeing[token] + torch.linspace(-0.1, 0.1, 24)
        assert criterion(moved, same, 0.05) > expected + 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_the_teacher_gets_no_gradient(path):
    criterion, student, teacher = make(2, 1)
    for x in (*teacher.features, *teacher.prototypes):
        x.requires_grad_()
    compute(path, criterion, student, teacher).backward()
    assert all(x.grad is None for x in (*teacher.features, *teacher.prototypes))
    assert all(x.grad.any() for x in (*student.features, *student.prototypes))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("token", "view"), [(0, 1), (0, 10), (2, 0), (3, 4)])
def test_nan_in_one_feature_of_the_student_is_in_the_terms_of_its_view_alone(path, token, view):
    criterion, student, teacher = make(3, 3)
    with torch.no_grad():
        student.features[token][view, 4, 0] = torch.nan
    for i, terms in enumerate(terms_of(path, criterion, student, teacher)):
        expected = torch.zeros_like(terms, dtype=torch.bool)
        if i == token:
            expected[:, view] = True
            expected.fill_diagonal_(False)
        assert torch.equal(terms.isnan(), expected)
    assert compute(path, criterion, student, teacher).isnan()


def test_centers_move_by_a_tenth_towards_the_mean_logits():
    criterion = PASSLoss(2, num_parts=1)
    criterion.centers.copy_(torch.tensor([[10.0, 0.0], [1.0, 1.0]]))
    cls = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[4.0, 5.0], [2.0, 1.0]]])  # mean (2, 2)
    criterion.update_centers([cls, torch.ones(2, 2, 2)])
    torch.testing.assert_close(criterion.centers, torch.tensor([[9.2, 0.2], [1.0, 1.0]]))
    assert list(criterion.state_dict()) == ["centers"]


# ---- The chunked path


def gradients(loss: Tensor, student: Projections) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*student.features, *student.prototypes]))


@pytest.mark.parametrize("chunk", [1, 3, 8, 20])
@pytest.mark.parametrize(("parts", "local_views"), [(0, 3), (1, 1), (3, 3), (3, 0)])
def test_the_chunked_path_gives_the_loss_terms_and_gradients_of_the_plain_one(chunk, parts, local_views):
    criterion, student, teacher = make(parts, local_views)
    plain = criterion(student.logits(), teacher.logits(), 0.05)
    chunked, terms = criterion.chunked(student, teacher, 0.05, chunk)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)
    for ours, expected in zip(terms, criterion.pairs(student.logits(), teacher.logits(), 0.05), strict=True):
        assert_near(ours, expected, 1e-5)
        assert not ours.requires_grad
    for ours, expected in zip(gradients(3 * chunked, student), gradients(3 * plain, student), strict=True):
        assert ours.dtype == torch.float32
        assert_near(ours, expected, 1e-5)


def test_inside_autocast_the_plain_path_computes_in_float32():
    criterion, student, teacher = make(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, target = student.logits(), teacher.logits()
        inside = criterion(z, target, 0.05)
    assert {x.dtype for x in (*z, *target)} == {torch.bfloat16}
    assert inside.dtype == torch.float32
    assert torch.equal(inside, criterion([x.float() for x in z], [x.float() for x in target], 0.05))


def test_inside_autocast_the_chunked_path_agrees_with_the_plain_one():
    criterion, student, teacher = make(3, 3)
    exact = criterion(student.logits(), teacher.logits(), 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = criterion.chunked(student, teacher, 0.05, chunk=4)[0]
        plain = criterion(student.logits(), teacher.logits(), 0.05)
    assert chunked.dtype == torch.float32
    assert abs(chunked / exact - 1) > 2e-6  # the logits are of bfloat16, or this would prove nothing
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(chunked, exact, rtol=2**-8, atol=0)
    for ours, expected in zip(gradients(chunked, student), gradients(exact, student), strict=True):
        assert ours.dtype == torch.float32
        assert_near(ours, expected, 2**-5)


@pytest.mark.parametrize("num_prototypes", [4096, 65536])
def test_in_float16_gradients_of_many_prototypes_keep_their_digits(num_prototypes):
    generator = torch.Generator().manual_seed(0)
    x, y = (0.3 * F.normalize(torch.randn(v, 4, 64, generator=generator), dim=-1) for v in (5, 2))
    w, u = (F.normalize(torch.randn(num_prototypes, 64, generator=generator), dim=-1) for _ in range(2))
    results = []
    for enabled in (True, False):
        x, w = (t.detach().requires_grad_() for t in (x, w))
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            center = torch.zeros(num_prototypes)
            loss, _ = chunked_cross_entropies(x, (w, None), y, (u, None), center, 0.1, 0.04, chunk=4)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for half, full in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert not torch.equal(half, full)
        assert (half - full).norm() < 2**-9 * full.norm()  # of 1 / 65536 as it is float16 keeps 8 bits, of 11


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_inside_autocast_centers_move_in_float32(kind):
    criterion, _, teacher = make(3, 3)
    other = PASSLoss(24)
    other.load_state_dict(criterion.state_dict())
    outputs = teacher.logits() if kind == "logits" else teacher
    criterion.update_centers(outputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.update_centers(outputs)
    assert torch.equal(other.centers, criterion.centers)


def test_centers_are_updated_before_the_teacher_or_the_order_is_refused():
    torch.manual_seed(0)
    networks = [PASSNetwork(timm.create_model("test_pass_vit"), 24, 16, 8) for _ in range(2)]
    with torch.no_grad():
        features = networks[0](torch.randn(2, 2, 3, 64, 32))
    logits, right, wrong = features.logits(), PASSLoss(24), PASSLoss(24)
    right.update_centers(features)
    update_teacher(networks[0].parameters(), networks[1].parameters(), 0.5)
    with pytest.raises(ValueError, match="call update_centers before update_teacher"):
        wrong.update_centers(features)
    wrong.update_centers(logits)  # these hold what the teacher was
    torch.testing.assert_close(wrong.centers, right.centers)


def test_a_second_backward_of_the_chunked_path_is_refused():
    criterion, student, teacher = make(1, 1)
    loss = criterion.chunked(student, teacher, 0.05)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_the_chunked_path_computes_no_gradients_where_none_are_wanted():
    criterion, student, teacher = make(3, 3)
    expected = criterion.chunked(student, teacher, 0.05)[0]
    with torch.no_grad():
        loss = criterion.chunked(student, teacher, 0.05)[0]
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


# ---- Errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("of_student", "of_teacher"), [(2, 3), (3, 2), (2, 2), (0, 3)])
def test_outputs_of_another_number_of_tokens_are_refused_with_both_numbers(path, of_student, of_teacher):
    student, teacher = projections(of_student, 1, 0), projections(of_teacher, 1, 1, student=False)
    message = rf"expected outputs of 4 kinds .* got {1 + of_student} of the student and {1 + of_teacher} of the teacher"
    with pytest.raises(ValueError, match=message):
        compute(path, PASSLoss(24), student, teacher)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_less_than_one_sample_is_refused(chunk):
    criterion, student, teacher = make(1, 1)
    with pytest.raises(ValueError, match=f"chunk must be 1 sample or more, got {chunk}"):
        criterion.chunked(student, teacher, 0.05, chunk)


def test_the_chunked_path_takes_the_weight_norm_along_with_gradients_of_directions_and_gains():
    torch.manual_seed(0)
    heads = [ProjectionHead(6, num_prototypes=10, hidden_dim=8, bottleneck_dim=5, norm_last_layer=False) for _ in "ab"]
    for head in heads:
        torch.nn.init.uniform_(head.last_layer.parametrizations.weight.original0, 0.5, 2.0)
    (student, teacher), x, y = heads, torch.randn(5, 3, 6), torch.randn(2, 3, 6)
    criterion = PASSLoss(10, num_parts=0)
    plain = criterion([student(x)], [teacher(y)], 0.07)
    chunked, _ = criterion.chunked(projected(student, x), projected(teacher, y), 0.07, chunk=2)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean_logits(projected(teacher, y)), mean_logits([teacher(y)]))
    torch.testing.assert_close(projected(student, x).logits()[0], student(x))
    names, parameters = zip(*student.named_parameters(), strict=True)
    ours, expected = (torch.autograd.grad(loss, parameters) for loss in (chunked, plain))
    assert "last_layer.parametrizations.weight.original0" in names  # the gains
    for gradient, expected_gradient in zip(ours, expected, strict=True):
        assert_near(gradient, expected_gradient, 1e-5)


def projected(head: ProjectionHead, x: torch.Tensor) -> Projections:
    prototypes, gains = head.factors()
    return Projections([head.features(x)], [prototypes], [gains])
