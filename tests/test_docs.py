"""Options, files and tests that the documentation and the messages name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jax_selftrain.cli import parse_command_line
from jax_selftrain.command_table import COMMANDS, CONFIG_FILE, DISTRIBUTED_COMMANDS, LOG_LEVEL
from jax_selftrain.config import StudyConfig, yaml_io
from jax_selftrain.distributed.cluster import DistributedConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, *sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "tpu_scripts").iterdir())]
TEXTS += [ROOT / "Dockerfile", ROOT / "sky.yaml", ROOT / "SECURITY.md"]
MODULES = sorted((ROOT / "jax_selftrain").rglob("*.py"))
PYTHON_FILES = [
    str(file) for folder in ("jax_selftrain", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")
]
OTHER_FLAGS = {"--help", "--version", "--implicit-dirs", "--gpus-per-task", "--repo-type", "--tyro-print-completion"}
"""Flags in the package that are not options of a command."""
NAME = r"[a-z]+(?:-[a-z]+)*"
FLAG = r"(?<![\w-])--[a-z][\w.-]*\w"


def flags(command: str) -> set[str]:
    types = yaml_io.option_types(COMMANDS[command].config_class) | {CONFIG_FILE: str, LOG_LEVEL: str}
    if command in DISTRIBUTED_COMMANDS:
        types |= yaml_io.option_types(DistributedConfig)
    negated = {yaml_io.negated_flag(name) for name, tp in types.items() if tp is bool}
    return {yaml_io.flag(name) for name in types} | negated | {"--help"}


FLAGS = {command: flags(command) for command in COMMANDS}
ALL_FLAGS = set[str]().union(*FLAGS.values())


def commands(text: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the flags of each command in a text."""
    for line in text.replace("\\\n", " ").splitlines():
        for name, words in re.findall(
            r"(?:jax-selftrain +|`)([a-z]+(?:-[a-z]+)*)\b((?:(?!jax-selftrain)[^`|#;])*)", line
        ):
            if name in COMMANDS:
                yield name, set(re.findall(FLAG, words))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_have_the_options_that_a_text_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    unknown = {(name, flag) for name, found in commands(text) for flag in found - FLAGS[name]}
    if path in PAGES:
        unknown |= {("", flag) for flag in re.findall(rf"`({FLAG})", text) if flag not in ALL_FLAGS}
    assert not unknown


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_parsed_and_pages_name_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse_command_line(name, COMMANDS[name].example.split())
    page = (ROOT / COMMANDS[name].page).read_text(encoding="utf-8")
    assert re.search(rf"jax-selftrain +{name}\b|`{name}\b", page)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_messages_and_docstrings_name_existing_options(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = {flag for text in strings for flag in re.findall(FLAG, text) if not flag.startswith("--xla")}
    assert found <= ALL_FLAGS | OTHER_FLAGS | {flag.replace("--", "--train.", 1) for flag in ALL_FLAGS}


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: path.name)
def test_options_of_a_section_exist(path: Path) -> None:
    sections = {tuple(name.split(".")) for name in yaml_io.option_types(StudyConfig) if "." in name}
    named = re.findall(r"`(sample|train|score|extract|memorization)\.([a-z]\w*)`", path.read_text(encoding="utf-8"))
    assert set(named) <= sections | {("score", "json")}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_files_of_a_page_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []
    named = {file for span in re.findall(r"`([^`\n]+)`", text) for file in re.findall(r"[\w./-]+\.py\b", span)}
    assert {file for file in named if not any(name.endswith(f"/{file}") for name in PYTHON_FILES)} == set()


def test_sentences_of_troubleshooting_exist() -> None:
    sources = ["".join(re.split(r'"\s*f?"', re.sub(r"\{[^{}]*\}", "…", path.read_text()))) for path in MODULES]
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sentences = [
        span for row in re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE) for span in re.findall(r"`([^`]+)`", row)
    ]
    assert len(sentences) >= 10
    parts = {part.strip() for one in sentences if one != "RESOURCE_EXHAUSTED" for part in re.split("…,? ?", one)}
    assert {part for part in parts if part and not any(part in text for text in sources)} <= {"not", ":", ": needs"}


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} | {
        "index.md"
    }
