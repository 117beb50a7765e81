"""README.md: its links to lines of code lead where they say, and it stays a front door."""

import ast
import re
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parent.parent
README = (CODE / "README.md").read_text()
# `Name` [file.py:12](file.py#L12), `First` … `Last` [file.py:12-34](file.py#L12-L34)
LINK = re.compile(r"(?:`([\w.]+)` … )?`([\w.]+)` \[([\w./]+):(\d+)(?:-(\d+))?\]\(([\w./]+)#L(\d+)(?:-L(\d+))?\)")


def definitions(file: str) -> dict[str, tuple[int, int]]:
    """First and last line of each function and class of a file, by its qualified name."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found[prefix + child.name] = first, child.end_lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((CODE / file).read_text()), "")
    return found


@pytest.mark.parametrize("link", list(LINK.finditer(README)), ids=lambda link: link[0].split("]")[0])
def test_a_link_to_code_leads_there(link):
    first, last, file, start, end, target, target_start, target_end = link.groups()
    assert (file, start, end) == (target, target_start, target_end), "what is shown is what is linked"
    places = definitions(file)
    assert int(start) == places[first or last][0]
    if end:
        assert int(end) == places[last][1]


def test_readme_is_a_front_door():
    lines = README.split("\n")
    assert len(lines) <= 251 and len(LINK.findall(README)) >= 20
    read = re.search(r"These ([\d,]+) lines are the method", README)
    table = [link for link in LINK.finditer(README) if link[5]]
    assert int(read[1].replace(",", "")) == sum(int(link[5]) - int(link[4]) + 1 for link in table)
