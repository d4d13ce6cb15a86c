"""nuScenes' JSON tables -> rows, or columns of numpy arrays that are kept on disk.

Small tables are parsed whenever they are asked for. The large ones (trainval: 2.6 M rows of `sample_data` and of
`ego_pose`, 1.2 M of `sample_annotation`) are read a piece at a time, become columns, and stay in a cache: plain .npy
files, mapped into memory, found by the sizes and times of the tables that they were made from.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

PIECE = 8 << 20  # bytes of JSON that are parsed at a time
FORMAT = 1  # of the cached columns; another number makes all caches anew
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")  # the end of a row that another one follows


def read(path: Path, row: type, take: Callable[[list], Any] = list, progress: bool = False) -> list[Any]:
    """A table (a JSON list of objects) as what `take` makes of its pieces, lists of `row` (a msgspec Struct).

    FileNotFoundError where there is no such table; ValueError naming table, path and row where it does not parse or
    a row lacks a field. Fields that the Struct does not name are skipped unread.
    """
    decoder = msgspec.json.Decoder(list[row])
    try:
        size = path.stat().st_size
        try:
            return [take(decoder.decode(piece)) for piece in _pieces(path, size, progress)]
        except msgspec.DecodeError:
            # Either the table is broken, or a piece was cut inside a text that looks like the end of a row: parsed in
            # one go it is well, or says which of its rows is not
            return [take(decoder.decode(path.read_bytes()))]
    except FileNotFoundError:
        raise FileNotFoundError(f"table {path.stem} is missing: there is no {path}") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"table {path.stem} cannot be read: {error} ({path})") from None


def _pieces(path: Path, size: int, progress: bool) -> Iterable[bytes]:
    """A large JSON list as a few smaller ones, cut between rows."""
    from tqdm import tqdm

    if size <= PIECE:
        yield path.read_bytes()
        return
    rest = b""
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=path.stem, unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        while block := file.read(PIECE):
            bar.update(len(block))
            rest += block
            tail = max(0, len(rest) - (64 << 10))  # rows are shorter than that; if one is not, the piece grows
            cuts = [match.end() for match in _BETWEEN.finditer(rest, tail)]
            if cuts:
                end = rest.rindex(b",", 0, cuts[-1])
                yield rest[:end] + b"]"
                rest = b"[" + rest[cuts[-1] :]
    yield rest


# ---- columns


def texts(values: list[str]) -> np.ndarray:
    """Texts of any length -> (n,) bytes of one length, padded with zeros (tokens: S32)."""
    width = max(map(len, values), default=1) or 1
    whole = "".join(values)
    if whole.isascii():
        if len(whole) == width * len(values):  # as tokens are: one pass in C
            return np.frombuffer(whole.encode(), f"S{width}")
        return np.array(values, f"S{width}")
    return np.array([value.encode() for value in values])


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of the pieces of a table, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def places(tokens: np.ndarray | list[str]) -> Callable[[np.ndarray], np.ndarray]:
    """A table's tokens -> a function that gives the place of each of (m,) tokens there, int64; -1 for an empty one, -2
    for one that the table lacks."""
    tokens = texts(tokens) if isinstance(tokens, list) else tokens
    keys = _keys(tokens)
    order = np.argsort(keys)
    keys = keys[order]
    if len(keys) and (keys[1:] == keys[:-1]).any():  # one pair in 10^7 tables of trainval's size, or a token twice
        order, keys = np.arange(len(tokens)), None
        known = {token: i for i, token in enumerate(tokens.tolist())}

    def lookup(wanted: np.ndarray) -> np.ndarray:
        if not len(tokens):
            place = np.full(len(wanted), -2)
        elif keys is None:
            place = np.array([known.get(token, -2) for token in wanted.tolist()], np.int64)
        else:
            place = order[np.searchsorted(keys, _keys(wanted)).clip(max=len(keys) - 1)]
            place = np.where(tokens[place] == wanted, place, -2)
        return np.where(wanted == b"", -1, place)

    return lookup


def _keys(tokens: np.ndarray) -> np.ndarray:
    """(n,) uint64: numbers that differ where tokens do, but for one chance in 10^19; sorting them is fast."""
    width = -(-tokens.dtype.itemsize // 8) * 8
    words = tokens.astype(f"S{width}").view(np.uint64).reshape(len(tokens), width // 8)
    key = np.zeros(len(tokens), np.uint64)
    for column in words.T:
        # splitmix64's finaliser: all bits of a word reach all bits of the key. Padding adds nothing: widths may differ
        mixed = key + column
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key = np.where(column == 0, key, mixed ^ (mixed >> np.uint64(31)))
    return key


def twice(tokens: np.ndarray) -> str | None:
    """A token that stands in a table more than once, or None."""
    order = np.sort(tokens)
    again = np.flatnonzero(order[1:] == order[:-1])
    return order[again[0]].decode() if len(again) else None


# ---- the cache


def kept(
    name: str, sources: list[Path], folders: list[Path], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The columns that `make` builds from the sources: from the cache when they are there, else built and kept.

    folders: where a cache may live, the best first; the first that can be written takes it, and where none can the
    columns stay in memory. A cache is true while the sources have the sizes and times that they had; one that is not
    whole is built again.
    """
    told = [(path.name, stat.st_size, stat.st_mtime_ns) for path in sources for stat in [_stat(path)]]
    key = hashlib.sha256(repr((FORMAT, told)).encode()).hexdigest()[:16]
    for folder in folders:
        found = _load(folder / f"{name}-{key}")
        if found is not None:
            return found
    columns = make()
    for folder in folders:
        with contextlib.suppress(OSError):
            _keep(folder, f"{name}-{key}", columns)
            _forget(folder, name, but=f"{name}-{key}")
            return _load(folder / f"{name}-{key}") or columns
    return columns


def cache_folders(dataroot: Path) -> list[Path]:
    """Beside the data where that can be written, else in the user's cache (XDG_CACHE_HOME)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = hashlib.sha256(str(dataroot.resolve()).encode()).hexdigest()[:16]
    return [dataroot / ".occflow", home / "occflow" / "tables" / place]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"table {path.stem} is missing: there is no {path}") from None


def _load(folder: Path) -> dict[str, np.ndarray] | None:
    """The columns below a folder, mapped; None where they are not whole."""
    try:
        sums = json.loads((folder / "columns.json").read_text())
        columns = {}
        for name, expected in sums.items():
            columns[name] = column = np.load(folder / f"{name}.npy", mmap_mode="r" if expected[0] else None)
            if _sum(column) != expected:
                return None
        return columns
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _keep(folder: Path, name: str, columns: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        for column, values in columns.items():
            np.save(beside / f"{column}.npy", values, allow_pickle=False)
        sums = {column: _sum(values) for column, values in columns.items()}
        (beside / "columns.json").write_text(json.dumps(sums))
        beside.chmod(0o755)  # others may read it: a data set is shared
        if (folder / name).exists():  # broken, or else it would have been used; or another process was faster
            shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # the other process once more: its columns are the same
            beside.rename(folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sum(column: np.ndarray) -> list:
    return [int(column.nbytes), zlib.crc32(np.ascontiguousarray(column).view(np.uint8).reshape(-1).data)]


def _forget(folder: Path, name: str, but: str) -> None:
    """Removes the columns of tables that have changed since."""
    for old in folder.glob(f"{name}-*"):
        if old.name != but:
            shutil.rmtree(old, ignore_errors=True)
