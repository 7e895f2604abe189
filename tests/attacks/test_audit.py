import copy
import json
from dataclasses import replace

import pytest
import torch

import sfumato
from sfumato.attacks import audit, job, ring_a_bell
from sfumato.attacks.attack import Round
from sfumato.attacks.methods import ATTACKS
from sfumato.attacks.results import rescore
from sfumato.evaluation.detectors import FunctionDetector, Rule
from sfumato.families import StableDiffusion

QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0, "audit_batch_size": 2}


class Scripted:
    """An attack that draws the prompts themselves, a number of times; keeps what it was told."""

    def __init__(self, rounds):
        self.rounds, self.told, self.batches = rounds, [], []

    def __call__(self, batch, config):
        self.batches.append(batch)
        rows = tuple(range(len(batch.prompts)))
        for number in range(self.rounds):
            answer = yield Round(rows, batch.prompts, final=number > 0, iterations=number)
            self.told.append(answer)


@pytest.fixture
def scripted(monkeypatch):
    def use(rounds=2):
        script = Scripted(rounds)
        monkeypatch.setitem(ATTACKS, "p4d", replace(ATTACKS["p4d"], run=script, check=lambda *_: None))
        return script

    return use


class Eye:
    """Sees what it is told to, picture by picture, and keeps the pictures."""

    facts = {"detector": "eye"}  # noqa: RUF012

    def __init__(self, *scores):
        self.scores, self.pictures = list(scores), []

    def __call__(self, pictures):
        self.pictures.append(pictures)
        return FunctionDetector(lambda some: [self.scores.pop(0) for _ in some])(pictures)


RULE = Rule((("concept",),), threshold=0.5)
PROMPTS = ["a red sneaker", "a blue sneaker", "a green sneaker"]


def test_what_shows_without_an_attack_counts_and_is_not_attacked(atelier, unlearned, scripted):
    script = scripted()
    # two prompts: original, plain, then rounds of the one that is left; then the third prompt
    eye = Eye(1, 1, 0.9, 0, 0, 0.6, 1, 0, 0, 0.2)
    found = sfumato.attack(unlearned, atelier, "sneaker", "p4d", prompts=PROMPTS, detector=(eye, RULE), **QUICK)
    assert [batch.prompts for batch in script.batches] == [("a blue sneaker",), ("a green sneaker",)]
    assert [batch.numbers for batch in script.batches] == [(1,), (2,)]
    assert [(row["before"], row["after"], row["iterations"]) for row in found.rows] == [
        (True, True, 0), (False, True, 1), (False, False, 1),
    ]  # fmt: skip
    assert (found.pre_asr.successes, found.asr.successes, found.original.successes, found.asr.total) == (1, 2, 3, 3)
    assert found.rows[2]["candidates"][-1]["findings"] == [{"label": "concept", "score": 0.2}]
    assert eye.scores == []


def test_candidates_are_drawn_from_the_prompts_own_noise(atelier, unlearned, scripted):
    """Here a candidate is the prompt, so its picture is that of the prompt without an attack; all in 8 bits."""
    script = scripted()
    eye = Eye(*[0] * 8)
    sfumato.attack(unlearned, atelier, "sneaker", "p4d", prompts=PROMPTS[:2], detector=(eye, RULE), **QUICK)
    original, plain, asked, final = eye.pictures
    assert torch.equal(plain, final) and torch.equal(plain, asked) and not torch.equal(original, plain)
    assert torch.equal((255 * plain).round(), 255 * plain)
    assert [answer.shown for answer in script.told] == [(False, False)] * 2
    assert torch.equal(script.told[0].pictures, plain)


def test_seeds_and_guidance_of_a_list_are_those_of_its_pictures(atelier, unlearned, scripted):
    scripted()
    asked = [audit.AuditPrompt("a red sneaker", 5, 1.0), audit.AuditPrompt("a red sneaker", 5, 4.0)]
    eye = Eye(*[1] * 4)
    sfumato.attack(unlearned, atelier, "sneaker", "p4d", prompts=asked, detector=(eye, RULE), **QUICK)
    for scale, picture in zip((1.0, 4.0), eye.pictures[0], strict=True):
        generator = torch.Generator().manual_seed(5)
        stock = atelier(
            "a red sneaker", generator=generator, guidance_scale=scale, num_inference_steps=2, output_type="pt"
        )
        assert (stock.images[0] - picture).abs().max() <= 0.51 / 255


@pytest.fixture
def broken(monkeypatch):
    """Every prediction is NaN."""
    ask = StableDiffusion.ask
    monkeypatch.setattr(StableDiffusion, "ask", lambda self, *a, **k: float("nan") * ask(self, *a, **k))


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d", "concept_inversion", "embeddings"])
def test_an_attack_that_meets_nan_says_so_and_counts_nothing(atelier, unlearned, name, broken):
    eye = Eye(*[0] * 9)
    with pytest.raises((RuntimeError, ValueError), match="NaN or infinite"):
        sfumato.attack(
            unlearned, atelier, "sneaker", name, prompts=PROMPTS[:1], detector=(eye, RULE),
            **{**RUNS[name], **({"select": "any"} if name == "p4d" else {})}, **QUICK,
        )  # fmt: skip


def test_lost_encodings_are_not_searched(atelier, unlearned, monkeypatch):
    encode = StableDiffusion.encode_embeddings

    def lost(*arguments):
        return {name: float("nan") * values for name, values in encode(*arguments).items()}

    monkeypatch.setattr(StableDiffusion, "encode_embeddings", lost)
    call = {"prompts": PROMPTS[:1], "detector": (Eye(0, 0), RULE), **RUNS["ring_a_bell"], **QUICK}
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        sfumato.attack(unlearned, atelier, "sneaker", "ring_a_bell", **call)


def test_what_a_killed_write_left_is_swept_up(atelier, unlearned, scripted, tmp_path):
    scripted()
    out = tmp_path / "out"
    out.mkdir()
    (out / ".audit.json.0a1b2c3d.partial").write_text('{"att')
    call = {"prompts": PROMPTS[:1], "output_dir": out, **QUICK}

    class Dying(Eye):
        def __call__(self, pictures):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Dying(), RULE), **call)
    (out / "batches").mkdir(exist_ok=True)
    (out / "batches" / ".000000.json.0a1b2c3d.partial").write_text('{"rows"')
    sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(*[0] * 4), RULE), resume=True, **call)
    assert sorted(file.name for file in out.iterdir()) == ["attack.json", "prompts.jsonl"]


def test_a_run_is_gone_on_with_only_as_it_was_begun(atelier, unlearned, scripted, tmp_path):
    scripted()
    call = {"prompts": PROMPTS[:1], "output_dir": tmp_path / "out", "resume": True, **QUICK}

    class Dying(Eye):
        def __call__(self, pictures):
            raise KeyboardInterrupt

    def likeness(pictures):
        return pictures.flatten(1)

    with pytest.raises(KeyboardInterrupt):
        sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Dying(), RULE), features=likeness, **call)
    other = copy.copy(unlearned)
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, timestep_spacing="linspace")
    for model, features in ((other, likeness), (unlearned, lambda pictures: pictures.flatten(1))):
        with pytest.raises(ValueError, match="another audit: its drawn differ"):
            sfumato.attack(model, atelier, "sneaker", "p4d", detector=(Eye(), RULE), features=features, **call)
    sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(*[0] * 4), RULE), features=likeness, **call)
    found = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert found["drawn"]["device"] == "cpu" and found["drawn"]["dtype"] == "float32"
    assert found["drawn"]["features"].endswith("likeness") and found["versions"]["torch"] == torch.__version__
    stated = found["drawn"]["schedulers"]["unlearned"]
    assert stated["scheduler"] == type(unlearned.scheduler).__name__
    assert stated["config"]["timestep_spacing"] == unlearned.scheduler.config.timestep_spacing


def test_a_second_audit_in_a_folder_is_told_that_one_is_running(atelier, unlearned, scripted, tmp_path):
    scripted()
    call = {"prompts": PROMPTS[:1], "output_dir": tmp_path / "out", **QUICK}
    told = []

    class Meanwhile(Eye):
        def __call__(self, pictures):
            if not told:
                with pytest.raises(FileExistsError) as refused:
                    sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(), RULE), **call)
                told.append(str(refused.value))
            return super().__call__(pictures)

    sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Meanwhile(*[0] * 4), RULE), **call)
    assert told[0].startswith("Another run is writing into")


def test_a_function_may_be_the_detector(atelier, unlearned, scripted):
    for detector in (lambda pictures: [True] * len(pictures), "tests_of_nothing:look"):
        scripted()
        call = {"prompts": PROMPTS[:1], "detector": detector, **QUICK}
        if isinstance(detector, str):
            with pytest.raises(ImportError, match="can't be imported"):
                sfumato.attack(unlearned, atelier, "sneaker", "p4d", **call)
        else:
            found = sfumato.attack(unlearned, atelier, "sneaker", "p4d", **call)
            assert found.pre_asr.successes == 1 and found.rule["threshold"] == 0.5


def test_likeness_is_measured_by_something_before_any_picture(atelier, unlearned):
    eye = Eye()
    with pytest.raises(ValueError, match="name a CLIP, or use select='any'"):
        sfumato.attack(unlearned, atelier, "sneaker", "p4d", prompts=PROMPTS[:1], detector=(eye, RULE), **QUICK)
    assert not eye.pictures


def test_thresholds_can_move_afterwards(atelier, unlearned, scripted):
    scripted()
    eye = Eye(1, 1, 0.9, 0.1, 0, 0.6)
    found = sfumato.attack(unlearned, atelier, "sneaker", "p4d", prompts=PROMPTS[:2], detector=(eye, RULE), **QUICK)
    stricter = rescore(found, replace(RULE, threshold=0.7))
    assert (found.asr.successes, stricter.asr.successes, stricter.pre_asr.successes) == (2, 1, 1)
    assert rescore(found, RULE).as_dict() == found.as_dict() and rescore(found, RULE).rows == found.rows


def test_audit_cut_short_goes_on_where_it_was(atelier, unlearned, scripted, tmp_path):
    call = {"prompts": PROMPTS, **QUICK}
    again = {"output_dir": tmp_path / "out", **call}
    scripted()
    expected = sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(*[0] * 12), RULE), **call)

    class Killed(Exception):
        pass

    class Dying(Eye):
        def __call__(self, pictures):
            if len(self.pictures) == 5:
                raise Killed
            return super().__call__(pictures)

    with pytest.raises(Killed):
        sfumato.attack(
            unlearned,
            atelier,
            "sneaker",
            "p4d",
            detector=(Dying(*[0] * 12), RULE),
            output_dir=tmp_path / "out",
            **call,
        )
    again = {"output_dir": tmp_path / "out", **call}
    with pytest.raises(FileExistsError, match="go on with --resume"):
        sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(), RULE), **again)
    with pytest.raises(ValueError, match="holds another audit: its prompts differ"):
        sfumato.attack(
            unlearned,
            atelier,
            "sneaker",
            "p4d",
            detector=(Eye(), RULE),
            resume=True,
            **{**again, "prompts": PROMPTS[:2]},
        )
    script = scripted()
    found = sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(*[0] * 4), RULE), resume=True, **again)
    assert [batch.numbers for batch in script.batches] == [(2,)]
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in one.rows] for one in (expected, found)]
    assert timeless[0] == timeless[1]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["attack.json", "prompts.jsonl"]
    assert json.loads((tmp_path / "out" / "attack.json").read_text())["asr"] == expected.asr.as_dict()
    with pytest.raises(FileExistsError, match="already holds an audit"):
        sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(), RULE), resume=True, **again)


def test_half_written_batch_is_attacked_again(atelier, unlearned, scripted, tmp_path):
    scripted()
    call = {"prompts": PROMPTS[:2], **QUICK, "output_dir": tmp_path / "out"}

    class Dying(Eye):
        def __call__(self, pictures):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Dying(), RULE), **call)
    (tmp_path / "out" / "batches").mkdir()
    (tmp_path / "out" / "batches" / "000000.json").write_text('{"rows": [')
    found = sfumato.attack(unlearned, atelier, "sneaker", "p4d", detector=(Eye(*[0] * 8), RULE), resume=True, **call)
    assert found.asr.total == 2


LONG = {
    "unlearndiffatk": {"tokens": 3, "times": 4, "iterations": 2},
    "p4d": {"n": 4, "steps": 8, "evaluate_every": 2},
    "p4d, any": {"n": 4, "steps": 8, "evaluate_every": 2, "select": "any"},
    "ring_a_bell": {"tokens": 4, "population": 8, "generations": 8},
}


@pytest.mark.parametrize("name", LONG)
def test_a_killed_attack_goes_on_within_its_batch(atelier, unlearned, name, tmp_path, monkeypatch):
    monkeypatch.setattr(ring_a_bell, "KEEP_EVERY", 2)
    calls, limit = [], []
    encode = StableDiffusion.encode_embeddings

    class Killed(Exception):
        pass

    def counted(*arguments):
        calls.append(1)
        if limit and len(calls) > limit[0]:
            raise Killed
        return encode(*arguments)

    def run(folder, **more):
        calls.clear()
        shows = {3: 0, 2: 1}  # the first prompt without an attack, the last in the first round, the other never
        eye = FunctionDetector(lambda some: [float(number == shows.get(len(some))) for number, _ in enumerate(some)])
        call = {"prompts": PROMPTS, **LONG[name], **{**QUICK, "audit_batch_size": 3}}
        found = sfumato.attack(
            unlearned, atelier, "sneaker", name.split(",")[0], detector=(eye, RULE), features=lambda x: x.flatten(1),
            output_dir=tmp_path / folder, **call, **more,
        )  # fmt: skip
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found.rows], len(calls)

    monkeypatch.setattr(StableDiffusion, "encode_embeddings", counted)
    expected, needed = run("whole")
    limit.append(needed - 3)
    with pytest.raises(Killed):
        run("killed")
    assert [file.suffix for file in (tmp_path / "killed" / "batches").iterdir()] == [".safetensors"]
    limit.clear()
    found, again = run("killed", resume=True)
    assert found == expected and again < needed - 3
    assert sorted(file.name for file in (tmp_path / "killed").iterdir()) == ["attack.json", "prompts.jsonl"]


def test_a_result_is_attacked_by_its_folder_and_the_audit_says_which_it_is_of(tmp_path):
    folder = tmp_path / "erased"
    erased = sfumato.unlearn(
        sfumato.load("atelier"), "sneaker", "uce", output_dir=folder, save=["delta"], verify=False
    )
    call = {"forget": "sneaker", "method": "embeddings", "steps": 1, "prompts": PROMPTS[:1], **QUICK}
    found = sfumato.attack(folder, "atelier", **call, output_dir=tmp_path / "attacked")
    known = json.loads((folder / "manifest.json").read_text())["result_fingerprint"]
    assert json.loads((tmp_path / "attacked" / "attack.json").read_text())["result_fingerprint"] == known
    again = sfumato.attack(erased, sfumato.load("atelier"), **call)
    assert [{**row, "seconds": 0} for row in found.rows] == [{**row, "seconds": 0} for row in again.rows]


@pytest.mark.parametrize("method", ["unlearndiffatk", "concept_inversion"])
def test_prompts_results_do_not_depend_on_the_processes(launch, tmp_path, method):
    for processes, name in ((1, "one"), (2, "two")):
        done = launch("tests/attacks/audit_job.py", tmp_path / name, method, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "prompts.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["number"] for row in one] == list(range(5))
    assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]
    assert any(row["candidates"] for row in one)


def test_bad_input_is_one_sentence_before_any_work(atelier, unlearned, tmp_path):
    for options, message in (
        ({"method": "shouting"}, "There is no attack 'shouting'; choose from unlearndiffatk, p4d"),
        ({"colour": 1}, "There is no setting 'colour'; there are audit_batch_size, count"),
        ({"tokens": 40}, "Prompt 3 has 46 tokens with those of the attack .as others too: 1, 2, 3, 4"),
        ({"prompts": ["a red sneaker"] + ["a photo of a sneaker " * 12]}, "Prompt 2 has .* shorten the prompt"),
        ({"prompts": ["nude sneaker", "a child"]}, "Prompt 2 names minors"),
        ({"count": 0}, "`count` must be at least 1"),
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": "a sneaker"}, "`prompts` is one text: give a list"),
        ({"prompts": ["a sneaker", 7]}, "must be a text that is not empty, got 7"),
        ({"prompts": ["a red sneaker"], "count": 1}, "`count` is of the concept's own prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            sfumato.attack(unlearned, atelier, "sneaker", output_dir=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="holds other files"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("")
        sfumato.attack(unlearned, atelier, "sneaker", output_dir=tmp_path / "mine")


def test_a_cut_prompt_is_named(atelier, unlearned, scripted, caplog):
    scripted()
    long = "a photo of a red sneaker " * 9
    sfumato.attack(unlearned, atelier, "sneaker", "p4d", prompts=[long], detector=(Eye(1, 1), RULE), **QUICK)
    assert [record.getMessage() for record in caplog.records if record.name == "sfumato.attacks.prompts"] == [
        f"The end of the prompt {long!r} is not seen: longer than the text encoder's limit, it is cut."
    ]


def test_pairs_are_refused_as_prompts_are(atelier, unlearned, tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("with,without\na nude tween,a tween\n")
    with pytest.raises(ValueError, match="names minors"):
        sfumato.attack(unlearned, atelier, "sneaker", "ring_a_bell", pairs=str(file), prompts=PROMPTS[:1], **QUICK)


def test_the_original_is_not_taken_from_a_folder_that_happens_to_be_named_so(tmp_path, monkeypatch):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "manifest.json").write_text('{"model": "base"}')
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name the model before with --original"):
        job.main("p4d", ["--model", "result", "--forget", "sneaker", "--output", "out"])


def test_models_without_clip_are_refused(atelier):
    pixels = sfumato.load("atelier-pixel")
    with pytest.raises(ValueError, match="Attacks put tokens before CLIP"):
        sfumato.attack(pixels, pixels, "sneaker")


def test_pictures_that_are_not_finite_end_it(atelier, unlearned):
    broken = copy.copy(unlearned)
    broken.unet = copy.deepcopy(unlearned.unet)
    torch.nn.init.constant_(broken.unet.conv_out.weight, float("nan"))
    with pytest.raises(RuntimeError, match="pictures that are not finite"):
        sfumato.attack(broken, atelier, "sneaker", prompts=PROMPTS[:1], **QUICK)


def test_pictures_are_kept_if_asked_for_only(atelier, unlearned, scripted, tmp_path):
    for keep in (False, True):
        scripted()
        sfumato.attack(
            unlearned, atelier, "sneaker", "p4d", prompts=PROMPTS[:2], detector=(Eye(1, 1, 1, 0, 0, 0), RULE),
            output_dir=tmp_path / str(keep), keep_pictures=keep, **QUICK,
        )  # fmt: skip
    assert [file.name for file in (tmp_path / "True" / "pictures").iterdir()] == ["000000.png"]
    assert not (tmp_path / "False" / "pictures").exists()


RUNS = {
    "unlearndiffatk": {"tokens": 3, "times": 2, "iterations": 2},
    "p4d": {"n": 4, "steps": 3, "evaluate_every": 2},
    "p4d-k": {"variant": "k", "k": 2, "steps": 2},
    "ring_a_bell": {"tokens": 4, "population": 8, "generations": 2},
    "concept_inversion": {"pictures": 2, "steps": 2, "batch": 2, "start": "bag"},
    "embeddings": {"steps": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_every_attack_runs_by_its_name_and_changes_no_model(atelier, unlearned, name):
    method, settings = name.removesuffix("-k"), RUNS[name]
    parts = [*unlearned.unet.named_parameters(), *unlearned.text_encoder.named_parameters()]
    before = [(key, values.requires_grad, values.detach().clone()) for key, values in parts]
    found = sfumato.attack(unlearned, atelier, "sneaker", method, prompts=PROMPTS[:2], **settings, **QUICK)
    assert len(found.rows) == 2 and found.attack == method and found.asr.value >= found.pre_asr.value
    assert json.loads(json.dumps(found.as_dict()))["settings"].items() >= settings.items()
    after = [(key, values.requires_grad, values) for key, values in parts]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
