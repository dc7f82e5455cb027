"""Build the site in _docs: the README, every chapter with its API, the experiments with their figures; static, no network."""
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
from docutils import nodes
from latex2mathml.converter import convert
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from sphinx.application import Sphinx

from pcl_nb.lab.report import entries
from readme import DIRECTIVE, HIDDEN, ROOT, render

NBS = ROOT/'nbs'
LAYERS = {'The paper': '.', 'The lab': 'lab', 'Base': 'base', 'Names at the top': 'names'}    # caption -> folder of chapters

SETTINGS = dict(
    project='pcl_nb', html_title='pcl_nb', author='pcl_nb contributors',
    extensions=['myst_nb', 'sphinx_copybutton', 'docs'], html_theme='furo', nb_execution_mode='off',
    myst_enable_extensions=['dollarmath', 'amsmath'], myst_heading_anchors=4, html_math_renderer='mathml',
    html_show_copyright=False, html_copy_source=False, html_show_sourcelink=False,
    copybutton_exclude='.linenos, .gp, .go',
    suppress_warnings=['mystnb.unknown_mime_type', 'myst.header', 'toc.not_included'])


def documented(module) -> list:
    "(qualified name, object) of what a module exports, each class followed by its methods."
    found = []
    for name in module.__all__:
        o = getattr(module, name)
        if not (inspect.isclass(o) or inspect.isfunction(o)): continue
        found.append((name, o))
        methods = vars(o).items() if inspect.isclass(o) else ()
        found += [(f'{name}.{n}', m) for n, m in methods if inspect.isfunction(m) and not n.startswith('_') and m.__doc__]
    return found


def api(module) -> str:
    "The reference of a module: signatures with the comment of each parameter; '' where it exports nothing."
    text = ['## API']
    for name, o in documented(module):
        shown = show_doc(o, renderer=BasicMarkdownRenderer)._repr_markdown_()
        text.append(re.sub(r'^-{3,}\n+#+ .*\n', f'### `{name}`\n', shown.lstrip(), count=1))
    return '\n\n'.join(text) if len(text) > 1 else ''


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
    added = [api(importlib.import_module(f'pcl_nb.{exports}'))] if exports else []
    if figures: added.append('\n\n'.join(['## Results', 'At profile `embedded`; [all](../figures/README.md).', *figures]))
    nb.cells = cells + [nbformat.v4.new_markdown_cell(text) for text in added if text]
    return nb


def results(folder: Path) -> dict:
    "Experiment -> its pictures in `folder`, as Markdown."
    found = {}
    for e in entries(folder):
        found.setdefault(e['notebook'], []).extend(f"{e['caption']}:\n\n![{e['caption']}](../figures/{folder.name}/{name}.png)"
            for name in e['pictures'])
    return found


def notebooks() -> dict:
    "Caption -> pages without ending, relative to nbs: the chapters of each layer in order, and the experiments."
    found = {caption: sorted((NBS/folder).glob('*.ipynb')) for caption, folder in LAYERS.items()}
    here = found['The paper']
    found['The paper'] = [p for p in here if p.stem[0].isdigit()]
    found['Experiments'] = [p for p in here if p not in found['The paper'] and p.stem != 'index']
    return {caption: [p.relative_to(NBS).with_suffix('').as_posix() for p in paths] for caption, paths in found.items()}


def toctree(caption: str, pages: list) -> str:
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```', ''])


def unshown(folder: str, names: list) -> list:
    "What the site does not copy of the results: profile smoke, and files that no page refers to."
    if Path(folder) == ROOT/'figures': return ['smoke']
    return [n for n in names if Path(n).suffix not in ('.png', '.csv', '.json', '.md', '.tex', '')]


def stage(src: Path):
    "The sources of the site."
    shutil.copytree(ROOT/'figures', src/'figures', ignore=unshown)
    for table in src.glob('figures/*/*.md'): table.write_text(f'# {table.stem}\n\n{table.read_text()}')   # a page has a title
    for name in 'CONTRIBUTING.md', 'CHANGELOG.md', 'LICENSE': shutil.copy(ROOT/name, src)
    for folder in 'howto', 'reference': shutil.copytree(ROOT/folder, src/folder)
    listed, pictures = notebooks(), results(ROOT/'figures'/'embedded')
    for name in (n for names in listed.values() for n in names):
        target = src/'nbs'/f'{name}.ipynb'
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page(NBS/f'{name}.ipynb', pictures.get(name, [])), target)
    trees = [toctree(caption, [f'nbs/{n}' for n in names]) for caption, names in listed.items()]
    trees.append(toctree('Built upon', [f'howto/{p.stem}' for p in sorted((ROOT/'howto').glob('*.md'))]))
    trees.append(toctree('Reference', [f'reference/{p.stem}' for p in sorted((ROOT/'reference').glob('*.md'))]))
    trees.append(toctree('More', ['Results <figures/README>', 'CONTRIBUTING', 'CHANGELOG']))
    (src/'index.md').write_text('\n'.join([render(NBS/'index.ipynb'), *trees]))


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
    "(page, link) for each link inside the site that has no target."
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
        print(f'{out} exists and is no site; give a folder that does not exist yet', file=sys.stderr)
        return 2
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as d:
        src, site = Path(d)/'src', Path(d)/'out'/'site'
        stage(src)
        app = Sphinx(src, None, site, Path(d)/'trees', 'html', confoverrides=SETTINGS, status=None)
        app.build()
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site, out)       # an earlier site stays until the new one is complete
    lost = broken(out)
    for where, link in lost: print(f'{where}: {link} has no target', file=sys.stderr)
    print(f'{out}/index.html: {len(list(out.rglob("*.html")))} pages'
        + (f', {len(lost)} broken links' if lost else ', every link inside has a target'))
    return bool(lost or app.statuscode)


if __name__ == '__main__': sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT/'_docs'))
