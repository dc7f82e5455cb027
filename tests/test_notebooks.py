"""The notebooks as documents: exported and clean, in order, and with parameters that papermill can see."""
import ast
import configparser
import re
import shutil
import subprocess
import sys

import nbformat
import papermill as pm
import pytest
from packaging.requirements import Requirement

from conftest import NBS, ROOT, code_cells, contents, tagged
from pcl_nb.lab import survey
from pcl_nb.lab.experiment import CHECKS, EXPERIMENTS as DECLARED

LAYERS = 'base', '', 'lab', 'names'       # folders of chapters: a module imports what stands before it
CHAPTERS = sorted(NBS.glob('[0-9]*.ipynb')) + sorted(p for layer in LAYERS if layer for p in (NBS/layer).glob('*.ipynb'))
EXPERIMENTS = sorted(p for p in NBS.glob('*.ipynb') if p not in CHAPTERS and p.name != 'index.ipynb')


def each(notebooks):
    "Run a test for each of the notebooks, under its name."
    return pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.stem)


def number(notebook):
    "The chapter's number; 0 where chapters have none."
    first = notebook.stem.split('_')[0]
    return int(first) if first.isdigit() else 0


def module_of(notebook):
    "The module that a notebook exports, or None."
    found = re.findall(r'^#\s*\|\s*default_exp\s+([\w.]+)', '\n'.join(c.source for c in code_cells(notebook)), re.M)
    return found[0] if found else None


def imported_modules(path):
    "The package's modules that a module imports, wherever in it."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ('pcl_nb', *path.relative_to(ROOT/'pcl_nb').parts[:-1])[:None if node.level < 2 else 1 - node.level]
            base = '.'.join(filter(None, (*(here if node.level else ()), node.module)))
            names = [base] if base not in ('pcl_nb', 'pcl_nb.base', 'pcl_nb.lab') else [f'{base}.{a.name}' for a in node.names]
        else: continue
        yield from (n.removeprefix('pcl_nb.') for n in names if n.startswith('pcl_nb.'))


def own_checks(notebook):
    "The parameters that an experiment gives checks of its own, besides those of all experiments."
    classes = {'Experiment': None, **{e.__name__: e for e in DECLARED.values()}}
    calls = [n for c in code_cells(notebook) for n in ast.walk(ast.parse(c.source))
             if isinstance(n, ast.Call) and ast.unparse(n.func) in classes]
    assert len(calls) == 1, 'an experiment names itself once'
    declared = classes[ast.unparse(calls[0].func)]
    assert (declared.name if declared else calls[0].args[0].value) == notebook.stem
    return list(declared.own) if declared else [n for k in calls[0].keywords for n in ([k.arg] if k.arg else survey.CHECKS)]


def requirements():
    "All requirements in settings.ini."
    config = configparser.ConfigParser()
    config.read(ROOT/'settings.ini')
    return [Requirement(line) for key in ('requirements', 'dev_requirements') for line in config['DEFAULT'][key].split('\n')
        if line.strip()]


def test_clean_and_export_change_nothing(tmp_path):
    "The committed notebooks are clean and the package is what they export."
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True,
        text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    for name in filter(None, listed.stdout.split('\0')):
        if (ROOT/name).is_file():
            (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, tmp_path/name)
    before = contents(tmp_path)
    for step in ('from nbdev.clean import nbdev_clean as step', 'from nbdev.doclinks import nbdev_export as step'):
        subprocess.run([sys.executable, '-c', f'{step}; step()'], cwd=tmp_path, check=True)
    after = contents(tmp_path)
    assert [n for n in sorted({*before, *after}) if n.startswith(('nbs/', 'pcl_nb/')) and '__pycache__' not in n
        and before.get(n) != after.get(n)] == []


def test_layers_are_there():
    "Base, paper, lab, and the names at the top."
    assert {p.parent.name for p in CHAPTERS} == {'nbs', *filter(None, LAYERS)}


@each(CHAPTERS)
def test_chapter_exports_the_module_of_its_name(notebook):
    "Chapter lab/NN_x exports pcl_nb/lab/x.py; nbs/names stands at the top of the package."
    name, layer = re.sub(r'^\d+_', '', notebook.stem), notebook.parent.name
    assert module_of(notebook) == (f'{layer}.{name}' if layer in ('base', 'lab') else name)
    assert (ROOT/'pcl_nb'/f"{module_of(notebook).replace('.', '/')}.py").exists()


@each(CHAPTERS + EXPERIMENTS)
def test_first_cell_is_title_and_summary(notebook):
    "`# title`, blank line, `> summary` on one line."
    first = nbformat.read(notebook, as_version=4).cells[0]
    assert first.cell_type == 'markdown' and re.match(r'# \S.*\n\n> \S.*(\n\n|$)', first.source)


def place(notebook):
    "Layer and number of a chapter."
    folder = notebook.parent.name
    return LAYERS.index('' if folder == 'nbs' else folder), number(notebook)


@each(CHAPTERS)
def test_chapter_imports_only_chapters_above_it(notebook):
    "Data flows one way: a layer knows those below it, a chapter those above it."
    chapter = {module_of(p): place(p) for p in CHAPTERS}
    used = {name: chapter[name] for name in imported_modules(ROOT/'pcl_nb'/f"{module_of(notebook).replace('.', '/')}.py")}
    assert used or place(notebook) in {(LAYERS.index(''), n) for n in range(len(chapter))} | {(0, 0)}
    assert {n: c for n, c in used.items() if c >= place(notebook)} == {}


@each(CHAPTERS)
def test_chapter_has_no_parameters(notebook):
    "Parameters belong to experiments."
    assert tagged(code_cells(notebook)) == []


@each(EXPERIMENTS)
def test_experiment_exports_nothing(notebook):
    "What others import is in a chapter."
    assert module_of(notebook) is None and not any(re.search(r'^#\s*\|\s*export', c.source, re.M) for c in code_cells(notebook))


@each(EXPERIMENTS)
def test_parameters_cell_holds_literals_only(notebook):
    "One cell is tagged, and each of its lines is `name: type = literal`."
    cells = tagged(code_cells(notebook))
    assert len(cells) == 1
    for line in ast.parse(cells[0].source).body:
        assert isinstance(line, ast.AnnAssign) and line.lineno == line.end_lineno
        assert type(ast.literal_eval(line.value)).__name__ == line.annotation.id


@each(EXPERIMENTS)
def test_papermill_lists_every_checked_parameter(notebook):
    "Each parameter is checked, and `papermill --help-notebook` shows it with its type and a help text."
    declared = [line.target.id for line in ast.parse(tagged(code_cells(notebook))[0].source).body]
    assert set(own_checks(notebook)) <= set(declared) <= {*own_checks(notebook), *CHECKS}
    listed = pm.inspect_notebook(str(notebook))
    assert sorted(listed) == sorted(declared)
    assert [n for n, p in listed.items() if not p['help'] or p['inferred_type_name'] not in ('str', 'int', 'float', 'bool')] == []


@each(CHAPTERS)
def test_cells_of_chapters_are_short(notebook):
    "A cell is read at a glance: 30 lines of 120 columns."
    cells = [c.source.splitlines() for c in code_cells(notebook)]
    assert max(map(len, cells)) <= 30 and max(len(line) for c in cells for line in c) <= 120


@each(EXPERIMENTS)
def test_experiment_is_short(notebook):
    "Some 100 lines of code without the parameters, 15 a cell, 120 columns; the committed picture where there is one."
    cells = [c.source.splitlines() for c in code_cells(notebook) if not tagged([c])]
    assert max(map(len, cells)) <= 15 and max(len(line) for c in cells for line in c) <= 120
    assert sum(bool(line.strip()) for c in cells for line in c) <= 101
    prose = '\n'.join(c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == 'markdown')
    shown = re.findall(r'!\[[^]]+\]\(([^)]+)\)', prose)
    assert all((NBS/path).exists() for path in shown)
    assert shown or notebook.stem in ('target_class', 'erasing_methods', 'open_choices', 'your_own', 'explore')


@pytest.mark.skipif(not (NBS/'index.ipynb').exists(), reason='nbs/index.ipynb is not written yet')
def test_readme_is_the_rendered_index(tmp_path):
    "README.md is what tools/readme.py makes of nbs/index.ipynb."
    subprocess.run([sys.executable, 'tools/readme.py', tmp_path/'README.md'], cwd=ROOT, check=True)
    assert (ROOT/'README.md').read_text(encoding='utf-8') == (tmp_path/'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('figures, found', [('{tmp}', 0), ('figures', 2), ('{root}/figures', 2)])
def test_index_runs_with_any_figures_folder(tmp_path, monkeypatch, figures, found):
    "Every table from results elsewhere, named as from the project's folder; one line where they are missing."
    monkeypatch.setenv('PCL_NB_FIGURES', figures.format(tmp=tmp_path, root=ROOT))
    monkeypatch.chdir(NBS)
    names, shown = {}, []
    for cell in code_cells(NBS/'index.ipynb'):
        *body, last = ast.parse(cell.source).body
        exec(compile(ast.Module(body, []), 'index', 'exec'), names)
        if not isinstance(last, ast.Expr): exec(compile(ast.Module([last], []), 'index', 'exec'), names); continue
        value = eval(compile(ast.Expression(last.value), 'index', 'eval'), names)
        if type(value).__name__ == 'Markdown': shown.append(value.data)
    lacks = [m for m in shown if ' is missing: ' in m]
    assert len(shown) == 2 and len(lacks) == 2 - found and all('\n' not in m for m in lacks)


@pytest.mark.parametrize('requirement', requirements(), ids=lambda r: r.name)
def test_requirement_is_pinned(requirement):
    "constraints.txt pins each requirement, to a version that it allows."
    def normal(name): return re.sub('[-_.]+', '-', name).lower()
    lines = [line.split('==') for line in (ROOT/'constraints.txt').read_text().splitlines() if line.strip() and not line.startswith('#')]
    pins = {normal(name): version for name, version in lines}
    assert normal(requirement.name) in pins and requirement.specifier.contains(pins[normal(requirement.name)])


def test_promises_are_held_by_tests_that_exist():
    "What CONTRIBUTING.md promises names its tests."
    named = re.findall(r'`(tests/\w+\.py)(?:::(\w+))?`', (ROOT/'CONTRIBUTING.md').read_text())
    assert len(named) > 15
    for file, test in named: assert f'def {test}(' in (ROOT/file).read_text() if test else (ROOT/file).exists(), (file, test)
