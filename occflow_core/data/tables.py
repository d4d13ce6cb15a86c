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

PIECE = 32 << 20  # bytes of JSON that are parsed at a time
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
    joined = "".join(values)
    width = len(values[0]) if values else 1
    # two passes in C instead of one in Python: tokens all have 32 characters
    if width and joined.isascii() and len(joined) == width * len(values) and {len(v) for v in values} == {width}:
        return np.frombuffer(joined.encode(), f"S{width}")
    return np.array([v.encode() for v in values] or [b""], "S")[: len(values)]


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns of the pieces of a table, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def places(wanted: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """For each wanted token its place in `tokens`, int64; -1 where the token is empty, -2 where there is none such."""
    if len(wanted) == len(tokens) and wanted.dtype == tokens.dtype and (wanted == tokens).all():
        return np.arange(len(tokens))  # as nuScenes' ego_pose and sample_data are
    place = {token: i for i, token in enumerate(tokens.tolist())}
    place[b""] = -1
    return np.fromiter((place.get(token, -2) for token in wanted.tolist()), np.int64, len(wanted))


def twice(tokens: np.ndarray) -> str | None:
    """A token that stands in a table more than once, or None."""
    if len(set(tokens.tolist())) == len(tokens):
        return None
    values, count = np.unique(tokens, return_counts=True)
    return values[count > 1][0].decode()


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
