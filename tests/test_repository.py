"""What the documents promise exists, what no source file may do, what every test runs under."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from dsv3_jax.model.norm import rms_norm

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md")
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")
TREE_LINE = re.compile(r"^(?P<indent>(?:[│ ] {3})*)[├└]── (?P<names>.+)$")
WRITTEN_BY_COMMANDS = (".venv", "runs")
SOURCE_FOLDERS = ("src", "kernels", "tests", "configs", "scripts", "notebooks")
PURE_MODULES = (
    "dsv3_jax",
    "dsv3_jax.config",
    "dsv3_jax.model.accounting",
    "dsv3_jax.data.packing",
    "dsv3_jax.parallel.pipeline.check",
    "dsv3_jax.parallel.pipeline.simulate",
    "dsv3_jax.plan.report_page",  # and all of plan that reads compiled programs
)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def file_tree(text: str) -> Iterator[str]:
    """The paths of the fenced blocks that draw a tree with ├── and └──, four columns a level.

    A line may hold several names, separated by single spaces; two spaces or a # end them.
    """
    for _, block in FENCED.findall(text):
        folders: list[str] = []
        for line in block.splitlines():
            match = TREE_LINE.match(line.rstrip())
            if match is None:
                continue
            depth = len(match["indent"]) // 4
            names = re.split(r"  |#", match["names"])[0].replace(",", " ").split()
            for name in names:
                yield "".join(folders[:depth]) + name
            folders[depth:] = [names[-1].rstrip("/") + "/"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every line of the shell blocks, comments and prompts taken off."""
    for language, block in FENCED.findall(text):
        if language not in ("sh", "bash", "shell", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].removeprefix("$ ").split()
            if words:
                yield words


def test_file_tree_reads_levels_and_several_names():
    text = """
```
.
├── src/a/          a package
│   └── b.py c.py   two files
└── Makefile        # the commands
```
"""
    assert list(file_tree(text)) == ["src/a/", "src/a/b.py", "src/a/c.py", "Makefile"]


def test_readme_tree_names_existing_files_only():
    paths = list(file_tree(text_of("README.md")))
    assert paths, "README.md draws no file tree with ├── and └──"
    missing = [path for path in paths if not path.startswith(WRITTEN_BY_COMMANDS)]
    missing = [path for path in missing if not (ROOT / path).exists()]
    assert not missing, f"README.md's tree names what does not exist: {missing}"


def test_readme_tree_shows_every_package():
    shown = {path.rstrip("/") for path in file_tree(text_of("README.md"))}
    package = ROOT / "src" / "dsv3_jax"
    packages = [path.parent.relative_to(ROOT).as_posix() for path in package.glob("*/__init__.py")]
    assert not set(packages) - shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    links = [link for link in LINK.findall(text_of(document)) if "://" not in link]
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing, f"{document} links to what does not exist: {missing}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_commands_have_targets(document):
    targets = set(re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE))
    for words in commands(text_of(document)):
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word]
            assert set(named) <= targets, f"{document}: {' '.join(words)}"
        for word in words:
            if re.fullmatch(r"[\w/.]+\.(py|sh|ipynb)|(configs|tests|notebooks)/[\w/.]+", word):
                assert (ROOT / word).exists(), f"{document}: {' '.join(words)}: no {word}"


def documented_subcommands() -> list[str]:
    found = set()
    for document in DOCUMENTS:
        for words in commands(text_of(document)):
            line = " ".join(words)
            found |= set(re.findall(r"(?:^|/|\s)(?:dsv3|-m dsv3_jax\.cli) ([a-z]+)", line))
    return sorted(found)


@pytest.mark.parametrize("subcommand", documented_subcommands())
def test_documented_subcommands_have_help(subcommand):
    result = subprocess.run(
        [sys.executable, "-m", "dsv3_jax.cli", subcommand, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert subcommand in result.stdout


def source_files() -> list[Path]:
    files = [*ROOT.glob("*.py"), ROOT / "Makefile"]
    for folder in SOURCE_FOLDERS:
        files += (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".ipynb"))
    return [path for path in files if path != Path(__file__)]


def test_no_source_touches_private_jax_or_stringifies_annotations():
    banned = re.compile(
        r"\bjax\._src\b|\bfrom jax import _src\b|from __future__ import annotations"
    )
    offenders = [str(path) for path in source_files() if banned.search(path.read_text("utf-8"))]
    assert not offenders


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_module_imports_no_jax(module):
    """In a fresh interpreter, so that packages' __init__ files count too."""
    program = (
        f"import sys, {module}\n"
        "print([name for name in ('jax', 'jaxlib', 'flax') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_shape_annotations_are_checked_in_tests():
    assert rms_norm(jnp.ones((2, 3)), jnp.ones(3), 1e-6).shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError, match="rms_norm"):
        rms_norm(jnp.ones((2, 3)), jnp.ones(4), 1e-6)


def test_dtype_promotion_is_strict_in_tests():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
