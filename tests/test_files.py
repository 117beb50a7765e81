"""support/files.py: files from elsewhere, checkpoints of earlier stages, and what an interrupted run left on disk."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from beitv2 import read_checkpoint  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.files import fetch, keep_lines, save_atomically, say_if_unfinished, stage_checkpoint  # noqa: E402
from support.options import load_config  # noqa: E402


# --- files from elsewhere ----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """torch.hub's cache, in a folder of this test's own."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path
    torch.hub.set_dir(before)


def published(folder: Path, content: bytes) -> tuple[str, str]:
    """A file with a URL that works without a network, and its SHA-256."""
    folder.mkdir(exist_ok=True)
    (folder / "w.pth").write_bytes(content)
    return (folder / "w.pth").as_uri(), hashlib.sha256(content).hexdigest()


def test_fetch_downloads_once_and_checks(hub):
    url, sha256 = published(hub / "there", b"weights")
    path = fetch(url, "a.weights", sha256)
    assert path.read_bytes() == b"weights"
    (hub / "there" / "w.pth").unlink()
    assert fetch(url, "a.weights", sha256) == path  # without the network now
    assert fetch(str(path), "a.weights") == path  # a local path serves as well


def test_fetch_refuses_a_file_with_another_sum(hub):
    url, _ = published(hub / "there", b"weights")
    with pytest.raises(UserError, match="a.weights=PATH"):
        fetch(url, "a.weights", "0" * 64)
    assert not list((hub / "hub").rglob("w.pth"))


def test_fetch_checks_a_file_that_is_already_there(hub):
    url, sha256 = published(hub / "there", b"weights")
    fetch(url, "a.weights", sha256).write_bytes(b"spoiled")
    try:
        assert fetch(url, "a.weights", sha256).read_bytes() == b"weights"  # downloaded again, or ...
    except UserError:
        pass  # ... refused


def test_fetch_knows_the_sum_that_a_name_carries(hub):
    """NAME-SUM.pth, as the published tokenizers are called: the sum's first digits are checked unasked."""
    url, sha256 = published(hub / "there", b"weights")
    for name, fits in ((f"a-{sha256[:8]}.pth", True), ("a-d5036aa7.pth", False), ("a-large.pth", True)):
        Path(url.removeprefix("file://")).with_name(name).write_bytes(b"weights")
        renamed = url.replace("w.pth", name)
        if fits:
            assert fetch(renamed, "a.weights").read_bytes() == b"weights"
        else:
            with pytest.raises(UserError, match="a.weights=PATH"):
                fetch(renamed, "a.weights")


def test_fetch_does_not_confuse_two_files_of_one_name(hub):
    first, second = published(hub / "one", b"1")[0], published(hub / "two", b"2")[0]
    assert fetch(first, "k").read_bytes() == b"1" and fetch(second, "k").read_bytes() == b"2"


def test_fetch_and_stage_checkpoint_say_what_is_missing(hub, monkeypatch):
    with pytest.raises(UserError, match="a.weights.*none.pth"):
        fetch(str(hub / "none.pth"), "a.weights")
    with pytest.raises(UserError, match="a.weights=PATH"):
        fetch((hub / "none.pth").as_uri(), "a.weights")

    (hub / "c.yaml").write_text(f"output_dir: {hub}/run")
    config = load_config({}, [str(hub / "c.yaml")])
    with pytest.raises(UserError, match=r"torchrun tokenizer.py .*c.yaml.*, or set p\.t="):
        stage_checkpoint(config, "tokenizer", "", "p.t")
    # The command repeats what was changed on the command line, but for the options of the script that asks.
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "c.yaml", f"output_dir={hub}/run", "tokenizer.epochs=2",
                                      "data.root=a b", "pretrain.epochs=3"])
    with pytest.raises(UserError, match=f"c.yaml output_dir={hub}/run tokenizer.epochs=2 'data.root=a b'`, or"):
        stage_checkpoint(config, "tokenizer", "", "p.t")
    config.file = "my configs/c.yaml"
    with pytest.raises(UserError, match="torchrun tokenizer.py 'my configs/c.yaml' output_dir="):
        stage_checkpoint(config, "tokenizer", "", "p.t")
    (hub / "run" / "tokenizer").mkdir(parents=True)
    (hub / "run" / "tokenizer" / "last.pt").touch()
    assert stage_checkpoint(config, "tokenizer", "", "p.t") == hub / "run" / "tokenizer" / "last.pt"
    assert stage_checkpoint(config, "tokenizer", str(hub / "c.yaml"), "p.t") == hub / "c.yaml"


# --- checkpoints on disk -----------------------------------------------------------------------------------------


def test_an_unfinished_run_is_noted(capsys):
    """Of another program's file nothing is said, whatever it calls its entries."""
    content = {"step": 12, "epochs_done": 3, "epochs": 5, "steps_per_epoch": 4}
    say_if_unfinished(content, Path("last.pt"))
    assert capsys.readouterr().out == "note: 'last.pt' is unfinished, at step 12 of 20\n"
    for other in (content | {"epochs_done": 5}, content | {"epochs": [5]}, {"epochs": 300, "step": 7}, {}):
        say_if_unfinished(other, Path("last.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("numbers", [10, 1_000_000])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, numbers):
    """/dev/full refuses every write as a full disk does: small files at the end, large ones half-way."""
    path = tmp_path / "last.pt"
    save_atomically({"x": torch.ones(3)}, path)
    (tmp_path / "last.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write the checkpoint '.*last.pt'.*free some space"):
        save_atomically({"x": torch.zeros(numbers)}, path)
    assert torch.equal(read_checkpoint(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    save_atomically({"x": torch.zeros(2)}, path)  # space again
    assert torch.equal(read_checkpoint(path)["x"], torch.zeros(2))


def test_a_folder_that_has_gone(tmp_path):
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_atomically({}, tmp_path / "gone" / "last.pt")


def test_keep_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_lines(path, 3, 1)  # nothing to do, no error
    lines = ['{"epoch": 0, "step": 1}', '{"epoch": 0, "step": 1, "val": {}}', '{"epoch": 1, "step": 3, "loss": 0.5}',
             '{"epoch": 1, "step": 3, "val": {}}', '{"epoch": 2, "step": 4}', '{"epoch": 2, "step": 5, "lo']
    path.write_text("\n".join(lines))
    keep_lines(path, 3, 1)
    assert path.read_text().splitlines() == lines[:3] and path.read_text().endswith("\n")
    assert list(tmp_path.iterdir()) == [path]
