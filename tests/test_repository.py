"Files around the package: citation, changes, workflows, environments, the wheel, types."
import configparser
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest
import yaml

import pcl_nb
from conftest import ROOT

SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/'settings.ini')
VERSION, FORMS = SETTINGS['DEFAULT']['version'], sorted((ROOT/'.github'/'ISSUE_TEMPLATE').glob('*.yml'))
WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))


def read(path): return yaml.safe_load((ROOT/path).read_text())


def test_citation_is_that_of_the_readme():
    "This version; the paper as the README cites it."
    cited, text = read('CITATION.cff'), (ROOT/'README.md').read_text()
    assert cited['version'] == VERSION == pcl_nb.__version__ and cited['license'] == 'Apache-2.0'
    paper, bibtex = cited['preferred-citation'], dict(re.findall(r'^\s+(\w+)\s+= \{(.*)\}', text, re.M))
    assert bibtex['author'] == ' and '.join(f"{a['family-names']}, {a['given-names']}" for a in paper['authors'])
    assert (bibtex['title'], bibtex['booktitle']) == (paper['title'], paper['collection-title'])
    assert (int(bibtex['volume']), int(bibtex['year'])) == (paper['volume'], paper['year'])


def test_changes_begin_with_this_version():
    assert re.search(r'^## (\S+?),? ', (ROOT/'CHANGELOG.md').read_text(), re.M)[1] == VERSION


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_runs_what_exists(path):
    "Targets of the Makefile and files; the Python that settings.ini needs; a limit of time."
    targets, makefile = set(), (ROOT/'Makefile').read_text()
    for job in read(path)['jobs'].values():
        assert job['timeout-minutes'] <= 60
        for step in job['steps']:
            if 'python-version' in step.get('with', {}): assert step['with']['python-version'] == SETTINGS['DEFAULT']['min_python']
            command = step.get('run', '').split()
            if command[:1] == ['make']: targets.add(command[1])
            elif command: assert (ROOT/command[0]).exists()
            assert step.get('with', {}).get('path', '_docs') == '_docs'           # where `make docs` builds
    assert all(re.search(f'^{t}:', makefile, re.M) for t in targets) and targets == {'test': {'check'}, 'pages': {'docs'}}[path.stem]


@pytest.mark.parametrize('path', FORMS, ids=lambda p: p.stem)
def test_form_is_complete(path):
    "A name, a description, questions with names of their own."
    form = read(path)
    ids = [question['id'] for question in form['body']]
    assert form['name'] and form['description'] and len(set(ids)) == len(ids) > 2
    assert all(q['attributes']['label'] and q['type'] in ('input', 'textarea', 'checkboxes') for q in form['body'])


@pytest.mark.parametrize('name', ['environment.yml', '.binder/environment.yml'])
def test_environment_has_the_python_and_the_files(name):
    found = read(name)['dependencies']
    assert f"python={SETTINGS['DEFAULT']['min_python']}" in found and 'pip' in found
    pip = next((d['pip'] for d in found if isinstance(d, dict)), [])
    assert all((ROOT/line.split()[1].split('[')[0]).exists() for line in pip)


def test_binder_starts_the_explorer():
    "Installs with the pins, and executes a notebook that is there."
    script = (ROOT/'.binder'/'postBuild').read_text()
    assert (ROOT/'.binder'/'postBuild').stat().st_mode & 0o100 and '-c constraints.txt' in script
    assert [n for n in re.findall(r'papermill (\S+)', script) if (ROOT/n).exists()] == ['nbs/explore.ipynb']
    subprocess.run(['bash', '-n', ROOT/'.binder'/'postBuild'], check=True)


@pytest.mark.slow
def test_wheel_is_typed_and_described(tmp_path):
    "It holds `py.typed` and the templates; its metadata names extras and classifiers."
    shutil.copytree(ROOT, tmp_path/'src', ignore=lambda d, names: {n for n in names if n[0] == '.' or n in ('runs', 'results', 'figures', '_docs')})
    made = subprocess.run([sys.executable, '-c', 'from setuptools.build_meta import build_wheel; print(build_wheel("out"))'],
        cwd=tmp_path/'src', capture_output=True, text=True)
    if 'No module named' in made.stderr: pytest.skip('setuptools is not installed')
    assert made.returncode == 0, made.stderr[-2000:]
    wheel, = (tmp_path/'src'/'out').glob('*.whl')
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        about = Parser().parsestr(z.read(next(n for n in names if n.endswith('METADATA'))).decode())
    assert {'pcl_nb/py.typed', 'pcl_nb/metrics.py', 'pcl_nb/base/core.py', 'pcl_nb/lab/store.py'} <= set(names)
    assert any(n.endswith('.j2') for n in names) and about['Version'] == VERSION
    assert 'Typing :: Typed' in about.get_all('Classifier') and {'dev', 'trainers'} <= set(about.get_all('Provides-Extra'))


def public():
    "Every exported function, and every method of an exported class."
    for found in pkgutil.walk_packages(pcl_nb.__path__, 'pcl_nb.'):
        m = importlib.import_module(found.name)
        for name in getattr(m, '__all__', ()):
            o = getattr(m, name)
            if inspect.isfunction(o): yield f'{found.name}.{name}', o
            elif inspect.isclass(o) and o.__module__ == found.name:
                yield from ((f'{found.name}.{name}.{n}', f) for n, f in vars(o).items() if inspect.isfunction(f))


def test_none_is_in_the_annotation_where_it_is_the_default():
    "A typed caller may give what is the default."
    lacks = [f'{name}({p.name})' for name, f in public() for p in inspect.signature(f).parameters.values()
        if p.default is None and isinstance(p.annotation, type) and p.annotation is not p.empty]
    assert lacks == []


@pytest.mark.slow
def test_types_of_the_public_functions(tmp_path):
    "mypy: the package's return types, and a typed program that uses it."
    pytest.importorskip('mypy', reason='mypy is not installed: pip install mypy')
    made = subprocess.run([sys.executable, '-m', 'mypy', '--cache-dir', tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
