"""Makes `.venv`: everything the demo and the tests need, ROS 2 and our own messages included, without apt or sudo.

    python3 tools/setup.py run     what `make demo` needs
    python3 tools/setup.py test    that, and what `make test` needs
    python3 tools/setup.py status  what either would do; exit code 1 when there is something to do

The work is cut into stages. A stage writes "underway" into `.venv/.setup/<stage>` when it begins and the hash of all it
was made from when it is done: a stage is repeated when that hash changed, and what was interrupted is not believed.
Runs under the machine's own python3, so: standard library only.
"""

import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = VENV / ".setup"  # stamps, logs, build folders
PYTHON = VENV / "bin" / "python"
PYTHONS = ((3, 10), (3, 12))  # oldest and newest CPython that the ROS wheels are made for
UNDERWAY = "underway"

# What a sourced ROS (or the ROS wheels, which set a library path for their own process) leaves in the environment; it
# would mix another ROS into the venv's.
ROS_VARIABLES = {
    "AMENT_CURRENT_PREFIX",
    "AMENT_PREFIX_PATH",
    "CMAKE_PREFIX_PATH",
    "COLCON_PREFIX_PATH",
    "LD_LIBRARY_PATH",
    "PKG_CONFIG_PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "RMW_IMPLEMENTATION",
    "ROS_DISTRO",
    "ROS_PACKAGE_PATH",
    "ROS_PYTHON_VERSION",
    "ROS_VERSION",
    "_ROS_WHEELS_BOOTSTRAP_COMPLETE",
}


class Failed(Exception):
    """One message for the user; exit code 1."""


# ---------------------------------------------------------------------------------------------- what the machine lacks


def missing():
    """(what, Debian/Ubuntu package) for everything that this machine lacks."""
    lacks = []
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        lacks.append(("Python's venv module", "python3-venv"))
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        lacks.append(("Python.h", "python3-dev"))
    if not _compiler("CC", ("cc", "gcc", "clang")) or not _compiler("CXX", ("c++", "g++", "clang++")):
        lacks.append(("a C++ compiler", "g++"))
    lacks += [(tool, tool) for tool in ("cmake", "make") if not shutil.which(tool)]
    return lacks


def _compiler(variable, names):
    chosen = os.environ.get(variable, "").split()
    return any(shutil.which(name) for name in (chosen[:1] or names))


def check(version=sys.version_info[:2]):
    """Raises Failed, in one sentence, unless this machine can do the work."""
    if not PYTHONS[0] <= tuple(version) <= PYTHONS[1]:
        low, high = (".".join(map(str, v)) for v in PYTHONS)
        raise Failed(
            f"OccFlow needs Python {low} to {high} (ROS 2 has wheels for no other), this is {version[0]}.{version[1]}: "
            f"install one of them with its -venv and -dev packages, then name it, for example: make PYTHON=python{high}"
        )
    lacks = missing()
    if lacks:
        things = ", ".join(what for what, _ in lacks)
        packages = " ".join(package for _, package in lacks)
        raise Failed(f"This machine lacks {things}: sudo apt install {packages}")


# ------------------------------------------------------------------------------------------------------------- stages


def make_venv():
    # moved away first: a removal that is interrupted must not leave half a .venv
    old = VENV.with_name(".venv.old")
    shutil.rmtree(old, ignore_errors=True)
    if VENV.exists():
        VENV.rename(old)
    shutil.rmtree(old, ignore_errors=True)
    STATE.mkdir(parents=True)
    (STATE / "venv").write_text(UNDERWAY)
    run("venv", [sys.executable, "-m", "venv", str(VENV)])


def install(*files):
    def work():
        wanted = [part for file in files for part in ("-r", f"requirements/{file}")]
        pip(files[-1].replace(".txt", ""), ["-c", "requirements/constraints.txt", *wanted])
        mend_cmake_exports()

    return work


def install_ourselves():
    # --no-build-isolation: setuptools is among the requirements, nothing more need be fetched
    pip("occflow", ["--no-deps", "--no-build-isolation", "--use-pep517", "-e", "."])
    # pip leaves out the data_files of an editable install: links make the venv a prefix like colcon's install/
    remove_installed("occflow")
    links = dict(ament_files())
    manifest("occflow").write_text("".join(f"{link}\n" for link in links))
    for link, file in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file)


def ament_files():
    """(link in the venv, file of this checkout) for the data_files of the root's setup.py."""
    asked = "import sys, setuptools; setuptools.setup = lambda **k: print(*k['data_files'], sep='\\n'); import setup"
    said = subprocess.check_output([str(PYTHON), "-c", asked], cwd=ROOT, env=environment(), text=True)
    for folder, files in map(ast.literal_eval, said.splitlines()):
        yield from ((VENV / folder / Path(file).name, ROOT / file) for file in files)


def mend_cmake_exports():
    """The CMake exports in the ROS wheels name Python and numpy of the machine that built them; let them name ours."""
    asked = "import sysconfig, numpy; print(sysconfig.get_path('include')); print(numpy.get_include())"
    python, numpy = subprocess.check_output([str(PYTHON), "-c", asked], env=environment(), text=True).split("\n")[:2]
    for file in (VENV / "share").rglob("*.cmake"):
        text = file.read_text()
        mended = re.sub(r"/opt/python/[^/;\"]+/include/python[\d.]+", lambda _: python, text)
        mended = re.sub(r"/opt/python/[^;\"]+/site-packages/numpy/(_core|core)/include", lambda _: numpy, mended)
        if mended != text:
            with Landing(file) as new:
                new.write_text(mended)


def build(package, source):
    """Builds a message package with rosidl and installs it into the venv, so that nothing need be sourced."""

    def work():
        remove_installed(package)
        folder = STATE / f"build-{package}"
        shutil.rmtree(folder, ignore_errors=True)
        extra = {"AMENT_PREFIX_PATH": str(VENV), "LD_LIBRARY_PATH": str(VENV / "lib")}
        options = {
            "CMAKE_PREFIX_PATH": VENV,
            "CMAKE_INSTALL_PREFIX": VENV,
            "CMAKE_BUILD_TYPE": "Release",
            "Python3_EXECUTABLE": PYTHON,
            "BUILD_TESTING": "OFF",
        }
        chosen = [f"-D{name}={value}" for name, value in options.items()]
        run(package, ["cmake", "-S", str(ROOT / source), "-B", str(folder), *chosen], extra)
        jobs = str(min(os.cpu_count() or 1, 8))
        run(package, ["cmake", "--build", str(folder), "--parallel", jobs, "--target", "install"], extra, append=True)
        shutil.copy(folder / "install_manifest.txt", manifest(package))
        shutil.rmtree(folder)

    return work


def manifest(package):
    return STATE / f"{package}.installed"


def remove_installed(package):
    """A message that was renamed must not live on beside the new one."""
    if manifest(package).is_file():
        for line in manifest(package).read_text().splitlines():
            Path(line).unlink(missing_ok=True)


def nothing():
    """The work of a stage whose result is there already."""


def foreign_tf2_msgs():
    """tf2_msgs that somebody else put into the venv (PyPI may have it one day): then ours is not built."""
    if manifest("tf2_msgs").is_file() or _says("tf2_msgs") == UNDERWAY:
        return False
    asked = [str(PYTHON), "-c", "import tf2_msgs.msg"]
    return subprocess.run(asked, env=environment(), stderr=subprocess.DEVNULL).returncode == 0


def stages(level):
    """(name, what the user reads, its cause, the work) in order; each cause includes the one before it."""
    interpreter = f"{sys.version_info[:2]} {VENV}"  # a venv cannot be moved
    pins, run_txt, test_txt = (ROOT / "requirements" / f"{name}.txt" for name in ("constraints", "run", "test"))
    ours = [ROOT / name for name in ("setup.py", "setup.cfg", "package.xml")]
    ours += [ROOT / name for name in ("launch", "config", "rviz", "resource", "scripts", "msg/msg")]
    messages = [ROOT / "msg" / name for name in ("package.xml", "CMakeLists.txt", "msg")]
    plan = [
        ("venv", f"making .venv for Python {sys.version.split()[0]}", [interpreter], make_venv),
        ("run", "installing PyTorch, ROS 2 and the rest (minutes)", [pins, run_txt], install("run.txt")),
        ("tf2_msgs", "building tf2_msgs (10 to 30 s)", [ROOT / "tools/tf2_msgs"], build("tf2_msgs", "tools/tf2_msgs")),
        ("occflow_msgs", "building occflow_msgs (10 to 30 s)", messages, build("occflow_msgs", "msg")),
        ("occflow", "installing this checkout, editable", ours, install_ourselves),
        ("test", "installing what the tests need", [pins, test_txt], install("run.txt", "test.txt")),
    ]
    return [stage for stage in plan if level == "test" or stage[0] != "test"]


NEEDS = {"venv": (), "run": ("venv",), "tf2_msgs": ("run",), "occflow_msgs": ("run",), "occflow": ("run",)}
NEEDS["test"] = ("run",)


def stale(level):
    """The stages to do, each with the hash to write when it is done."""
    hashes, todo, names = {}, [], set()
    script = Path(__file__).read_bytes()
    for name, says, cause, work in stages(level):
        parts = [script if name != "venv" else b"", *(hashes[before].encode() for before in NEEDS[name])]
        hashes[name] = digest([*parts, *(contents(c) for c in cause)])
        stamp = STATE / name
        done = stamp.read_text() if stamp.is_file() else ""
        again = done != hashes[name] or not PYTHON.exists() or names.intersection(NEEDS[name])
        if again:
            names.add(name)
            todo.append((name, says, hashes[name], work))
    return todo


def contents(cause):
    if isinstance(cause, str):
        return cause.encode()
    files = sorted(f for f in cause.rglob("*") if f.suffix != ".pyc" and f.is_file()) if cause.is_dir() else [cause]
    return digest([part for f in files if f.is_file() for part in (str(f).encode(), f.read_bytes())]).encode()


def digest(parts):
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


# -------------------------------------------------------------------------------------------------------------- tools


class Landing:
    """A file beside the target that replaces it when the block ends well."""

    def __init__(self, target):
        self.target, self.new = target, target.with_name(target.name + ".new")

    def __enter__(self):
        return self.new

    def __exit__(self, kind, *_):
        if kind is None:
            os.replace(self.new, self.target)


def environment(**extra):
    clean = {name: value for name, value in os.environ.items() if name not in ROS_VARIABLES}
    return {**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", **extra}


def pip(log, arguments):
    run(log, [str(PYTHON), "-m", "pip", "install", *arguments])


def run(log, command, extra=None, append=False):
    """Runs quietly; when it fails, shows the end of what it said and where the whole stands."""
    path = STATE / f"{log}.log"
    with path.open("ab" if append else "wb") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        done = subprocess.run(command, cwd=ROOT, env=environment(**(extra or {})), stdout=output, stderr=output)
    if done.returncode:
        last = path.read_text(errors="replace").splitlines()[-15:]
        said = "\n".join(f"    {line}" for line in last)
        raise Failed(f"{said}\n{Path(command[0]).name} failed; all it said is in {path.relative_to(ROOT)}")


def leave_the_venv():
    """Called by the venv's own Python: go on with the one it was made from, for .venv may be remade."""
    called = Path(sys.executable)
    if VENV in called.parents:
        base = str(called.resolve())
        os.execve(base, [base, *sys.argv], environment())


@contextlib.contextmanager
def alone():
    """Two set-ups at once (`make demo` and `make test`) would tear .venv apart: the second waits."""
    with open(__file__) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another one in this checkout", flush=True)
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def set_up(level):
    todo = stale(level)
    if not todo:
        return
    check()
    # an interrupted pip can leave packages that look whole; a venv costs minutes, a wrong one costs days
    halves = [name for name in ("venv", "run", "test") if _says(name) == UNDERWAY]
    if halves and todo[0][0] != "venv":
        print(f"set-up: the last one was interrupted while at work on {halves[0]!r}, starting over", flush=True)
        (STATE / "venv").write_text(UNDERWAY)
        todo = stale(level)
    for number, (name, says, done, work) in enumerate(todo, 1):
        print(f"set-up [{number}/{len(todo)}] {says} ... ", end="", flush=True)
        began = time.monotonic()
        work = nothing if name == "tf2_msgs" and foreign_tf2_msgs() else work
        if name != "venv":  # which begins by removing all stamps
            (STATE / name).write_text(UNDERWAY)
        try:
            work()
        except Failed:
            print("failed", flush=True)
            raise
        with Landing(STATE / name) as stamp:
            stamp.write_text(done)
        print(f"{time.monotonic() - began:.0f} s", flush=True)


def _says(name):
    return (STATE / name).read_text() if (STATE / name).is_file() else ""


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in ("run", "test", "status"):
        print(__doc__)
        return 2
    if arguments == ["status"]:
        todo = stale("test")
        print("\n".join(says for _, says, _, _ in todo) or "all is there")
        return 1 if todo else 0
    leave_the_venv()
    try:
        with alone():
            set_up(arguments[0])
    except Failed as failure:
        print(f"set-up: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the next call goes on from what is whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
