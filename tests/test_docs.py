"""The site: everything in it that is linked is there."""
import re
import subprocess
import sys

import pytest

from conftest import ROOT

pytest.importorskip('sphinx', reason='sphinx is not installed')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')/'site'
    made = subprocess.run([sys.executable, ROOT/'tools'/'docs.py', out], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    return out


def test_every_notebook_has_a_page(site):
    "Every notebook of every layer, each chapter with its API."
    found = sorted((ROOT/'nbs').rglob('*.ipynb'))
    assert {n.parent.name for n in found} == {'nbs', 'base', 'lab', 'names'}
    for notebook in found:
        if notebook.stem == 'index': continue
        page = (site/'nbs'/notebook.relative_to(ROOT/'nbs').with_suffix('.html')).read_text()
        assert '#| ' not in page, notebook.stem
        assert not notebook.stem[0].isdigit() or 'id="api"' in page, notebook.stem
    assert '<math' in (site/'nbs'/'13_erf.html').read_text(), 'formulas'
    assert (site/'searchindex.js').stat().st_size > 10_000


def test_chapters_are_grouped_by_layer(site):
    "The menu has a group a layer, with its chapters in order."
    menu = re.split('class="caption"', (site/'index.html').read_text())[1:]
    groups = {re.search('caption-text">([^<]*)', g)[1]: re.findall(r'href="nbs/([^"#]*).html"', g) for g in menu[:5]}
    assert list(groups) == ['The paper', 'The lab', 'Base', 'Names at the top', 'Experiments']
    assert groups['The paper'][0] == '00_images' and groups['The lab'][:2] == ['lab/00_recipe', 'lab/01_store']
    assert groups['Base'][0] == 'base/00_core' and 'names/data' in groups['Names at the top'] and 'erf' in groups['Experiments']


def test_pages_that_build_upon_it_are_listed(site):
    "A group of their own, and the changes."
    menu = {re.search('caption-text">([^<]*)', g)[1]: g for g in re.split('class="caption"', (site/'index.html').read_text())[1:]}
    assert re.findall(r'href="howto/([^"#]*).html"', menu['Built upon']) == ['add_a_claim', 'add_a_data_set', 'add_a_method']
    assert 'CHANGELOG.html' in menu['More']


def test_experiments_show_their_figures(site):
    "Pictures of all committed results, those of one architecture, too."
    for notebook, pictures in {'erf': ['fig5_resnet18', 'fig6_resnet18'], 'qualitative': ['fig4_resnet18'], 'focus_area': ['fig2'],
            'claims': ['claims', 'effects']}.items():
        page = (site/'nbs'/f'{notebook}.html').read_text()
        for name in pictures: assert f'/{name}.png' in page, (notebook, name)


def test_links_that_lead_nowhere_are_found(site, tmp_path):
    "The check of the links can fail."
    sys.path.insert(0, str(ROOT/'tools'))
    try: from docs import broken
    finally: sys.path.pop(0)
    assert broken(site) == []
    (tmp_path/'index.html').write_text('<a href="index.html#here">1</a><a id="here" href="gone.html">2</a><img src="https://example.org/x.png"><a href="#there">3</a>')
    assert broken(tmp_path) == [('index.html', 'gone.html'), ('index.html', '#there')]


def test_what_is_no_site_is_not_replaced(tmp_path):
    "One line, and the folder is as it was."
    (tmp_path/'mine.txt').write_text('kept')
    made = subprocess.run([sys.executable, ROOT/'tools'/'docs.py', tmp_path], capture_output=True, text=True)
    assert made.returncode == 2 and made.stderr.count('\n') == 1 and 'does not exist yet' in made.stderr and (tmp_path/'mine.txt').read_text() == 'kept'
