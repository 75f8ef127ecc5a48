"""The site: no public name is missing from the reference, and no method from the table of methods."""

import importlib.util
import io
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

import actsteer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture
def written(monkeypatch):
    """Page -> text, of those that are made of the code."""
    if importlib.util.find_spec("griffe") is None:
        pytest.skip("pip install 'actsteer[docs]'")
    pages = {}

    class Page(io.StringIO):
        def close(self):
            pages[self.name] = self.getvalue()
            super().close()

    def opened(name, mode):
        page = Page()
        page.name = name
        return page

    monkeypatch.setitem(sys.modules, "mkdocs_gen_files", types.SimpleNamespace(open=opened))
    for script in ("reference.py", "errors.py"):
        runpy.run_path(str(DOCS / script))
    return pages


def described(text):
    return re.findall(r"^::: ([\w.]+)", text, flags=re.M)


def test_every_public_name_is_described_on_one_page(written):
    written |= {str(page.relative_to(DOCS)): page.read_text() for page in PAGES}
    del written["reference/types.md"]  # of which one has a public name, too
    paths = [path for page, text in written.items() for path in described(text)]
    names = [path.rpartition(".")[2] for path in paths if ".integrations." not in path]
    assert [name for name in actsteer.__all__ if names.count(name) != 1] == []


def test_the_index_of_the_reference_has_all_that_its_pages_describe(written):
    index = written.pop("reference/index.md")
    anchors = re.findall(r"\]\((\w+\.md)#([\w.]+)\)", index)
    assert sorted(anchors) == sorted(
        (page.removeprefix("reference/"), path)
        for page, text in written.items()
        for path in described(text)
        if page.startswith("reference/")
    )


def test_every_estimator_intervention_and_gate_has_its_row_among_the_methods(written):
    firsts = re.findall(r"^\| (.+?) \|", (DOCS / "methods.md").read_text(), flags=re.M)
    rows = re.findall(r"\[`(\w+)`\]", " ".join(firsts))
    public = [
        path.rpartition(".")[2]
        for page in ("estimators", "interventions", "gates")
        for path in described(written[f"reference/{page}.md"])
    ]
    assert len(public) > 25
    assert sorted({*public, "optimize", "discover"} - set(rows)) == []


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_links_into_the_repository_lead_somewhere(page):
    links = re.findall(r"\(https://github.com/actsteer/actsteer/blob/main/([^)#]+)", page.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


DOCSTRING = """Does it. See `Steerer` and `shown`.

    drawn   `Steerer`

Raises:
    ShapeError, SiteNotFoundError: it cannot.

>>> print("a\\n  b")
a
  b

>>> 1
1
"""


def test_a_docstring_has_its_examples_whole_its_errors_listed_and_its_public_names_linked():
    griffe = pytest.importorskip("griffe")
    extension = runpy.run_path(str(DOCS / "docstrings.py"))["Docstrings"]()
    own = griffe.Function("shown", docstring=griffe.Docstring(DOCSTRING))
    extension.on_instance(obj=own)
    first, *rest = own.docstring.value.split("\n\n", 1)
    assert first == (
        'Does it. See <autoref identifier="actsteer.steering.steerer.Steerer" optional><code>Steerer</code></autoref> '
        "and `shown`."
    )
    drawn, raises, code = rest[0].split("\n\n", 2)
    assert drawn == "    drawn   `Steerer`"
    assert raises == "Raises:\n    ShapeError | SiteNotFoundError: it cannot."
    assert code == '```pycon\n>>> print("a\\n  b")\na\n  b\n\n>>> 1\n1\n```'
