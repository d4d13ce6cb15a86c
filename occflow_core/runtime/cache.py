"""Built engines on disk: found by all that they were built from, whole or not there, never used unread.

One folder an engine: its files and `manifest.json`, which tells what they were built from and their SHA-256. Nothing
in it is ever unpickled, but an engine is machine code: a cache that others may write is not used.
"""

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

MANIFEST = "manifest.json"
UNUSED = 90  # days after which an engine that nobody asked for is removed
log = getLogger("occflow")
Made = TypeVar("Made")


class Unfit(ValueError):
    """An engine that cannot be used; one sentence says why."""


def home() -> Path:
    """Where engines are kept unless told otherwise: the user's cache directory (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "occflow" / "engines"


def key(facts: dict[str, Any]) -> str:
    """The name of the engine that is built from these facts (plain JSON): another one where any of them differs."""
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def engine(folder: Path, facts: dict[str, Any], build: Callable[[Path], None], use: Callable[[Path], Made]) -> Made:
    """What `use` makes of the files that `build` once wrote for these facts.

    build: writes files into an empty folder. use: reads them; Unfit where they do not do, and what it gives must not
    need the files any more. What is there and unfit is built again, once, and kept until the new one is good. Two
    processes do not build the same engine at once. Where the cache cannot be written the engine is built all the same,
    for this process alone. With each that is built those go that nobody asked for in UNUSED days. Raises what `build`
    raises, and Unfit where even the new one is.
    """
    place = folder / key(facts)
    with _alone(folder, place.name) as kept:
        why = _unfit(place, facts) if kept else ""
        if why is None:
            try:
                made = use(place)
                with suppress(OSError):
                    os.utime(place)  # when it was last of use
                return made
            except Unfit as problem:
                why = str(problem)
        if why:
            log.warning("engine %s: %s; it is built again", place, why)
        with tempfile.TemporaryDirectory(prefix="occflow-engine-") as name:
            fresh = Path(name)
            build(fresh)
            made = use(fresh)
            if kept:
                write_manifest(fresh, facts)
                try:
                    _put(fresh, place)
                    _forget(folder)
                except OSError as problem:
                    log.warning("engine %s cannot be kept (%s): it is built anew at the next start", place, problem)
            return made


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Beside the files of an engine: what they were built from and their SHA-256."""
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"facts": facts, "files": files}, indent=2) + "\n")


def _unfit(place: Path, facts: dict[str, Any]) -> str | None:
    """Why an engine on disk cannot be used: None where it can, "" where there is none."""
    if not place.exists():
        return ""
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        told, files = manifest["facts"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"its {MANIFEST} cannot be read ({problem!r})"
    # through JSON and back, as the facts on disk came: tuples are lists there
    mine = json.loads(json.dumps(facts))
    if told != mine:
        differ = sorted(k for k in mine.keys() | dict(told).keys() if mine.get(k) != dict(told).get(k))
        return f"it was built from something else ({', '.join(differ)})"
    for name, digest in files.items():
        try:
            if Path(name).name != name or _digest(place / name) != digest:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} cannot be read"
    return None


def _put(fresh: Path, place: Path) -> None:
    """A copy of a folder in the cache, in the place of what was there; all of it or nothing."""
    beside, old = (place.with_name(f".{place.name}.{word}") for word in ("new", "old"))
    for left in (beside, old):  # by a process that was killed here
        shutil.rmtree(left, ignore_errors=True)
    try:
        shutil.copytree(fresh, beside)
        for path in beside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if place.exists():
            os.replace(place, old)
        os.replace(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _forget(folder: Path) -> None:
    """Removes engines that nobody asked for in UNUSED days: each version of a model, of PyTorch and of this code has
    one of its own. A lock's file stays: somebody may wait for it."""
    for place in folder.glob("[!.]*"):
        with suppress(OSError):
            if time.time() - place.stat().st_mtime > UNUSED * 86400:
                with _lock(folder, place.name).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(place)


def _lock(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[bool]:
    """One process at a time for an engine's name; False where nothing can be kept in the folder. A lock ends with its
    process, however that ends."""
    with ExitStack() as held:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if about.st_uid != os.geteuid() or about.st_mode & 0o022:
                raise PermissionError("it belongs to somebody else or others may write it")
            lock = held.enter_context(_lock(folder, name).open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("engine %s: waiting for another process that builds it", folder / name)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as problem:  # a network's file system may have no locks
            log.warning("cache of engines %s: %s; the engine is built for this process alone", folder, problem)
            kept = False
        else:
            kept = True
        yield kept


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
