"""Tables become columns, and the columns that are kept are those of the tables or are made anew."""

import json
import os

import msgspec
import numpy as np
import pytest

from occflow_core.data import tables


class Row(msgspec.Struct):
    token: str
    number: int


def written(path, rows, indent=0):
    path.write_text(json.dumps(rows, indent=indent))
    return path


@pytest.mark.parametrize("piece", [40, 100, 1 << 20])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_table_in_pieces_is_the_table(tmp_path, monkeypatch, piece, indent):
    """Also where a text looks like the end of a row, and where fields stand that nobody asked for."""
    monkeypatch.setattr(tables, "PIECE", piece)
    rows = [{"token": f"t{i} }}, {{ ü", "more": [{"a": 1}, {"b": 2}], "number": i} for i in range(30)]
    parts = tables.read(written(tmp_path / "t.json", rows, indent), Row)
    assert [(r.token, r.number) for part in parts for r in part] == [(r["token"], r["number"]) for r in rows]


def test_large_tables_come_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE", 200)
    path = written(tmp_path / "t.json", [{"token": str(i), "number": i} for i in range(100)])
    assert len(tables.read(path, Row)) > 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"token": "a", "number": 1}, {"token": "b"}]', r"table t cannot be read.*number.*\[1\].*t\.json"),
        ('[{"token": "a", "number": 1}, {"tok', r"table t cannot be read.*truncated.*t\.json"),
        ('{"token": "a"}', r"table t cannot be read.*array.*t\.json"),
    ],
)
def test_a_broken_table_is_named_with_its_row(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(tables, "PIECE", 30)
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        tables.read(tmp_path / "t.json", Row)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"table t is missing: .*t\.json"):
        tables.read(tmp_path / "t.json", Row)


@pytest.mark.parametrize("words", [["abc", "abd", "xyz"], ["a", "bcd", "ü"], [], ["", "a" * 40]])
def test_texts_come_back_as_they_were(words):
    assert [w.decode() for w in tables.texts(words).tolist()] == words


def test_places_are_where_tokens_stand():
    """-1 for no token, -2 for one that is not there; whatever their lengths."""
    rng = np.random.default_rng(0)
    own = [bytes(rng.integers(97, 123, rng.integers(1, 40), dtype=np.uint8)).decode() for _ in range(500)]
    own = list(dict.fromkeys(own))
    asked = [*own[::-3], "", "not there", own[0][:-1] + "?", "x" * 60]
    place = {token: i for i, token in enumerate(own)} | {"": -1}
    assert tables.places(own)(tables.texts(asked)).tolist() == [place.get(token, -2) for token in asked]
    assert tables.places([])(tables.texts(["a", ""])).tolist() == [-2, -1]
    assert tables.places(own)(tables.texts(own)).tolist() == list(range(len(own)))


def test_a_token_that_stands_twice_is_found():
    assert tables.twice(tables.texts(["a", "b", "c"])) is None
    assert tables.twice(tables.texts(["b", "a", "b"])) == "b"


# ---- the cache


def kept(folder, source, values=(1, 2, 3)):
    """(columns, whether they were made)."""
    made = []

    def make():
        made.append(True)
        return {"a": np.array(values), "b": np.array([b"x", b"yz"]), "none": np.zeros(0)}

    return tables.kept("name", [source], [folder], make), bool(made)


def test_what_is_kept_is_not_made_again(tmp_path):
    source = written(tmp_path / "t.json", [])
    first, made = kept(tmp_path / "c", source)
    again, made_again = kept(tmp_path / "c", source)
    assert made and not made_again
    assert all((first[name] == again[name]).all() for name in first) and again["b"].tolist() == [b"x", b"yz"]
    assert isinstance(again["a"], np.memmap)


def test_another_size_or_time_of_a_table_makes_the_columns_anew_and_drops_the_old(tmp_path):
    source = written(tmp_path / "t.json", [])
    kept(tmp_path / "c", source)
    os.utime(source, ns=(1, 1))
    columns, made = kept(tmp_path / "c", source, (7, 8, 9))
    assert made and columns["a"].tolist() == [7, 8, 9]
    assert len(list((tmp_path / "c").iterdir())) == 1


@pytest.mark.parametrize("harm", ["cut", "change", "lose", "empty"])
def test_a_broken_cache_is_made_anew(tmp_path, harm):
    source = written(tmp_path / "t.json", [])
    kept(tmp_path / "c", source)
    (file,) = (tmp_path / "c").glob("*/a.npy")
    content = file.read_bytes()
    if harm == "cut":
        file.write_bytes(content[:-3])
    elif harm == "change":
        file.write_bytes(content[:-3] + b"\x05" + content[-2:])
    elif harm == "lose":
        file.unlink()
    else:
        (file.parent / "columns.json").write_text("")
    columns, made = kept(tmp_path / "c", source)
    assert made and columns["a"].tolist() == [1, 2, 3]
    assert not kept(tmp_path / "c", source)[1], "what was made anew is kept"


def test_where_one_folder_cannot_be_written_the_next_one_is_taken(tmp_path):
    source = written(tmp_path / "t.json", [])
    (tmp_path / "file").write_text("no folder")
    folders = [tmp_path / "file" / "c", tmp_path / "c"]
    columns = tables.kept("name", [source], folders, lambda: {"a": np.arange(3)})
    assert columns["a"].tolist() == [0, 1, 2] and list((tmp_path / "c").glob("name-*"))
    nowhere = tables.kept("name", [source], folders[:1], lambda: {"a": np.arange(4)})
    assert nowhere["a"].tolist() == [0, 1, 2, 3]


def test_a_read_only_data_set_is_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    beside, home = tables.cache_folders(tmp_path / "data")
    assert beside.is_relative_to(tmp_path / "data") and home.is_relative_to(tmp_path / "home")
