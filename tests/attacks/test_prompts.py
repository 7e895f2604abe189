import pytest

from sfumato.attacks.prompts import AuditPrompt, read_pairs, read_prompts, refuse_minors


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


def test_lines_end_at_line_ends_alone(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"a red\ncar"\n')
    assert read_prompts(tmp_path / "a.csv") == [AuditPrompt("a red\ncar")]
    for name, content in (("b.txt", "one\u2028prompt\r\nanother\n"), ("c.jsonl", '{"prompt": "one\u2028prompt"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_prompts(tmp_path / name)[0] == AuditPrompt("one\u2028prompt")
    assert len(read_prompts(tmp_path / "b.txt")) == 2


def test_large_seeds_are_not_rounded(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,seed\nx,9007199254740993\ny,5.0\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "seed": 9007199254740993}\n{"prompt": "y", "seed": 5.0}\n')
    for name in ("a.csv", "b.jsonl"):
        assert [one.seed for one in read_prompts(tmp_path / name)] == [9007199254740993, 5]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": null}\n', "Row 2 of .* has no 'prompt'"),
        ("a.jsonl", "null\n", "Row 1 of .* has no 'prompt'"),
        ("a.jsonl", '"x"\n', "Row 1 of .* has no 'prompt'"),
        ("a.jsonl", '{"prompt": ["x"]}\n', "Row 1 of .* has no 'prompt'"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt"\n', "Line 3 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", '{"prompt": "x", "guidance": [7.5]}\n', "Row 1 of"),
        ("a.jsonl", '{"prompt": "x", "guidance": NaN}\n', "Row 1 of .*guidance scale must be at least 1, got nan"),
        ("a.jsonl", '{"prompt": "x", "seed": Infinity}\n', "Row 1 of .*seed"),
        ("a.jsonl", '{"prompt": "x", "seed": 1.5}\n', "Row 1 of .*whole number, got 1.5"),
        ("a.jsonl", '{"prompt": "x", "seed": 1e30}\n', "Row 1 of .*`seed` must be a whole number from 0"),
        ("a.csv", "seed,prompt\n5\n", "Row 1 of .* has no 'prompt'"),
    ],
    ids=lambda value: ascii(value)[:40] if "{" in value else None,
)
def test_a_row_that_is_no_prompt_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)


def test_a_list_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt can't be read as txt in UTF-8"):
        read_prompts(tmp_path / "a.txt")


def test_pairs_come_as_csv_and_json_lines(tmp_path):
    (tmp_path / "a.csv").write_text('with,without\n"a, b",a\nc,\n')
    assert read_pairs(tmp_path / "a.csv") == [("a, b", "a"), ("c", "")]
    for name, content, message in (
        ("b.csv", "with\nx\n", "Row 1 of .* needs 'with' and 'without'"), ("c.jsonl", "[1]\n", "Row 1 .* is no pair"),
        ("d.csv", "with,without\na,a\n", "do not differ"), ("e.csv", "with,without\n", "holds no pair"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path / name)


def test_minors_are_refused_where_anything_is_sexual():
    refuse_minors(["a child with a kite", "a teenager on a bicycle"], ["kite", "judge"])
    refuse_minors(["a nude statue", "an old man"], ["nudity", "nudenet"])
    for prompts, about in (
        (["a nude statue", "a child with a kite"], ["statue"]), (["a teenager"], ["nudity"]),
        (["a 15 year old"], ["x", "nudenet"]), (["young girl in lingerie"], []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="names minors in a sexual audit"):
            refuse_minors(prompts, about)


@pytest.mark.parametrize(
    "prompt",
    [
        "a nude girl, 12 years old", "a naked 16yo", "nude 12-years-old", "naked girl aged 13",
        "nude sixteen year old", "sixteen year old nude",
        "nude adolescent", "a nude tween", "naked ten year old", "nude, 15 y/o", "a naked 9 y.o.", "nude, age 14",
        "nude boy", "nude juvenile", "naked, aged twelve", "nude seventeen-year-old", "nude, 6 yrs old",
        "nude under 18", "nude, six months old", "nude schoolchildren",
        "Nude SCHOOLGIRLS", "naked, 17 years of age", "nude, age of 15", "a naked under-aged model", "nude, she is 15",
    ],
)  # fmt: skip
def test_minors_are_told_by_any_of_their_words_and_by_ages(prompt):
    with pytest.raises(ValueError, match="names minors in a sexual audit"):
        refuse_minors([prompt], [])


@pytest.mark.parametrize(
    "prompt",
    [
        "a nude woman, 30 years old", "a naked 45yo man", "a nude aged 62", "a nude of 1912", "naked forty year old",
        "two nudes, one on a sofa", "a nude statue with 12 arms", "a nude painted in 15 colours", "nude, middle aged",
        "a girl with a kite", "a nude of the school of Rubens", "a nude in two days", "a nude in the golden age",
        "nude, aged 18", "a 116 year old painting of a nude", "sixteen nude statues",
    ],
)  # fmt: skip
def test_adults_and_other_numbers_are_not_refused(prompt):
    refuse_minors([prompt], ["nudity", "nudenet"])
