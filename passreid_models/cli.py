"""Command line: arguments only. What the package itself does not load is imported where it is needed."""

import argparse
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from huggingface_hub.utils import disable_progress_bars

from passreid_models import __version__
from passreid_models.architectures import DEFAULT_MODEL
from passreid_models.checkpoints import zoo
from passreid_models.checkpoints.local_dir import convert_checkpoint
from passreid_models.checkpoints.names import known_names
from passreid_models.device import pick_device, pick_dtype
from passreid_models.runtime import (
    check_file,
    did_you_mean,
    keep_freed_memory,
    not_found,
    printable,
    require,
    write_json,
)

SHOWN = 5  # images that are named, of those whose descriptor is not finite
MODEL = "name, tag, hf-hub:ORG/NAME, exported folder, run or checkpoint file (default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``passreid``.

    Returns:
        Exit code, as of ``run``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in TRAININGS:
        program, training = TRAININGS[argv[0]]
        return run(program, lambda: training(argv[1:]))
    return run("passreid", lambda: _command(argv))


def train(argv: Sequence[str] | None = None) -> int:
    """Run ``passreid-train``.

    Returns:
        Exit code, as of ``run``.
    """
    return run("passreid-train", lambda: _train(sys.argv[1:] if argv is None else argv))


def run(program: str, work: Callable[[], int]) -> int:
    """Do the work of a command; report errors in one line.

    Args:
        program: Name for messages.
        work: Returns the exit code.

    Returns:
        Exit code: that of ``work``, such as 0; 1 done in part, such as images left out, or the output's reader has
        gone; or descriptors or the loss are not finite, memory ran out, a loader process died; 2 a user's mistake; 130
        interrupted; 128 + the signal, when one stopped a training run (its state is saved).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError, ValueError):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is no error
    code, message = 0, ""
    error: BaseException | None = None
    try:
        code = work()
    except (SystemExit, BrokenPipeError) as e:  # --help; `passreid weights list | head`
        code, error = 1, e
    except KeyboardInterrupt as e:
        code, message, error = 130, "interrupted", e
    except Exception as e:
        try:
            (code, message), error = _explain(e, program), e
        except Exception:
            if _is_left():
                traceback.print_exc()
                _end(1)
            raise
    if (lost := _lost_output()) and (isinstance(error, SystemExit | None) or _is_same(error, lost)):
        written = f"standard output could not be written: {lost.strerror}"
        code, message = (1, "") if isinstance(lost, BrokenPipeError) else (2, written)
    elif isinstance(error, SystemExit):
        raise error
    if message and sys.stderr is not None:
        try:
            print(f"{program}: {printable(message)}", file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)
    if error is not None and _is_left():
        _end(code)
    return code


def _is_left() -> bool:
    """Whether ``process_group`` has left NCCL's group: Python's own end would wait for the other processes, too."""
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl")


def _end(code: int) -> None:
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _lost_output() -> OSError | None:
    """Flush standard output; return the error if its reader has gone, or its disk is full."""
    if sys.stdout is None or sys.stdout.closed:
        return None
    try:
        sys.stdout.flush()
    except OSError as e:
        _discard(sys.stdout)
        return e
    return None


def _is_same(error: BaseException, lost: OSError) -> bool:
    """Whether a command's error is that of standard output, to which it printed."""
    return isinstance(error, OSError) and error.filename is None and error.errno == lost.errno


def _discard(stream: TextIO) -> None:
    """Write to nowhere: Python otherwise reports the closed pipe again when it ends."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as null:
        os.dup2(null.fileno(), stream.fileno())


def _explain(error: Exception, program: str) -> tuple[int, str]:
    """Exit code and message of an error; one of the program itself is raised again."""
    from passreid_models.evaluation.report import NonFiniteError
    from passreid_models.training.run import Stopped
    from passreid_models.training.trainer import NonFiniteLossError

    if isinstance(error, Stopped):
        return 128 + error.signum if error.signum else 0, str(error) if _is_first() else ""
    is_full = isinstance(error, RuntimeError) and re.search("DefaultCPUAllocator|out of memory", str(error))
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_full:  # of the CPU, of Apple's GPUs
        advice = {
            "passreid": "a smaller --batch-size needs less",
            "passreid-train": "a smaller --batch-size, --accumulate 2 or more, or --grad-checkpointing needs less",
        }.get(program, "a smaller batch or --grad-checkpointing needs less")
        reason = re.split(r"\. (?=[A-Z])", str(error).rpartition("DefaultCPUAllocator: ")[2])[0]
        return 1, f"out of memory: {advice} ({reason or 'Python has none left'})"
    if isinstance(error, NonFiniteError | NonFiniteLossError | ChildProcessError):
        return 1, str(error)
    if isinstance(error, ValueError | OSError):
        return 2, str(error)
    raise error


def _command(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if getattr(args, "quiet", False):
        disable_progress_bars()
    code: int = args.run(args)
    return code


def _train(argv: Sequence[str]) -> int:
    from passreid_models.pretrain.run import train

    config = _train_config(argv)
    if pick_device(config.device).type == "cpu":
        keep_freed_memory()  # a tenth of a step were new pages
    return _print_export(train(config))


def _train_config(argv: Sequence[str]) -> Any:
    from passreid_models.pretrain.config import PRESETS, PretrainConfig
    from passreid_models.training.command import read_config

    what = "Pre-train a PASS model on DATA: a folder of person crops, a text list of files, a tar file, or "
    expected, several = (
        "a folder of person crops, such as passreid-train my_crops/",
        "; a text file can list their images",
    )
    return read_config(argv, PretrainConfig, PRESETS, "passreid-train", f"{what}synthetic:ids=1000.", expected, several)


def _finetune(argv: Sequence[str]) -> int:
    from passreid_models.reid.config import PRESETS, FinetuneConfig
    from passreid_models.reid.supervised import finetune
    from passreid_models.training.command import read_config

    name, presets = "passreid finetune", PRESETS["finetune"]
    what = "Fine-tune on DATA with identity labels: Market-1501, MSMT17, DukeMTMC-reID, a folder for each identity, a "
    expected = "a labelled dataset, such as passreid finetune Market-1501/ --init pass_vit_small_patch16.lup"
    config = read_config(argv, FinetuneConfig, presets, name, f"{what}CSV file.", expected)
    return _print_export(finetune(config))


def _cluster(argv: Sequence[str]) -> int:
    from passreid_models.reid.config import PRESETS, ClusterConfig
    from passreid_models.reid.unsupervised import cluster
    from passreid_models.training.command import read_config

    name, presets = "passreid cluster", PRESETS["cluster"]
    what = "Train re-ID on DATA without labels, from clusters of its descriptors; with --source, adapt a model to it."
    expected = "images, such as passreid cluster my_crops/ --init pass_vit_small_patch16.lup"
    return _print_export(cluster(read_config(argv, ClusterConfig, presets, name, what, expected)))


def _is_first() -> bool:
    """Whether this is the first process of torchrun, whose process group has ended."""
    return os.environ.get("RANK", "0") == "0"


def _print_export(folder: Path) -> int:
    if _is_first():
        print(f'timm.create_model("local-dir:{folder}", pretrained=True)')
    return 0


TRAININGS = {
    "train": ("passreid-train", _train),
    "finetune": ("passreid finetune", _finetune),
    "cluster": ("passreid cluster", _cluster),
}
"""Commands that parse their own arguments (training/command.py): name for messages, and function."""


class _Parser(argparse.ArgumentParser):
    """Parser whose errors name the nearest command or option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # here, not in the parser of all commands, which does not know this one's options
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        if option := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += did_you_mean(option[1], self._option_string_actions)
        elif word := re.search(r"invalid choice: '([^']*)' \(choose", message):
            choices = [str(choice) for action in self._actions for choice in action.choices or ()]
            message += did_you_mean(word[1], choices)
        if self.prog == "passreid":
            super().error(printable(message))
        advice = "" if message.endswith("?") else f"; {self.prog} --help lists the options"
        self.exit(2, f"{self.prog}: {printable(message)}{advice}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="passreid", description="Part-aware person re-identification models for timm.")
    parser.add_argument("--version", action="version", version=f"passreid-models {__version__}")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, metavar="SHELL", help="script for bash, zsh or tcsh to complete"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="rank generated persons with the bundled weights, offline")
    demo.add_argument("--model", default=DEFAULT_MODEL, help=MODEL)
    demo.add_argument("--out", type=Path, default=Path("passreid_demo.png"), help="picture to write (%(default)s)")
    demo.add_argument("--ids", type=int, default=40, help="persons (default: %(default)s)")
    demo.add_argument(
        "--make-data", type=Path, metavar="DIR", help="write the persons to DIR, in the Market-1501 layout, and stop"
    )
    demo.set_defaults(run=_demo)

    embed = commands.add_parser("embed", help="images to descriptors")
    embed.add_argument("images", nargs="+", help="image files and folders")
    embed.add_argument("-o", "--output", type=Path, required=True, help=".safetensors, .npz or .csv")
    _add_model_options(embed)
    embed.add_argument("--batch-size", type=int, default=64)
    _add_fusion(embed)
    embed.add_argument("--flip", action="store_true", help="average with the mirrored image's descriptor")
    embed.add_argument("--parts", action="store_true", help="write the part tokens too")
    embed.add_argument("--strict", action="store_true", help="stop at the first unreadable image")
    _add_quiet(embed)
    embed.set_defaults(run=_embed)

    evaluate = commands.add_parser("eval", help="mAP, CMC and ROC of a model on a dataset")
    evaluate.add_argument("data", help="Market-1501, MSMT17, DukeMTMC-reID, a folder for each identity, a CSV file ...")
    _add_model_options(evaluate)
    _add_fusion(evaluate)
    evaluate.add_argument("--flip", action="store_true", help="average with the mirrored image's descriptor")
    _add_size(evaluate)
    evaluate.add_argument("--batch-size", type=int, default=64)
    evaluate.add_argument("--rerank", action="store_true", help="also after k-reciprocal re-ranking")
    evaluate.add_argument("--per-camera", action="store_true", help="also scores for the queries of each camera")
    evaluate.add_argument(
        "--open-set", action="store_true", help="also identification where some are not in the gallery"
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write all metrics")
    evaluate.add_argument("--pictures", type=Path, metavar="DIR", help="draw rankings, CMC, ROC and similarities")
    evaluate.add_argument("--no-cache", action="store_true", help="neither read nor write cached descriptors")
    _add_quiet(evaluate)
    evaluate.set_defaults(run=_eval)

    parts = commands.add_parser("parts", help="draw which patches CLS and each PART look at")
    parts.add_argument("images", nargs="+", help="image files and folders; parts are compared with those of the first")
    parts.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="picture to write")
    _add_model_options(parts)
    parts.set_defaults(run=_parts)

    gallery = commands.add_parser("gallery", help="a map of a gallery's images, as one HTML page")
    gallery.add_argument("data", metavar="DIR", help="as for eval, or a folder of images")
    gallery.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="page to write (.html)")
    _add_model_options(gallery)
    gallery.set_defaults(run=_gallery)

    data = commands.add_parser("data", help="check a dataset").add_subparsers(required=True, metavar="COMMAND")
    check = data.add_parser("check", help="count a dataset's images; list errors and remarks")
    check.add_argument("data", help="as for eval")
    check.add_argument("--no-verify", action="store_true", help="do not open the images")
    check.add_argument("--json", type=Path, metavar="FILE", help="write counts and findings")
    _add_quiet(check)
    check.set_defaults(run=_data_check)

    synth = commands.add_parser("synth", help="write 3-D persons in the Market-1501 layout; resumable")
    synth.add_argument("--ids", type=int, required=True, metavar="N", help="persons")
    synth.add_argument(
        "--images", type=int, required=True, metavar="M", help="images per person, by the cameras in turn"
    )
    synth.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder: new, empty, or begun by this command"
    )
    synth.add_argument("--cameras", type=int, default=8, help="cameras per person, 2 to 9 (default: %(default)s)")
    synth.add_argument("--sites", type=int, default=1, help="sites, each with --cameras cameras (default: %(default)s)")
    synth.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    synth.add_argument("--train-ids", type=int, metavar="N", help="persons for training, of all (default: half)")
    synth.add_argument("--size", type=_size, default=(256, 128), metavar="HxW", help="image size (default: 256x128)")
    synth.add_argument(
        "--patterns", choices=("train", "held-out"), default="train", help="textures of garments (default: %(default)s)"
    )
    synth.add_argument("--place", choices=("street", "studio"), default="street", help="surroundings (%(default)s)")
    synth.add_argument("--workers", type=int, metavar="N", help="drawing processes (default: one per core)")
    synth.add_argument(
        "--first-id", type=int, default=0, help="first pid; for persons not in other folders (%(default)s)"
    )
    _add_quiet(synth)
    synth.set_defaults(run=_synth)

    convert = commands.add_parser("convert", help="an official checkpoint to a folder for timm's local-dir:")
    convert.add_argument("checkpoint", type=Path, help="any published layout: .pth, .pth.tar, .safetensors")
    convert.add_argument("folder", type=Path, help="output, new or empty")
    convert.add_argument("--model", help="registered architecture; by default the one that the tensors fit")
    convert.add_argument("--network", choices=("teacher", "student"), default="teacher")
    convert.add_argument("--fusion", choices=("cat", "mean", "parts", "token"), help="fusion of the descriptor")
    convert.add_argument(
        "--neck", choices=("none", "single", "multi"), help="neck of the model (default: by the layout)"
    )
    convert.add_argument("--mean-std", choices=("imagenet", "0.5"), help="statistics of the training images")
    convert.add_argument(
        "--interpolation", choices=("bilinear", "bicubic"), help="resampling of images (default: by the layout)"
    )
    convert.add_argument("--img-size", type=_size, metavar="HxW", help="image size instead of the file's")
    convert.add_argument(
        "--resize", choices=("auto", "bicubic", "bilinear"), default="auto", help="resampling of positions"
    )
    convert.add_argument("--num-heads", type=int, help="attention heads, if no registered model fits")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="a model to ONNX, torch.export, torchscript or Roboflow's reid")
    export.add_argument("model", help=MODEL.partition(" (default")[0])
    export.add_argument("output", type=Path, metavar="OUT", help="file .onnx, .pt2 or .pt; a folder for roboflow-reid")
    export.add_argument("--format", choices=("onnx", "pt2", "torchscript", "roboflow-reid"), help="default: by suffix")
    export.add_argument(
        "--input",
        choices=("normalized", "imagenet", "uint8"),
        default="normalized",
        help="images normalised by the model's statistics or ImageNet's, or bytes [B, H, W, 3] (default: %(default)s)",
    )
    export.add_argument("--half", action="store_true", help="float16 weights and activations")
    export.add_argument("--l2", action=argparse.BooleanOptionalAction, help="L2-normalise; default: as the weights")
    _add_fusion(export)
    _add_size(export)
    export.set_defaults(run=_export)

    # only for the list of commands: TRAININGS
    commands.add_parser("train", help="pre-train on a folder of person crops; the same as passreid-train")
    commands.add_parser("finetune", help="train re-ID with identity labels")
    commands.add_parser("cluster", help="train re-ID without labels, or adapt a model to other cameras")

    plot = commands.add_parser("plot", help="draw the curves of a training run")
    plot.add_argument("folder", type=Path, metavar="RUN", help="folder of passreid-train, finetune or cluster")
    plot.add_argument("--out", type=Path, help="picture to write (default: RUN/curves.png)")
    plot.set_defaults(run=_plot)

    weights = commands.add_parser("weights", help="list, pull, verify, publish").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = weights.add_parser("list", help="all known weights")
    listing.add_argument("architecture", nargs="?", default="", help="only of this architecture")
    listing.add_argument("--json", action="store_true", help="the manifest's rows as JSON")
    listing.set_defaults(run=_weights_list)
    pull = weights.add_parser("pull", help="download, verify, convert and cache published weights")
    pull.add_argument("name", help="architecture.tag, or a tag that one architecture has")
    pull.add_argument("--from", dest="source", type=Path, metavar="FILE", help="the authors' file, downloaded by hand")
    pull.add_argument("--force", action="store_true", help="even if they are in the cache")
    _add_quiet(pull)
    pull.set_defaults(run=_weights_pull)
    verify = weights.add_parser("verify", help="check the SHA-256 of bundled and cached weights")
    verify.add_argument("name", nargs="?", default="", help="only these weights")
    verify.set_defaults(run=_weights_verify)
    publish = weights.add_parser("publish", help="push a folder to the Hugging Face Hub")
    publish.add_argument("folder", type=Path)
    publish.add_argument("repo_id", metavar="ORG/NAME")
    publish.add_argument("--private", action="store_true")
    publish.add_argument("--revision", help="branch")
    publish.add_argument("--dry-run", action="store_true", help="show the files and the model card, push nothing")
    publish.set_defaults(run=_weights_publish)
    return parser


class _PrintCompletion(argparse.Action):
    """Print a shell's script that completes commands, options, files and names of models."""

    SHELLS = ("bash", "zsh", "tcsh")

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        shtab = require("shtab", "completion", "completion")
        if values not in self.SHELLS:
            parser.error(f"expected one of {', '.join(self.SHELLS)}, got {values!r}")
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
        _add_training_options(commands)
        models = {"bash": "_passreid_models", "zsh": "_passreid_models", "tcsh": "f"}
        parsers = [parser, *commands.values()]
        for one in parsers:
            for action in one._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += [p for p in action.choices.values() if p not in parsers]
                elif action.nargs != 0 and not action.choices:
                    is_model = {"--model", "--init"} & set(action.option_strings) or action.dest == "name"
                    action.complete = models if is_model else shtab.FILE
        print(shtab.complete(parser, values, preamble=_complete_models()))
        parser.exit()


def _add_training_options(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add the options of the commands that parse their own arguments."""
    from passreid_models.pretrain.config import PRESETS, PretrainConfig
    from passreid_models.reid import config as reid

    tasks: dict[str, Any] = {
        "train": (PretrainConfig, PRESETS),
        "finetune": (reid.FinetuneConfig, reid.PRESETS["finetune"]),
        "cluster": (reid.ClusterConfig, reid.PRESETS["cluster"]),
    }
    for name, (config, presets) in tasks.items():
        commands[name].add_argument("data")
        commands[name].add_argument("--config")
        commands[name].add_argument("--preset", choices=tuple(presets))
        for field in fields(config):
            if field.name != "data":
                action = "store_true" if field.type in (bool, "bool") else "store"
                commands[name].add_argument(f"--{field.name.replace('_', '-')}", action=action)


def _complete_models() -> dict[str, str]:
    """Shell functions that complete a file or the name of a model, by shell."""
    names = " ".join(known_names())
    return {
        "bash": f'_passreid_models() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"_passreid_models() {{ compadd {names}; _files }}",
    }


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
        if min(height, width) < 16 or height % 16 or width % 16:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected HEIGHTxWIDTH in multiples of 16 such as 384x128, got {text!r}"
        ) from None
    return height, width


def _demo(args: argparse.Namespace) -> int:
    from passreid_models import demo

    if args.make_data:
        print(demo.make_data(args.make_data, args.ids))
    else:
        print(demo.run(args.model, args.out, args.ids))
    return 0


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=MODEL)
    parser.add_argument("--device", help="default: the accelerator, if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--force-dtype", action="store_true", help="compute in bfloat16 on a CPU slow at it, too")


def _add_fusion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fusion", choices=("cat", "mean", "parts", "token"), help="instead of the weights' own")


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_size, metavar="HxW", help="image size instead of the weights' own")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def _dtype(args: argparse.Namespace) -> torch.dtype:
    """Dtype of ``--dtype``; float32 in place of bfloat16, and a warning, on a CPU that is slow at it."""
    device = pick_device(args.device)
    dtype, fast = pick_dtype(args.dtype, device), pick_dtype("auto", device)
    if args.dtype != "bfloat16" or device.type != "cpu" or fast == dtype or args.force_dtype:
        return dtype
    print(
        "passreid: bfloat16 may be a hundred times slower on this CPU, which is not known to have instructions for it: "
        "computing in float32 (--force-dtype insists)",
        file=sys.stderr,
    )
    return fast


def _print_left_out(reasons: Sequence[str], limit: int | None = None) -> None:
    """Print the images that are left out, each with the reason; those beyond ``limit`` as a number."""
    for reason in reasons[:limit]:
        print(f"passreid: left out: {printable(reason)}", file=sys.stderr)
    if more := len(reasons) - len(reasons[:limit]):
        print(f"passreid: left out: {more} more images for the same reason", file=sys.stderr)


def _image_names(images: Sequence[str]) -> list[str]:
    """Files among the arguments, and the images of the folders among them; one at least has to be there."""
    from passreid_models.data.images import find_images

    if not any(map(os.path.lexists, images)):
        raise not_found(images[0])
    return [str(p) for image in images for p in (find_images(image) if Path(image).is_dir() else [image])]


def _embed(args: argparse.Namespace) -> int:
    from passreid_models.embed import Embedder, check_format, check_names, finite_advice, is_not_finite, save_features

    check_format(args.output, args.parts)
    names = _image_names(args.images)
    check_names(args.output, names)
    embed = Embedder(args.model, args.device, _dtype(args), args.batch_size, fusion=args.fusion, flip=args.flip)
    errors: dict[int, str] | None = None if args.strict else {}
    result = embed(names, parts=args.parts, errors=errors, progress=not args.quiet)
    descriptors, parts = result if args.parts else (result, None)
    failed = errors or {}
    _print_left_out([reason for reason in failed.values() if not is_not_finite(reason)])
    _print_left_out([reason for reason in failed.values() if is_not_finite(reason)], SHOWN)
    rows = [i for i in range(len(names)) if i not in failed]
    if rows:
        if failed:
            descriptors, parts = descriptors[rows], parts[rows] if parts is not None else None
        save_features(args.output, [names[i] for i in rows], descriptors, parts)
        print(f"{len(rows)} descriptors of width {embed.dim} -> {args.output}")
    if not_finite := sum(map(is_not_finite, failed.values())):
        advice = finite_advice(embed.dtype)
        print(f"passreid: {not_finite} of {len(names)} descriptors are not finite: {advice}", file=sys.stderr)
    if unreadable := len(failed) - not_finite:
        print(f"passreid: {unreadable} of {len(names)} images could not be read", file=sys.stderr)
    if not rows:
        print(f"passreid: no descriptors, so {args.output} was not written", file=sys.stderr)
    return 1 if failed else 0


def _parts(args: argparse.Namespace) -> int:
    from passreid_models.data.images import count
    from passreid_models.evaluation.attention import draw_parts

    names = _image_names(args.images)
    draw_parts(args.model, names, args.output, device=args.device, dtype=_dtype(args))
    print(f"{count(len(names), 'image')} -> {args.output}")
    return 0


def _gallery(args: argparse.Namespace) -> int:
    from passreid_models.embed import Embedder
    from passreid_models.evaluation.gallery_page import write_gallery_page

    errors: list[str] = []
    line = write_gallery_page(args.data, args.output, Embedder(args.model, args.device, _dtype(args)), errors)
    _print_left_out(errors)
    print(line)
    return 1 if errors else 0


def _eval(args: argparse.Namespace) -> int:
    from passreid_models.evaluation.evaluate import evaluate_model

    evaluation = evaluate_model(
        args.data,
        args.model,
        size=args.size,
        fusion=args.fusion,
        flip=args.flip,
        batch_size=args.batch_size,
        device=args.device,
        dtype=_dtype(args),
        rerank=args.rerank,
        per_camera=args.per_camera,
        open_set=args.open_set,
        cache=not args.no_cache,
        json_file=args.json,
        pictures=args.pictures,
        progress=not args.quiet,
    )
    if evaluation is None:  # the first process prints
        return 0
    print(evaluation)
    _print_left_out(evaluation.unreadable)
    _print_left_out(evaluation.not_finite, SHOWN)
    return 1 if evaluation.unreadable or evaluation.not_finite else 0


def _data_check(args: argparse.Namespace) -> int:
    from passreid_models.data.check import check_dataset

    if args.json:
        check_file(args.json)
    check = check_dataset(args.data, verify=not args.no_verify, progress=not args.quiet)
    print(check)
    if args.json:
        write_json(args.json, check.to_dict())
    return 0 if check.ok else 1


def _synth(args: argparse.Namespace) -> int:
    from passreid_synth3d.dataset import make_data

    summary = make_data(
        args.out,
        args.ids,
        args.images,
        cameras=args.cameras,
        sites=args.sites,
        seed=args.seed,
        size=args.size,
        train_ids=args.train_ids,
        patterns=args.patterns,
        place=args.place,
        first_id=args.first_id,
        workers=args.workers,
        progress=not args.quiet,
    )
    print(summary)
    return 0


def _convert(args: argparse.Namespace) -> int:
    report = convert_checkpoint(
        args.checkpoint,
        args.folder,
        args.model,
        network=args.network,
        fusion=args.fusion,
        neck="" if args.neck == "none" else args.neck,
        mean_std=args.mean_std,
        interpolation=args.interpolation,
        img_size=args.img_size,
        pos_embed_resize=args.resize,
        num_heads=args.num_heads,
    )
    print(report)
    print(f'written: timm.create_model("local-dir:{args.folder}", pretrained=True)')
    return 0


def _export(args: argparse.Namespace) -> int:
    from passreid_models.embed import Embedder
    from passreid_models.export import check_output, export_model

    check_output(args.output, args.format)
    embed = Embedder(args.model, "cpu", fusion=args.fusion, size=args.size)
    print(export_model(embed, args.output, args.format, input=args.input, half=args.half, l2=args.l2))
    print(f"{embed} -> {args.output}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from passreid_models.training.plot import plot_run

    print(plot_run(args.folder, args.out))
    return 0


def _weights_list(args: argparse.Namespace) -> int:
    rows = zoo.list_weights(args.architecture)
    if not rows:
        raise ValueError(f"no weights of {args.architecture!r}; see `passreid weights list`")
    if args.json:
        print(json.dumps([asdict(w) for w in rows], indent=2))
        return 0
    print(f"{'name':<53}{'here':<9}{'size':<9}{'mAP':>6}{'Rank-1':>8}  {'measured on, by':<51}training data")
    for w in rows:
        here = "bundled" if w.bundled_file else "cached" if zoo.cached_folder(w.name) else "-"
        a = w.accuracy
        scores = f"{a['mAP']:>6.1f}{a['rank1']:>8.1f}" if a else f"{'-':>6}{'-':>8}"
        measured = f"{a['measured_on']}, {a['measured_by']}" if a else "-"
        size = "x".join(map(str, w.input_size))
        print(f"{w.name:<53}{here:<9}{size:<9}{scores}  {measured:<51}{w.data}")
    return 0


def _weights_pull(args: argparse.Namespace) -> int:
    print(zoo.pull(args.name, args.source, args.force))
    if record := zoo.read_record(zoo.get_weight(args.name).name):
        print(f"SHA-256 of the source file: {record['source_sha256']}")
    return 0


def _weights_verify(args: argparse.Namespace) -> int:
    states = zoo.verify(args.name)
    for name, state in states:
        print(f"{name:<53}{state}")
    return 1 if any(state in ("damaged", "missing") for _, state in states) else 0


def _weights_publish(args: argparse.Namespace) -> int:
    from passreid_models.checkpoints.publish import files_to_publish, publish

    url, sizes = publish(args.folder, args.repo_id, private=args.private, revision=args.revision, dry_run=args.dry_run)
    for name, size in sizes.items():
        print(f"{size:>12,}  {name}")
    if args.dry_run:
        card = files_to_publish(args.folder, args.repo_id)["README.md"]
        print(f"\n{card.decode() if isinstance(card, bytes) else card.read_text(encoding='utf-8')}")
    print(url or f"nothing was pushed to {args.repo_id} (--dry-run)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
