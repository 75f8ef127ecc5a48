"""CASES.md: every edge case has its row, and every row tests that are marked with its number."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| (?P<number>\d+) \| .+ \| (?P<tests>[^|]+) \|$", re.MULTILINE)
LINK = re.compile(r"\]\((?P<file>[^)]+)\)")


def marked(file: Path) -> set[int]:
    """The numbers in the case markers of a file."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.case"]
    return {ast.literal_eval(number) for mark in marks for number in mark.args}


def test_the_table_names_for_every_case_the_files_that_test_it():
    rows = {
        int(row["number"]): {link["file"] for link in LINK.finditer(row["tests"])}
        for row in ROW.finditer((TESTS / "CASES.md").read_text())
    }
    files = {file.relative_to(TESTS).as_posix(): marked(file) for file in TESTS.rglob("test_*.py")}
    assert rows == {number: {name for name, cases in files.items() if number in cases} for number in range(1, 54)}
    assert all(rows.values())
