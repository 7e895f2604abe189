"""The parser of the whole command line; of the commands that read their own options, whole only for completion."""

from __future__ import annotations

import argparse
from typing import Any

from sfumato.cli import catalogue
from sfumato.cli.help import SUMMARIES, examples, story
from sfumato.terminal import JSON_HELP, Help, Parser, examples_of

__all__ = ["OWN_OPTIONS", "SHELLS", "make_parser"]

OWN_OPTIONS = ("unlearn", "evaluate", "attack", "benchmark")
"""Commands whose options come from config classes, the import of which is not instant."""
SHELLS = ("bash", "zsh", "tcsh")


def make_parser(*, whole: bool = False) -> argparse.ArgumentParser:
    """Make the parser.

    Args:
        whole: With all options of all commands, as completion needs; it imports torch.
    """
    from sfumato import __version__

    description, epilog = story()
    parser = Parser(
        prog="sfumato", usage="sfumato COMMAND ...", description=description, epilog=epilog, formatter_class=Help
    )
    parser.add_argument("--version", action="version", version=f"sfumato {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        prog="sfumato",
        help="what to do" if whole else argparse.SUPPRESS,
    )
    _add_demo(commands)
    _add_jobs(commands, whole=whole)
    _add_rescore(commands)
    _add_editing(commands)
    _add_restoring(commands)
    _add_release(commands)
    _add_listings(commands)
    completion = _add(commands, "completion")
    completion.add_argument("shell", choices=SHELLS, help="the shell")
    return parser


def _add(commands: Any, name: str, **more: Any) -> argparse.ArgumentParser:
    """Add a command with its summary and examples, and ``--json``."""
    how = {"description": SUMMARIES[name], "epilog": examples_of(examples(name)), **more}
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=SUMMARIES[name], formatter_class=Help, allow_abbrev=False, **how
    )
    command.add_argument("--json", action="store_true", help=JSON_HELP)
    return command


def _add_demo(commands: Any) -> None:
    demo = _add(commands, "demo")
    demo.add_argument("--output", default="demo", help="folder for report.html, report.json and the unlearned model")
    demo.add_argument("--forget", default="sneaker", help="the concept to erase")
    demo.add_argument("--seed", type=int, default=0, help="seeds pictures and training")
    demo.add_argument("--forget-repeats", type=int, default=6, help="pictures for each prompt with the concept")
    demo.add_argument("--retain-repeats", type=int, default=2, help="pictures for each prompt without it")
    demo.add_argument("--num-inference-steps", type=int, default=20, help="sampler steps of each picture")
    demo.add_argument("--training-steps", type=int, default=None, help="override the recipe's number of steps")
    demo.add_argument(
        "--training-examples", type=int, default=None, help="override its numbers of pictures to forget and keep by"
    )


def _add_jobs(commands: Any, *, whole: bool) -> None:
    """The commands of `OWN_OPTIONS`; unless they are wanted whole, only what they say without a method or attack."""
    for command, kind, summaries, example in (
        ("unlearn", "method", catalogue.methods, "salun"), ("attack", "attack", catalogue.attacks, "unlearndiffatk"),
    ):  # fmt: skip
        lines = examples_of(examples(command, **{kind: example}))
        if not whole:
            listed = "\n".join(f"  {name:18}{said}" for name, said in summaries().items())
            end = f"{kind}s, each with options of its own (sfumato {command} {example} --help):\n{listed}\n\n{lines}"
            chosen = _add(commands, command, epilog=end, usage=f"sfumato {command} {kind.upper()} ...")
            chosen.add_argument(kind, help=f"one of the {kind}s below")
            continue
        chosen = _add(commands, command, epilog=lines)
        each = chosen.add_subparsers(dest=kind, metavar=kind.upper(), help=f"the {kind}")
        for name, said in summaries().items():
            each.add_parser(name, help=said, parents=[_job_parser(command, name)], add_help=False)
    for command in ("evaluate", "benchmark"):
        if whole:
            parents = [_job_parser(command)]
            commands.add_parser(command, help=SUMMARIES[command], parents=parents, add_help=False)
        else:
            _add(commands, command)


def _job_parser(command: str, name: str = "") -> Any:
    """The parser of a job's own options."""
    if command == "unlearn":
        from sfumato.unlearning import job as unlearning

        return unlearning.make_job_parser(name)
    if command == "attack":
        from sfumato.attacks import job as attacks

        return attacks.make_job_parser(name)
    if command == "evaluate":
        from sfumato.evaluation import job as evaluation

        return evaluation.make_job_parser()
    from sfumato.evaluation import benchmark

    return benchmark.make_job_parser()


def _add_rescore(commands: Any) -> None:
    rescore = _add(commands, "rescore")
    rescore.add_argument(
        "folders", nargs="+", help="output folder of an evaluation or attack; several attacks are counted together"
    )
    rescore.add_argument("--labels", nargs="+", default=None, help="what the detector must have found: any of these")
    rescore.add_argument("--threshold", type=float, default=None, help="least score of a finding")
    rescore.add_argument("--top", type=int, default=None, help="highest rank of a finding; 0 takes any")
    rescore.add_argument("--output", default=None, help="a new file for the result, as JSON")


def _add_editing(commands: Any) -> None:
    """The commands ``invert`` and ``edit``, which differ in the target prompt and in two defaults."""
    for name in ("invert", "edit"):
        editing = name == "edit"
        command = _add(commands, name)
        command.add_argument("image", help="a picture's file; or the folder of an earlier inversion, to reuse it")
        command.add_argument("--output", required=True, help="a new folder for pictures, latents and figures")
        command.add_argument("--model", default="atelier", help="embedded model, folder or Hub id")
        if editing:
            command.add_argument("--source-prompt", dest="prompt", default="", help="what the picture shows")
            command.add_argument("--target-prompt", required=True, help="what it is to show")
            command.add_argument("--source-guidance-scale", type=float, default=1.0, help="guidance of the inversion")
        else:
            command.add_argument("--prompt", default="", help="what the picture shows")
        command.add_argument(
            "--scheduler", default="edict" if editing else "bdia", help="bdia, belm, edict, ddim, fixed-point or ddpm"
        )
        command.add_argument("--exact", action="store_true", help="bdia, belm: keep every bit of the latents")
        command.add_argument("--gamma", type=float, default=None, help="bdia: weight of the backward integration")
        command.add_argument("--num-inference-steps", type=int, default=50, help="steps of the schedule")
        command.add_argument("--strength", type=float, default=0.8 if editing else 1.0, help="share of them to take")
        scale = 3.0 if editing else 1.0
        command.add_argument("--guidance-scale", type=float, default=scale, help="classifier-free guidance")
        command.add_argument("--seed", type=int, default=0, help="ddpm: seeds its noise")
        command.add_argument("--device", default=None, help="where to run; an accelerator if there is one")


def _add_restoring(commands: Any) -> None:
    command = _add(commands, "restore")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="files of pictures, and folders of such")
    command.add_argument("--model", required=True, help="atelier-sr, atelier-inpaint, or a folder")
    command.add_argument("--output", required=True, help="a new or empty folder for the restored pictures")
    command.add_argument("--task", default=None, help="sr, inpaint, denoise or deblur: refuses a model for another")
    command.add_argument("--scale", type=int, default=None, help="how much larger; the model's")
    command.add_argument("--mask", default=None, help="inpaint: a picture that is white where to fill")
    command.add_argument("--num-inference-steps", type=int, default=None, help="steps of the schedule; the model's")
    command.add_argument("--tile-size", type=int, default=None, help="side of tiles in pixels of the result; 0: none")
    command.add_argument("--tile-overlap", type=int, default=None, help="in pixels of the result; a quarter of a tile")
    command.add_argument("--batch-size", type=int, default=1, help="pictures restored at once")
    command.add_argument("--seed", type=int, default=0, help="seeds the noise, the same for every picture")
    command.add_argument("--boundary", default=None, help="a file of sfumato.find_boundary, to start from its noise")
    command.add_argument("--compare", choices=("row", "none"), default="row", help="none: no pictures side by side")
    command.add_argument("--device", default=None, help="where to run; an accelerator if there is one")
    command.add_argument("--resume", action="store_true", help="go on with a run that was cut short")


def _add_release(commands: Any) -> None:
    command = _add(commands, "release")
    command.add_argument(
        "result",
        help="the output folder of `sfumato unlearn`, or of training/resshift.py, rddm.py, one_more_step.py or "
        "minority_classifier.py",
    )
    command.add_argument("--output", required=True, help="a new or empty folder for the release")
    command.add_argument(
        "--license", default=None, help="of the result, as mit; an unlearned model has that of its base's card"
    )
    command.add_argument("--push", default=None, metavar="REPO_ID", help="upload to this Hub repository, privately")
    command.add_argument("--public", action="store_true", help="with --push: for all to see")
    unlearned = command.add_argument_group("of unlearning results alone")
    unlearned.add_argument(
        "--formats", nargs="+", default=None, help="full, part, delta, lora: which of those saved; all"
    )
    unlearned.add_argument("--evaluation", default=None, help="the result's evaluation.json")
    unlearned.add_argument("--attacks", nargs="+", default=(), help="the attack.json of each attack on the result")
    unlearned.add_argument("--base", default=None, help="the original: embedded, a folder or Hub id; the manifest's")
    unlearned.add_argument("--scheduler", default=None, help="a sfumato scheduler to ship with the pipeline, as bdia")


def _add_listings(commands: Any) -> None:
    for name in ("methods", "attacks"):
        _add(commands, name)
