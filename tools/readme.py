"""Render nbs/index.ipynb as README.md: nbconvert's markdown, less what only nbdev and Jupyter need."""
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r'^#\s*\|\s*(.*)\n?', re.M)
HIDDEN = re.compile(r'^(hide\b|include:\s*false)', re.I)
SILENT = re.compile(r'^echo:\s*false', re.I)
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)')


def render(notebook: Path) -> str:
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata.language_info = {'name': 'python'}  # names the code fences; nbdev_clean removes it
    folder = notebook.resolve().parent.relative_to(ROOT).as_posix()
    cells = []
    for cell in nb.cells:
        if cell.cell_type == 'code':
            if any(HIDDEN.match(d) for d in DIRECTIVE.findall(cell.source)): continue
            if any(SILENT.match(d) for d in DIRECTIVE.findall(cell.source)):  # its output alone
                cell = nbformat.v4.new_markdown_cell('\n\n'.join(o.data['text/markdown'] for o in cell.outputs))
            else: cell.source = DIRECTIVE.sub('', cell.source)
            if not cell.source.strip(): continue
        elif cell.cell_type == 'markdown':  # its links start from nbs/, those of the README from the root
            cell.source = LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])), cell.source)
        else: continue  # raw cells hold front matter
        cells.append(cell)
    nb.cells = cells
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    text = render(ROOT/'nbs'/'index.ipynb')
    Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'README.md').write_text(text, encoding='utf-8')
