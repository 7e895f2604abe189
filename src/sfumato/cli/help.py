"""What ``--help`` tells: the commands in groups, and examples of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfumato.terminal import EXIT_CODES

__all__ = ["EXAMPLES", "GROUPS", "SUMMARIES", "examples", "story"]

GROUPS: Mapping[str, Mapping[str, str]] = {
    "try it": {
        "demo": "erase a concept from the embedded model and show the proof (three to seven minutes on two cores)",
    },
    "erase a concept": {
        "unlearn": "make a model forget: sfumato unlearn METHOD",
        "methods": "list the unlearning methods",
    },
    "prove that it is gone": {
        "evaluate": "measure what an unlearned model forgot, and what it kept",
        "attack": "try to bring the concept back: sfumato attack ATTACK",
        "attacks": "list the attacks",
        "rescore": "count again what an evaluation or attack found, by another rule; nothing is drawn",
        "benchmark": "compare unlearning methods on concepts, with a leaderboard",
    },
    "pictures": {
        "invert": "find the noise from which a model draws a picture, and draw it again",
        "edit": "change a picture: invert it with one prompt, draw it again with another",
        "restore": "restore pictures: enlarge, fill holes, take off noise or blur",
    },
    "give it to others": {
        "release": "make of an unlearning result, or of a network that was trained, a folder for the Hugging Face Hub",
    },
    "the shell": {
        "completion": "print a script that completes commands, options and names in bash, zsh or tcsh",
    },
}
"""What a reader wants, to the commands for it, to what each does."""

SUMMARIES: Mapping[str, str] = {name: said for group in GROUPS.values() for name, said in group.items()}

EXAMPLES: Mapping[str, Sequence[str]] = {
    "demo": (
        "sfumato demo",
        "sfumato demo --forget sketch --output demo-sketch",
    ),
    "unlearn": (
        "sfumato unlearn {method} --forget sneaker --output no-sneaker",
        "sfumato unlearn {method} --forget sneaker --output no-sneaker --resume",
        "sfumato unlearn {method} --forget sneaker --output no-sneaker --dry_run",
        'sfumato unlearn {method} --model my/sd15 --forget "Van Gogh" --output no-van-gogh --save delta --json',
    ),
    "methods": (
        "sfumato methods",
        "sfumato methods --json",
    ),
    "evaluate": (
        "sfumato evaluate --model no-sneaker --forget sneaker --output evaluated",
        "sfumato evaluate --model no-sneaker --forget sneaker --output evaluated --resume",
        "sfumato evaluate --model no-sneaker --forget sneaker --output first-look --forget_repeats 1 --json",
    ),
    "attack": (
        "sfumato attack {attack} --model no-sneaker --forget sneaker --output attacked",
        "sfumato attack {attack} --model no-sneaker --forget sneaker --output attacked --resume",
        "sfumato attack {attack} --model no-sneaker --forget sneaker --output few-prompts --count 4 --json",
    ),
    "attacks": (
        "sfumato attacks",
        "sfumato attacks --json",
    ),
    "rescore": (
        "sfumato rescore evaluated --threshold 0.9 --output stricter.json",
        "sfumato rescore attacked attacked-by-p4d --output together.json",
    ),
    "benchmark": (
        "sfumato benchmark --methods uce,rece --concepts sneaker,sketch --quick --output leaderboard",
        "sfumato benchmark --methods uce,rece --concepts sneaker,sketch --quick --output leaderboard --resume",
    ),
    "invert": (
        'sfumato invert photo.png --prompt "a photo of a red sandal" --exact --output inverted',
        "sfumato invert photo.png --scheduler edict --output inverted-by-edict --json",
    ),
    "edit": (
        'sfumato edit inverted --target-prompt "a photo of a green sandal" --output edited',
        'sfumato edit photo.png --source-prompt "a photo of a red sandal" --target-prompt "a photo of a green sandal" '
        "--output edited-at-once",
    ),
    "restore": (
        "sfumato restore tiny.png --model atelier-sr --output enlarged",
        "sfumato restore photos --model atelier-inpaint --mask hole.png --output filled --resume",
    ),
    "release": (
        "sfumato release no-sneaker --output release",
        "sfumato release no-sneaker --output release --evaluation evaluated/evaluation.json "
        "--attacks attacked/attack.json",
        "sfumato release no-sneaker --output release --push me/no-sneaker",
    ),
    "completion": (
        "sfumato completion bash",
        "sfumato completion zsh",
    ),
}
"""Commands of each; every one is read by its parser in a test."""

STORY = (
    "sfumato unlearn salun --forget sneaker --output no-sneaker",
    "sfumato evaluate --model no-sneaker --forget sneaker --output evaluated",
    "sfumato attack unlearndiffatk --model no-sneaker --forget sneaker --output attacked",
)


def examples(command: str, **names: str) -> list[str]:
    """Give a command's examples, of a method or an attack if it is one's."""
    return [line.format(**names) if names else line for line in EXAMPLES[command]]


def story() -> tuple[str, str]:
    """Give what ``sfumato --help`` says of the commands, and what it says at the end."""
    lines = ["Samplers, exact inversion, restoration and concept unlearning.", ""]
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:12}{said}" for name, said in commands.items()), ""]
    lines += ["from a model to the proof that it forgot:", *(f"  {line}" for line in STORY)]
    codes = [f"  {code:<5}{said}" for code, said in EXIT_CODES.items()]
    end = [
        "Every command has --help with examples, and --json: its result as one JSON document on standard output,",
        'or {"error": ..., "type": ...} if it failed. Progress and notes go to standard error.', "",
        "exit codes:", *codes,
    ]  # fmt: skip
    return "\n".join(lines), "\n".join(end)
