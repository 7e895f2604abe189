import json
import threading
import time

import pytest
import torch

from sfumato import storage


def test_directory_appears_only_when_its_block_ends_well(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), storage.atomic_directory(target) as partial:
        (partial / "new").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (target / "old").read_text() == "old"
    with storage.atomic_directory(target) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    (target / "old").write_text("")
    link.symlink_to(target)
    with storage.atomic_directory(link) as folder:
        (folder / "new").write_text("")
    assert link.is_symlink() and [file.name for file in target.iterdir()] == ["new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "target"]


def test_a_mount_point_is_refused_before_anything_is_written():
    with pytest.raises(OSError, match="mount point"), storage.atomic_directory("/proc"):
        pass


def test_tensors_and_metadata_survive_the_file(tmp_path):
    tensors = {"a": torch.randn(3, 4).half(), "b": torch.tensor(7)}
    path = storage.save_tensors(tmp_path / "x.safetensors", tensors, {"n": 3, "words": ["é", "b"]})
    loaded = storage.load_tensors(path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert storage.read_metadata(path) == {"n": 3, "words": ["é", "b"]}


def test_truncated_file_is_named(tmp_path):
    path = storage.save_tensors(tmp_path / "x.safetensors", {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="x.safetensors is corrupt or cut short"):
        storage.load_tensors(path)


def test_names_of_tensors_are_read_from_the_header(tmp_path):
    path = storage.save_tensors(tmp_path / "x.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)})
    assert sorted(storage.tensor_names(path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "x.json is not valid JSON"),
        (b"\xff\xfe", "x.json is not valid JSON"),
        (b"[]", "x.json must hold a"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        storage.read_json(tmp_path / "x.json")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.safetensors"):
        storage.load_tensors(tmp_path / "no.safetensors")


def test_fingerprint_depends_on_names_shapes_types_and_values_but_not_on_order():
    a, b = ("a", torch.arange(4.0)), ("b", torch.ones(2))
    prints = {
        storage.fingerprint(pairs)
        for pairs in (
            [a, b],
            [("c", a[1]), b],
            [("a", a[1].view(2, 2)), b],
            [("a", a[1].half()), b],
            [("a", a[1] + 1), b],
        )
    }
    assert len(prints) == 5
    assert storage.fingerprint([a, b]) == storage.fingerprint([b, a])


def test_output_folder_with_a_finished_model_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds a finished model"):
        storage.check_output_dir(tmp_path, resume=True)


def test_output_folder_with_an_unfinished_run_needs_resume(tmp_path):
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="--resume"):
        storage.check_output_dir(tmp_path)
    assert storage.check_output_dir(tmp_path, resume=True) == tmp_path


def test_folder_with_files_of_somebody_else_is_refused_and_kept(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "mine.py").write_text("precious")
    (tmp_path / "unet").mkdir()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="not this job's .unet"):
            storage.check_output_dir(tmp_path, resume=resume)
    assert (tmp_path / "examples" / "mine.py").read_text() == "precious"


def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        storage.check_output_dir(tmp_path / "file" / "out")


def test_full_disk_is_refused_before_the_work(tmp_path):
    with pytest.raises(OSError, match="Not enough disk space"):
        storage.check_disk_space(tmp_path / "not" / "yet", 10**18)


def test_text_is_written_whole(tmp_path):
    path = storage.write_text(tmp_path / "deep" / "x.json", json.dumps({"a": 1}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_a_link_that_leads_nowhere_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="it is a link to .*gone, which is not there"):
        storage.check_output_dir(tmp_path / "out")


def test_a_claimed_folder_is_left_as_it_was(tmp_path):
    with pytest.raises(KeyError), storage.claimed(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
        with pytest.raises(FileExistsError, match="Another run is writing into"), storage.claimed(tmp_path / "out"):
            raise AssertionError
        raise KeyError
    assert not (tmp_path / "out").exists()
    with storage.claimed(tmp_path / "out"):
        (tmp_path / "out" / "examples").mkdir()
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["examples"]
    (tmp_path / "out" / "model_index.json").touch()
    with pytest.raises(FileExistsError, match="finished model"), storage.claimed(tmp_path / "out"):
        raise AssertionError
    with storage.claimed(None):
        pass


def test_a_lock_is_waited_for_also_when_its_folder_vanishes_meanwhile(tmp_path):
    held, released, got = threading.Event(), threading.Event(), []

    def second():
        held.wait()
        with storage.locked(tmp_path / "out") as free:
            got.append(free)
        with storage.locked(tmp_path / "out", wait=True) as free:
            got.extend([free, released.is_set()])

    thread = threading.Thread(target=second)
    thread.start()
    with storage.locked(tmp_path / "out") as free:
        held.set()
        while thread.is_alive() and not got:
            time.sleep(0.01)
        time.sleep(0.1)
        released.set()
    thread.join()
    assert free and got == [False, True, True] and not (tmp_path / "out").exists()


def test_bytes_are_written_whole_into_a_folder_made_for_them(tmp_path):
    path = storage.write_bytes(tmp_path / "new" / "file", b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_job_with_files_of_its_own_resumes_among_them_only(tmp_path):
    (tmp_path / "pictures").mkdir()
    storage.check_output_dir(tmp_path, resume=True, own={"pictures"})
    with pytest.raises(FileExistsError, match="not this job's"):
        storage.check_output_dir(tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        storage.check_output_dir(tmp_path, own={"pictures"})


def test_a_result_is_moved_up_and_replaces_what_was_there(tmp_path):
    for folder in (tmp_path / "unet", tmp_path / "result" / "unet"):
        folder.mkdir(parents=True)
        (folder / f"of-{folder.parent.name}.txt").write_text("weights")
    for name in ("model_index.json", "history.json"):
        (tmp_path / "result" / name).write_text(name)
    (tmp_path / "logs").mkdir()
    storage.put_in_place(tmp_path / "result", "model_index.json")
    assert {entry.name for entry in tmp_path.iterdir()} == {"unet", "logs", "model_index.json", "history.json"}
    assert [file.name for file in (tmp_path / "unet").iterdir()] == ["of-result.txt"]
