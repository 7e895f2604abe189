"""The card says what was found, in the Hub's own form, and no name can break it."""

import dataclasses
import json
import re
import shlex
import subprocess

import pytest
import yaml
from huggingface_hub import ModelCard

import sfumato
from sfumato.attacks.audit import AuditConfig
from sfumato.attacks.job import AttackJob
from sfumato.attacks.methods import ATTACKS
from sfumato.evaluation.evaluate import EvaluationConfig
from sfumato.evaluation.job import EvaluationJob

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "```\n---\nlicense: mit\n---\n```",
    "[x](javascript:alert(1)) ![y](z) `code` $E=mc^2$ **bold**",
    "'; rm -rf ~; echo \"",
    "{{ 7 * 7 }} {% raw %}",
    "- dash: [1, 2]\u2028\x00\u202e",
    "-rf",
]


def test_the_findings_read_back_from_the_metadata(run, tmp_path, findings):
    folder = sfumato.release(run.folder, tmp_path / "release", base="atelier", **findings)
    data = ModelCard.load(folder / "README.md").data
    found = {(each.dataset_type, each.metric_type): each for each in data.eval_results}
    values = {name: each.metric_value for (_, name), each in found.items()}
    distances = {"frechet_distance_against_the_original": 12.5, "frechet_distance_against_real_pictures": 2.5}
    shares = {"ua": 0.9, "neighbour_boot": 0.5, "pre_asr": 0.0, "asr": 0.8}  # without what is none or no number
    assert values == {**shares, **distances, "drift_retain": 0.25}
    counted = {"low": 0.7, "high": 0.9, "successes": 24, "total": 30}
    assert found["sfumato-attack", "asr"].metric_args == counted
    assert found["sfumato-attack", "pre_asr"].metric_args["before"] == 1.0
    real = found["sfumato-evaluation", "frechet_distance_against_real_pictures"].metric_args
    assert real == {"low": 2.0, "high": 3.0, "before": 1.5, "before_low": 1.0, "before_high": 2.0}
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", "apache-2.0")
    assert data.base_model == "atelier" and {"sfumato", "uce", "concept-unlearning", "lora"} <= set(data.tags)


def test_the_text_states_results_settings_and_where_it_came_from(run, tmp_path, findings):
    folder = sfumato.release(run.folder, tmp_path / "release", base="atelier", **findings)
    text = (folder / "README.md").read_text()
    manifest = json.loads((run.folder / "manifest.json").read_text())
    for name in ("base_fingerprint", "result_fingerprint"):
        assert manifest[name] in text
    for name in manifest["settings"]:
        assert f"| {name} |".replace("_", "\\_") in text
    for name, version in manifest["versions"].items():
        assert f"| {name} | {version} |" in text
    text = text.replace("\\", "")
    assert "**80.0 % of the prompts show the concept, as they are or attacked**; as they are: 0.0 %" in text
    assert "| UA | 10.0 % [5.0, 20.0] | 90.0 % [80.0, 95.0] | 90 of 100 |" in text and "| CRA" not in text
    assert "| Fréchet distance, against real pictures | 1.5 [1, 2] | 2.5 [2, 3] |  |" in text
    assert "Detector: clip (model clip). Rule: wanted sneaker, top 1. Settings: real photos, seed 0." in text
    assert "| ASR |  | 80.0 % [70.0, 90.0] | 24 of 30 |" in text
    assert "Not evaluated" not in text and "Not attacked" not in text
    assert json.loads((folder / "attack-1.json").read_text())["asr"]["value"] == 0.8


def test_the_audits_commands_are_for_the_folder_of_the_release_and_name_nothing_of_this_machine(
    run, tmp_path, findings
):
    for formats, model in ((["delta"], "."), (["lora"], "again")):  # a LoRA is not what was evaluated
        folder = sfumato.release(run.folder, tmp_path / model / "new", formats=formats, base="atelier", **findings)
        evaluation, attack = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "attack-1.json"))
        assert evaluation["command"] == (
            f"sfumato evaluate --model {model} --forget sneaker --original atelier --detector clip:clip "
            "--features mine:embed --real photos --seed 3 --quick --output audit"
        )
        assert attack["command"] == (
            f"sfumato attack embeddings --model {model} --forget sneaker --original atelier --prompts 'my list.csv' "
            "--steps 3 --seed 7 --output attack-1"
        )
        text = (folder / "README.md").read_text()
        assert f"{evaluation['command']}\n{attack['command']}\n" in text
        assert "What --detector, --features, --real, --prompts names is not part of this release" in text
        assert evaluation["models"]["result"] == {"name": "new", "fingerprint": "1"}
        assert evaluation["models"]["original"]["name"] == "atelier" and "cache" not in evaluation["settings"]


@pytest.mark.parametrize(
    "command",
    [
        None,
        "sfumato evaluate --model out --forget sneaker --output found; rm -rf ~",
        "sfumato evaluate --help",
        "sfumato release out --output found",
        "rm -rf ~",
        "sfumato evaluate 'unfinished",
    ],
)
def test_what_is_no_command_of_an_audit_is_not_in_the_card(run, tmp_path, findings, command, capfd):
    content = json.loads(findings["evaluation"].read_text()) | {"command": command}
    findings["evaluation"].write_text(json.dumps(content))
    folder = sfumato.release(
        run.folder, tmp_path / "new", formats=["delta"], base="atelier", evaluation=findings["evaluation"]
    )
    text = (folder / "README.md").read_text()
    assert "sfumato evaluate" not in text and "rm -rf" not in text and "usage" not in "".join(capfd.readouterr())
    assert "What evaluation.json holds was found by calls from Python" in text
    assert json.loads((folder / "evaluation.json").read_text())["command"] is None


def test_every_option_of_an_audit_that_is_text_is_known_to_be_a_path_or_none():
    free = {"model", "forget", "output", "original", "neighbours", "retain", "dtype", "place", "insertion", "variant"}
    free |= {"select", "start", "attack"}  # choices and words
    handled = {"cache", "device", "pairs", "prompts", "real", "detector", "features", "clip"}
    jobs = [EvaluationJob, EvaluationConfig, AttackJob, AuditConfig, *(attack.config for attack in ATTACKS.values())]
    texts = {field.name for job in jobs for field in dataclasses.fields(job) if "str" in str(field.type)}
    assert handled <= texts <= handled | free


def test_what_was_not_measured_is_said_to_be_so(run, tmp_path):
    folder = sfumato.release(run.folder, tmp_path / "release", formats=["lora"], base="atelier")
    text = (folder / "README.md").read_text()
    assert "**Not evaluated.**" in text and "**Not attacked.**" in text
    assert ModelCard.load(folder / "README.md").data.eval_results is None


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ({"moved": 0.5, "drifted": 0.1}, "changed by 0.50 for the concept and by 0.10 for what is retained"),
        (
            {"moved": 1, "drifted": 0, "gone": 0.9, "shown_before": 1.0, "neighbours": {"boot": [1.0, 0.5]}},
            "10 % after were judged to show it; pictures of other words judged right, before to after: "
            "boot 100 % to 50 %. This is a quick check",
        ),
    ],
)
def test_the_check_at_the_end_of_the_run_is_told_and_is_no_evaluation(edit_manifest, tmp_path, verdict, said):
    folder = sfumato.release(edit_manifest(verdict=verdict), tmp_path / "release", formats=["lora"], base="atelier")
    text = (folder / "README.md").read_text()
    assert said in text and "**Not evaluated.**" in text


def test_the_licence_is_the_bases_own(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: rail-x\nlicense_link: LICENSE.md\n---\n")
    (base / "LICENSE.md").write_text("terms")
    folder = sfumato.release(run.folder, tmp_path / "release", formats=["lora"], base=base)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "rail-x", "LICENSE.md")
    assert (folder / "LICENSE.md").read_text() == "terms"
    assert data.base_model is None  # a folder of one machine is no model that others find
    (base / "README.md").write_text("no metadata")
    with pytest.raises(ValueError, match="licence of 'base' could not be found"):
        sfumato.release(run.folder, tmp_path / "other", formats=["lora"], base=base)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_mere_text(run, edit_manifest, tmp_path, findings, name):
    concept = {"name": name, "prompts": [name], "anchors": [name], "retain": [name], "phrases": [name]}
    settings = {"note": name, "technique": "replace", name: name}
    folder = edit_manifest(forget=name, concept=concept, settings=settings, asked={"anchor": name, "retain": [name]})
    evaluation, attack = (json.loads(path.read_text()) for path in (findings["evaluation"], findings["attacks"][0]))
    evaluation |= {"concept": {"phrases": [name]}, "detector": {"detector": name, name: name}, "settings": {name: 1}}
    evaluation |= {"scores": {"result": {"neighbours": {name: {"value": 0.5}}}}, "distances": {}, "command": name}
    command = shlex.join(["sfumato", "attack", "p4d", "--model", "x", f"--forget={name}", "--output", "x"])
    attack |= {"attack": "p4d", "concept": {"phrases": [name]}, "rule": {name: name}, "command": command}
    findings["evaluation"].write_text(json.dumps(evaluation))
    findings["attacks"][0].write_text(json.dumps(attack))
    released = sfumato.release(folder, tmp_path / "release", base="atelier", formats=["delta"], **findings)
    card = ModelCard.load(released / "README.md")
    assert card.data.license == "apache-2.0" and len(card.data.eval_results) == 3
    text, fences = card.text, re.compile(r"^(`{3,})(\w+)\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)
    commands = [code for _, language, code in fences.findall(text) if language == "bash"]
    assert len(commands) == 2
    wanted = name.partition("\0")[0]  # no command line can have more of it
    for command, place in zip(commands, (2, 4), strict=True):
        said = subprocess.run(
            ["bash", "-c", 'sfumato() { printf "%s\\0" "$@"; }; set -f; ' + command], capture_output=True, text=True
        )
        words = said.stdout.split("\0")[place:]
        assert words[:2] == ["--forget", wanted] if not name.startswith("-") else words[0] == f"--forget={wanted}"
    assert all(c.isprintable() or c == "\n" for command in commands for c in command)
    assert all(shlex.split(line, posix=True)[0] == "sfumato" for line in commands[1].splitlines())
    prose = fences.sub("", text)
    live = re.sub(r"\\.", "", prose.replace("[sfumato](https", ""))  # without what is escaped
    assert "<script" not in prose and "](" not in live and "`code`" not in live and "$E" not in live
    assert "{{" not in name or "{{ 7 \\* 7 }}" in prose
    header = re.compile(r"^\|(?: ?-+ ?\|)+$|^\|---")
    for block in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        rows = [re.sub(r"\\.", "", row) for row in block.splitlines()]
        assert header.match(rows[1]) and len({row.count("|") for row in rows}) == 1
    assert yaml.safe_load((released / "recipe.yaml").read_text())["technique"] == "replace"
