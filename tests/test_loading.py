import json
import shutil

import pytest
import torch

import sfumato
from sfumato import storage
from sfumato.loading import assets_folder


@pytest.fixture(scope="module")
def atelier():
    return sfumato.load("atelier")


def test_atelier_is_a_stock_pipeline_in_float32(atelier):
    from diffusers import StableDiffusionPipeline

    assert type(atelier) is StableDiffusionPipeline
    assert all(module.dtype == torch.float32 for module in (atelier.unet, atelier.vae, atelier.text_encoder))


def test_stock_diffusers_loads_atelier_without_help_from_us():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "atelier", dtype=torch.float32)
    image = pipe("a photo of a red bag", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)


def test_any_local_folder_loads(atelier, tmp_path):
    atelier.save_pretrained(tmp_path / "copy")
    copy = sfumato.load(tmp_path / "copy")
    assert torch.equal(copy.unet.conv_in.weight, atelier.unet.conv_in.weight)


def test_a_folder_of_a_pipeline_of_ours_loads_as_that(tmp_path):
    pipe = sfumato.load("atelier-pixel")
    pipe.save_pretrained(tmp_path)
    loaded = sfumato.load(tmp_path)
    assert type(loaded) is type(pipe) is sfumato.ClassConditionalPipeline
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_embedded_weights_are_small_and_free_of_pickle():
    files = [path for path in assets_folder().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md", ".png", ".txt", ".yaml"}
    sizes: dict[str, int] = {}
    for path in files:
        if path.suffix == ".safetensors":
            part = path.relative_to(assets_folder()).parts[0]
            sizes[part] = sizes.get(part, 0) + path.stat().st_size
    restorers = [sizes.pop(name) for name in ("atelier-sr", "atelier-inpaint")]
    guides = [sizes.pop(name) for name in ("atelier-one-more-step", "atelier-minority", "atelier-pixel-minority")]
    assert sum(sizes.values()) <= 20_000_000 and max(restorers) <= 6_000_000 and max(guides) <= 3_000_000


def test_model_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        sfumato.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="name is empty"):
        sfumato.load("")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        sfumato.load(tmp_path)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(assets_folder() / "atelier", tmp_path / "model")
    return tmp_path / "model"


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "file", sorted(str(path.relative_to(assets_folder())) for path in assets_folder().glob("atelier/*/*.json"))
)
@pytest.mark.parametrize("content", ['{"a": ', "", "[]"])
def test_damaged_config_of_any_part_is_named(folder, file, content):
    damaged = folder.parent / file.replace("atelier", "model")
    damaged.write_text(content)
    with pytest.raises(ValueError, match=f"{damaged} (is not valid JSON|must hold a JSON object)"):
        sfumato.load(folder)


@pytest.mark.parametrize("file", ["model_index.json", "tokenizer/tokenizer.json"])
def test_config_without_its_content_is_named(folder, file):
    (folder / file).write_text(json.dumps({name: [None, None] for name in ("tokenizer", "unet")}))
    with pytest.raises(ValueError, match=f"{file} is damaged: it has no '"):
        sfumato.load(folder)


def test_config_that_does_not_fit_the_weights_names_the_model(folder):
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=f"The model in {folder} can't be loaded .ValueError: Cannot load"):
        sfumato.load(folder)


@pytest.mark.parametrize(
    ("part", "other", "kind"),
    [
        (f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "UNet2DConditionModel"),
        (f"vae/{WEIGHTS}", f"unet/{WEIGHTS}", "AutoencoderKL"),
        ("text_encoder/model.safetensors", f"unet/{WEIGHTS}", "CLIPTextModel"),
    ],
)
def test_weights_of_another_part_are_refused(folder, part, other, kind):
    shutil.copy(assets_folder() / "atelier" / other, folder / part)
    with pytest.raises(ValueError, match=rf"{part} lacks (\d+) of the \1 weights of {kind}"):
        sfumato.load(folder)


def test_one_missing_weight_is_refused(folder):
    weights = storage.load_tensors(folder / "unet" / WEIGHTS)
    del weights["conv_in.weight"]
    storage.save_tensors(folder / "unet" / WEIGHTS, weights)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} lacks 1 of the \d+ weights of UNet2DConditionModel .conv_in"):
        sfumato.load(folder)


def test_sharded_weights_load_and_a_foreign_variant_is_refused(atelier, tmp_path):
    atelier.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(sfumato.load(tmp_path).unet.conv_in.weight, atelier.unet.conv_in.weight)
    atelier.save_pretrained(tmp_path, variant="fp16")
    assert torch.equal(sfumato.load(tmp_path, variant="fp16").unet.conv_in.weight, atelier.unet.conv_in.weight)
    name = "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(tmp_path / "vae" / name, tmp_path / "unet" / name)
    assert torch.equal(sfumato.load(tmp_path).unet.conv_in.weight, atelier.unet.conv_in.weight)
    with pytest.raises(ValueError, match=f"{name} lacks"):
        sfumato.load(tmp_path, variant="fp16")


def test_weights_under_their_older_names_load(atelier, folder):
    """As Stable Diffusion 1.4 has them: attention of the autoencoder before diffusers 0.12, CLIP of transformers 4."""
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, value in storage.load_tensors(folder / "vae" / WEIGHTS).items():
        for new, old in older.items():
            name = name.replace(new, old)
        renamed[name] = value
    storage.save_tensors(folder / "vae" / WEIGHTS, renamed)
    text = folder / "text_encoder" / "model.safetensors"
    values = storage.load_tensors(text)
    storage.save_tensors(text, {f"text_model.{name}": value for name, value in values.items()}, {})
    pipe = sfumato.load(folder)
    for ours, theirs in ((pipe.vae, atelier.vae), (pipe.text_encoder, atelier.text_encoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_part_given_by_the_caller_is_not_compared_with_the_folder(atelier, folder):
    shutil.copy(folder / "vae" / WEIGHTS, folder / "unet" / WEIGHTS)
    assert sfumato.load(folder, unet=atelier.unet).unet is atelier.unet


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_refused_by_name_however_harmless(atelier, folder, part):
    file = next((folder / part).glob("*.safetensors"))
    name = {"unet": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[part]
    torch.save(storage.load_tensors(file), folder / part / name)
    assert sfumato.load(folder).unet is not None  # of both, safetensors are read
    file.unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=f"{part}/{name} is a pickle.*save_pretrained"):
            sfumato.load(folder, **options)
    assert sfumato.load(folder, **{part: getattr(atelier, part)}).vae is not None


@pytest.fixture
def result(atelier, tmp_path):
    """A result that holds a part."""
    atelier.unet.save_pretrained(tmp_path / "result" / "unet")

    def stated(**manifest):
        saved = {"part": {"components": ["unet"]}}
        content = {"model": "atelier", "saved": saved} | manifest
        storage.write_text(tmp_path / "result" / "manifest.json", json.dumps(content))
        return tmp_path / "result"

    return stated


def test_a_part_that_is_a_pickle_cut_short_or_another_is_refused(atelier, result):
    folder = result()
    assert sfumato.loading.load_result(folder).unet is not None
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=f"unet/{WEIGHTS} is corrupt or cut short"):
        sfumato.loading.load_result(folder)
    shutil.copy(assets_folder() / "atelier" / "vae" / WEIGHTS, file)
    with pytest.raises(ValueError, match=rf"unet/{WEIGHTS} lacks"):
        sfumato.loading.load_result(folder)
    file.unlink()
    atelier.unet.save_pretrained(folder / "unet", safe_serialization=False)
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.bin is a pickle"):
        sfumato.loading.load_result(folder)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"saved": []}, "is damaged"),
        ({"saved": {"part": {}}}, "is damaged"),
        ({"saved": {"part": ["unet"]}}, "is damaged"),
        ({"saved": {"part": {"components": "unet"}}}, "is damaged"),
        ({"saved": {"part": {"components": [1]}}}, "is damaged"),
        ({"model": ["atelier"]}, "is damaged"),
        ({"saved": {"part": {"components": ["../x"]}}}, "leads out"),
        ({"saved": {"part": {"components": ["nothing"]}}}, "no network of StableDiffusionPipeline"),
        ({"saved": {"part": {"components": ["scheduler"]}}}, "no network of StableDiffusionPipeline"),
    ],
)
def test_a_manifest_that_can_not_be_believed_is_refused_in_a_sentence(result, stated, said):
    with pytest.raises(ValueError, match=said):
        sfumato.loading.load_result(result(**stated))


def test_truncated_weights_are_named_before_anything_is_built(folder):
    weights = folder / "unet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is corrupt or cut short"):
        sfumato.load(folder)


def test_a_download_that_breaks_off_is_to_be_started_again(monkeypatch):
    class ReadTimeout(Exception):
        pass

    def fail(*_, **__):
        try:
            raise ReadTimeout("no more bytes")
        except ReadTimeout as error:
            raise OSError("can't load the files") from error

    monkeypatch.setattr("sfumato.loading.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(ConnectionError, match="was interrupted .* goes on where it stopped"):
        sfumato.load("someone/model")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Task error: File reconstruction error: CAS Client Error: Request middleware error"),
        OSError("Consistency check failed: file should be of size 100 but has size 7 (unet/model.safetensors)."),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
    ids=["xet", "short", "reset"],
)
def test_every_way_of_breaking_off_is_known(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sfumato.loading.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(ConnectionError, match="goes on where it stopped"):
        sfumato.load("someone/model")


def test_a_model_on_the_hub_with_pickles_alone_is_named(monkeypatch):
    def fail(*_, **options):
        assert options["use_safetensors"] is True
        raise OSError("Could not find the necessary `safetensors` weights")

    monkeypatch.setattr("sfumato.loading.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(ValueError, match="'someone/model' has no safetensors .* save it by save_pretrained"):
        sfumato.load("someone/model")


def test_other_failures_of_a_download_are_those_of_the_name(monkeypatch):
    def fail(*_, **__):
        raise OSError("404")

    monkeypatch.setattr("sfumato.loading.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(FileNotFoundError, match="'atelie' is neither .* Did you mean 'atelier'"):
        sfumato.load("atelie")
