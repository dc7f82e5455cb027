"""Build the site in _docs: the README, every chapter with its API, the experiments with their figures; static, searchable, no network."""
import importlib
import inspect
import re
import shutil
import sys
import tempfile
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import yaml
from docutils import nodes
from latex2mathml.converter import convert
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from sphinx.application import Sphinx

from readme import DIRECTIVE, HIDDEN, ROOT, render

SETTINGS = dict(
    project='pcl_nb', html_title='pcl_nb', author='pcl_nb contributors', extensions=['myst_nb', 'sphinx_copybutton', 'docs'],
    html_theme='furo',
    nb_execution_mode='off', myst_enable_extensions=['dollarmath', 'amsmath'], myst_heading_anchors=4, html_math_renderer='mathml',
    html_show_copyright=False, html_copy_source=False, html_show_sourcelink=False, copybutton_exclude='.linenos, .gp, .go',
    suppress_warnings=['mystnb.unknown_mime_type', 'myst.header', 'toc.not_included'])


def documented(module) -> list:
    "(qualified name, object) of what a module exports, each class followed by its methods."
    found = []
    for name in module.__all__:
        o = getattr(module, name)
        if not (inspect.isclass(o) or inspect.isfunction(o)): continue
        found.append((name, o))
        if inspect.isclass(o):
            found += [(f'{name}.{n}', m) for n, m in vars(o).items() if inspect.isfunction(m) and not n.startswith('_') and m.__doc__]
    return found


def api(module) -> str:
    "The reference of a module: signatures with what is said of each parameter."
    text = ['## API']
    for name, o in documented(module):
        shown = show_doc(o, renderer=BasicMarkdownRenderer)._repr_markdown_()
        text.append(re.sub(r'^-{3,}\n+#+ .*\n', f'### `{name}`\n', shown.lstrip(), count=1))
    return '\n\n'.join(text)


def page(path: Path, figures: list):
    "A notebook as readers see it: without what only nbdev needs; a chapter with its API, an experiment with its figures."
    nb = nbformat.read(path, as_version=4)
    nb.metadata.language_info = {'name': 'python'}
    cells, exports = [], None
    for cell in nb.cells:
        if cell.cell_type == 'code':
            directives = DIRECTIVE.findall(cell.source)
            exports = next((d.split()[1] for d in directives if d.startswith('default_exp')), exports)
            cell.source = DIRECTIVE.sub('', cell.source)
            if not cell.source.strip() or any(HIDDEN.match(d) for d in directives): continue
        cells.append(cell)
    if exports: cells.append(nbformat.v4.new_markdown_cell(api(importlib.import_module(f'pcl_nb.{exports}'))))
    if figures:
        cells.append(nbformat.v4.new_markdown_cell(
            '\n\n'.join(['## Results', 'At profile `embedded`; [all of them](../figures/README.md).', *figures])))
    nb.cells = cells
    return nb


def results(folder: Path) -> dict:
    "Experiment -> its pictures in `folder`, as Markdown."
    found = {}
    for figure in yaml.safe_load((ROOT/'nbs'/'figures.yaml').read_text())['figures'].values():
        for name in figure['outputs']:
            if (folder/f'{name}.png').exists():
                found.setdefault(figure['experiment'],
                    []).append(f"{figure['caption']}:\n\n![{figure['caption']}](../figures/{folder.name}/{name}.png)")
    return found


def toctree(caption: str, pages: list) -> str: return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```', ''])


def stage(src: Path):
    "The sources of the site."
    (src/'nbs').mkdir(parents=True)
    shutil.copytree(ROOT/'figures', src/'figures',
        ignore=lambda d, names: [n for n in names if Path(d) != ROOT/'figures'
            and Path(n).suffix not in ('.png', '.csv', '.json', '.md', '.tex', '')] + ['smoke'])
    for table in src.glob('figures/*/*.md'): table.write_text(f'# {table.stem}\n\n{table.read_text()}')   # a page has a title
    shutil.copy(ROOT/'CONTRIBUTING.md', src); shutil.copy(ROOT/'LICENSE', src)
    notebooks = sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb') if p.stem != 'index')
    pictures = results(ROOT/'figures'/'embedded')
    for name in notebooks: nbformat.write(page(ROOT/'nbs'/f'{name}.ipynb', pictures.get(name, [])), src/'nbs'/f'{name}.ipynb')
    chapters, experiments = [n for n in notebooks if n[0].isdigit()], [n for n in notebooks if not n[0].isdigit()]
    (src/'index.md').write_text(render(ROOT/'nbs'/'index.ipynb') + '\n' + toctree('Chapters', [f'nbs/{n}' for n in chapters])
        + toctree('Experiments', [f'nbs/{n}' for n in experiments]) + toctree('More', ['Results <figures/README>', 'CONTRIBUTING']))


def setup(app):
    "Formulas as MathML, which browsers draw themselves."
    def inline(self, node): self.body.append(convert(node.astext())); raise nodes.SkipNode
    def block(self, node):
        self.body.append(f'<div style="overflow-x: auto; padding: .4em 0">{convert(node.astext(), display="block")}</div>')
        raise nodes.SkipNode
    app.add_html_math_renderer('mathml', (inline, None), (block, None))


class Links(HTMLParser):
    "What a page refers to, and the anchors it has."
    def __init__(self, path):
        super().__init__(); self.to, self.ids = [], set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k in ('href', 'src') and v: self.to.append(v)
            if k in ('id', 'name') and v: self.ids.add(v)


def broken(site: Path) -> list:
    "(page, link) for each link inside the site that leads nowhere."
    pages, lost = {p.resolve(): Links(p) for p in site.rglob('*.html')}, []
    for path, links in pages.items():
        for link in links.to:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target /= 'index.html'
            anchor = unquote(parts.fragment)
            if not target.exists() or anchor and target in pages and anchor not in pages[target].ids:
                lost.append((path.relative_to(site.resolve()).as_posix(), link))
    return lost


def main(out: Path) -> int:
    "Build the site, check its links, put it in the place of an earlier one: the exit code."
    if out.exists() and not (out/'searchindex.js').exists():       # it would be replaced
        print(f'{out} is there and is no site; give a folder that does not exist yet', file=sys.stderr)
        return 2
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as d:
        src, site = Path(d)/'src', Path(d)/'out'/'site'
        stage(src)
        app = Sphinx(src, None, site, Path(d)/'trees', 'html', confoverrides=SETTINGS, status=None)
        app.build()
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site, out)       # a site that is there stays until the new one is complete
    lost = broken(out)
    for where, link in lost: print(f'{where}: {link} leads nowhere', file=sys.stderr)
    print(f'{out}/index.html: {len(list(out.rglob("*.html")))} pages'
        + (f', {len(lost)} broken links' if lost else ', every link inside leads somewhere'))
    return bool(lost or app.statuscode)


if __name__ == '__main__': sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT/'_docs'))
