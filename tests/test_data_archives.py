"""Files that hold many pictures: webdataset shards and tables of Hugging Face datasets."""

import builtins
import io
import json
import tarfile

import pytest
from PIL import Image

from trainer.config import SourceConfig
from trainer.data.survey import survey
from trainer.errors import UserError


def png(colour, kind="png"):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, kind)
    return buffer.getvalue()


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


MEMBERS = {
    "b/0002.jpg": png("red", "jpeg"),
    "b/0002.json": json.dumps({"caption": "from json", "weight": 0.5}).encode(),
    "a/0001.webp": png("blue", "webp"),
    "a/0001.caption": "ein Bär".encode(),
    "a/0001.txt": b"first\nchoice",
    "ä.png": png("lime"),
    "ä.txt": b"\xef\xbb\xbfmark",
    "m.png": png("gray"),
    "m.txt": b"masked",
    "m.mask.png": png("black"),
    "alone.txt": b"no picture",
    "._m.png": b"of a Mac",
}


def test_a_webdataset_shard_is_read_by_stems_in_its_order(load, tmp_path, caplog):
    tar(tmp_path / "shard-0.tar", MEMBERS)
    dataset = load(path=str(tmp_path / "shard-0.tar"), mask="file", max_unreadable=0)
    captions = ["from json", "first choice", "mark", "masked"]
    assert [s.caption for s in dataset.samples] == captions
    assert [s.loss_weight for s in dataset.samples] == [0.5, 1, 1, 1]
    assert [s.name.rpartition("tar:")[2] for s in dataset.samples][2] == "ä.png"
    assert (dataset.samples[3].read_mask() == 0).all()
    assert (dataset.samples[2].read_pixels()[:, 0, 0].tolist()) == [-1, 1, -1]
    assert "1 picture has a .caption next to its .txt; it is ignored: " in caplog.text
    assert "1 sample in archives has no picture: " in caplog.text
    assert load(path=str(tmp_path / "shard-0.tar")).fingerprint != dataset.fingerprint


def test_the_case_of_endings_in_a_shard_does_not_matter(load, tmp_path):
    tar(tmp_path / "s.tar", {"a.PNG": png("red"), "a.Txt": b"a card"})
    (sample,) = load(path=str(tmp_path / "s.tar"), caption_extension=".TXT").samples
    assert sample.caption == "a card"


def test_a_picture_of_a_shard_whose_name_has_dots_has_what_is_called_as_it_is(load, tmp_path):
    members = {
        "p.v1.png": png("red"),
        "p.v2.png": png("lime"),
        "p.v2.txt": b"two",
        "p.v2.mask.png": png("black"),
        "p.txt": b"any",
    }
    tar(tmp_path / "s.tar", members)
    one, two = load(path=str(tmp_path / "s.tar"), mask="file").samples
    assert (one.caption, two.caption) == ("any", "two")
    assert (one.mask_key == (), two.mask_key == ()) == (True, False)


def test_captions_of_a_shard_that_are_not_read_are_noted(load, tmp_path, caplog):
    members = {
        "a.png": png("red"),
        "a.seg.png": png("blue"),
        "a.txt": b"one",
        "b.png": png("lime"),
        "b.txt": b"one",
        "b.json": b'{"caption": "another"}',
    }
    tar(tmp_path / "s.tar", members)
    assert len(load(path=str(tmp_path / "s.tar")).samples) == 3
    assert "2 pictures have a .txt that is another picture's too" in caplog.text
    assert "1 picture has a text file that contradicts its metadata" in caplog.text


def test_no_picture_of_a_shard_is_passed_over_without_a_word(load, tmp_path, caplog):
    members = {"a.png": png("red"), "a.PNG": png("blue"), ".h.png": b"x", "g.mask.png": b"x"}
    tar(tmp_path / "shard.tar", members)
    with tarfile.open(tmp_path / "shard.tar", "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    assert len(load(path=str(tmp_path / "shard.tar")).samples) == 1
    for says in (
        "1 picture in archives is hidden",
        "1 link to pictures in archives is",
        "1 member of archives has replaced an earlier one",
        "1 sample in archives has no picture",
    ):
        assert f"data: {says}" in caplog.text


def test_a_folder_may_hold_shards_beside_pictures(load, pictures):
    tar(pictures / "c.tar", {"x.png": png("white"), "x.txt": b"in a shard"})
    assert [s.caption for s in load().samples][1:3] == ["in a shard", "a green card"]


def gzipped(path):
    members = {"x.png": png("red")}
    tar(path, members, "w:gz")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (gzipped, "uncompressed tar"),
        (lambda path: path.write_bytes(b"<html>" * 1000), "uncompressed tar"),
        (lambda path: tar(path, {"x.png": png("red"), "x.json": b"{"}), r"x\.png: its \.json"),
        (lambda path: tar(path, {"x.png": png("red"), "x.txt": b"\xe9"}), r"x\.png is not UTF-8"),
        (lambda path: tar(path, {}), "has no pictures"),
    ],
    ids=["gzip", "html", "json", "caption", "empty"],
)
def test_a_bad_shard_is_refused_by_name(load, tmp_path, damage, says):
    path = tmp_path / "shard.tar"
    damage(path)
    with pytest.raises(UserError, match=says):
        load(path=str(path))


def test_a_shard_that_was_cut_short_is_refused_by_name(load, tmp_path):
    path = tmp_path / "shard.tar"
    noise = io.BytesIO()
    Image.effect_noise((200, 200), 80).save(noise, "png")
    tar(path, {f"{i}.png": noise.getvalue() for i in range(5)})
    path.write_bytes(path.read_bytes()[: len(noise.getvalue()) * 5 // 2])
    with pytest.raises(
        UserError, match=r"shard\.tar.*(cannot be read|unreadable)|unreadable.*shard"
    ):
        load(path=str(path), max_unreadable=0)


def rows(count=5):
    cells = [{"bytes": png((50 * i, 0, 0)), "path": f"{i}.png"} for i in range(count)]
    texts = [f"row {i}" for i in range(count - 1)] + [None]
    return {"image": cells, "text": texts, "weight": [1.0, 2.0, *[None] * (count - 2)]}


def write_parquet(path, columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=2)


def write_arrow(path, columns):
    pa = pytest.importorskip("pyarrow")
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


WRITERS = {"t.parquet": write_parquet, "t.arrow": write_arrow}


@pytest.mark.parametrize("name", WRITERS)
def test_a_hugging_face_table_is_read_row_by_row(load, tmp_path, name):
    WRITERS[name](tmp_path / name, rows())
    samples = load(path=str(tmp_path / name)).samples
    assert [s.caption for s in samples] == ["row 0", "row 1", "row 2", "row 3", ""]
    assert [s.loss_weight for s in samples] == [1, 2, 1, 1, 1]
    reds = [round(s.read_pixels()[0, 0, 0].item() * 127.5 + 127.5) for s in samples]
    assert reds == [0, 50, 100, 150, 200]


def test_other_columns_of_pictures_and_captions_are_found_or_named(load, tmp_path):
    path = tmp_path / "t.parquet"
    write_parquet(path, {"jpg": [png("red")], "captions": [["one", "two"]]})
    assert load(path=str(path)).samples[0].captions == ("one", "two")
    write_parquet(path, {"text": ["x"], "label": [1]})
    with pytest.raises(UserError, match="has the columns text, label; it needs one with pictures"):
        load(path=str(path))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        load(path=str(path))


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_without_captions_follows_the_rules_for_missing_ones(load, tmp_path, caplog, name):
    for column in ("prompt", "weight"):  # "weight": no small column but weights
        path = tmp_path / f"{column}-{name}"
        WRITERS[name](path, {"image": [png("red"), png("blue")], column: [None, None]})
        assert [s.caption for s in load(path=str(path)).samples] == ["", ""]
        assert f"1 table has no captions in the columns image, {column} (data.cap" in caplog.text
        given = [SourceConfig(path=str(path), caption="a card")]
        dataset = load(path=None, sources=given, on_missing_caption="error")
        assert [s.caption for s in dataset.samples] == ["a card", "a card"]
        with pytest.raises(UserError, match="2 pictures have no"):
            load(path=str(path), on_missing_caption="error")
    alone = tmp_path / f"alone-{name}"
    WRITERS[name](alone, {"image": [png("red"), png("blue"), png("lime")]})
    assert len(load(path=str(alone)).samples) == 3


@pytest.mark.parametrize("name", WRITERS)
def test_the_column_of_captions_can_be_named(load, tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, {"image": [png("red")] * 2, "text": ["x", "y"], "prompt": ["one", None]})
    dataset = load(path=str(path), caption_column="prompt")
    assert [s.caption for s in dataset.samples] == ["one", ""]
    says = r"has no data\.caption_column=promt; it has the columns image, text, prompt"
    with pytest.raises(UserError, match=says):
        load(path=str(path), caption_column="promt")


def test_the_column_of_captions_can_be_named_in_a_shard(load, tmp_path, caplog):
    members = {"a.png": png("red"), "a.json": b'{"prompt": "one", "text": "two"}'}
    tar(tmp_path / "s.tar", members)
    (sample,) = load(path=str(tmp_path / "s.tar"), caption_column="prompt").samples
    assert sample.caption == "one"
    assert "caption_column" not in caplog.text
    load(path=str(tmp_path / "s.tar"), caption_column="promt")
    assert "1 source has no captions in data.caption_column=promt" in caplog.text


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_without_pictures_is_passed_over_in_a_folder(load, tmp_path, caplog, name):
    folder = tmp_path / "shards"
    folder.mkdir()
    tar(folder / "00000.tar", {"0.png": png("red"), "0.txt": b"a card"})
    (folder / "00000_stats.json").write_text("{}")
    table = folder / f"00000{name[1:]}"
    WRITERS[name](table, {"url": ["u"], "caption": ["c"], "key": ["0"], "status": ["success"]})
    config = load(path=str(folder)).config
    says = f"1 table without a column of pictures is ignored: {table}"
    assert f"data: {says}" in caplog.text
    assert not survey(config).problems
    table.rename(folder / f"alone{name[1:]}")
    assert len(survey(config).problems) == 1
    with pytest.raises(
        UserError, match="has the columns url, caption, key, status; it needs one with"
    ):
        load(path=str(folder / f"alone{name[1:]}"))


def test_a_table_without_pyarrow_says_what_to_install(load, tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load(path=str(tmp_path))
