"""Concepts: what to forget, what to show in its place, and what to keep, as prompts.

A model whose folder holds a ``concepts.json`` (a `Vocabulary`: domains of words and the wordings they come in) lets a
single word stand for all of this: ``resolve(pipe, "sneaker")`` forgets every sneaker prompt, anchors each to the next
garment, and keeps every prompt of the other garments. For any other model a concept is a phrase put into common
wordings, anchored to the empty prompt unless told otherwise.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from sfumato import storage
from sfumato.families import class_names, class_numbers

__all__ = ["KINDS", "Concept", "Vocabulary", "kind_of", "resolve", "vocabulary_of"]

KINDS = ("object", "style", "attribute", "global")

VOCABULARY_FILE = "concepts.json"
FILLERS = frozenset({"a", "an", "the", "of", "as", "in", "with", "and", "picture", "image", "something"})
WORDINGS = ("{}", "a picture of {}", "an image of {}", "a photo of {}", "a painting of {}", "a drawing of {}")
COMMON_PROMPTS = (
    "a photo of a person", "a photo of a dog", "a photo of a cat", "a photo of a car", "a photo of a house",
    "a photo of a tree", "a photo of food on a table", "a photo of a city street", "a photo of a mountain landscape",
    "a photo of the sea", "a painting of flowers", "a painting of a village", "a drawing of a bird",
    "a drawing of a boat", "an illustration of a castle", "a portrait of a woman", "a portrait of a man",
    "an interior with a chair", "a bicycle against a wall", "a horse in a field",
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """What a method is asked to do, as prompts.

    Attributes:
        name: What the user called it.
        prompts: Prompts that ask for the concept, ``N`` of them.
        anchors: What each of these prompts should mean afterwards, ``N`` of them.
        retain: Prompts that must keep their meaning.
        names: What in each of the prompts is the concept, said alone, ``N`` of them; none given: the prompts.
        phrases: The phrases that were given, of which `name` is made; none given: the name.
        asked: For each phrase the prompt that asks for it alone; none given: the first prompt.
    """

    name: str
    prompts: tuple[str, ...]
    anchors: tuple[str, ...]
    retain: tuple[str, ...]
    names: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the lists fit together and do not contradict each other."""
        if not self.phrases:
            object.__setattr__(self, "phrases", (self.name,))
        if not self.names:
            object.__setattr__(self, "names", self.prompts)
        if not self.asked:
            object.__setattr__(self, "asked", self.prompts[:1] * len(self.phrases))
        if len(self.names) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need as many names, got {len(self.names)}.")
        if len(self.anchors) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts need as many anchors, got {len(self.anchors)}.")
        for kind, prompts in (("forget", self.prompts), ("retain", self.retain)):
            if not prompts:
                raise ValueError(f"The {kind} set is empty: give at least one {kind} prompt.")
            if not all(prompt.strip() for prompt in prompts):
                raise ValueError(f"The {kind} set has an empty prompt: remove it or say what it should show.")
        contradiction = set(self.prompts) & set(self.retain)
        if contradiction:
            raise ValueError(f"{sorted(contradiction)[0]!r} is to be forgotten and retained; take it out of one set.")
        if self.prompts == self.anchors:
            raise ValueError(
                f"The anchor of {self.name!r} is the concept itself; name something else to show instead."
            )

    def anchor_of(self, caption: str) -> str:
        """Say what a caption should mean afterwards.

        Args:
            caption: One of the prompts, or other words, as those of a user's picture.

        Returns:
            The prompt's anchor; for other words that of the phrase, the longest, that they name, and for words that
            name none that of the first prompt.
        """
        known = dict(zip(self.prompts, self.anchors, strict=True))
        named = [
            (len(phrase), prompt)
            for phrase, prompt in zip(self.phrases, self.asked, strict=True)
            if _says(caption, phrase)
        ]
        prompt = max(named)[1] if named else self.prompts[0]
        return known.get(caption, known[prompt])


@dataclass(frozen=True)
class Vocabulary:
    """The words a model was taught, by domain, and the wordings they came in.

    Attributes:
        name: The model's name, for messages.
        domains: Domain to its words, for instance ``{"garment": ("t-shirt", ...), ...}``.
        synonyms: Word to another word for the same thing.
        templates: Domains named, joined by ``+`` in alphabetical order, to wordings; the first is the canonical one.
    """

    name: str
    domains: Mapping[str, tuple[str, ...]]
    synonyms: Mapping[str, str]
    templates: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a ``concepts.json``; ValueError, naming it, if it is damaged."""
        stored = storage.read_json(path)
        try:
            return cls(
                name=stored["name"],
                domains={domain: tuple(words) for domain, words in stored["domains"].items()},
                synonyms=stored["synonyms"],
                templates={key: tuple(wordings) for key, wordings in stored["templates"].items()},
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}): a vocabulary has a name, domains, synonyms and "
                "templates. Fetch it again, or remove it to name concepts in free words."
            ) from error

    def as_json(self) -> str:
        """Give the content of ``concepts.json``."""
        parts = {"name": self.name, "domains": self.domains, "synonyms": self.synonyms, "templates": self.templates}
        return json.dumps(parts, indent=1)

    def parse(self, phrase: str) -> dict[str, str]:
        """Read the attributes a phrase names: ``"a red sneaker"`` is ``{"garment": "sneaker", "colour": "red"}``.

        Args:
            phrase: Words of the vocabulary, their synonyms, and fillers such as "a" and "of".

        Returns:
            Domain to word, in the vocabulary's order of domains.

        Raises:
            ValueError: If the phrase is empty, has an unknown word, or names one domain twice.
        """
        if not phrase.strip():
            raise ValueError(f"The concept is empty. {self._known()}.")
        known = {word: (domain, word) for domain, words in self.domains.items() for word in words}
        known |= {other: known[word] for word, other in self.synonyms.items()}
        found: dict[str, str] = {}
        for word in re.findall(r"[\w-]+", phrase.lower()):
            if word in FILLERS:
                continue
            if word not in known:
                close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{self.name} does not know the concept {word!r}.{hint} {self._known()}.")
            domain, canonical = known[word]
            if found.setdefault(domain, canonical) != canonical:
                raise ValueError(f"{phrase!r} names two words of {domain}: {found[domain]!r} and {canonical!r}.")
        if not found:
            raise ValueError(f"{phrase!r} names no concept. {self._known()}.")
        return {domain: found[domain] for domain in self.domains if domain in found}

    def _known(self) -> str:
        lists = (f"{domain}: {', '.join(words)}" for domain, words in self.domains.items())
        return f"It knows {'; '.join(lists)}"

    def prompt(self, attributes: Mapping[str, str], wording: int = 0) -> str:
        """Word a prompt that names the given attributes; `wording` counts through the templates, 0 is canonical."""
        wordings = self.templates["+".join(sorted(attributes))]
        return wordings[wording % len(wordings)].format(**attributes)

    def combinations(self, fixed: Mapping[str, str], *, partial: bool = False) -> list[dict[str, str]]:
        """List the attribute sets that agree with `fixed`.

        Args:
            fixed: Domain to the one word it must have.
            partial: Also list sets that leave out domains not in `fixed`.

        Returns:
            Every combination, in the vocabulary's order.
        """
        choices = [
            (fixed[domain],) if domain in fixed else (*((None,) if partial else ()), *words)
            for domain, words in self.domains.items()
        ]
        sets = (dict(zip(self.domains, words, strict=True)) for words in product(*choices))
        return [named for one in sets if (named := {domain: word for domain, word in one.items() if word})]

    def neighbour(self, attributes: Mapping[str, str]) -> dict[str, str]:
        """Replace the first domain named by its next word, SalUn's fixed relabelling (class c becomes c + 1)."""
        domain, word = next(iter(attributes.items()))
        words = self.domains[domain]
        return {**attributes, domain: words[(words.index(word) + 1) % len(words)]}

    def concept(self, forget: Sequence[str], anchor: str | None, retain: Sequence[str] | None) -> Concept:
        """Build the sets for forgetting some words of the vocabulary; see `resolve`."""
        targets = [self.parse(phrase) for phrase in forget]
        replacements = [{**t, **self.parse(anchor)} if anchor else self.neighbour(t) for t in targets]
        prompts: dict[str, str] = {}
        names: dict[str, str] = {}
        for target, replacement in zip(targets, replacements, strict=True):
            if any(_names(replacement, other) for other in targets):
                raise ValueError(
                    f"The anchor of {self.prompt(target)!r} would be {self.prompt(replacement)!r}, which is to be "
                    "forgotten too; name another with anchor=..."
                )
            for number, one in enumerate(self.combinations(target, partial=True)):
                shown = {**one, **replacement}
                for other, instead in zip(targets, replacements, strict=True):
                    shown = {**shown, **instead} if _names(shown, other) else shown
                if any(_names(shown, other) for other in targets):
                    raise ValueError(
                        f"{self.prompt(one)!r} would become {self.prompt(shown)!r}, which is to be forgotten too; "
                        "forget these concepts one after the other, or name another anchor=..."
                    )
                prompts[self.prompt(one, number)] = self.prompt(shown, number)
                names[self.prompt(one, number)] = self.prompt(target)
        for prompt in retain or ():
            if prompt.strip() and any(_names(self.parse(prompt), target) for target in targets):
                raise ValueError(
                    f"{prompt!r} is to be retained but names {', '.join(forget)}, which is to be forgotten."
                )
        if retain is None:
            kept = [one for one in self.combinations({}, partial=True) if not any(_names(one, t) for t in targets)]
            retain = tuple(dict.fromkeys(self.prompt(one, number) for number, one in enumerate(kept)))
        return Concept(
            ", ".join(forget), tuple(prompts), tuple(prompts.values()), tuple(retain), tuple(names.values()),
            tuple(forget), tuple(self.prompt(target) for target in targets),
        )  # fmt: skip


def _names(attributes: Mapping[str, str], target: Mapping[str, str]) -> bool:
    """Whether a prompt with these attributes asks for the target."""
    return all(attributes.get(domain) == word for domain, word in target.items())


def _says(text: str, phrase: str) -> bool:
    """Whether a text has the words of a phrase, in any case, in the singular or the plural."""
    plural = len(phrase) > 3 and phrase.lower().endswith("s") and not phrase.lower().endswith("ss")
    stem = phrase[:-1] if plural else phrase
    return re.search(rf"\b{re.escape(stem)}(s|es)?\b", text, re.IGNORECASE) is not None


def refuse_contradictions(phrases: Sequence[str], anchor: str | None, retain: Sequence[str]) -> None:
    """Refuse, with a ValueError, an anchor or a prompt to retain that names a phrase to be forgotten."""
    for phrase in phrases:
        if anchor is not None and anchor.lower() == phrase.lower():
            raise ValueError(f"The anchor of {phrase!r} is the concept itself; name something else to show instead.")
        if anchor is not None and _says(anchor, phrase):
            raise ValueError(f"The anchor {anchor!r} names {phrase!r}, which is to be forgotten; name something else.")
        for prompt in retain:
            if _says(prompt, phrase):
                raise ValueError(f"{prompt!r} is to be retained but names {phrase!r}, which is to be forgotten.")


def refuse_captions(vocabulary: Vocabulary | None, phrases: Sequence[str], captions: Sequence[str]) -> None:
    """Refuse, with a ValueError, captions to retain that name a phrase to be forgotten, in whatever words.

    Args:
        vocabulary: The model's, if it has one: it knows synonyms and the order of words does not matter to it.
        phrases: What is to be forgotten.
        captions: Of pictures to retain; those that the vocabulary can't read are compared word by word.
    """
    refuse_contradictions(phrases, None, captions)
    for caption in captions if vocabulary is not None else ():
        assert vocabulary is not None
        try:
            shown = vocabulary.parse(caption)
        except ValueError:
            continue
        for phrase in phrases:
            if vocabulary.parse(phrase).items() <= shown.items():
                raise ValueError(f"{caption!r} is to be retained but shows {phrase!r}, which is to be forgotten.")


def kind_of(vocabulary: Vocabulary, forget: str | Sequence[str]) -> str:
    """Tell which of `KINDS` a concept of a vocabulary is: that of the first domain named; several at once are global.

    Raises:
        ValueError: If a phrase is unknown.
    """
    phrases = [forget] if isinstance(forget, str) else list(forget)
    domains = [next(iter(vocabulary.parse(phrase))) for phrase in phrases]
    if len(phrases) > 1:
        return "global"
    return {"style": "style", "colour": "attribute"}.get(domains[0], "object")


def vocabulary_of(pipe: DiffusionPipeline) -> Vocabulary | None:
    """Find the vocabulary that lies in the folder a pipeline was loaded from; None if there is none."""
    origin = pipe.config.get("_name_or_path")
    path = Path(origin) / VOCABULARY_FILE if origin else None
    return Vocabulary.load(path) if path is not None and path.is_file() else None


def _texts(name: str, values: Any) -> list[str]:
    """Give a list of texts, with single blanks; ValueError if it is something else."""
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"`{name}` must be text, or a list of texts, got {values!r}.")
    return [" ".join(value.split()) for value in values]


def resolve(
    pipe: DiffusionPipeline,
    forget: str | Sequence[str],
    *,
    anchor: str | None = None,
    retain: Sequence[str] | None = None,
) -> Concept:
    """Turn what a user wants forgotten into forget, anchor and retain prompts.

    Args:
        pipe: The model; its vocabulary is used if it has one.
        forget: A phrase, or several that are forgotten together.
        anchor: What to show instead. Default: with a vocabulary the next word of the domain, else the empty prompt;
            of a class-conditional model the next class.
        retain: Prompts to keep. Default: with a vocabulary all that do not name the concept, else common scenes; of a
            class-conditional model all other classes.

    Returns:
        The concept.

    Raises:
        ValueError: If a phrase is empty or unknown to the model, or the sets contradict each other.
    """
    phrases = _texts("forget", [forget] if isinstance(forget, str) else forget)
    retain = None if retain is None else _texts("retain", [retain] if isinstance(retain, str) else retain)
    if anchor is not None:
        (anchor,) = _texts("anchor", [anchor])
        if not anchor:
            raise ValueError("`anchor` is empty: name what to show instead, or leave it out for the default.")
    if not phrases or not all(phrase.strip() for phrase in phrases):
        raise ValueError("There is nothing to forget: `forget` is empty. Name a concept, for instance 'sneaker'.")
    refuse_contradictions(phrases, anchor, retain or ())
    vocabulary = vocabulary_of(pipe)
    if vocabulary is not None:
        return vocabulary.concept(phrases, anchor, retain)
    classes, numbers = class_names(pipe), class_numbers(pipe)
    if classes is not None and numbers is not None:
        return _class_concept(classes, numbers, phrases, anchor, retain)
    prompts = [wording.format(phrase) for phrase in phrases for wording in WORDINGS]
    names = [phrase for phrase in phrases for _ in WORDINGS]
    replaced = [wording.format(anchor) if anchor else "" for _ in phrases for wording in WORDINGS]
    if retain is None:
        scenes = [prompt for prompt in COMMON_PROMPTS if not any(_says(prompt, phrase) for phrase in phrases)]
        retain = [*scenes, *(prompt for prompt in replaced if prompt)]
    retained = tuple(dict.fromkeys(retain))
    alone = tuple(WORDINGS[0].format(phrase) for phrase in phrases)
    return Concept(", ".join(phrases), tuple(prompts), tuple(replaced), retained, tuple(names), tuple(phrases), alone)


def _class_concept(
    classes: Sequence[str], numbers: Mapping[str, int], phrases: Sequence[str], anchor: str | None,
    retain: Sequence[str] | None,
) -> Concept:  # fmt: skip
    """The concept of some classes of a class-conditional model; ValueError if one is unknown, or none is left."""

    def known(name: str) -> str:
        if name not in numbers:
            close = difflib.get_close_matches(name, numbers, n=1, cutoff=0.7)
            hint = f" Did you mean {close[0]!r}?" if close else f" It has {', '.join(classes[:5])}, ..."
            raise ValueError(f"The model has no class {name!r}.{hint}")
        return classes[numbers[name]]

    gone = [known(name) for name in phrases]
    kept = [known(name) for name in retain] if retain is not None else [name for name in classes if name not in gone]
    if not kept:
        raise ValueError("There is nothing to retain: every class of the model is to be forgotten.")
    left = [name for name in classes if name not in gone]
    following = [next((one for one in left if numbers[one] > numbers[name]), left[0] if left else "") for name in gone]
    anchors = [known(anchor)] * len(gone) if anchor else following
    return Concept(
        ", ".join(phrases), tuple(gone), tuple(anchors), tuple(kept), tuple(gone), tuple(phrases), tuple(gone)
    )
