"""The files of the documentation site, for MkDocs: the paths of the repository are those of the
site's sources, so that a link works on the site as it does in the repository.

Pages are README.md, docs/ and results/. A Python file or a notebook that a page links to becomes a
page as well.
"""

import re
from pathlib import Path

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
FILES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "docs/**/*.md"]
FILES += ["docs/*.css", "docs/images/*.svg", "examples/launch/*"]
FILES += [f"results/**/*.{ending}" for ending in ("md", "png", "txt", "csv")]
_CODE_LINK = re.compile(r"(\]\((?!\w+://)([^)#]+\.(?:py|ipynb)))\)")


def on_files(files, config):
    """Replaces the files of docs/ by those of the whole site; those of the theme stay."""
    found = [file for file in files if file.src_dir != config.docs_dir]
    pages = sorted({path for pattern in FILES for path in ROOT.glob(pattern)})
    found += [_file(path.relative_to(ROOT), config) for path in pages]
    linked = {code for page in pages if page.suffix == ".md" for code in _linked_code(page)}
    for path in sorted(linked):
        found += _notebook(path, config) if path.suffix == ".ipynb" else [_program(path, config)]
    return Files(found)


def on_page_markdown(markdown, **_):
    """Points links to code at the pages of that code."""
    return _CODE_LINK.sub(r"\1.md)", markdown)


def _file(path, config):
    file = File(str(path), str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file


def _linked_code(page):
    targets = [
        (page.parent / target).resolve() for _, target in _CODE_LINK.findall(page.read_text())
    ]
    return [path.relative_to(ROOT) for path in targets if path.exists()]  # MkDocs names the others


def _program(path, config):
    text = f"# {path}\n\n````python\n{(ROOT / path).read_text()}````\n"
    return File.generated(config, f"{path}.md", content=text)


def _notebook(path, config):
    """The page of a notebook, and its figures."""
    notebook = nbformat.read(ROOT / path, as_version=4)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    yield File.generated(config, f"{path}.md", content=text)
    for name, content in resources["outputs"].items():
        yield File.generated(config, str(path.parent / name), content=content)
