"""The site: everything in it that is linked is there."""
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
    "Every notebook is there, each chapter with its API."
    for notebook in (ROOT/'nbs').glob('*.ipynb'):
        if notebook.stem == 'index': continue
        page = (site/'nbs'/f'{notebook.stem}.html').read_text()
        assert '#| ' not in page, notebook.stem
        assert not notebook.stem[0].isdigit() or 'id="api"' in page, notebook.stem
    assert '<math' in (site/'nbs'/'09_erf.html').read_text(), 'formulas'
    assert (site/'searchindex.js').stat().st_size > 10_000


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
