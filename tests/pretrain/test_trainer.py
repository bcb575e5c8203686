"""The training step: written out plainly, and options that must not change it."""

import math
import shutil
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.hooks import RemovableHandle

from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints.read import read_checkpoint
from passreid_models.data.sources import open_source
from passreid_models.device import pick_dtype
from passreid_models.pretrain.batches import StepSampler, ViewBatch, ViewDataset, make_loader
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.network import PASSNetwork
from passreid_models.pretrain.trainer import PretrainTrainer, schedule_values
from passreid_models.pretrain.views import Views
from passreid_models.runtime import seed_step
from passreid_models.training.trainer import NonFiniteLossError
from tests.tiny_runs import tiny

IMAGES, EPOCH_STEPS = 8, 2
DATA = f"synthetic:ids={IMAGES},images=1,cameras=1,size=64x32"
CPU = torch.device("cpu")
LAST, GAINS = "last_layer.parametrizations.weight.original1", "last_layer.parametrizations.weight.original0"


def setting(**options: Any) -> PretrainConfig:
    return tiny(DATA, Path("unused"), **{"epochs": 3, "warmup_epochs": 0, "local_views": 9, **options})


def make(**options: Any) -> PretrainTrainer:
    return PretrainTrainer(setting(**options), IMAGES, CPU)


def batches_of(config: PretrainConfig) -> list[list[ViewBatch]]:
    """Micro-batches of each step."""
    crop = config.crop(0)
    dataset = ViewDataset(open_source(config.data), crop, crop, 0, config.seed)
    steps = config.epochs * EPOCH_STEPS
    sampler = StepSampler(IMAGES, config.batch_size, steps, config.seed, accumulate=config.accumulate)
    flat = list(make_loader(dataset, sampler, 0, False))
    return [flat[i * config.accumulate : (i + 1) * config.accumulate] for i in range(steps)]


def test_the_signs_of_collapse_leave_the_statistics_of_a_stem_as_they_are(monkeypatch, batches):
    stemmed = replace(ARCHITECTURES["test_pass_vit"], conv_stem=True)
    monkeypatch.setitem(ARCHITECTURES, "test_pass_vit", stemmed)
    watched, plain = make(), make()
    monkeypatch.setattr(plain, "_inspect", lambda *args: None)
    for trainer in (watched, plain):
        run(trainer, batches[:EPOCH_STEPS])
    assert watched.indicators
    assert any("batch_norm.running_mean" in name for name, _ in watched.teacher.named_buffers())
    for (name, ours), expected in zip(watched.teacher.named_buffers(), plain.teacher.buffers(), strict=True):
        assert torch.equal(ours, expected), name


@pytest.fixture(scope="module")
def batches() -> list[list[ViewBatch]]:
    return batches_of(setting())


def run(trainer: PretrainTrainer, batches: list[list[ViewBatch]]) -> list[dict[str, float]]:
    return [trainer.training_step(micro_batches) for micro_batches in batches]


def weights(network: PASSNetwork) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in network.named_parameters()}


def without_key_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without key biases: attention does not depend on them, their gradient is rounding, Adam scales it up."""
    return {
        k: v.view(3, -1)[[0, 2]] if k.endswith("attn.qkv.bias") else v for k, v in tensors.items()
    }  # fmt: skip


def assert_close(ours: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def assert_same_run(ours: PretrainTrainer, expected: PretrainTrainer, tolerance: float) -> None:
    """Assert the same weights and centres, after steps larger than rounding."""
    for network in ("student", "teacher"):
        our_weights, expected_weights = (without_key_biases(weights(getattr(t, network))) for t in (ours, expected))
        assert_close(our_weights, expected_weights, tolerance)
        start = weights(getattr(make(), network))
        moved = [(v - start[k]).abs().max() for k, v in weights(getattr(expected, network)).items() if GAINS not in k]
        assert min(moved) > tolerance  # or this would prove nothing
    assert_close(ours.criterion.centers, expected.criterion.centers, tolerance)


# ---- The step, written out


class Plain:
    """Steps of PASS as loops over the names of parameters."""

    def __init__(self, trainer: PretrainTrainer) -> None:
        self.config = trainer.config
        self.student, self.teacher = deepcopy(trainer.student), deepcopy(trainer.teacher)
        self.criterion = PASSLoss(32)
        self.criterion.centers.copy_(trainer.criterion.centers)
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.updates: dict[str, int] = {}
        self.norms: list[float] = []

    def step(self, number: int, global_views: Tensor, local_views: Tensor) -> float:
        lr, weight_decay, momentum, temperature = schedule_values(self.config, number, EPOCH_STEPS)
        seed_step(self.config.seed, number)  # for drop path
        with torch.no_grad():
            targets = self.teacher(global_views).logits()
        logits = self.student(global_views, local_views).logits()
        terms = self.criterion.pairs(logits, targets, temperature)
        loss = torch.stack([t.sum() for t in terms]).sum() / 44
        self.student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                if not p.requires_grad or ("last_layer" in name and number < EPOCH_STEPS):
                    continue
                rows = p.grad[0] if name == "backbone.reg_token" else [p.grad]
                for row in rows:
                    self.norms.append(row.norm().item())
                    if self.config.clip and row.norm() > self.config.clip:
                        row *= self.config.clip / (row.norm() + 1e-6)
                folded = name in ("backbone.cls_token", "backbone.reg_token")
                decay = 0.0 if p.ndim == 1 else weight_decay * (0.5 if folded else 1)
                self.adamw(name, p, lr * (2 if folded else 1), decay)
            for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                p.mul_(momentum).add_(q, alpha=1 - momentum)
            means = torch.stack([z.mean((0, 1)) for z in targets])
            kept = self.config.center_momentum
            self.criterion.centers.mul_(kept).add_(means, alpha=1 - kept)
        return loss.item()

    def adamw(self, name: str, p: Tensor, lr: float, decay: float) -> None:
        p.mul_(1 - lr * decay)
        t = self.updates[name] = self.updates.get(name, 0) + 1
        self.m[name] = 0.9 * self.m.get(name, torch.zeros_like(p)) + 0.1 * p.grad
        self.v[name] = 0.999 * self.v.get(name, torch.zeros_like(p)) + 0.001 * p.grad**2
        p.sub_(lr * (self.m[name] / (1 - 0.9**t)) / ((self.v[name] / (1 - 0.999**t)).sqrt() + 1e-8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 20.0, "norm_last_layer": False},
        {"clip": 0.0, "momentum": 0.99, "center_momentum": 0.5, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 2},
    ],
    ids=["clipped", "gains", "unclipped"],
)
def test_steps_are_those_written_out_forward_clip_adamw_teacher_and_centres(batches, options):
    trainer = make(loss_chunk=0, drop_path=0.5, **options)
    plain = Plain(trainer)
    for number, micro_batches in enumerate(batches[:4]):
        before = weights(plain.student)
        expected = plain.step(number, *trainer.photometric.batch(micro_batches[0].views))
        loss = trainer.training_step(micro_batches)["loss"]
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)  # a difference of logits up to 10, in float32
        for ours, written_out in ((trainer.student, plain.student), (trainer.teacher, plain.teacher)):
            assert_close(*(without_key_biases(weights(network)) for network in (ours, written_out)), 1e-6)
        assert_close(trainer.criterion.centers, plain.criterion.centers, 1e-6)
        moved = {k: (v - before[k]).abs().max().item() for k, v in weights(plain.student).items()}
        still = {k for k, v in moved.items() if v < 1e-4}
        frozen = {k for k in moved if "last_layer" in k and (number < EPOCH_STEPS or (GAINS in k and not options))}
        assert still - frozen <= {k for k in moved if GAINS in k}
    if plain.config.clip:
        assert min(plain.norms) < plain.config.clip < max(plain.norms)  # some are clipped and some are not


@torch.no_grad()
def shorten_prototypes(student: PASSNetwork) -> None:
    """Give the prototypes large gradients: their directions stay, and so does the loss."""
    for head in student.heads:
        head.last_layer.parametrizations.weight.original1.mul_(1e-3)


def test_the_step_reports_the_loss_of_each_kind_of_token_the_schedules_and_the_norm_before_clipping(batches):
    trainer = make(drop_path=0.0)
    shorten_prototypes(trainer.student)
    student, temp = deepcopy(trainer.student), trainer.config.teacher_temp
    global_views, local_views = trainer.photometric.batch(batches[0][0].views)
    logits, targets = student(global_views, local_views).logits(), trainer.teacher(global_views).logits()
    terms = PASSLoss(32).pairs(logits, targets, temp)
    loss = sum(t.sum() for t in terms) / 44
    loss.backward()
    grads = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for k, g in grads.items() if LAST not in k]).norm().item()  # these are frozen
    metrics = trainer.training_step(batches[0])
    assert list(metrics) == [
        "loss", "loss_cls", "loss_part1", "loss_part2", "loss_part3", "lr", "weight_decay", "momentum", "teacher_temp",
        "grad_norm",
    ]  # fmt: skip
    kinds = [t.sum().item() / n for t, n in zip(terms, (20, 8, 8, 8), strict=True)]
    assert list(metrics.values())[:5] == pytest.approx([loss.item(), *kinds], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 3


def test_views_keep_their_image_and_their_place_on_the_way_through_the_photometric_part(batches):
    trainer, views = make(), batches[0][0].views
    global_views, local_views = trainer.photometric.batch(views)
    assert global_views.shape == (2, 4, 3, 64, 32)
    assert local_views.shape == (9, 4, 3, 32, 16)
    for b in range(4):
        for v in range(11):
            image = views.global_views[b, v] if v < 2 else views.local_views[b, v - 2]
            alone = trainer.photometric(image[None], views.params[b, v][None])[0]
            assert_close(global_views[v, b] if v < 2 else local_views[v - 2, b], alone, 1e-5)


def test_clip_by_norm_is_what_the_step_then_does(batches):
    by_norm, by_parameter, unclipped = (
        make(drop_path=0.0, **o) for o in ({"clip_by": "norm"}, {}, {"clip": 0.0, "clip_by": "norm"})
    )
    gradients = []
    for trainer in (by_norm, by_parameter, unclipped):
        shorten_prototypes(trainer.student)
        trainer.training_step(batches[0])
        # after one step Adam's first moment is a tenth of the gradient that it was given
        gradients.append([10 * s["exp_avg"] for s in trainer.optimizer.state.values()])
    norm = torch.stack([g.norm() for g in gradients[2]]).norm().item()
    frozen = trainer.student.heads[0].last_layer.parametrizations.weight.original1
    assert not trainer.optimizer.state[frozen]  # and it does not count in the norm of all
    factors = [(a.norm() / b.norm()).item() for a, b in zip(gradients[0], gradients[2], strict=True)]
    assert max(factors) == pytest.approx(min(factors), rel=1e-4)
    assert factors[0] == pytest.approx(3 / norm, rel=1e-4)
    assert len({round((a.norm() / b.norm()).item(), 4) for a, b in zip(gradients[1], gradients[2], strict=True)}) > 5


# ---- What moves and what does not


def test_the_last_layers_stay_in_epoch_0_and_move_after_it(batches):
    trainer = make()
    start = weights(trainer.student)
    last = [k for k in start if LAST in k]
    assert len(last) == 4
    run(trainer, batches[:EPOCH_STEPS])
    assert all(torch.equal(weights(trainer.student)[k], start[k]) for k in last)
    run(trainer, batches[EPOCH_STEPS : EPOCH_STEPS + 1])
    assert all((weights(trainer.student)[k] - start[k]).abs().max() > 1e-4 for k in last)


@pytest.mark.parametrize("epochs", [0, 2])
def test_freeze_last_layer_epochs_says_for_how_long(batches, epochs):
    trainer = make(freeze_last_layer_epochs=epochs)
    name = f"heads.0.{LAST}"
    moves = []
    for micro_batches in batches:
        before = weights(trainer.student)[name]
        trainer.training_step(micro_batches)
        moves.append(not torch.equal(weights(trainer.student)[name], before))
    assert moves == [i >= epochs * EPOCH_STEPS for i in range(len(batches))]


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_gains_of_the_prototypes_stay_at_1_with_norm_last_layer_alone(batches, norm_last_layer):
    trainer = make(norm_last_layer=norm_last_layer)
    run(trainer, batches)
    for network in (trainer.student, trainer.teacher):
        gains = [v for k, v in weights(network).items() if GAINS in k]
        assert len(gains) == 4
        assert [g.eq(1).all().item() for g in gains] == [norm_last_layer] * 4


def test_the_teacher_begins_as_the_student_gets_no_gradient_and_has_no_stochastic_depth(batches):
    trainer = make(drop_path=0.5)
    assert_close(weights(trainer.teacher), weights(trainer.student), 0)
    assert trainer.teacher.training  # SPEC 3: as upstream, which matters for the BatchNorm of a conv stem
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    views = trainer.photometric.batch(batches[0][0].views)[0]
    features = [[network(views).features[0] for _ in range(2)] for network in (trainer.teacher, trainer.student)]
    assert torch.equal(*features[0])
    assert not torch.equal(*features[1])
    run(trainer, batches[:1])
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_stochastic_depth_grows_linearly_over_the_blocks_of_the_student():
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in make(drop_path=0.3).student.backbone.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


# ---- Schedules of a run


def test_the_schedules_of_a_run_are_functions_of_the_step_alone():
    config = setting(
        epochs=20, batch_size=64, lr=5e-4, min_lr=1e-6, warmup_epochs=None, momentum=0.996, warmup_teacher_temp=0.04,
        teacher_temp=0.07, warmup_teacher_temp_epochs=4,
    )  # fmt: skip
    values = [schedule_values(config, step, 5) for step in range(100)]
    assert [v.lr for v in values[:11]] == pytest.approx([1.25e-4 * s / 9 for s in range(10)] + [1.25e-4])
    middle = 10 + 45  # of the cosine after the warm-up of a tenth of the epochs
    assert values[middle].lr == pytest.approx((1.25e-4 + 1e-6) / 2)
    assert values[50][1:3] == pytest.approx(((0.04 + 0.4) / 2, (0.996 + 1) / 2))
    assert values[0][1:3] == pytest.approx((0.04, 0.996))
    temperatures = [values[5 * epoch].teacher_temp for epoch in range(20)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, *[0.07] * 17])
    assert all(values[5 * e].teacher_temp == values[5 * e + 4].teacher_temp for e in range(20))
    whole = [schedule_values(replace(config, warmup_epochs=20), step, 5).lr for step in (0, 99)]
    assert whole == pytest.approx([0, 1.25e-4])  # a warm-up to the end is no error


def test_the_learning_rate_scales_with_the_batch():
    peaks = [schedule_values(setting(batch_size=b, lr=5e-4), 0, 1).lr for b in (256, 1024)]
    assert peaks == pytest.approx([5e-4, 2e-3])


# ---- What must not change the step


def test_the_chunked_loss_gives_the_weights_of_the_plain_one(batches):
    plain, chunked, coarse = (make(lr=0.01, loss_chunk=chunk) for chunk in (0, 8, 1))
    for trainer in (plain, chunked, coarse):
        run(trainer, batches[:3])
    assert_same_run(chunked, plain, 1e-5)
    assert_same_run(coarse, plain, 1e-5)


def test_two_micro_batches_are_the_joint_batch(batches):
    whole, halves = make(lr=0.01, drop_path=0.0), make(lr=0.01, drop_path=0.0, accumulate=2)
    metrics = [run(t, batches_of(t.config)[:3]) for t in (halves, whole)]
    assert len(batches_of(halves.config)[0]) == 2
    for ours, expected in zip(*metrics, strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert ours["loss_part2"] == pytest.approx(expected["loss_part2"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert_same_run(halves, whole, 1e-5)


def test_gradient_checkpointing_changes_nothing_also_with_stochastic_depth(batches):
    whole, recomputed = make(lr=0.01, drop_path=0.3), make(lr=0.01, drop_path=0.3, grad_checkpointing=True)
    assert recomputed.student.backbone.grad_checkpointing
    for trainer in (whole, recomputed):
        run(trainer, batches[:3])
    assert_same_run(recomputed, whole, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_near_the_plain_one(batches):
    torch._dynamo.reset()
    counters["stats"].clear()
    whole, compiled = make(lr=0.01, drop_path=0.0), make(lr=0.01, drop_path=0.0, compile=True)
    for trainer in (whole, compiled):
        run(trainer, batches[:3])
    # teacher, student's global and local views, for all blocks; teacher, student's CLS and parts, for all heads
    assert counters["stats"]["unique_graphs"] == 6
    start, ours, expected = (without_key_biases(weights(t.student)) for t in (make(), compiled, whole))
    for key in expected:  # on average: other kernels round otherwise, and Adam makes steps of that in single weights
        assert (ours[key] - expected[key]).abs().mean() <= 1e-6, key
        assert GAINS in key or (ours[key] - start[key]).abs().mean() > 1e-5, key
    assert compiled.state()["student"].keys() == whole.state()["student"].keys()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_share_a_graph_whatever_their_drop_path_and_are_bypassed_in_evaluation(batches):
    torch._dynamo.reset()
    counters["stats"].clear()
    trainer, again = (make(drop_path=0.5, compile=True) for _ in range(2))
    losses = [[metrics["loss"] for metrics in run(t, batches[:2])] for t in (trainer, again)]
    assert losses[0] == losses[1] != [metrics["loss"] for metrics in run(make(drop_path=0.0), batches[:2])]
    backbone, images = trainer.student.backbone.eval(), torch.randn(3, 3, 64, 32)
    with torch.no_grad():
        assert backbone(images).isfinite().all()
    assert counters["stats"]["unique_graphs"] == 6


def test_weights_are_cast_once_a_step_to_what_autocast_makes_of_them(batches, monkeypatch):
    trainer = make(dtype="bfloat16", drop_path=0.0)
    views = [v.detach() for v in trainer.photometric.batch(batches[0][0].views)]
    gradients = []
    for once in (True, False):
        if not once:
            monkeypatch.setattr("passreid_models.pretrain.network._weights_cast_once", lambda groups: nullcontext())
        trainer.student.zero_grad()
        with profile(activities=[ProfilerActivity.CPU]) as recorded, trainer.autocast():
            outputs = trainer.student(*views)
        casts = sum(e.count for e in recorded.key_averages() if e.key in ("aten::_to_copy", "aten::_foreach_copy_"))
        sum(x.float()[..., 0].sum() for x in outputs.features).backward()
        gradients.append((casts, {k: p.grad for k, p in trainer.student.named_parameters() if p.grad is not None}))
    (few, ours), (many, expected) = gradients
    assert few < 0.6 * many
    assert ours.keys() == expected.keys()
    for key, grad in ours.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(
            grad, expected[key], rtol=0.02, atol=0.01 * expected[key].abs().max().item(), msg=key
        )


def test_after_a_failed_forward_pass_the_weights_are_the_parameters_again(batches):
    trainer = make(dtype="bfloat16")
    with trainer.autocast(), pytest.raises(ValueError, match="not divisible"):
        trainer.student(torch.randn(2, 4, 3, 60, 32))
    layers = [m for m in trainer.student.modules() if "weight" in m._parameters]
    assert len(layers) > 20
    assert all(m.weight is m._parameters["weight"] for m in layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_finite_near_float32_and_keeps_weights_and_centres_in_float32(batches, dtype):
    half, full = make(dtype=dtype, drop_path=0.0), make(drop_path=0.0)
    metrics, expected = run(half, batches), run(full, batches[:1])
    assert all(math.isfinite(row[k]) for row in metrics for k in ("loss", "loss_cls", "loss_part3"))
    assert metrics[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.05)
    assert metrics[0]["loss"] != pytest.approx(expected[0]["loss"], rel=1e-6)  # it was computed in half precision
    tensors = [*half.student.parameters(), *half.teacher.parameters(), half.criterion.centers]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors)
    assert half.scaler.is_enabled() == (dtype == "float16")
    if dtype == "bfloat16":  # float16 may spend these steps on finding its scale
        before, after = weights(make().student), weights(half.student)
        assert all((after[k] - before[k]).abs().max() > 1e-4 for k in after if GAINS not in k)


def test_automatic_precision_is_float32_or_bfloat16_on_a_cpu():
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_plain_dino_is_the_same_trainer_without_parts(batches):
    trainer = make(parts=0)
    metrics = run(trainer, batches_of(trainer.config)[: EPOCH_STEPS + 1])
    assert "loss_part1" not in metrics[0]
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["loss_cls"], rel=1e-6)
    assert trainer.student.backbone.reg_token is None
    assert "part_cosine" not in trainer.indicators


@pytest.mark.slow
def test_the_conv_stem_trains_and_its_teacher_keeps_running_statistics_of_its_own():
    trainer = make(model="pass_vit_small_ics_patch16", batch_size=4)
    key = next(k for k in trainer.teacher.state_dict() if k.endswith("running_mean"))
    start = trainer.teacher.state_dict()[key].clone()
    run(trainer, batches_of(trainer.config)[:1])
    means = [network.state_dict()[key] for network in (trainer.teacher, trainer.student)]
    assert not torch.equal(means[0], start)
    assert not torch.equal(*means)


# ---- State


def test_a_loaded_state_goes_on_bit_for_bit(batches, tmp_path):
    trainer = make(drop_path=0.5)
    run(trainer, batches[:3])
    torch.save(trainer.state(), tmp_path / "state.pt")
    expected = run(trainer, batches[3:])
    resumed = make(drop_path=0.5)
    resumed.load_state(read_checkpoint(tmp_path / "state.pt"))  # weights_only
    assert resumed.step == 3
    assert run(resumed, batches[3:]) == expected
    for network in ("student", "teacher"):
        assert_close(weights(getattr(resumed, network)), weights(getattr(trainer, network)), 0)
    assert torch.equal(resumed.criterion.centers, trainer.criterion.centers)


def test_a_state_of_other_settings_or_data_is_refused_by_name():
    state = make().state()
    with pytest.raises(ValueError, match=r"other settings \(seed: 3, in the run 0; lr: 0.1, in the run 0.05\)"):
        make(lr=0.1, seed=3).load_state(state)
    make(keep=7, workers=2, log_steps=9).load_state(state)  # which do not touch the weights
    with pytest.raises(ValueError, match=r"has 8 images, and .* now holds 9"):
        PretrainTrainer(setting(), 9, CPU).load_state(state)


def test_a_state_of_another_world_size_is_taken_with_a_warning(caplog):
    state = {**make().state(), "world_size": 4}
    make().load_state(state)
    assert "resumed with 1 processes instead of 4" in caplog.text


# ---- Refused, and not finite


def test_batches_that_do_not_fit_the_data_or_the_micro_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size: 16 is more than the 8 images of synthetic"):
        make(batch_size=16)
    with pytest.raises(ValueError, match="batch_size: 4 is not divisible by 1 processes x 3 micro-batches"):
        make(accumulate=3)


def poisoned(view: int, **options: Any) -> tuple[PretrainTrainer, ViewBatch]:
    """A trainer, and a batch with a view whose brightness factor is NaN, and so the student's output there."""
    trainer = make(**options)
    batch = batches_of(trainer.config)[0][0]
    params = batch.views.params.clone()
    params[1, view, 0] = torch.nan  # the brightness of a view of the second image
    params[1, view, 4] = 0
    return trainer, ViewBatch(Views(*batch.views[:2], params), [])


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize(("view", "term"), [(7, "CLS: teacher's global view 1, student's view 8"),
                                            (10, "CLS: teacher's global view 1, student's view 11")])  # fmt: skip
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_term_and_moves_nothing(chunk, view, term):
    trainer, batch = poisoned(view, loss_chunk=chunk)
    before = weights(trainer.student) | {f"teacher.{k}": v for k, v in weights(trainer.teacher).items()}
    with pytest.raises(NonFiniteLossError) as e:
        trainer.training_step([batch])
    assert str(e.value) == f"the loss of step 1 is not finite ({term})"
    assert_close(weights(trainer.student) | {f"teacher.{k}": v for k, v in weights(trainer.teacher).items()}, before, 0)
    assert not trainer.criterion.centers.any()
    assert trainer.step == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_tolerated_step_is_left_out_whole_and_the_one_too_many_stops(caplog, accumulate):
    trainer, bad = poisoned(2, skip_nonfinite=2, accumulate=accumulate)
    good = batches_of(trainer.config)[0][0]
    before = weights(trainer.student)
    for step in (1, 2):
        assert math.isnan(trainer.training_step([good] * (accumulate - 1) + [bad])["loss"])
        assert trainer.step == step
        assert f"left out, {step} of 2 allowed" in caplog.text
    assert_close(weights(trainer.student), before, 0)
    assert not trainer.optimizer.state
    assert not trainer.criterion.centers.any()
    trainer.training_step([good] * accumulate)
    assert trainer.optimizer.state
    with pytest.raises(NonFiniteLossError, match="the loss of step 4 is not finite"):
        trainer.training_step([good] * (accumulate - 1) + [bad])


def infinite(trainer: PretrainTrainer) -> RemovableHandle:
    """Make one gradient of the student infinite from now on, but not its loss."""
    return trainer.student.backbone.blocks[1].mlp.fc1.weight.register_hook(lambda g: torch.full_like(g, math.inf))


def moving(trainer: PretrainTrainer) -> dict[str, Any]:
    state = deepcopy(trainer.state())
    return {**{k: state[k] for k in ("student", "teacher", "centers")}, "moments": state["optimizer"]["state"]}


@pytest.mark.parametrize("clip", [{}, {"clip_by": "norm"}, {"clip": 0.0}], ids=["parameter", "norm", "none"])
def test_a_gradient_that_is_not_finite_is_named_with_its_step_and_moves_nothing(batches, caplog, clip):
    stops, goes_on = make(**clip), make(skip_nonfinite=1, **clip)
    for trainer in (stops, goes_on):
        run(trainer, batches[:1])
        before, hook = moving(trainer), infinite(trainer)
        if trainer is stops:
            with pytest.raises(NonFiniteLossError, match=r"^the gradient of step 2 is not finite$"):
                trainer.training_step(batches[1])
        else:
            assert math.isnan(trainer.training_step(batches[1])["loss"])
        hook.remove()
        assert before["centers"].any()
        assert before["moments"]
        assert_close(moving(trainer), before, 0)
    assert "the gradient of step 2 is not finite: left out, 1 of 1 allowed" in caplog.text
    metrics = goes_on.training_step(batches[2])
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["grad_norm"])
    assert all(x.isfinite().all() for x in goes_on.student.parameters())
    assert any(not torch.equal(v, before["student"][k]) for k, v in goes_on.student.state_dict().items())


def test_a_resumed_run_knows_how_many_steps_were_left_out(batches):
    trainer, resumed = make(skip_nonfinite=1), make(skip_nonfinite=1)
    infinite(trainer)
    trainer.training_step(batches[0])
    resumed.load_state(deepcopy(trainer.state()))
    infinite(resumed)
    with pytest.raises(NonFiniteLossError, match="the gradient of step 2 is not finite"):
        resumed.training_step(batches[1])


def test_indicators_are_of_the_end_of_each_epoch(batches):
    trainer, values = make(), []
    for micro_batches in batches:
        trainer.training_step(micro_batches)
        values.append(dict(trainer.indicators))
    assert not values[0]
    assert set(values[1]) == {"teacher_entropy", "marginal_entropy", "kl", "center_norm", "feature_std", "part_cosine"}
    assert values[1] == values[2] != values[3]
    assert values[-1]["center_norm"] == pytest.approx(trainer.criterion.centers[0].norm().item(), rel=1e-6)
