import pytest

from sfumato.concepts import Concept, Vocabulary, resolve, vocabulary_of
from sfumato.loading import assets_folder


class Pipe:
    """What `resolve` reads of a pipeline: where it was loaded from."""

    def __init__(self, folder=None):
        self.config = {"_name_or_path": str(folder)} if folder else {}


ATELIER, OTHER = Pipe(assets_folder() / "atelier"), Pipe()


@pytest.fixture
def words():
    return Vocabulary.load(assets_folder() / "atelier" / "concepts.json")


def test_vocabulary_survives_its_file(words, tmp_path):
    (tmp_path / "concepts.json").write_text(words.as_json())
    assert vocabulary_of(Pipe(tmp_path)) == words
    assert vocabulary_of(OTHER) is None


@pytest.mark.parametrize(
    ("phrase", "attributes"),
    [
        ("sneaker", {"garment": "sneaker"}),
        ("a Red sneaker", {"garment": "sneaker", "colour": "red"}),
        ("a photo of a t-shirt", {"garment": "t-shirt", "style": "photo"}),
        ("trainer", {"garment": "sneaker"}),
        ("mosaic", {"style": "mosaic"}),
    ],
)
def test_phrases_are_read_as_attributes(words, phrase, attributes):
    assert words.parse(phrase) == attributes


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("snaeker", "does not know the concept 'snaeker'. Did you mean 'sneaker'"),
        ("dragon", "atelier does not know the concept 'dragon'. It knows garment: t-shirt, trouser"),
        ("red blue bag", "two words of colour: 'red' and 'blue'"),
        ("a picture of", "names no concept"),
    ],
)
def test_phrases_that_make_no_sense_are_refused_with_what_is_known(words, phrase, message):
    with pytest.raises(ValueError, match=message):
        words.parse(phrase)


def test_concept_of_a_vocabulary_covers_all_that_names_it_and_retains_all_that_does_not():
    concept = resolve(ATELIER, "sneaker")
    assert len(concept.prompts) == 5 * 7  # four styles or none, six colours or none
    assert all("sneaker" in prompt for prompt in concept.prompts)
    assert all("bag" in anchor and "sneaker" not in anchor for anchor in concept.anchors)
    assert not any("sneaker" in prompt for prompt in concept.retain)
    assert len(concept.retain) == 10 * 5 * 7 - 1  # nine garments or none, without the empty prompt
    assert dict(zip(concept.prompts, concept.anchors, strict=True))["a sneaker"] == "a bag"


def test_anchor_keeps_every_other_attribute_and_the_wording():
    for prompt, anchor in zip(
        *(getattr(resolve(ATELIER, "red", anchor="blue"), k) for k in ("prompts", "anchors")), strict=True
    ):
        assert prompt.replace("red", "blue") == anchor


def test_every_prompt_knows_what_in_it_is_the_concept_alone():
    both = resolve(ATELIER, ["sneaker", "mosaic"])
    assert len(both.names) == len(both.prompts) and set(both.names) == {"a sneaker", "a mosaic"}
    assert all(name.split()[-1] in prompt for name, prompt in zip(both.names, both.prompts, strict=True))
    assert set(resolve(OTHER, ["Van Gogh", "a dog"]).names) == {"Van Gogh", "a dog"}
    assert Concept("x", ("a", "b"), ("c", "c"), ("d",)).names == ("a", "b")


def test_compound_concept_spares_its_parts():
    concept = resolve(ATELIER, "red sneaker")
    for kept in ({"blue", "sneaker"}, {"red", "bag"}):
        assert any(kept <= set(prompt.replace(",", "").split()) for prompt in concept.retain)
    assert all("red" in prompt and "sneaker" in prompt for prompt in concept.prompts)


def test_several_concepts_are_forgotten_together():
    concept = resolve(ATELIER, ["sneaker", "mosaic"])
    assert not any("sneaker" in prompt or "mosaic" in prompt for prompt in concept.retain)
    assert {"a sneaker", "a mosaic"} <= set(concept.prompts)


def test_anchor_that_is_forgotten_too_is_refused():
    with pytest.raises(ValueError, match="to be forgotten too"):
        resolve(ATELIER, ["sneaker", "bag"])


def test_phrase_for_any_model_is_put_into_common_wordings_and_anchored_to_nothing():
    concept = resolve(OTHER, "Van Gogh")
    assert "a painting of Van Gogh" in concept.prompts
    assert set(concept.anchors) == {""}
    assert "a photo of a dog" in concept.retain


def test_common_scenes_that_name_the_concept_are_not_retained():
    assert not any("dog" in prompt for prompt in resolve(OTHER, "dog").retain)


def test_retain_prompts_of_the_user_are_taken_as_they_are():
    assert resolve(OTHER, "dog", retain=["a cat", "a hotdog stand"]).retain == ("a cat", "a hotdog stand")
    with pytest.raises(ValueError, match="names 'dog'"):
        resolve(OTHER, "dog", retain=["a small dog"])


def test_retain_prompts_are_read_with_the_vocabulary(words):
    with pytest.raises(ValueError, match="'a red trainer' is to be retained but names sneaker"):
        words.concept(["sneaker"], None, ["a red trainer"])
    with pytest.raises(ValueError, match="does not know the concept 'hat'"):
        words.concept(["sneaker"], None, ["a photo of a hat"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forget": None}, "`forget` must be text, or a list of texts, got None"),
        ({"forget": ["sneaker", 3]}, "`forget` must be text"),
        ({"retain": [3]}, "`retain` must be text"),
        ({"anchor": 5}, "`anchor` must be text"),
        ({"anchor": " "}, "`anchor` is empty"),
    ],
)
def test_what_is_no_text_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve(OTHER, **{"forget": "sneaker", **settings})


def test_anchor_equal_to_the_concept_is_refused():
    for anchor in ("dog", " dog "):
        with pytest.raises(ValueError, match="is the concept itself"):
            resolve(OTHER, "Dog", anchor=anchor)
    with pytest.raises(ValueError, match="The anchor 'a big dog' names 'dog'"):
        resolve(OTHER, "dog", anchor="a big dog")
    assert resolve(OTHER, "grumpy cat", anchor="cat").anchors[0] == "cat"


def test_blanks_do_not_matter():
    assert resolve(OTHER, " big  dog ", anchor="a  cat") == resolve(OTHER, "big dog", anchor="a cat")


def test_a_comma_does_not_make_two_concepts_of_one():
    assert resolve(OTHER, "red, sneaker").phrases == ("red, sneaker",)
    assert resolve(OTHER, ["red", "sneaker"]).phrases == ("red", "sneaker")


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 prompts need as many anchors, got 1"):
        Concept("x", ("a", "b"), ("c",), ("d",))


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"name": ', "concepts.json is not valid JSON"), ("{}", "concepts.json is damaged .KeyError: 'name'")],
)
def test_damaged_vocabulary_is_named(tmp_path, content, message):
    (tmp_path / "concepts.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(tmp_path / "concepts.json")


def test_a_caption_in_other_words_gets_the_anchor_of_the_phrase_that_it_names():
    concept = resolve(OTHER, ["sneaker", "old car"], anchor="bag")
    assert concept.anchor_of("a photo of old car") == "a photo of bag"
    assert concept.anchor_of("an Old Car in the rain") == "bag"
    assert concept.anchor_of("a picture of nothing") == "bag"


def test_a_caption_that_names_two_phrases_gets_the_anchor_of_the_longer_one():
    concept = resolve(ATELIER, ["red sneaker", "sneaker", "mosaic"])
    known = dict(zip(concept.prompts, concept.anchors, strict=True))
    assert concept.asked == ("a red sneaker", "a sneaker", "a mosaic")
    for caption, prompt in {
        "my old sneaker on grass": "a sneaker", "a red sneaker in the rain": "a red sneaker",
        "a mosaic of a boat": "a mosaic", "nothing of it": concept.prompts[0],
    }.items():  # fmt: skip
        assert concept.anchor_of(caption) == known[prompt]


@pytest.mark.parametrize(("forget", "retain"), [("cat", "a photo of two cats"), ("dogs", "a dog"), ("bus", "buses")])
def test_a_phrase_is_the_same_in_singular_and_plural(forget, retain):
    with pytest.raises(ValueError, match="is to be retained but names"):
        resolve(OTHER, forget, retain=[retain])
    assert not any("dog" in prompt for prompt in resolve(OTHER, "dogs").retain)
    assert resolve(OTHER, "glass", retain=["a gla", "a carpet"]).retain == ("a gla", "a carpet")
