"""The README's code runs as it stands, block after block."""

from pathlib import Path

from mktestdocs import check_md_file

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_s_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_md_file(README, memory=True)


def test_the_first_example_ends_in_an_assert():
    first = README.read_text().split("```python\n")[1].split("```")[0]
    assert first.strip().splitlines()[-1].startswith("assert ")
