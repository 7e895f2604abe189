"""A release loads anywhere, repeats its run, and holds nothing that it should not."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import sfumato
from sfumato import cli
from sfumato.loading import PICKLES

SCRIPT = textwrap.dedent("""
    import sys
    sys.modules["sfumato"] = None  # importing it fails
    import json, torch
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    drawn = {}
    for number, block in enumerate(json.load(open("blocks.json"))):
        names = {}
        exec(block, names)
        pipe = names["pipe"]
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        settings = json.load(open("settings.json"))
        drawn[str(number)] = torch.from_numpy(pipe(generator=generator, output_type="np", **settings).images.copy())
    save_file(drawn, "drawn.safetensors")
""")


SETTINGS = {"prompt": ["a red sneaker", "a photo of a blue coat"], "num_inference_steps": 4}


def draw(pipe, settings=SETTINGS):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(generator=generator, output_type="np", **settings).images)


def blocks(card, language="python"):
    return re.findall(rf"```{language}\n(.*?)\n```", (card / "README.md").read_text(), re.DOTALL)


def pasted(root, folder, settings=SETTINGS):
    """Run a card's snippets beside the release, without this package; gives what each of them draws."""
    (root / "blocks.json").write_text(json.dumps(blocks(folder)))
    (root / "settings.json").write_text(json.dumps(settings))
    environment = {"HF_HOME": str(root / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = load_file(root / "drawn.safetensors")
    return [drawn[str(number)] for number in range(len(drawn))]


def test_every_snippet_of_the_card_draws_the_results_pictures_where_this_package_is_not_installed(run, tmp_path):
    (tmp_path / "original").symlink_to(run.original)
    folder = sfumato.release(run.folder, tmp_path / "release", base=run.original)
    adapted = sfumato.load(run.original)
    adapted.load_lora_weights(run.folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    wanted = [draw(run.result)] * 3 + [draw(adapted)]
    drawn = pasted(tmp_path, folder)
    assert len(drawn) == 4 and not torch.equal(wanted[0], draw(run.base))
    assert [torch.equal(found, picture) for found, picture in zip(drawn, wanted, strict=True)] == [True] * 4


def test_a_release_of_an_embedded_model_brings_it_along(run, tmp_path):
    """Else only this package would have what a part, a delta or a LoRA is put on."""
    folder = sfumato.release(run.folder, tmp_path / "release", formats=["part", "delta", "lora"], base="atelier")
    adapted = sfumato.load()
    adapted.load_lora_weights(run.folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    wanted = [draw(run.result)] * 2 + [draw(adapted)]
    drawn = pasted(tmp_path, folder)
    assert [torch.equal(found, picture) for found, picture in zip(drawn, wanted, strict=True)] == [True] * 3
    assert torch.equal(draw(sfumato.load(folder / "base")), draw(run.base))
    assert ModelCard.load(folder / "base" / "README.md").data.license == "apache-2.0"
    assert "import sfumato" not in "".join(blocks(folder))
    assert not (sfumato.release(run.folder, tmp_path / "whole", formats=["full"], base="atelier") / "base").exists()


def test_a_scheduler_of_ours_travels_with_the_pipeline(run, tmp_path):
    folder = sfumato.release(run.folder, tmp_path / "release", formats=["full"], base=run.original, scheduler="belm")
    pipe = sfumato.load(run.folder)
    pipe.scheduler = sfumato.BELMScheduler.from_config(pipe.scheduler.config)
    (drawn,) = pasted(tmp_path, folder)
    assert torch.equal(drawn, draw(pipe))
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["scheduling_belm", "BELMScheduler"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_the_schedulers_and_pipelines_that_a_run_was_saved_with_travel_too(run, copied, tmp_path):
    index = json.loads((copied / "model_index.json").read_text())
    index["scheduler"] = ["sfumato.schedulers.scheduling_bdia", "BDIAScheduler"]
    index["_class_name"] = "InfEditPipeline"
    (copied / "model_index.json").write_text(json.dumps(index))
    folder = sfumato.release(copied, tmp_path / "release", formats=["full"], base="atelier")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_infedit", "InfEditPipeline"]
    assert index["scheduler"] == ["scheduling_bdia", "BDIAScheduler"]
    assert {path.name for path in folder.glob("*.py")} == {"pipeline_infedit.py", "attention_control.py"}
    carried = {path.stem for path in (folder / "scheduler").glob("*.py")}
    assert carried == {"scheduling_bdia", "coupled", "heun", "levels", "noise_schedule", "reversible"}


def test_a_pipeline_of_ours_travels_with_its_weights(tmp_path):
    small = {"forget_examples": 2, "retain_examples": 2, "example_steps": 1, "batch_size": 2, "steps": 2}
    result = sfumato.unlearn(
        sfumato.load("atelier-pixel"),
        "class 7",
        output_dir=tmp_path / "out",
        learning_rate=1e-3,
        verify=False,
        save=["full", "delta"],
        **small,
    )
    folder = sfumato.release(tmp_path / "out", tmp_path / "release")
    settings = {"class_labels": [7, 8], "num_inference_steps": 4}
    whole, changed = pasted(tmp_path, folder, settings)
    assert torch.equal(whole, draw(result, settings)) and torch.equal(changed, whole)
    assert (folder / "base" / "pipeline_class_conditional.py").is_file()  # the original's own folder loads too
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "unconditional-image-generation"


@pytest.mark.parametrize("formats", [["full"], ["part"], ["delta"], ["lora"], ["delta", "lora"]])
def test_only_the_formats_asked_for_are_there_and_only_safetensors(run, tmp_path, formats):
    folder = sfumato.release(run.folder, tmp_path / "release", formats=formats, base="atelier")
    present = {"full": "model_index.json", "part": "unet", "delta": "delta", "lora": "lora"}
    expected = {name for name in present if name in formats or (name == "part" and "full" in formats)}
    assert {name for name, path in present.items() if (folder / path).exists()} == expected
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in PICKLES]
    assert {path.name for path in files if path.suffix == ".py"} == ({"delta.py"} if "delta" in formats else set())
    assert len(blocks(folder)) == len(formats)
    assert set(json.loads((folder / "manifest.json").read_text())["saved"]) == set(formats)


def test_nothing_in_a_release_names_a_path_of_this_machine(run, edit_manifest, tmp_path, findings):
    settings = json.loads((run.folder / "manifest.json").read_text())["settings"]
    changed = edit_manifest(settings=settings | {"retain_images": "/home/someone/private/pictures"})
    folder = sfumato.release(changed, tmp_path / "release", base=run.original, **findings)
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(run.root).encode() not in content and b"/home/someone" not in content, path
    assert "retain\\_images | pictures" in (folder / "README.md").read_text()


def test_what_was_counted_again_is_repeated_by_the_card_and_names_no_path_either(run, tmp_path, findings):
    """Two attacks counted together by another threshold, and an evaluation with other labels."""
    evaluation, (attack,) = findings["evaluation"], findings["attacks"]
    for file, count, by in (
        (evaluation, 1, {"labels": ["sneaker", "ankle boot"], "threshold": None, "top": 0}),
        (attack, 2, {"labels": None, "threshold": 0.25, "top": None}),
    ):
        stored = json.loads(file.read_text())
        origin = {"rule": {"wanted": [["sneaker"]]}, "commands": [stored["command"]] * count, "by": by}
        file.write_text(json.dumps({**stored, "command": None, "rescored": origin}))
    folder = sfumato.release(run.folder, tmp_path / "release", base=run.original, **findings)
    assert not [path for path in folder.rglob("*") if path.is_file() and b"/home/someone" in path.read_bytes()]
    lines = "\n".join(blocks(folder, "bash")).splitlines()
    assert "sfumato rescore audit --labels sneaker 'ankle boot' --top 0 --output audit-counted.json" in lines
    (counting,) = [line for line in lines if "--threshold" in line]
    words = shlex.split(counting)
    assert words[:2] == ["sfumato", "rescore"] and words[4:6] == ["--threshold", "0.25"]
    assert [line.rsplit(" ", 1)[1] for line in lines if line.startswith("sfumato attack")] == words[2:4]
    assert "calls from Python" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("by", [None, {"labels": "; rm -rf"}, {"threshold": "1; ls"}, {"command": "ls"}], ids=str)
def test_a_damaged_count_is_said_to_come_from_calls(by, run, tmp_path, findings):
    stored = json.loads(findings["evaluation"].read_text())
    origin = {"rule": {}, "commands": [stored["command"]], "by": by}
    findings["evaluation"].write_text(json.dumps({**stored, "command": None, "rescored": origin}))
    card = (sfumato.release(run.folder, tmp_path / "release", base=run.original, **findings) / "README.md").read_text()
    assert "sfumato rescore" not in card and "calls from Python" in card


def test_the_commands_of_the_card_repeat_the_run(run, tmp_path, monkeypatch):
    options = {"anchor": "boot", "retain": ["a coat", "a bag, photo"], "preserve_scale": 0.7, "save": ["delta"]}
    sfumato.unlearn(run.base, "sneaker", "uce", output_dir=tmp_path / "out", verify=False, **options)
    folder = sfumato.release(tmp_path / "out", tmp_path / "release", base=run.original)
    (command,) = blocks(folder, "bash")
    (folder / "original").symlink_to(run.original)
    monkeypatch.chdir(folder)
    program, *words = shlex.split(command)
    assert program == "sfumato"
    cli.main([*words, "--verify", "False"])
    stated, again = (json.loads((folder / name / "manifest.json").read_text()) for name in (".", "again"))
    assert again["result_fingerprint"] == stated["result_fingerprint"] != stated["base_fingerprint"]
    assert again["result_fingerprint"] != json.loads((run.folder / "manifest.json").read_text())["result_fingerprint"]
    assert again["settings"] == stated["settings"] and again["concept"] == stated["concept"]


def test_the_command_line_makes_the_same_release(run, tmp_path, findings, capsys):
    attack = str(findings["attacks"][0])
    cli.main(["release", str(run.folder), "--output", str(tmp_path / "a"), "--formats", "delta", "lora", "--base",
              "atelier", "--license", "mit", "--attacks", attack, attack])  # fmt: skip
    assert "a/README.md" in capsys.readouterr().out
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert data.license == "mit" and data.base_model == "atelier" and len(data.eval_results) == 4


# ---------------------------------------------------------------- what is refused, before anything is there


def refused(error, message, result, output, **options):
    with pytest.raises(error, match=message):
        sfumato.release(result, output, **{"base": "atelier", **options})
    assert not [path for path in output.parent.iterdir() if "release" in path.name]


@pytest.mark.parametrize("name", ["unet/weights.bin", "old.CKPT", "logs/state.pt", "x.pkl"])
def test_a_folder_with_a_pickle_is_refused(copied, tmp_path, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(b"")
    refused(ValueError, f"{Path(name).name} may run code", copied, tmp_path / "release")


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(copied, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (copied / "unet" / "inside.json").symlink_to(copied / "unet" / "config.json")
    sfumato.release(copied, tmp_path / "fine", formats=["part"], base="atelier")
    (copied / "unet" / "secret.json").symlink_to(tmp_path / "secret.json")
    refused(ValueError, "is a link that leads out of", copied, tmp_path / "release")


def test_weights_other_than_the_manifests_are_refused(run, copied, tmp_path):
    run.base.unet.save_pretrained(copied / "unet")
    refused(ValueError, "are not those of its manifest", copied, tmp_path / "release", formats=["full"])
    refused(ValueError, "are not those of its manifest", copied, tmp_path / "release", formats=["part"])


def test_code_of_others_is_refused(copied, tmp_path):
    index = json.loads((copied / "model_index.json").read_text())
    for change in ({"scheduler": ["evil", "Evil"]}, {"unet": ["evil", "Evil"]}, {"_class_name": ["evil", "Evil"]}):
        (copied / "model_index.json").write_text(json.dumps(index | change))
        refused(ValueError, "code of neither diffusers nor sfumato", copied, tmp_path / "release")


def test_a_component_named_by_a_path_is_refused(copied, tmp_path):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"../secret": ["diffusers", "UNet2DModel"]}))
    refused(ValueError, r"names a component '\.\./secret'", copied, tmp_path / "release")


def test_what_the_manifest_can_not_say_is_refused(edit_manifest, tmp_path):
    entries = {"method": "x`y", "dtype": "os.system('x')", "settings": None, "saved": []}
    for name, value in entries.items():
        kept = {key: json.loads((edit_manifest() / "manifest.json").read_text())[key] for key in entries}
        refused(ValueError, f"'{name}' is missing or wrong", edit_manifest(**{name: value}), tmp_path / "release")
        edit_manifest(**kept)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"formats": ["all"]}, ValueError, "takes what the run saved .full, part, delta, lora., got 'all'"),
        ({"formats": []}, ValueError, "got nothing"),
        ({"base": "someone/unheard-of"}, ValueError, "licence of 'someone/unheard-of' could not be found.*--license"),
        ({"license": "my own: terms"}, ValueError, "must be an identifier such as apache-2.0"),
        ({"scheduler": "sampler"}, ValueError, "no scheduler 'sampler'; choose from BDIAScheduler"),
        ({"scheduler": "bdia", "formats": ["lora"]}, ValueError, "the formats must include full"),
        ({"evaluation": "nowhere.json"}, FileNotFoundError, "There is no file nowhere.json"),
        ({"push": "not an id"}, ValueError, "takes a Hub id such as name/model, got 'not an id'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(run, tmp_path, options, error, message):
    refused(error, message, run.folder, tmp_path / "release", **options)


def test_findings_about_something_else_are_refused(run, tmp_path, findings):
    content = json.loads(findings["evaluation"].read_text())
    for change, message in (
        ({"concept": {"phrases": ["boot"]}}, r"is about \['boot'\], but the run forgot 'sneaker'"),
        ({"result_fingerprint": "0"}, "is of another result"),
        ({"result_fingerprint": None}, "does not say which result it is of: run `sfumato evaluate` on the run's"),
        ({"scores": {}}, "it has no scores of the result"),
    ):
        findings["evaluation"].write_text(json.dumps(content | change))
        refused(ValueError, message, run.folder, tmp_path / "release", **findings)
    findings["evaluation"].write_text(findings["attacks"][0].read_text())
    refused(ValueError, "is not what `sfumato evaluate` writes: its 'models'", run.folder, tmp_path / "release",
            **findings)  # fmt: skip
    attack = json.loads(findings["attacks"][0].read_text())
    findings["attacks"][0].write_text(json.dumps(attack | {"attack": "bribery"}))
    refused(ValueError, "names an attack 'bribery'; choose from", run.folder, tmp_path / "release",
            attacks=findings["attacks"])  # fmt: skip


def test_nothing_is_overwritten(run, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds something"):
        sfumato.release(run.folder, kept, base="atelier")
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]
    sfumato.release(run.folder, tmp_path / "release", formats=["lora"], base="atelier")
    with pytest.raises(FileExistsError, match="already holds something"):
        sfumato.release(run.folder, tmp_path / "release", formats=["lora"], base="atelier")
    with pytest.raises(FileNotFoundError, match="has no manifest.json"):
        sfumato.release(kept, tmp_path / "new")


def test_a_stock_pipeline_needs_no_trust(run, tmp_path):
    folder = sfumato.release(run.folder, tmp_path / "release", formats=["full"], base="atelier")
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(folder), diffusers.StableDiffusionPipeline)


# ---------------------------------------------------------------- the whole way, and all of it again from the card

UNLEARN = "sfumato unlearn uce --forget sneaker --output out"
FEW = {
    "unlearn": UNLEARN,
    "evaluate": "sfumato evaluate --model out --forget sneaker --output found/eval --cache pictures --device cpu "
    "--forget_repeats=1 --num_inf 1 --resamples 2",
    "attack": "sfumato attack unlearndiffatk --model out --forget sneaker --output found/attack --device cpu "
    "--iterations 2 --times 3 --count 4 --num_inference_steps 3",
}
WHOLE = {
    "unlearn": UNLEARN,
    "evaluate": "sfumato evaluate --model out --forget sneaker --output found/eval --quick",
    "attack": "sfumato attack unlearndiffatk --model out --forget sneaker --output found/attack --iterations 4 "
    "--count 4 --num_inference_steps 10",
}
RELEASE = (
    "sfumato release out --output release --evaluation found/eval/evaluation.json --attacks found/attack/attack.json"
)


def call(line, folder, monkeypatch):
    """Run a command in this process, which is quicker; without the check at a run's end."""
    monkeypatch.chdir(folder)
    words = shlex.split(line)
    cli.main(words[1:] + (["--verify", "False"] if words[1] == "unlearn" else []))


def type_in(line, folder, _):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def without_time(folder):
    """The rows of an attack."""
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("commands", "start"),
    [(FEW, call), pytest.param(WHOLE, type_in, marks=pytest.mark.slow)],
    ids=["few steps", "whole"],
)
def test_a_release_is_loaded_repeated_and_audited_from_its_card_alone(tmp_path, monkeypatch, commands, start):
    made = tmp_path / "made"
    made.mkdir()
    for line in (*commands.values(), RELEASE):
        start(line, made, monkeypatch)
    wanted, stated = draw(sfumato.load(made / "out")), json.loads((made / "out" / "manifest.json").read_text())
    rows = without_time(made / "found" / "attack")
    found = json.loads((made / "found" / "eval" / "evaluation.json").read_text())
    attacked = json.loads((made / "found" / "attack" / "attack.json").read_text())
    assert found["result_fingerprint"] == attacked["result_fingerprint"] == stated["result_fingerprint"]
    assert found["command"] == commands["evaluate"] and attacked["command"] == commands["attack"]

    folder = tmp_path / "elsewhere" / "release"
    shutil.copytree(made / "release", folder)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(made)
    (drawn,) = pasted(folder.parent, folder)
    assert torch.equal(drawn, wanted)
    repeat, audits = blocks(folder, "bash")
    for line in (repeat, *audits.splitlines()):
        start(line, folder, monkeypatch)
    assert (
        json.loads((folder / "again" / "manifest.json").read_text())["result_fingerprint"]
        == (stated["result_fingerprint"])
    )
    again = json.loads((folder / "audit" / "evaluation.json").read_text())
    for name in ("concept", "detector", "scores", "distances", "result_fingerprint"):
        assert again[name] == found[name], name
    for which in ("result", "original"):
        assert again["models"][which]["fingerprint"] == found["models"][which]["fingerprint"]
    assert without_time(folder / "attack-1") == rows and len(rows) == 4
    audit = json.loads((folder / "attack-1" / "attack.json").read_text())
    for name in ("asr", "pre_asr", "original", "rule", "fingerprints", "settings"):
        assert audit[name] == attacked[name], name
