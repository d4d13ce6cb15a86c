"""Set-up and packaging: pinned, explained, repeatable, and in need of nothing that it does not name."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
ROS_LEFTOVERS = ("_ROS_WHEELS_BOOTSTRAP_COMPLETE", "LD_LIBRARY_PATH")  # the ROS wheels leave them in our environment
UNTOUCHED = {name: value for name, value in os.environ.items() if name not in ROS_LEFTOVERS}


def load_setup_tool():
    spec = importlib.util.spec_from_file_location("occflow_setup_tool", ROOT / "tools" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool():
    return load_setup_tool()


def requirement_lines(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def distribution(line: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower()


def pins() -> dict[str, list[str]]:
    """Distribution -> its lines in constraints.txt."""
    found: dict[str, list[str]] = {}
    for line in requirement_lines("constraints.txt"):
        found.setdefault(distribution(line), []).append(line)
    return found


def checkout(into: Path) -> Path:
    """A copy of what git would carry: tracked files and new ones that are not ignored, links as links."""
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):  # tracked, but just removed
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name, follow_symlinks=False)
    return into


# ---------------------------------------------------------------------------------------------------- what stands where


def test_both_packages_carry_the_one_version():
    versions = {file: ElementTree.parse(ROOT / file).findtext("version") for file in ("package.xml", "msg/package.xml")}
    assert len(set(versions.values())) == 1, versions


def test_the_packages_message_definitions_are_those_of_the_message_package():
    link = ROOT / "occflow_core" / "msg"
    assert link.is_symlink() and os.readlink(link) == "../msg/msg"
    assert [p.name for p in link.glob("*.msg")] == [p.name for p in (ROOT / "msg" / "msg").glob("*.msg")] != []


@pytest.mark.parametrize("file", ["run.txt", "test.txt"])
def test_every_requirement_has_a_reason_and_an_exact_version(file):
    pinned = pins()
    for line in requirement_lines(file):
        wanted, _, reason = line.partition("#")
        assert reason.strip(), f"{file}: {line!r} gives no reason"
        assert distribution(wanted) in pinned, f"{file}: {line!r} is not in constraints.txt"


def test_constraints_are_exact_and_leave_no_python_out():
    for name, lines in pins().items():
        for line in lines:
            marker = r'( ; (python_version (<|>=) "3\.\d+"|platform_machine != "\w+"))?'
            assert re.fullmatch(r"[\w.-]+==[\w.!]+" + marker, line), line
        assert len(lines) <= 2, f"{name} is pinned more than once: {lines}"
    for name in {distribution(line) for file in ("run.txt", "test.txt") for line in requirement_lines(file)}:
        sides = sorted(re.findall(r"(<|>=) \"", " ".join(pins()[name])))
        assert sides in ([], ["<", ">="]), f"{name} is not pinned for every Python: {pins()[name]}"


def test_nothing_large_or_unrelated_is_required():
    names = set(pins()) | {distribution(line) for file in ("run.txt", "test.txt") for line in requirement_lines(file)}
    # PyPI's `launch` is another program than ROS's
    assert not names & {"rerun-sdk", "tensorrt", "launch", "nuscenes-devkit", "opencv-python"}
    # hundreds of megabytes that only a GPU uses: torch's CUDA builds bring their own
    assert "triton" not in {distribution(line) for line in requirement_lines("run.txt")}


def test_triton_is_the_one_that_torchs_gpu_builds_ask_for():
    """Two exact wishes that differ cannot be installed; torch's CPU builds do not tell theirs."""
    asked = {"torch": "2.13.0", "triton": "3.7.1"}  # read in the metadata of torch's build from PyPI: renew both
    assert {name: pins()[name][0].partition("==")[2] for name in asked} == asked


def test_no_file_names_a_registry_or_a_home_directory():
    written = [
        *ROOT.glob("requirements/*"),
        *ROOT.glob("tools/**/*"),
        *ROOT.glob("msg/**/*"),
        ROOT / "Makefile",
        ROOT / "README.md",
    ]
    for file in (f for f in written if f.is_file() and f.suffix != ".pyc"):
        found = re.search(r"https?://(?!download\.ros|www\.w3)|index-url|find-links|/home/|/root/", file.read_text())
        assert not found, f"{file}: {found.group()}"


# ----------------------------------------------------------------------------------------- what the machine may lack


@pytest.mark.parametrize(
    ("absent", "package"),
    [("cmake", "cmake"), ("make", "make"), ("c++ g++ clang++", "g++"), ("cc gcc clang", "g++")],
    ids=lambda value: value.split()[0],
)
def test_a_missing_tool_is_named_with_its_package(tool, monkeypatch, tmp_path, absent, package):
    for name in {"cmake", "make", "c++", "g++", "cc", "gcc"} - set(absent.split()):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert [p for _, p in tool.missing()] == [package]
    with pytest.raises(tool.Failed, match=rf"^This machine lacks [^\n]+: sudo apt install {re.escape(package)}$"):
        tool.check((3, 11))


def test_missing_headers_and_venv_are_named_together_in_one_sentence(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True)
    with pytest.raises(tool.Failed) as told:
        tool.check((3, 11))
    assert str(told.value) == (
        "This machine lacks Python's venv module, Python.h: sudo apt install python3-venv python3-dev"
    )


@pytest.mark.parametrize("version", [(3, 9), (3, 13)])
def test_a_python_without_ros_wheels_is_refused_with_what_to_do(tool, version):
    with pytest.raises(tool.Failed, match=rf"this is {version[0]}\.{version[1]}: .*make PYTHON=python3"):
        tool.check(version)


def test_on_a_bare_machine_set_up_says_one_sentence_and_leaves_nothing(tmp_path):
    copy = checkout(tmp_path / "bare")
    bare = {name: value for name, value in UNTOUCHED.items() if name not in ("CC", "CXX")}
    bare["PATH"] = str(tmp_path)
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    command = [str(python), "tools/setup.py", "run"]
    told = subprocess.run(command, cwd=copy, env=bare, capture_output=True, text=True)
    assert told.returncode == 1 and not (copy / ".venv").exists()
    assert told.stdout == ""
    assert told.stderr == "set-up: This machine lacks a C++ compiler, cmake, make: sudo apt install g++ cmake make\n"


# ------------------------------------------------------------------------------------------------------- done, undone


@pytest.fixture
def toy(tool, monkeypatch, tmp_path):
    """The tool with two stages that only note that they were called; the second can be told to fail."""
    calls, trouble = [], []
    venv = tmp_path / ".venv"
    for name, value in {"ROOT": tmp_path, "VENV": venv, "STATE": venv / ".setup", "PYTHON": venv / "python"}.items():
        monkeypatch.setattr(tool, name, value)
    (tmp_path / "wanted").write_text("one")

    def make():
        shutil.rmtree(venv, ignore_errors=True)
        tool.STATE.mkdir(parents=True)
        tool.PYTHON.touch()
        calls.append("venv")

    def work():
        calls.append("run")
        if trouble:
            raise trouble.pop()

    plan = [("venv", "venv", ["x"], make), ("run", "run", [tmp_path / "wanted"], work)]
    monkeypatch.setattr(tool, "stages", lambda level: plan)
    monkeypatch.setattr(tool, "check", lambda: None)
    tool.calls, tool.trouble, tool.wanted = calls, trouble, tmp_path / "wanted"
    return tool


def test_what_is_done_is_not_done_again(toy):
    toy.set_up("run")
    toy.set_up("run")
    assert toy.calls == ["venv", "run"]


def test_what_changed_is_done_again_and_only_that(toy):
    toy.set_up("run")
    toy.wanted.write_text("two")
    toy.set_up("run")
    assert toy.calls == ["venv", "run", "run"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
def test_an_interrupted_installation_is_not_believed(toy, end):
    toy.trouble.append(end())
    with pytest.raises(end):
        toy.set_up("run")
    toy.set_up("run")
    assert toy.calls == ["venv", "run", "venv", "run"]
    toy.set_up("run")
    assert len(toy.calls) == 4


def test_a_failing_command_shows_its_last_lines_and_its_log(toy):
    toy.set_up("run")
    script = "print('first'); [print('line', i) for i in range(40)]; raise SystemExit(3)"
    with pytest.raises(toy.Failed) as told:
        toy.run("work", [sys.executable, "-c", script])
    said = str(told.value)
    assert "line 39" in said and "first" not in said and ".venv/.setup/work.log" in said


def test_builds_do_not_see_a_sourced_ros(tool, monkeypatch):
    for name in ("AMENT_PREFIX_PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "RMW_IMPLEMENTATION"):
        monkeypatch.setenv(name, "/opt/ros/humble")
    assert "/opt/ros/humble" not in tool.environment().values()


def test_a_venv_that_is_half_gone_still_finds_the_python_it_was_made_with(tmp_path):
    """Its interpreter is a link that outlives pyvenv.cfg; nothing may be installed into the Python behind it."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup.py", tmp_path / "tools")
    half = tmp_path / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    half.symlink_to(Path(sys.executable).resolve())
    script = "import setup, sys; setup.leave_the_venv(); setup.main(['status'])"
    (tmp_path / "tools" / "probe.py").write_text(f"import sys; print(sys.executable)\n{script}\n")
    told = subprocess.run([half, "tools/probe.py"], cwd=tmp_path, env=UNTOUCHED, capture_output=True, text=True)
    assert told.stdout.splitlines()[:2] == [str(half), str(half.resolve())], told


@pytest.mark.skipif(Path(sys.prefix) != VENV, reason="the tests run in an environment that `make setup` did not make")
def test_a_second_set_up_does_nothing():
    command = ["make", "--no-print-directory", "setup"]
    stamps = {path: path.stat().st_mtime_ns for path in (VENV / ".setup").iterdir() if path.is_file()}
    status = subprocess.run([sys.executable, "tools/setup.py", "status"], cwd=ROOT, capture_output=True, text=True)
    assert status.returncode == 0, f"first run `make setup`; it has work: {status.stdout}"
    said = subprocess.run(command, cwd=ROOT, env=UNTOUCHED, capture_output=True, text=True, check=True)
    assert said.stdout == "" and said.stderr == ""
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


# --------------------------------------------------------------------------------------------------------- installing


def test_ros2_run_occflow_core_offers_every_subcommand():
    from occflow_core.cli import SUBCOMMANDS

    scripts = {p.name for p in (ROOT / "scripts" / "occflow_core").iterdir()}
    assert scripts == set(SUBCOMMANDS) - {"demo"}  # the demo runs in a checkout
    assert all(os.access(p, os.X_OK) for p in (ROOT / "scripts").glob("*/*"))


@pytest.mark.slow
def test_a_wheel_without_ros_carries_the_messages_and_the_command(tmp_path):
    copy, target = checkout(tmp_path / "copy"), tmp_path / "venv"
    options = ["--no-deps", "--no-build-isolation", "--use-pep517", "--quiet"]
    wheel = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), "."]
    subprocess.run(wheel, cwd=copy, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    (made,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(target / "bin/python"), "install", "--no-deps", str(made)]
    subprocess.run(install, check=True, env=UNTOUCHED, capture_output=True)
    (package,) = target.glob("lib/python*/site-packages/occflow_core")
    for definition in (ROOT / "msg" / "msg").glob("*.msg"):
        carried = package / "msg" / definition.name
        assert not carried.is_symlink() and carried.read_bytes() == definition.read_bytes()
    assert (target / "bin" / "occflow").is_file()
    assert (package.parent / "occflow_recipes" / "demo.py").is_file()
    ament_tree(target)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake")
def test_colcon_builds_both_packages_and_ros2_finds_them(tmp_path):
    copy, install = checkout(tmp_path / "copy"), tmp_path / "install"
    prefix = str(VENV if Path(sys.prefix) == VENV else sys.prefix)
    environment = {
        **UNTOUCHED,
        "AMENT_PREFIX_PATH": prefix,
        "CMAKE_PREFIX_PATH": prefix,
        "LD_LIBRARY_PATH": f"{prefix}/lib",
        "PATH": f"{prefix}/bin:{UNTOUCHED['PATH']}",
    }
    command = [f"{prefix}/bin/colcon", "--log-base", str(tmp_path / "log"), "build", "--base-paths", ".", "msg"]
    command += ["--build-base", str(tmp_path / "build"), "--install-base", str(install), "--merge-install"]
    command += ["--cmake-args", f"-DPython3_EXECUTABLE={prefix}/bin/python", "-DBUILD_TESTING=OFF"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ament_tree(install)
    assert (install / "share/ament_index/resource_index/packages/occflow_msgs").is_file()
    assert (install / "share/occflow_msgs/msg/VoxelFlow.msg").is_file()
    (library,) = install.glob("lib/python*/site-packages/occflow_core")
    assert (library.parent / "occflow_recipes" / "demo.py").is_file()
    assert not (library / "msg").is_symlink() and (library / "msg" / "VoxelFlow.msg").is_file()


@pytest.mark.skipif(Path(sys.prefix) != VENV, reason="the tests run in an environment that `make setup` did not make")
def test_the_venv_is_an_ament_prefix_too():
    ament_tree(VENV)


def ament_tree(prefix: Path):
    """What `ros2 pkg`, `ros2 run` and `ros2 launch` look for."""
    for package in ("occflow_ros", "occflow_core"):
        assert (prefix / "share/ament_index/resource_index/packages" / package).is_file()
        assert (prefix / "share" / package / "package.xml").is_file()
        scripts = sorted((ROOT / "scripts" / package).iterdir())
        for script in scripts:
            installed = prefix / "lib" / package / script.name
            assert os.access(installed, os.X_OK) and installed.read_text() == script.read_text()
    for folder in ("launch", "config", "rviz"):
        for file in (ROOT / folder).glob("*.*"):
            assert (prefix / "share" / "occflow_ros" / folder / file.name).is_file(), file
