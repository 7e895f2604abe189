"""The ``sfumato`` command: parses, calls, prints. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]

OWN_OPTIONS = ("unlearn", "evaluate", "attack", "benchmark")
"""Commands that read their own options."""
RESUMABLE = (*OWN_OPTIONS, "restore")
"""Commands that continue with --resume."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors a user can mend are printed as one sentence, with exit status 1."""
    parser = _make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in OWN_OPTIONS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(options, rest)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        resumable = options.command in RESUMABLE
        sys.exit("interrupted" + ("; the job continues with --resume" if resumable else ""))


def _make_parser() -> argparse.ArgumentParser:
    from sfumato import __version__

    parser = argparse.ArgumentParser(
        prog="sfumato", description="Samplers, exact inversion, restoration and concept unlearning."
    )
    parser.add_argument("--version", action="version", version=f"sfumato {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="erase a concept from the embedded model and show the proof (six minutes)")
    demo.add_argument("--output", default="demo", help="folder for report.html, report.json and the unlearned model")
    demo.add_argument("--forget", default="sneaker", help="the concept to erase")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--forget-repeats", type=int, default=6, help="pictures for each prompt with the concept")
    demo.add_argument("--retain-repeats", type=int, default=2, help="pictures for each prompt without it")
    demo.add_argument("--num-inference-steps", type=int, default=20, help="sampler steps of each picture")
    demo.add_argument("--training-steps", type=int, default=None, help="override the recipe's number of steps")
    demo.add_argument(
        "--training-examples", type=int, default=None, help="override its numbers of pictures to forget and keep by"
    )
    demo.set_defaults(run=_demo)

    unlearn = commands.add_parser(
        "unlearn", add_help=False, help="erase a concept from a model (sfumato unlearn salun --help)"
    )
    unlearn.add_argument("method", nargs="?", default=None)
    unlearn.set_defaults(run=_unlearn)

    evaluate = commands.add_parser(
        "evaluate", add_help=False, help="measure what an unlearned model forgot, and what it kept"
    )
    evaluate.set_defaults(run=_evaluate)

    attack = commands.add_parser(
        "attack", add_help=False, help="try to bring a forgotten concept back (sfumato attack unlearndiffatk --help)"
    )
    attack.add_argument("method", nargs="?", default=None)
    attack.set_defaults(run=_attack)

    rescore = commands.add_parser(
        "rescore", help="count again what an evaluation or attack found, by another rule; nothing is drawn"
    )
    rescore.add_argument(
        "folders", nargs="+", help="output folder of an evaluation or attack; several attacks are counted together"
    )
    rescore.add_argument("--labels", nargs="+", default=None, help="what the detector must have found: any of these")
    rescore.add_argument("--threshold", type=float, default=None, help="least score of a finding")
    rescore.add_argument("--top", type=int, default=None, help="highest rank of a finding; 0 takes any")
    rescore.add_argument("--output", default=None, help="a new file for the result, as JSON")
    rescore.set_defaults(run=_rescore)

    benchmark = commands.add_parser(
        "benchmark", add_help=False, help="compare unlearning methods on concepts, with a leaderboard"
    )
    benchmark.set_defaults(run=_benchmark)

    _add_editing(commands)

    _add_restoring(commands)

    _add_release(commands)

    methods = commands.add_parser("methods", help="list the unlearning methods")
    methods.set_defaults(run=_methods)
    return parser


def _add_editing(commands: Any) -> None:
    """``invert`` and ``edit``, which differ in the target prompt and in two defaults."""
    for name, summary in (
        ("invert", "find the noise from which a model draws a picture, and draw it again"),
        ("edit", "change a picture: invert it with one prompt, draw it again with another"),
    ):
        editing = name == "edit"
        command = commands.add_parser(name, help=summary, description=summary)
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
        command.add_argument("--guidance-scale", type=float, default=3.0 if editing else 1.0)
        command.add_argument("--seed", type=int, default=0, help="ddpm: seeds its noise")
        command.add_argument("--device", default=None, help="where to run; an accelerator if there is one")
        command.set_defaults(run=_edit)


def _add_restoring(commands: Any) -> None:
    summary = "restore pictures: enlarge, fill holes, take off noise or blur"
    command = commands.add_parser("restore", help=summary, description=summary)
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
    command.set_defaults(run=_restore)


def _add_release(commands: Any) -> None:
    summary = "make of an unlearning result, or of a network that was trained, a folder for the Hugging Face Hub"
    command = commands.add_parser("release", help=summary, description=summary)
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
    command.set_defaults(run=_release)


def _release(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sfumato.releasing import release

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    folder = release(settings.pop("result"), settings.pop("output"), **settings)
    print(f"release  {folder}/README.md")
    if options.push is not None:
        print(f"Hub      https://huggingface.co/{options.push}")


def _edit(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sfumato.editing import EditingConfig, run_edit

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    exact, gamma = settings.pop("exact"), settings.pop("gamma")
    chosen = {**({"exact": True} if exact else {}), **({} if gamma is None else {"gamma": gamma})}
    figures = run_edit(EditingConfig(**settings, options=chosen))
    print(f"autoencoder alone    {figures['autoencoder_psnr']:.1f} dB")
    print(
        f"reconstruction       {figures['reconstruction_psnr']:.1f} dB, latents off by {figures['latent_error']:.1e}"
    )
    if figures["condition_number"] is not None:
        print(f"condition number     {figures['condition_number']:.3g}")
    mean, std, correlation = (figures["noise"][name] for name in ("mean", "std", "correlation"))
    print(f"noise found          mean {mean:.2f}, std {std:.2f}, correlation {correlation:.2f}")
    print(f"pictures and latents {options.output}/comparison.png, {options.output}/inversion.safetensors")


def _restore(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sfumato.restoring import RestoringConfig, run_restore

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    report = run_restore(RestoringConfig(**settings))
    done, failed = report["pictures"], report["failures"]
    if done:
        seconds = sum(picture["seconds"] for picture in done) / len(done)
        print(f"{len(done)} restored, {seconds:.2f} seconds a picture: {options.output}")
    bare = [picture["comparison_error"] for picture in done if "comparison_error" in picture]
    if bare:
        print(f"{len(bare)} without a picture side by side: {bare[0]}")
    if failed:
        listed = "".join(f"\n  {failure['error']}" for failure in failed)
        sys.exit(f"error: {len(failed)} of {len(done) + len(failed)} could not be restored:{listed}")


def _demo(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sfumato.demo import DemoConfig, run_demo

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    run_demo(DemoConfig(**settings))


def _unlearn(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from sfumato.unlearning.job import main as run_job
    from sfumato.unlearning.methods import METHODS

    usage = f"usage: sfumato unlearn METHOD --forget CONCEPT --output FOLDER ...; methods: {', '.join(METHODS)}"
    if options.method is None and {"-h", "--help"} & set(rest):
        print(usage)
        return
    if options.method not in METHODS:
        sys.exit(usage)
    run_job(options.method, list(rest))


def _evaluate(_: argparse.Namespace, rest: Sequence[str]) -> None:
    from sfumato.evaluation.job import main as run_job

    run_job(rest)


def _attack(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from sfumato.attacks.job import main as run_job
    from sfumato.attacks.methods import ATTACKS

    usage = f"usage: sfumato attack ATTACK --model RESULT --forget CONCEPT --output FOLDER ...; {', '.join(ATTACKS)}"
    if options.method is None and {"-h", "--help"} & set(rest):
        print("\n".join([usage, *(f"  {name:18}{attack.summary}" for name, attack in ATTACKS.items())]))
        return
    if options.method not in ATTACKS:
        sys.exit(usage)
    run_job(options.method, list(rest))


def _rescore(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sfumato.rescoring import main as run_job

    settings = {name: value for name, value in vars(options).items() if name not in ("command", "run")}
    print(run_job(settings.pop("folders"), **settings))


def _benchmark(_: argparse.Namespace, rest: Sequence[str]) -> None:
    from sfumato.evaluation.benchmark import main as run_job

    run_job(rest)


def _methods(_: argparse.Namespace, __: Sequence[str]) -> None:
    from sfumato.unlearning.methods import METHODS

    for name, method in METHODS.items():
        print(f"{name:18}{method.summary}")


if __name__ == "__main__":
    main()
