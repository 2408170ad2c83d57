"""Check the language and the structure of the package: names, docstrings, spelling, import order, sizes.

`python tests/test_language.py [PATH …]` prints the offenses in files or folders.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_selftrain"

BANNED_FIRST_WORDS = frozenset(["what", "how", "which", "whether", "of", "where", "those", "whoever", "as"])
BANNED_PHRASES = re.compile(
    r"\b(beside|stands?|stood|lies|asked|told|whoever|nobody|everybody|so many|of ours|handed back|put down|left out|"
    r"goes on|in whose|of which|by what|from whose|on whose|with whose|at hand|aside|likewise|thereby|whereof)\b",
    re.IGNORECASE,
)
BANNED_IN_NAMES = frozenset(["beside", "asked", "told", "stands", "lies", "whoever", "places", "said"])
BRITISH = re.compile(
    r"\b\w*(?:memoris|normalis|optimis|tokenis|initialis|utilis|linearis|quantis|summaris|recognis|minimis|maximis|"
    r"behaviour|colour|neighbour|favour|centre|labelled|licence)\w*\b",
    re.IGNORECASE,
)
MAX_SUMMARY_WORDS = 12
MAX_FILE_LINES = 400
MAX_PACKAGE_LINES = 30_583

LAYERS = (
    ("console", "errors", "version"),
    ("io",),
    ("stats",),
    ("config",),
    ("distributed",),
    ("remote",),
    ("models",),
    ("hub",),
    ("corpus",),
    ("sampling",),
    ("training", "likelihood"),
    ("evals",),
    ("study",),
    ("report", "planning"),
    ("experiments",),
    ("command_table",),
    ("command_help",),
    ("cli",),
    ("__init__", "__main__"),
)
"""A module imports its own package and those of earlier rows; packages of one row do not import each other."""
SEPARATE = {frozenset(("training", "likelihood")), frozenset(("training", "evals"))}


def source_files(*paths: Path) -> list[Path]:
    """Return the Python files under the paths, sorted."""
    return sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, is_summary) of docstrings; attribute docstrings have no summary rule."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for i, child in enumerate(node.body):
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.lineno, child.value.value, i == 0


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything that a module names: functions, classes, parameters, variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def offenses(file: Path) -> Iterator[str]:
    """Yield one line for each offense of a file against the rules of language."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    where = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    for line, text, is_summary in docstrings(tree):
        first = text.strip().splitlines()[0] if text.strip() else ""
        words = re.findall(r"[\w'’-]+", first)
        if words and words[0].lower() in BANNED_FIRST_WORDS:
            yield f"{where}:{line}: docstring begins with {words[0]!r}: {first}"
        if is_summary and len(first.split()) > MAX_SUMMARY_WORDS:
            yield f"{where}:{line}: summary of {len(first.split())} words (at most {MAX_SUMMARY_WORDS}): {first}"
        for found in BANNED_PHRASES.findall(text):
            yield f"{where}:{line}: {found!r} in a docstring"
    for line, text in comments(source):
        for found in BANNED_PHRASES.findall(text):
            yield f"{where}:{line}: {found!r} in a comment"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for found in BANNED_PHRASES.findall(node.value):
                yield f"{where}:{node.lineno}: {found!r} in text"
        if isinstance(node, ast.FunctionDef) and re.fullmatch(r"_?(\w+_of|(?!(un)?embed$)[a-z]+ed)", node.name):
            yield f"{where}:{node.lineno}: function {node.name}: use a verb"
    for line, name in names(tree):
        if BANNED_IN_NAMES & set(name.lower().split("_")):
            yield f"{where}:{line}: name {name}"
    for number, text in enumerate(source.splitlines(), 1):
        for match in BRITISH.finditer(text):
            yield f"{where}:{number}: British spelling {match[0]!r}"


def package_of(module: str) -> str:
    """Return the part of `jax_selftrain.X.…` that the import order speaks of."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, imported module) of the package's own imports, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jax_selftrain":
            if node.module == "jax_selftrain":
                for alias in node.names:
                    yield node.lineno, f"jax_selftrain.{alias.name}"
            else:
                yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jax_selftrain":
                    yield node.lineno, alias.name


@pytest.mark.parametrize("file", source_files(PACKAGE), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_names_and_docstrings_follow_the_rules(file: Path):
    assert not list(offenses(file))


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.yaml")), ids=lambda file: file.name)
def test_prose_in_yaml_follows_the_rules(file: Path):
    text = file.read_text(encoding="utf-8")
    assert not [*BANNED_PHRASES.findall(text), *BRITISH.findall(text)]


@pytest.mark.parametrize("file", source_files(PACKAGE), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_order(file: Path):
    rank = {name: i for i, row in enumerate(LAYERS) for name in row}
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for line, module in imports(file):
        other = package_of(module)
        if other == own or (other == "__init__" and module == "jax_selftrain.__version__"):
            continue
        assert rank[other] < rank[own], f"{file.name}:{line}: {own} imports {other}"
        assert frozenset((own, other)) not in SEPARATE, f"{file.name}:{line}: {own} imports {other}"


def test_public_names_and_file_stems_are_unique():
    stems, public = defaultdict(list), defaultdict(list)
    for file in source_files(PACKAGE):
        if file.name in ("__init__.py", "__main__.py"):
            continue
        stems[file.stem].append(str(file.relative_to(PACKAGE)))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                public[node.name].append(str(file.relative_to(PACKAGE)))
    twice = {name: files for name, files in {**stems, **public}.items() if len(files) > 1}
    assert not twice


def test_sizes():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in source_files(PACKAGE)}
    assert not {str(file): n for file, n in lines.items() if n > MAX_FILE_LINES}
    assert sum(lines.values()) <= MAX_PACKAGE_LINES


if __name__ == "__main__":
    found = [line for file in source_files(*map(Path, sys.argv[1:] or [PACKAGE])) for line in offenses(file.resolve())]
    print("\n".join(found))
    print(f"{len(found)} offenses")
