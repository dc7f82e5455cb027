"""The command lines: nothing slow is imported before the arguments are checked; `pcl-nb` runs every notebook with its parameters as options."""
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import zipfile

import pytest

import pcl_nb
from conftest import NBS, ROOT, contents
from pcl_nb.base import notebooks
from pcl_nb.base.core import InputError
from pcl_nb.lab import cli, jobs

SLOW = 'torch', 'torchvision', 'pandas', 'matplotlib', 'scipy', 'papermill', 'seaborn', 'statsmodels', 'joblib', 'IPython'
COMMANDS = dict(reproduce='pcl_nb.reproduce', train='pcl_nb.train', data='pcl_nb.data')     # with a module that is run by -m
WRONG = dict(
    reproduce=['--only fig99', '--archs resnet19', '--profile tiny', '--scenes imagenot', '--scenes folder:nowhere', '--repeats 0', '--seed -1',
        '--engine slurm', '--tflops 0', '--out setup.py', '--against nowhere', '--nope', '--epochs many'],
    train=['--arch resnet19', '--method plc', '--profile tiny', '--data imagenot', '--data folder:nowhere', '--lr nan', '--set tau', '--amp fp8',
        '--scheme hard', '--batch 0', '--out setup.py', '--nope'],
    data=['', 'look', 'check', 'check imagenot', 'pack folder:nowhere', 'pack imagenet --edge many'],
    erf=['--arch resnet19', '--profile tiny', '--scenes imagenot', '--bins many', '--log-counts maybe', '--nope', '-p arch', '-p nope 1'])


def outcomes(module, lines):
    "Run a module as a command in one new process, once for each line of arguments: (exit code, output, errors, slow modules imported so far)."
    code = f'''if True:
        import contextlib, io, json, runpy, sys
        for argv in json.loads({json.dumps(json.dumps(lines))}):
            sys.argv, code = ['command', *argv], None
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)
                except SystemExit as e: code = e.code or 0
            print(json.dumps([code, out.getvalue(), err.getvalue(), [m for m in {SLOW!r} if m in sys.modules]]))'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize('name', WRONG)
def test_nothing_slow_is_imported_before_arguments_are_checked(name):
    "After `--help` and after each refused argument of every command; exit code 0 or 2, no traceback."
    module, first = (COMMANDS[name], []) if name in COMMANDS else ('pcl_nb.lab.cli', [name])
    found = outcomes(module, [[*first, *line.split()] for line in ('--help', *WRONG[name])])
    code, out, err, slow = found[0]
    assert (code, err, slow) == (0, '', []) and 'usage: ' in out
    for line, (code, out, err, slow) in zip(WRONG[name], found[1:], strict=True):
        assert (code, out, slow) == (2, '', []) and 'error: ' in err.splitlines()[-1] and 'Traceback' not in err, line


def test_one_command_imports_nothing_slow():
    "Nor does `pcl-nb` itself, nor what it delegates to."
    shown = '--help', '--version', 'completion', 'reproduce --help', 'train --help', 'data --help', 'run erf --help'
    refused = 'reproduce --only fig99', 'data check imagenot', 'erff', 'run', 'run erff', 'run nbs/erf.ipynb -p arch resnet19', ''
    found = outcomes('pcl_nb.lab.cli', [line.split() for line in (*shown, *refused)])
    for line, (code, out, err, slow) in zip((*shown, *refused), found, strict=True):
        assert (code, slow) == (2 if line in refused else 0, []) and 'Traceback' not in err, line


def test_slow_modules_are_there():
    "The list would be worth nothing if a name in it were wrong."
    assert all(map(importlib.util.find_spec, SLOW))


@pytest.mark.parametrize('name, target', tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts'].items())
def test_entry_points_exist(name, target):
    "What pip installs as commands: `pcl-nb`, and `pcl-reproduce` as before."
    module, function = target.split(':')
    assert callable(getattr(importlib.import_module(module), function)) and name in ('pcl-nb', 'pcl-reproduce', 'pcl-measure')


@pytest.mark.parametrize('given, named', [('focus-aera', "did you mean 'focus-area'?"), ('trian', "did you mean 'train'?"), ('x', 'valid: reproduce'),
    ('--nope', 'valid: reproduce')])
def test_unknown_command_is_one_line(capsys, given, named):
    "The nearest name, exit code 2."
    assert cli.main([given]) == 2
    said = capsys.readouterr()
    assert named in said.err and said.err.count('\n') == 1 and said.err.startswith('pcl-nb: error: ') and not said.out


def test_version(capsys):
    assert cli.main(['--version']) == 0 and pcl_nb.__version__ in capsys.readouterr().out


@pytest.mark.parametrize('name', notebooks.experiments())
def test_help_of_an_experiment_states_its_parameters(capsys, name):
    "Each parameter of the notebook is an option, with its default and its comment."
    with pytest.raises(SystemExit) as ended: cli.main([name.replace('_', '-') if name != 'explore' else 'run', *[name]*(name == 'explore'), '--help'])
    said = ''.join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for p in notebooks.declared(name):
        assert f"--{p.name.replace('_', '-')}" in said and ''.join(f'{p.told} (default: {p.default!r})'.split()) in said


def test_experiments_are_listed(capsys):
    "Every notebook with parameters that lies in the folder, by a name with dashes."
    assert set(notebooks.experiments()) == {p.stem for p in NBS.glob('*.ipynb') if p.name != 'index.ipynb' and not p.name[0].isdigit()}
    assert cli.main(['--help']) == 0
    said = capsys.readouterr().out
    for name in (*cli.COMMANDS, *notebooks.experiments()): assert f"  {name.replace('_', '-')} " in said


@pytest.mark.slow
def test_experiment_writes_figure_and_table(store, capfd):
    "It prints the files that it wrote; the parameters arrive with their types."
    assert cli.main(['run', 'initialisation', '-p', 'archs', 'resnet18', '--profile', 'smoke', '--shared', '8']) == 0
    written = sorted(p.name for p in (store.results/'smoke').iterdir() if p.name[0] != '.')
    assert {'initialisation.csv', 'initialisation.png'} <= set(written)
    said = capfd.readouterr().out
    for name in written: assert str(store.results/'smoke'/name) in said
    assert str(store.runs/'executed'/'initialisation.ipynb') in said


@pytest.mark.slow
def test_what_only_the_notebook_refuses(store, capfd):
    "Its own line, exit code 2."
    assert cli.main(['initialisation', '--archs', 'resnet18', '--profile', 'smoke', '--inits', 'kaiming']) == 2
    assert 'pcl-nb initialisation: failed: InputError: parameter inits: ' in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('words, found', [('pcl-nb foc', ['focus-area']), ('pcl-nb erf --im', ['--images', '--images-from']),
    ('pcl-nb reproduce --dry', ['--dry-run']), ('pcl-nb train --sy', ['--sync-bn']), ('pcl-nb run your', ['your_own'])])
def test_completion(words, found):
    "bash completes commands, experiments and options."
    words = words.split()
    script = f"{cli.completion()}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _pcl_nb; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == found and not done.stderr


def test_explorer(monkeypatch, tmp_path, capsys):
    "JupyterLab gets the notebook; outside a clone a copy, which a second call keeps; one line where it is not installed."
    calls = []
    monkeypatch.setattr(cli.subprocess, 'call', lambda command: calls.append(command) or 0)
    assert cli.main(['explore', '--no-browser']) == 0 and calls[0][2:] == ['jupyterlab', str(NBS/'explore.ipynb'), '--no-browser']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, 'root', lambda: tmp_path)
    for _ in range(2): assert cli.main(['explore']) == 0 and calls[-1][3] == 'explore.ipynb' and (tmp_path/'explore.ipynb').exists()
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert cli.main(['explore']) == 2 and 'pip install jupyterlab' in capsys.readouterr().err


@pytest.mark.slow
def test_wheel_holds_the_experiments(tmp_path):
    "They are found without a clone, from any folder; the repository holds them once."
    if tuple(map(int, importlib.metadata.version('setuptools').split('.')[:1])) < (77,): pytest.skip('setuptools 77 builds it')
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    assert 'pcl_nb/nbs' not in listed.stdout
    for name in filter(None, listed.stdout.split('\0')):
        if not (ROOT/name).is_file() or name.startswith('figures/'): continue
        (tmp_path/'source'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'source'/name).write_bytes((ROOT/name).read_bytes())
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp_path, tmp_path/'source'],
                   check=True)
    zipfile.ZipFile(next(tmp_path.glob('*.whl'))).extractall(tmp_path/'site')
    inside = contents(tmp_path/'site'/'pcl_nb'/'nbs')
    assert inside == {n: b for n, b in contents(NBS).items() if n == 'figures.yaml' or n.removesuffix('.ipynb') in notebooks.experiments()}
    (elsewhere := tmp_path/'elsewhere').mkdir()
    def run(*args): return subprocess.run([sys.executable, '-m', 'pcl_nb.lab.cli', *args], cwd=elsewhere, capture_output=True, text=True,
                                          env=dict(os.environ, PYTHONPATH=str(tmp_path/'site')))
    done = run('erf', '--help')
    assert done.returncode == 0 and str(tmp_path/'site') in ''.join(done.stdout.split())
    done = run('reproduce', '--only', 'fig99')
    assert done.returncode == 2 and 'valid: fig1' in done.stderr


def test_a_damaged_or_missing_notebook_is_named(monkeypatch, tmp_path):
    "One line, as for every other input."
    monkeypatch.setattr(notebooks, 'notebooks_dir', lambda: tmp_path)
    (tmp_path/'erf.ipynb').write_text('{')
    for read in (notebooks.summary_of, notebooks.declared):
        with pytest.raises(InputError, match='is not a notebook'): read('erf')
        with pytest.raises(InputError, match='does not exist'): read('none')


def test_a_run_takes_the_parameters_as_they_are(monkeypatch, store):
    "Only what is given goes to the notebook, with the type that it declares."
    jobs_run = []
    monkeypatch.setattr(jobs, 'execute', lambda job, out, progress: jobs_run.append(job) or '')
    assert cli.main(['erf', '--repeats', '3', '--bins', '50', '--log-counts', 'true', '-p', 'images_from', 'own']) == 0
    assert jobs_run[0].notebook == 'erf' and jobs_run[0].parameters == dict(repeats='3', bins=50, log_counts=True, images_from='own')
