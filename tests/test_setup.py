"""scripts/setup.sh: how it finds an interpreter, and when it makes .venv anew. Installs nothing:
every interpreter here is a stub on a fake PATH.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
INTERPRETER = os.path.realpath(sys.executable)

# Runs this interpreter, which says that it is of another version (and skips site, to be quick).
DISGUISED = """#!/bin/sh
exec '{python}' -S -c 'import sys
sys.version_info = ({version}, 0, "final", 0)
exec(sys.argv[2])' "$@"
"""
FAILING_SHIM = """#!/bin/sh
echo "pyenv: version \\`3.13' is not installed (set by .python-version)" >&2
exit 127
"""
NO_ENSUREPIP = """#!/bin/sh
exec '{python}' -S -c 'import sys
sys.modules["ensurepip"] = None
exec(sys.argv[2])' "$@"
"""
UV = """#!/bin/sh
[ "$1 $2 $3" = "python install 3.13" ] && echo "Installed Python 3.13" && exit
[ "$1 $2 $3" = "python find 3.13" ] && echo '{python}' && exit
exit 1
"""


def write_stub(path: Path, script: str, **fields: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script.format(python=INTERPRETER, **fields))
    path.chmod(0o755)


def find_python(fake: Path) -> subprocess.CompletedProcess[str]:
    """The finder's result with only `fake/bin` on PATH and `fake/pyenv` as pyenv's root."""
    (fake / "bin").mkdir(exist_ok=True)
    return subprocess.run(
        [BASH, str(ROOT / "scripts" / "setup.sh"), "--find-python"],
        env={"PATH": str(fake / "bin"), "PYENV_ROOT": str(fake / "pyenv"), "HOME": str(fake)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_found(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr
    assert os.path.realpath(result.stdout.strip()) == os.path.realpath(sys._base_executable)


def test_python3_of_a_supported_version_is_taken(tmp_path):
    write_stub(tmp_path / "bin" / "python3", DISGUISED, version="3, 14")
    assert_found(find_python(tmp_path))


@pytest.mark.parametrize("version", ["2, 7", "3, 11", "3, 15"])
def test_an_unsupported_python3_is_passed_over(tmp_path, version):
    write_stub(tmp_path / "bin" / "python3", DISGUISED, version=version)
    assert find_python(tmp_path).returncode == 2
    write_stub(tmp_path / "bin" / "python3.12", DISGUISED, version="3, 12")
    assert_found(find_python(tmp_path))


def test_a_shim_that_fails_is_passed_over(tmp_path):
    for name in ("python3", "python3.13", "python3.12"):
        write_stub(tmp_path / "bin" / name, FAILING_SHIM)
    write_stub(tmp_path / "pyenv" / "versions" / "3.9.18" / "bin" / "python", FAILING_SHIM)
    assert find_python(tmp_path).returncode == 2
    write_stub(
        tmp_path / "pyenv" / "versions" / "3.13.0" / "bin" / "python", DISGUISED, version="3, 13"
    )
    assert_found(find_python(tmp_path))


def test_a_python_that_cannot_make_a_venv_with_pip_is_passed_over(tmp_path):
    write_stub(tmp_path / "bin" / "python3", NO_ENSUREPIP)
    assert find_python(tmp_path).returncode == 2


def test_uv_is_asked_last(tmp_path):
    write_stub(tmp_path / "bin" / "python3", FAILING_SHIM)
    write_stub(tmp_path / "bin" / "uv", UV)
    result = find_python(tmp_path)
    assert_found(result)
    assert "Installed Python 3.13" in result.stderr  # uv's own words do not mix with the path


def test_uv_that_cannot_download_ends_in_the_message(tmp_path):
    write_stub(tmp_path / "bin" / "uv", "#!/bin/sh\nexit 1\n")
    assert find_python(tmp_path).returncode == 2


def test_without_any_python_one_line_says_what_to_do(tmp_path):
    result = find_python(tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "install one" in result.stderr
    assert "make setup" in result.stderr


# Stands for an interpreter, for the one in the .venv that it "makes", and for pip.
RECORDING = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$*" >>pip.log && [ ! -e pip.fails ] ;;
"-c ") ;;
"-c "*) echo "$0" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """What `make setup` reads of a checkout, with a space in its path; no .venv of ours at risk."""
    path = tmp_path / "a checkout"
    (path / "scripts").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "scripts/setup.sh"):
        shutil.copy(ROOT / name, path / name)
    for name in ("bash", "sh", "env", "sed", "cat", "cksum", "rm", "mkdir", "cp"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return path


def set_up(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fake = checkout.parent
    return subprocess.run(
        arguments or (BASH, "scripts/setup.sh"),
        cwd=checkout,
        env={"PATH": str(fake / "bin"), "PYENV_ROOT": str(fake / "pyenv"), "HOME": str(fake)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def installs(checkout: Path) -> int:
    log = checkout / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_setup_ends_with_the_message_and_code_2(checkout):
    result = set_up(checkout, shutil.which("make"), "setup")
    assert result.returncode == 2
    assert "install one" in result.stderr
    assert not (checkout / ".venv").exists()


def test_a_second_setup_does_nothing(checkout):
    write_stub(checkout.parent / "bin" / "python3", RECORDING)
    assert "is ready" in set_up(checkout).stdout
    again = set_up(checkout)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert installs(checkout) == 1


def test_an_interrupted_setup_is_made_anew(checkout):
    write_stub(checkout.parent / "bin" / "python3", RECORDING)
    (checkout / "pip.fails").touch()
    failed = set_up(checkout)
    assert failed.returncode == 1
    assert "run make setup again" in failed.stderr
    left_over = checkout / ".venv" / "half-written"
    left_over.touch()
    (checkout / "pip.fails").unlink()
    assert set_up(checkout).returncode == 0
    assert not left_over.exists()


def test_other_dependencies_or_another_place_make_it_anew(checkout):
    write_stub(checkout.parent / "bin" / "python3", RECORDING)
    set_up(checkout)
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text() + "\n# a tool's setting\n")
    set_up(checkout)
    assert installs(checkout) == 1
    project.write_text("# a dependency\n" + project.read_text())
    set_up(checkout)
    assert installs(checkout) == 2
    moved = checkout.rename(checkout.parent / "moved")
    set_up(moved)
    assert installs(moved) == 3


def test_an_extra_is_added_in_place_and_keeps_the_others(checkout):
    write_stub(checkout.parent / "bin" / "python3", RECORDING)
    set_up(checkout)
    kept = checkout / ".venv" / "kept"
    kept.touch()
    set_up(checkout, BASH, "scripts/setup.sh", "test,lint")
    assert kept.exists()
    set_up(checkout)
    set_up(checkout, BASH, "scripts/setup.sh", "lint")
    assert installs(checkout) == 2
