"""What a run makes of a staging directory it finds: only what is provably g2kit's own is continued, finished or removed."""

import shutil

import pytest

from g2kit.formats import journal
from g2kit.formats.errors import ConflictError
from g2kit.formats.output import Output

from .fault_fs import Unsynced
from .output_case import Case, assert_sound, snapshot

HEAD = {"kind": "open", "version": 1, "plan": {}, "files": ["precious.txt"]}


class Killed(Exception):  # noqa: N818
    """The run ends here."""


def killed_after_landing(case: Case, dst, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is in its place; the journal, which says so, was not removed any more."""

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as m:
        m.setattr("g2kit.formats.output_commit.clear", die)
        with pytest.raises(Killed):
            case.run(dst, fs=Unsynced())
    assert dst.exists()
    assert dst.with_name(f"{dst.name}.partial").is_dir()


@pytest.mark.parametrize("single", [False, True])
def test_a_landed_output_is_recognised(tmp_path, monkeypatch, single):
    case, dst = Case(single=single), tmp_path / "out"
    killed_after_landing(case, dst, monkeypatch)
    out = case.run(dst, fs=Unsynced())
    assert out.committed
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("change", ["another", "damaged"])
def test_something_else_at_the_destination_is_not_taken_for_the_output(
    tmp_path, monkeypatch, single, change
):
    case, dst = Case(single=single), tmp_path / "out"
    killed_after_landing(case, dst, monkeypatch)
    if change == "another":  # a sound output of another model, with its own manifest
        (tmp_path / "other").mkdir()
        Case(single=single, seed=1).run(tmp_path / "other/out", fs=Unsynced())
        shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
        for path in (tmp_path / "other").iterdir():
            (tmp_path / path.name).unlink(missing_ok=True)
            path.rename(tmp_path / path.name)
    else:
        victim = dst if single else dst / "d.bin"
        victim.write_bytes(bytes(victim.stat().st_size))
    theirs = {n: b for n, b in snapshot(tmp_path).items() if ".partial/" not in n}
    with pytest.raises(ConflictError, match="exists") as e:
        case.run(dst, fs=Unsynced())
    assert e.value.code == "E_EXISTS"
    assert {n: b for n, b in snapshot(tmp_path).items() if ".partial/" not in n} == theirs


def test_a_landed_output_that_is_gone_is_written_again(tmp_path, monkeypatch):
    case, dst = Case(), tmp_path / "out"
    killed_after_landing(case, dst, monkeypatch)
    shutil.rmtree(dst)
    case.run(dst, fs=Unsynced())
    assert_sound(dst)


def plant(partial, *records) -> None:
    partial.mkdir()
    (partial / "journal").write_bytes(b"".join(map(journal.encode, records)))


@pytest.mark.parametrize("options", [{}, {"resume": False}, {"overwrite": True}])
@pytest.mark.parametrize("link", ["data", "old", "journal", "data/sub"])
def test_links_in_the_staging_directory_lead_nowhere(tmp_path, link, options):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("mine")
    commit = {"kind": "commit", "identity": [1, 1], "manifest": "x", "replaces": []}
    plant(tmp_path / "out.partial", HEAD, {"kind": "created"}, commit)
    path = tmp_path / "out.partial" / link
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    before = snapshot(tmp_path)
    with pytest.raises(ConflictError) as e:
        Case().run(tmp_path / "out", fs=Unsynced(), **options)
    assert path.name in str(e.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "sync"},
        {"kind": "sync", "units": {}, "written": {"a.bin": [[0, "x"]]}},
        {"kind": "sync", "units": {"a": 5}, "written": {}},
        {"kind": "commit", "replaces": 5},
        {"kind": "commit", "replaces": [5]},
        {"kind": ["sync"]},
        {"kind": "news"},
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_a_journal_that_this_version_did_not_write_is_refused(tmp_path, record, resume):
    plant(tmp_path / "out.partial", HEAD, record)
    before = snapshot(tmp_path)
    with pytest.raises(ConflictError, match="another version of g2kit"):
        Case().run(tmp_path / "out", fs=Unsynced(), resume=resume)
    assert snapshot(tmp_path) == before


def test_a_manifest_in_the_way_is_found_before_work(tmp_path):
    case, manifest = Case(single=True), tmp_path / "out.g2kit.manifest.json"
    manifest.write_text("mine")
    with pytest.raises(ConflictError, match=r"manifest\.json: the destination's manifest exists"):
        case.output(tmp_path / "out").preflight()
    assert manifest.read_text() == "mine"
    Case(single=True, overwrite=True).run(tmp_path / "out", fs=Unsynced())
    assert_sound(tmp_path / "out")
    (tmp_path / "out").unlink()
    manifest.unlink()
    manifest.mkdir()
    for overwrite in (False, True):
        out: Output = Case(single=True, overwrite=overwrite).output(tmp_path / "out")
        with pytest.raises(ConflictError, match="the destination is a directory, and one file"):
            out.preflight()


def test_a_manifest_that_appears_during_the_run_is_not_replaced(tmp_path):
    case, manifest = Case(single=True), tmp_path / "out.g2kit.manifest.json"

    def appear(unit: str) -> None:
        manifest.write_text("mine")

    with pytest.raises(ConflictError, match=r"manifest\.json: .* exists"):
        case.run(tmp_path / "out", appear, fs=Unsynced())
    assert manifest.read_text() == "mine"
    assert not (tmp_path / "out").exists()
