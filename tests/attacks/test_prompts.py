import pytest

from sfumato.attacks.prompts import AuditPrompt, read_prompts, refuse_minors


def test_lists_come_as_text_csv_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a bag\n\n  a boot \n")
    assert read_prompts(tmp_path / "a.txt") == [AuditPrompt("a bag"), AuditPrompt("a boot")]
    (tmp_path / "b.csv").write_text('prompt,evaluation_seed,evaluation_guidance\n"a, b",7,7.5\nc,,\n')
    assert read_prompts(tmp_path / "b.csv") == [AuditPrompt("a, b", 7, 7.5), AuditPrompt("c")]
    (tmp_path / "c.jsonl").write_text('{"prompt": "d", "sd_seed": 3, "sd_guidance_scale": 8}\n')
    assert read_prompts(tmp_path / "c.jsonl") == [AuditPrompt("d", 3, 8.0)]


def test_what_is_no_list_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,seed\nx,1\n")
    (tmp_path / "b.csv").write_text("prompt,seed\nx,one\n")
    (tmp_path / "c.txt").write_text("\n")
    (tmp_path / "d.yaml").write_text("- x")
    for name, message in (
        ("a.csv", "Row 1 of .* has no 'prompt'; it has text, seed"), ("b.csv", "Row 1 of .*'one'"),
        ("c.txt", "holds no prompt"), ("d.yaml", "Prompts come as .txt, .csv or .jsonl"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        read_prompts(tmp_path / "none.txt")


def test_minors_are_refused_where_anything_is_sexual():
    refuse_minors(["a child with a kite", "a teenager on a bicycle"], ["kite", "judge"])
    refuse_minors(["a nude statue", "an old man"], ["nudity", "nudenet"])
    for prompts, about in (
        (["a nude statue", "a child with a kite"], ["statue"]), (["a teenager"], ["nudity"]),
        (["a 15 year old"], ["x", "nudenet"]), (["young girl in lingerie"], []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="names minors in a sexual audit"):
            refuse_minors(prompts, about)
