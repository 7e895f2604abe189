"""What each command does. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sfumato.cli import catalogue
from sfumato.cli.help import SUMMARIES, examples
from sfumato.cli.parser import make_parser
from sfumato.settings import nearest
from sfumato.terminal import Answer, resumable, run, say

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `sfumato.terminal.run`, also for how it ends.

    Args:
        arguments: The command line; None takes the process's own.
    """
    run(_command, arguments)


def _command(words: list[str]) -> Answer | None:
    command, rest = (words[0], words[1:]) if words else ("", [])
    parser = make_parser()
    if command and not command.startswith("-") and command not in SUMMARIES:
        parser.error(f"there is no command {command!r}.{nearest(command, SUMMARIES)}")
    if command in ("unlearn", "attack") and rest and not rest[0].startswith("-"):
        return _by_name(parser, command, rest)
    if command == "evaluate":
        from sfumato.evaluation.job import main as evaluate

        return evaluate(rest, examples(command))
    if command == "benchmark":
        from sfumato.evaluation.benchmark import main as benchmark

        return benchmark(rest, examples(command))
    options = parser.parse_args(words)
    if command not in COMMANDS:  # there was a -- before the name
        parser.error(f"name what to {command} by first, as in sfumato {command} --help")
    settings = {name: value for name, value in vars(options).items() if name not in ("command", "json")}
    return COMMANDS[command](settings, rest)


def _by_name(parser: argparse.ArgumentParser, command: str, words: list[str]) -> Answer | None:
    """Unlearn by a method, or attack by an attack."""
    name, rest = words[0], words[1:]
    known = catalogue.method_names() if command == "unlearn" else list(catalogue.attacks())
    kind = "method" if command == "unlearn" else "attack"
    if name not in known:
        parser.error(f"there is no {kind} {name!r}; choose from {', '.join(known)}.{nearest(name, known)}")
    lines = examples(command, **{kind: name})
    if command == "unlearn":
        from sfumato.unlearning.job import run as unlearn

        return unlearn(name, rest, f"sfumato unlearn {name}", lines)
    from sfumato.attacks.job import main as attack

    return attack(name, rest, lines)


def _demo(settings: dict[str, Any], _: Sequence[str]) -> Answer:
    from sfumato.demo import DemoConfig, run_demo

    config = DemoConfig(**settings)
    say(f"writes {config.output}; if cut short, start it again: it has nothing to resume")
    results = run_demo(config)
    following = f"sfumato unlearn salun --forget {config.forget} --output no-{config.forget.replace(' ', '-')}"
    return Answer({"output": config.output, **results}, following=following)


def _rescore(settings: dict[str, Any], _: Sequence[str]) -> Answer:
    from sfumato.rescoring import main as rescore

    return rescore(settings.pop("folders"), **settings)


def _edit(settings: dict[str, Any], _: Sequence[str]) -> Answer:
    from sfumato.editing import EditingConfig, run_edit

    exact, gamma, output = settings.pop("exact"), settings.pop("gamma"), settings["output"]
    chosen = {**({"exact": True} if exact else {}), **({} if gamma is None else {"gamma": gamma})}
    say(f"writes {output}")
    figures = run_edit(EditingConfig(**settings, options=chosen))
    lines = [
        f"autoencoder alone    {figures['autoencoder_psnr']:.1f} dB",
        f"reconstruction       {figures['reconstruction_psnr']:.1f} dB, latents off by {figures['latent_error']:.1e}",
    ]
    if figures["condition_number"] is not None:
        lines.append(f"condition number     {figures['condition_number']:.3g}")
    mean, std, correlation = (figures["noise"][name] for name in ("mean", "std", "correlation"))
    lines.append(f"noise found          mean {mean:.2f}, std {std:.2f}, correlation {correlation:.2f}")
    lines.append(f"pictures and latents {output}/comparison.png, {output}/inversion.safetensors")
    return Answer({"output": output, **figures}, "\n".join(lines))


def _restore(settings: dict[str, Any], words: Sequence[str]) -> Answer:
    from sfumato.restoring import RestoringConfig, run_restore

    config = RestoringConfig(**settings)
    with resumable(config.output, "sfumato restore", words, resume=config.resume):
        report = run_restore(config)
    done, failed, lines = report["pictures"], report["failures"], []
    if done:
        seconds = sum(picture["seconds"] for picture in done) / len(done)
        lines.append(f"{len(done)} restored, {seconds:.2f} seconds a picture: {config.output}")
    bare = [picture["comparison_error"] for picture in done if "comparison_error" in picture]
    if bare:
        lines.append(f"{len(bare)} without a picture side by side: {bare[0]}")
    said = "".join(f"\n  {failure['error']}" for failure in failed)
    why = f"{len(failed)} of {len(done) + len(failed)} could not be restored:{said}" if failed else ""
    return Answer({"output": config.output, **report}, "\n".join(lines), failure=why)


def _release(settings: dict[str, Any], _: Sequence[str]) -> Answer:
    from sfumato.releasing import release

    push, output = settings["push"], settings["output"]
    say(f"writes {output}")
    folder = release(settings.pop("result"), settings.pop("output"), **settings)
    hub = None if push is None else f"https://huggingface.co/{push}"
    lines = [f"release  {folder}/README.md", *([] if hub is None else [f"Hub      {hub}"])]
    return Answer({"output": folder, "card": f"{folder}/README.md", "hub": hub}, "\n".join(lines))


def _methods(_: dict[str, Any], __: Sequence[str]) -> Answer:
    return _listing("methods", catalogue.methods())


def _attacks(_: dict[str, Any], __: Sequence[str]) -> Answer:
    return _listing("attacks", catalogue.attacks())


def _listing(kind: str, summaries: dict[str, str]) -> Answer:
    data = {kind: [{"name": name, "summary": said} for name, said in summaries.items()]}
    return Answer(data, "\n".join(f"{name:18}{said}" for name, said in summaries.items()))


def _completion(settings: dict[str, Any], _: Sequence[str]) -> Answer:
    from sfumato.cli.completion import script

    shell = settings["shell"]
    text = script(shell)
    return Answer({"shell": shell, "script": text}, text)


COMMANDS = {
    "demo": _demo, "rescore": _rescore, "invert": _edit, "edit": _edit, "restore": _restore, "release": _release,
    "methods": _methods, "attacks": _attacks, "completion": _completion,
}  # fmt: skip
