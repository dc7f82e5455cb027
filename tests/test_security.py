"""No file, parameter or download runs code, and nothing is written outside of where it belongs."""
import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pandas as pd
import papermill.iorw
import papermill.parameterize
import pytest
import torch

from conftest import NBS, ROOT, check, code_cells, contents, tagged
from pcl_nb import data, models, reproduce, runs
from pcl_nb.base import core, fetch, weights
from pcl_nb.lab import report

QUICK = runs.recipe_for('smoke')
CODE = "__import__('os').mkdir('pwned')"


class Evil:
    "Unpickled, it makes a folder where the test runs."
    def __reduce__(self): return os.mkdir, ('pwned',)


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path, monkeypatch):
    "The test runs in a folder of its own; at its end no folder has been made there, or above it."
    here = tmp_path/'here'/'inside'
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    yield here
    assert [p for folder in (here, here.parent, tmp_path) for p in folder.glob('pwned*')] == []


def test_the_bait_works(nothing_ran):
    "What the other tests plant does run where nobody takes care."
    for bite in (lambda: pickle.loads(pickle.dumps(Evil())), lambda: torch.load(zipped(Evil()), weights_only=False), lambda: eval(CODE)):
        bite()
        (nothing_ran/'pwned').rmdir()


# Files with code in them

def zipped(o):
    "What torch.save writes."
    buffer = io.BytesIO()
    torch.save(o, buffer)
    buffer.seek(0)
    return buffer


def legacy(o):
    "The same in the format before zip files."
    buffer = io.BytesIO()
    torch.save(o, buffer, _use_new_zipfile_serialization=False)
    return buffer


FORMS = dict(zip=lambda o: zipped(o).getvalue(), legacy=lambda o: legacy(o).getvalue(), pickle=lambda o: pickle.dumps(o, 2))
each_seal = pytest.mark.parametrize('seal', [bytes, core.sealed], ids=['bare', 'sealed'])      # anybody can seal: what is under a seal is not trusted either
each_form = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    "A run, as it is stored."
    folder = tmp_path_factory.mktemp('stored')
    runs.run(QUICK, folder, device='cpu', progress=False)
    return folder


@pytest.fixture
def run(stored, store):
    "A copy of it where runs are looked for."
    shutil.copytree(stored, store.runs/QUICK.key)
    return store.runs/QUICK.key


def same_weights(run, stored): return (run/'weights.safetensors').read_bytes() == (stored/'weights.safetensors').read_bytes()


def plant(run, raw, name):
    "Other weights in a stored run, as torch's file or under the name of today's, with a record whose checksums fit."
    about = json.loads((run/'run.json').read_text())
    del about['sha256']
    sums = [hashlib.sha256(d).hexdigest() for d in (raw, (run/'metrics.csv').read_bytes())]
    if name == 'weights.pt':
        (run/'weights.safetensors').unlink()
        about.update(zip(('sha256', 'metrics_sha256'), sums))
        about['seal'] = core.digest(about, 64)
    else: about['sha256'] = core.digest([about, *sums], 64)
    (run/name).write_bytes(raw)
    (run/'run.json').write_text(json.dumps(about))


each_name = pytest.mark.parametrize('name', ['weights.pt', 'weights.safetensors'])


@each_form
@each_name
def test_stored_weights_run_no_code(stored, run, form, name):
    "Even with the right hash in the record: the run is set aside and trained again."
    plant(run, form(dict(weight=Evil())), name)
    with pytest.warns(UserWarning, match='is damaged.*set aside as'): runs.trained(QUICK, device='cpu', progress=False)
    assert same_weights(run, stored) and (run/f'{name}.broken-1').exists()


@pytest.mark.parametrize('raw', [b'', b'not weights', FORMS['zip']([1, 2]), FORMS['zip'](dict(other=torch.zeros(2)))],
    ids=['empty', 'text', 'list', 'another network'])
@each_name
def test_weights_that_are_none_are_set_aside(stored, run, raw, name):
    "Whatever it is that their hash fits."
    plant(run, raw, name)
    with pytest.warns(UserWarning, match='is damaged.*set aside as'): runs.trained(QUICK, device='cpu', progress=False)
    assert same_weights(run, stored)


@each_seal
@pytest.mark.parametrize('raw',
    [*(form(dict(key=QUICK.key, epoch=0, metrics=[], model=Evil(), optimizer={}, scaler={})) for form in FORMS.values()),
                                 b'', FORMS['zip']([1, 2]), FORMS['zip'](dict(key=QUICK.key))], ids=[*FORMS, 'empty', 'list', 'incomplete'])
def test_checkpoint_runs_no_code(stored, tmp_path, raw, seal):
    "One that cannot be used, for this or another reason, is set aside; training starts anew and ends with the same weights."
    raw = seal(raw)
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'checkpoint.pt').write_bytes(raw)
    with pytest.warns(UserWarning, match='cannot be read.*set aside as checkpoint.pt.broken-1'):
        runs.run(QUICK, tmp_path/'run', device='cpu', progress=False)
    assert same_weights(tmp_path/'run', stored) and (tmp_path/'run'/'checkpoint.pt.broken-1').read_bytes() == raw


@each_form
@pytest.mark.parametrize('name', ['weights.pt', 'resnet18_places365.pth.tar'])
def test_weights_of_ones_own_run_no_code(tmp_path, name, form):
    "A file that is given by its path: refused in one line, whatever it is called."
    (tmp_path/name).write_bytes(form(dict(state_dict=Evil())))
    with pytest.raises(core.InputError, match='is refused: not a file of weights alone') as refused:
        models.create_model('resnet18', 5, weights=tmp_path/name)
    assert '\n' not in str(refused.value)


def measured(calls=None):
    "A measurement of the stored run."
    def measure(fitted):
        if calls is not None: calls.append(1)
        return dict(a=np.arange(500.), b=np.linspace(0, 1, 300)**2)
    return runs.stored(QUICK, 'test', {}, ('erf',), measure, device='cpu')


def npz(**arrays):
    "What NumPy saves, objects pickled where there are some."
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy(array):
    "One array alone, under the wrong name."
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@each_seal
@pytest.mark.parametrize('raw',
    [npz(a=np.array([Evil()], dtype=object)), pickle.dumps(Evil()), npy(np.array([Evil()], dtype=object)), npy(np.arange(3)), b'', b'PK'],
                         ids=['objects', 'pickle', 'objects in one array', 'one array', 'empty', 'cut off'])
def test_measurement_runs_no_code(run, raw, seal):
    "Set aside and measured again; the one that is set aside is kept."
    first, calls, raw = measured(), [], seal(raw)
    [path] = run.glob('test-*.npz')
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match='cannot be read.*set aside as'): again = measured(calls)
    assert len(calls) == 1 and all((again[k] == v).all() for k, v in first.items())
    assert path.with_name(path.name + '.broken-1').read_bytes() == raw and set(measured(calls)) == set(first) and len(calls) == 1


@pytest.mark.filterwarnings('ignore:.*set aside as')
def test_damage_anywhere_in_a_measurement_is_survived(run):
    "A bit turned over, at every sixty-first byte: the numbers are the same ones, read or measured again."
    first = measured()
    [path] = run.glob('test-*.npz')
    whole = path.read_bytes()
    for i in range(0, len(whole), 61):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 128]) + whole[i+1:])
        again = measured()
        assert set(again) == set(first) and all((again[k] == v).all() for k, v in first.items())
    assert len(list(run.glob('test-*.broken-*'))) > len(whole)//61//2


def imagenet(folder, meta):
    "The beginning of an ImageNet folder: a class of one image, its list of classes."
    for split in ('train', 'val'):
        (folder/split/'n01440764').mkdir(parents=True)
        (folder/split/'n01440764'/'a.JPEG').write_bytes(b'')
    (folder/'meta.bin').write_bytes(meta)
    return f'imagenet:{folder}'


@each_form
def test_list_of_classes_runs_no_code(tmp_path, form):
    "ImageNet's meta.bin: refused in one line."
    with pytest.raises(core.InputError, match='^imagenet: ') as refused: data.load(imagenet(tmp_path/'imagenet', form(Evil())), 'val', 32)
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('archive', ['ILSVRC2012_devkit_t12.tar.gz', 'ILSVRC2012_img_val.tar'])
def test_members_of_an_archive_cannot_leave_their_folder(nothing_ran, archive):
    "ImageNet's archives are unpacked by torchvision, and only with their known sums: another one is refused unopened."
    where = nothing_ran/'imagenet'
    name = imagenet(where, FORMS['zip']((dict(n01440764=('tench',)), ['n01440764'])))
    if 'devkit' in archive: (where/'meta.bin').unlink()
    else: shutil.rmtree(where/'val')
    with tarfile.open(where/archive, 'w') as tar:
        for member in ('../pwned', '../../pwned', str(nothing_ran/'pwned-absolute')): tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    before = contents(where)
    with pytest.raises(core.InputError, match='^imagenet: .*archive'): data.load(name, 'val', 32)
    assert contents(where) == before


def test_downloads_are_hashed():
    "Over https; CSAIL's server has had http only: what comes from there is refused unless a whole SHA-256, ours or the user's, says that it is the file."
    for source, public in weights.PUBLIC.items():
        for arch, name in public.files.items():
            wanted = fetch.expected_sum(ROOT/'nowhere'/name, public.sums.get(name))
            assert public.url.startswith('https://') and re.fullmatch('[0-9a-f]{8,64}',
                wanted) or wanted is None or re.fullmatch('[0-9a-f]{64}', wanted), (source, arch)
    assert [s for s, p in weights.PUBLIC.items() if not p.url.startswith('https://')] == ['places365']
    assert fetch.expected_sum(ROOT/'nowhere'/'resnet18_places365.pth.tar') is None        # tests/test_weights.py: and so it is refused


# Parameters that look like code

EXPERIMENTS = sorted(p for p in NBS.glob('*.ipynb') if not p.name[0].isdigit() and p.name != 'index.ipynb')


def texts(notebook):
    "The parameters of an experiment that are strings."
    return [line.target.id for line in ast.parse(tagged(code_cells(notebook))[0].source).body if line.annotation.id == 'str']


@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda p: p.stem)
def test_parameters_run_no_code(notebook):
    "Each string is refused in one line, or stays a string."
    assert texts(notebook)
    for name in texts(notebook):
        for value in (CODE, f'tau={CODE}', f'folder:{CODE}'):
            try: kept = check(notebook, **{name: value})[name]
            except core.InputError as e: assert '\n' not in str(e)
            else: assert CODE in str(kept)


@pytest.mark.parametrize('value', [CODE, f"'\n{CODE}\n'", f"\\'; {CODE} #", f'{{{CODE}}}', f'\"\"\"{CODE}'])
def test_parameters_reach_a_notebook_as_literals(value):
    "What papermill writes into a notebook are names and constants, whatever quotes and line ends are in them."
    notebook = papermill.iorw.load_notebook_node(str(NBS/'erf.ipynb'))
    cells = papermill.parameterize.parameterize_notebook(notebook, dict(pcl=value, scenes=value)).cells
    [injected] = tagged(cells, 'injected-parameters')
    assert {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(injected.source).body} == dict(pcl=value, scenes=value)


@pytest.mark.parametrize('main, args', [
    *((runs.main, ['--profile', 'smoke', '--quiet', '--method', 'pcl', *a])
        for a in (['--set', CODE], ['--set', f'tau={CODE}'], ['--set', f'{CODE}=1'], ['--data', CODE], ['--data', f'folder:{CODE}'],
            ['--arch', CODE], ['--weights', CODE], ['--compile', CODE], ['--lr', CODE], ['--device', CODE])),
    *((reproduce.main, ['--profile', 'smoke', '--dry-run', *a])
        for a in (['--only', CODE], ['--scenes', CODE], ['--scenes', f'folder:{CODE}'], ['--archs', CODE], ['--seed', CODE])),
], ids=lambda v: v.__module__.split('.')[1] if callable(v) else ' '.join(v[-2:]))
def test_command_lines_run_no_code(capsys, main, args):
    "Exit code 2 and one line."
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and capsys.readouterr().err.partition(': error: ')[2].count('\n') == 1


def test_report_shows_names_and_runs_none():
    "What stands in a table is text in the page, too."
    page = report._html_table(pd.DataFrame({'<script>a': ['<script>b', '"><img onerror=c>']}))
    assert '<script' not in page and '<img' not in page and page.count('&lt;') == 3


# The source itself

def sources():
    "Name -> code: of the package, the tools, the set-up and every notebook."
    for path in sorted([*(ROOT/'pcl_nb').rglob('*.py'), *(ROOT/'tools').glob('*.py'), ROOT/'setup.py']): yield path.name, path.read_text()
    for path in sorted(NBS.rglob('*.ipynb')):
        for i, cell in enumerate(code_cells(path)): yield f'{path.stem} cell {i}', cell.source


def calls():
    "Where, the name that is called, its arguments by name."
    for where, code in sources():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call): yield where, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_every_source_is_python():
    "No magics, no shell escapes: what follows sees all there is."
    assert [where for where, code in sources() if re.search(r'^\s*[!%]|get_ipython\(\)\.(run|system)', code, re.M)] == []
    assert len(list(calls())) > 3000


def test_nothing_is_evaluated_or_given_to_a_shell():
    "No eval, no exec, no shell: notebooks are run by papermill, in a kernel of their own."
    bad = re.compile(r'(eval|exec|compile|os\.(system|popen|exec\w+|spawn\w+)|subprocess\.get(status)?output|pty\..*|(code|runpy)\..*)$')
    assert [(w, n) for w, n, k in calls() if bad.match(n) or k.get('shell', 'False') != 'False'] == []


def test_nothing_is_unpickled_or_unpacked():
    "torch.load takes weights only, numpy.load no objects, YAML plain values; archives are read member by member, in one chapter."
    found = list(calls())
    assert {k.get('weights_only') for _, n, k in found if n == 'torch.load'} == {'True'}
    assert {k.get('allow_pickle') for _, n, k in found if n in ('np.load', 'numpy.load')} == {'False'}
    assert [(w, n) for w, n, _ in found if re.fullmatch(r'yaml\.\w*load\w*', n) and n != 'yaml.safe_load'] == []
    bad = re.compile(r'((c?pickle|cloudpickle|dill|marshal|shelve)\..*|joblib\.load|(pd|pandas)\.read_pickle|torch\.hub\.load.*|(tarfile|zipfile)\..*|shutil\.unpack_archive|.*\.extractall|extract_archive)$')
    reads = {'tarfile.open', 'tarfile.TarInfo', 'zipfile.ZipFile', 'zipfile.is_zipfile'}       # member by member: tests/test_fetch.py
    assert [(w, n) for w, n, _ in found if bad.match(n) and not (n in reads and 'photographs' in w)] == []
    taken = [(w, a.name) for w, code in sources() for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)
        for a in node.names
             if (node.module or '').split('.')[0] in ('pickle', 'marshal', 'shelve', 'os', 'subprocess', 'tarfile', 'zipfile', 'shutil')]
    assert taken == []


# JupyterLab

def test_lab_keeps_its_token_and_listens_here_alone():
    "`make lab` gives folders and nothing else; JupyterLab's own defaults are a random token and this machine's own address."
    recipe = re.search(r'^lab:.*\n((?:\t.*\n)+)', (ROOT/'Makefile').read_text(), re.M)[1]
    options = re.findall(r'--(\S+?)(?:=\S+)?(?=\s)', recipe)
    assert recipe.count('jupyter lab') == 1 and set(options) == {'ServerApp.root_dir', 'FileContentsManager.preferred_dir'}
    assert not re.search('token|password|0\\.0\\.0\\.0|allow_root|allow_origin|xsrf', recipe)
    from jupyter_server.auth import PasswordIdentityProvider
    from jupyter_server.serverapp import ServerApp
    app = ServerApp()
    assert app.ip in ('localhost', '127.0.0.1') and not app.allow_remote_access and not app.allow_root and not app.disable_check_xsrf
    assert os.environ.get('JUPYTER_TOKEN') or len(PasswordIdentityProvider(parent=app).token) >= 32
