"""Tables of bad input for every parameter, command line, public function and kind of file: one line that names what is valid, or a documented way."""
import contextlib
import io
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import NBS, check, code_cells, tagged
from pcl_nb import cam, data, erf, focus_area, losses, methods, models, reproduce, runs, sources, training
from pcl_nb.base import core, notebooks, weights
from pcl_nb.lab import experiment
from pcl_nb.base.core import InputError

nan, inf, LONG, SNOW = math.nan, math.inf, 'x'*100_000, 'naïve ☃'
SAYS = 'valid:', 'is not valid; give', 'is not a', 'give ', 'neither True nor False', 'not name=value', 'some of ', 'nearest of ', 'cannot be', 'makes one'     # one of these leads to what is valid


def one_line(said, *names):
    "A message that can be read at a glance."
    assert '\n' not in said and 10 < len(said) < 500 and '<_io' not in said, said
    for name in names: assert name in said, said


def refused(call, *names):
    "Nothing but an `InputError` in one line; the message."
    with pytest.raises(InputError) as e: call()
    one_line(str(e.value), *names)
    return str(e.value)


# Parameters of the experiments

BAD = dict(
    str=['', 'no such thing', SNOW, LONG, 'a\0b', 'folder:', 'folder:no such thing', 'folder:~no_such_user', 'packed:nowhere', '=', 'tau=',
        'settings.ini/x', 5, 10**12, 10**5000, -1.5, nan, True, None, ['a'], {}],
    int=[-2, 0, 10**12, 2**31, 10**5000, 1.5, nan, inf, 'x', '', '5', SNOW, True, None, [1]],
    float=[nan, inf, -inf, -1, -1e9, 10**400, 'x', '', '.5', True, None, [.5]],
    bool=['yes', '', 0, 1, None, nan, 'True'])

FOLDER = ['', 'no such thing', SNOW, 'folder:', 'folder:no such thing', 'folder:~no_such_user', 'packed:nowhere', '=', 'tau=']
VALID = dict(       # what looks bad and is documented
    str=dict(out=FOLDER, device=[''], pcl=['', {}], photos=[''], images=[''], figures=[5], repeats=[5], layers=[''],
        **{'explore.networks': [''], 'your_own.network': ['']}),      # empty: the default; a folder that is made; papermill reads -p figures 5 as a number
    int=dict(seed=[0, 2**31], workers=[0, 2**31], image=[0, 2**31], images=[2**31], epochs=[2**31], most=[2**31], evidence_images=[2**31],
        **{'your_own.batch': [2**31], 'any_network.images': [0, 2**31], 'any_network.size': [0]}),   # more than there are: all
    float={'initialisation.width': [-1]}, bool={})        # -1: the profile's


def parameters():
    "(notebook, name, type) of every experiment's parameters."
    line, found = re.compile(r'(\w+): (\w+) = \S'), []
    for notebook in sorted(NBS.glob('*.ipynb')):
        for cell in tagged(code_cells(notebook)):
            lines = [l for l in cell.source.splitlines() if l.strip() and not l.startswith('#')]
            assert all(map(line.match, lines)), 'each has a type: ' + notebook.name
            found += [(notebook, *line.match(l).groups()) for l in lines]
    return found


@pytest.mark.parametrize('notebook, name, kind', [pytest.param(*p, id=f'{p[0].stem}-{p[1]}') for p in parameters()])
def test_parameter(notebook, name, kind):
    "Each bad value is refused in a line that names the parameter, or documented as valid; never a library's traceback."
    documented = VALID[kind].get(f'{notebook.stem}.{name}', VALID[kind].get(name, ()))
    for value in BAD[kind]:
        valid = any(type(v) is type(value) and v == value for v in documented)
        with contextlib.redirect_stdout(io.StringIO()):
            if valid: assert check(notebook, **{name: value})[name] is not None; continue
            said = refused(lambda: check(notebook, **{name: value}), 'images of' if value == 2**31 and name in ('train', 'val') else name)
        assert any(s in said for s in SAYS), said


@pytest.mark.parametrize('notebook, name', [('erf', 'arch'), ('erf', 'stages'), ('focus_area', 'archs'),
    ('focus_area', 'figure'), ('erasing_methods', 'compare'), ('open_choices', 'choices'), ('speed', 'parts'),
    ('relu_activity', 'archs')])
def test_lists_as_papermill_gives_them(notebook, name):
    "By -p as text with commas or as JSON, by -y and from Python as a list or a tuple: the same value."
    usual = check(NBS/f'{notebook}.ipynb')[name]
    one = usual[:1]
    for value in (','.join(usual), json.dumps(usual), str(usual), usual, tuple(usual)):
        assert check(NBS/f'{notebook}.ipynb', **{name: value})[name] == usual, value
    assert check(NBS/f'{notebook}.ipynb', **{name: json.dumps(one)})[name] == one


def test_a_list_where_one_value_is_wanted():
    "One line that says so; a dict of settings is what -y gives, and is taken."
    for value in (['resnet18'], '["resnet18"]', 'resnet18,resnet50'):
        said = refused(lambda: check(NBS/'qualitative.ipynb', arch=value), 'parameter arch: ', 'resnet50')
        assert 'is a list; give one architecture: ' in said
    for settings in ({'tau': .6}, 'tau=0.6', ['tau=0.6']):
        assert check(NBS/'relu_activity.ipynb', pcl=settings)['pcl'] == {'tau': .6}


@pytest.mark.parametrize('name, value', [('seed', '3'), ('images', '100'), ('log_counts', 'False')])
def test_raw_numbers_are_named(name, value):
    "papermill's -r gives text: one line that says so."
    refused(lambda: check(NBS/'erf.ipynb', **{name: value}), f'parameter {name}: {value!r} is n', 'text', '-p, not -r')


def test_every_experiment_is_in_the_table():
    "The table is made of the notebooks: as many as there are."
    there = {p.stem for p in NBS.glob('*.ipynb') if not p.stem[0].isdigit() and p.stem != 'index'}
    assert {p[0].stem for p in parameters()} == there and len(parameters()) > 100


# Command lines

TRAINING = [['--seed', '-1'], ['--seed', '1.5'], ['--size', '0'], ['--size', '100000'], ['--width', '0'], ['--width', '5'],
    ['--width', 'nan'], ['--train', '-1'], ['--train', '0'],
    ['--train', str(10**12)], ['--val', 'none'], ['--val', '-1'], ['--data-seed', '-1'], ['--epochs', '-1'], ['--epochs', '1e3'],
    ['--momentum', '1'], ['--momentum', 'nan'], ['--weight-decay', '-1'],
    ['--gamma', 'inf'], ['--validate-every', '-1'], ['--threads', '-1'], ['--channels-last', 'maybe'], ['--sync-bn', '1'],
    ['--weights', 'nowhere'], ['--weights', 'places365', '--arch', 'resnet34'],
    ['--out', 'settings.ini'], ['--out', 'settings.ini/x'], ['--out', LONG], ['--out', '~no_such_user/x'], ['--data', 'places365:nowhere'],
    ['--data', f'folder:{LONG}'], ['--data', 'folder:~no_such_user'], ['--data', ''],
    ['--set', '=1'], ['--method', 'pcl', '--set', 'tau=' + '['*100_000], ['--method', 'pcl', '--set', 'tau=' + '1'*5000],
    ['--method', 'pcl', '--set', 'omega=' + '1'*400], ['--method', 'has', '--set', 'patches=' + '1'*5000],
    ['--nope', '1'], ['--arch', ''], ['--method', SNOW], ['--device', 'meta'], ['--accumulate', '1.5'], ['--lr', 'x'], ['--amp', 'fp16 '],
    ['--profile', ''], ['--scheme', '']]
REPRODUCE = [['--epochs', '0'], ['--epochs', '1.5'], ['--seed', '-1'], ['--seed', 'x'], ['--repeats', '101'], ['--repeats', 'x'],
    ['--compare'], ['--compare', '--against', LONG], ['--against', 'nowhere'], ['--publish'], ['--workers', '-1'],
    ['--workers', '-1', '--only', 'claims'], ['--workers', 'x'], ['--device', 'tpu9'],
    ['--device', 'meta'], ['--out', 'settings.ini'], ['--out', LONG], ['--objects', 'imagenot'], ['--objects', 'packed:nowhere'],
    ['--scenes', SNOW], ['--scenes', f'folder:{LONG}'], ['--tflops', 'nan'], ['--tflops', 'inf'],
    ['--tflops', '-1'], ['--tflops', 'x'], ['--only', f'fig6,{LONG}'], ['--archs', SNOW], ['--engine', 'dask:'],
    ['--engine', f'dask:{LONG}.json'], ['--reduced', '1'], ['--only', 'evidence', '--scenes', 'packed:nowhere'], ['--profile', '']]
DATA = [[], ['unpack'], ['pack'], ['pack', 'nowhere'], ['pack', SNOW], ['pack', 'packed:nowhere'], ['pack', 'folder:nowhere'],
    ['pack', f'folder:{LONG}'], ['pack', 'FOLDER', '--edge', '0'], ['pack', 'FOLDER', '--edge', 'x'],
    ['pack', 'FOLDER', 'settings.ini'], ['pack', 'FOLDER', LONG], ['pack', 'FOLDER', '~no_such_user/x'], ['check'], ['check', 'nowhere'],
    ['check', 'packed:nowhere'], ['check', 'places365:nowhere'], ['check', 'imagenet:nowhere'],
    ['check', 'concept_scenes'], ['check', 'concept_scenes', '--skip'], ['check', 'imagenet:nowhere', '--skip'],
    ['check', 'folder:~no_such_user'], ['check', 'folder:settings.ini', '--read'], ['check', 'imagenette:nowhere'],
    ['check', 'nowhere', '--manifest', 'photos-scenes'], ['check', 'FOLDER', '--manifest', 'photos'], ['check', 'nbs', '--manifest', 'nbs'],
    ['check', 'concept_scenes', '--manifest', 'photos-scenes'], ['check', 'nbs', '--manifest', 'figures/embedded/fig1.png'],
    ['fetch'], ['fetch', ''], ['fetch', SNOW], ['fetch', 'places365'], ['fetch', 'imagenette:settings.ini'], ['fetch', f'imagenette:{LONG}'],
    ['fetch', 'imagenette:~no_such_user'], ['fetch', 'imagenette:nbs'], ['fetch', 'miniplaces:/']]
LINES = ([(runs.main, ['--profile', 'smoke', '--quiet', *a])
    for a in TRAINING] + [(reproduce.main, ['--profile', 'smoke', '--quiet', *a]) for a in REPRODUCE] + [(data.main, a) for a in DATA])


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A folder of two classes, three images each, with spaces and more in its name and theirs."
    folder = tmp_path_factory.mktemp('set')/f'my {SNOW} pictures, all'
    for split in ('train', 'val'):
        for i in range(6): photo(folder/split/('côte d’azur', 'wood & field')[i % 2]/f'no {i} é.png', seed=i)
    return folder


def photo(path, w=40, h=30, seed=0, **how):
    "Write a noisy image."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path, **how)
    return path


@pytest.mark.parametrize('main, args', [pytest.param(m, a, id=f"{m.__module__.split('.')[1]} {' '.join(a)[:60]}") for m, a in LINES])
def test_command_line(capsys, store, pictures, main, args):
    "Exit code 2, the last line says what is valid, nothing is written."
    with pytest.raises(SystemExit) as ended: main([f'folder:{pictures}' if a == 'FOLDER' else a for a in args])
    assert ended.value.code == 2
    one_line(capsys.readouterr().err.strip().split('\n')[-1], ': error: ')
    assert not list(store.runs.glob('*/[!.]*')) and not store.results.exists() and not store.figures.exists() and not list(pictures.glob('packed*'))


# Public functions

torch.manual_seed(0)
M = models.create_model('resnet18', 5, width=.25, small_input=True, side=True).eval()
X, Y, Z, W = torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.randn(2, 5), torch.rand(5, 8)
MAPS, FEATURES, IMPACT, MASK = torch.rand(2, 4, 4), torch.rand(2, 8, 4, 4), torch.rand(16, 16), torch.ones(2, 1, 32, 32)
S, STATS = data.draw_concepts('scenes', 'val', 4, 32), ((.5, .5, .5), (.2, .2, .2))
WORDS = 'x', '', SNOW, None, 5, nan                                           # for a name
TAUS = nan, inf, -1, 2, 10**400, 'x', '', None, True, torch.tensor(.5)         # for a number from 0 to 1
COUNTS = 0, -1, 1.5, nan, 'x', None, True                                     # for a number of things
BATCHES = (X[0], torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32), torch.rand(2, 3, 0, 0), X.long(), X.bool(), X.to(torch.complex64),
    X.numpy(), None, 5, 'x')       # for a batch
SIZES = (0, 0), (8,), (1.5, 2), 5, 'x', None                                  # for height and width
MODELS = None, 'resnet18', nn.Conv2d(3, 3, 3)


class NoHead(nn.Module):
    "A network without a linear layer."
    def __init__(self): super().__init__(); self.a = nn.Conv2d(3, 4, 3)
    def forward(self, x): return self.a(x).mean((2, 3))


def each(call, *values): return [lambda v=v: call(v) for v in values]


def options(call, **values): return [lambda k=k, v=v: call(**{k: v}) for k, vs in values.items() for v in vs]


def first(batches): return next(iter(batches))


CALLS = {
    'focus_area.focus_area': each(lambda v: focus_area.focus_area(M, v), X[:0], X*nan, X*inf, [], [X[0], X[0, 0]],
        [None], [()], *BATCHES) + each(lambda v: focus_area.focus_area(v, X), *MODELS)
        + options(lambda **k: focus_area.focus_area(M, X, **k), tau=TAUS, rule=[*WORDS, ['threshold']], stage=WORDS,
            target=[[0], [0, 9], [0, -1], [.5, 1.], 'ab', 5, nan, [[0, 1]], [True, False], [None, 0]])
        + each(lambda v: focus_area.focus_area(M, X, rule='sufficient', steps=v), *COUNTS),
    'focus_area.coverage_table': each(lambda v: focus_area.coverage_table(M, v), [], [(X[:0], Y[:0])], None, 5, [X], [(X[0], Y)],
        X) + options(lambda **k: focus_area.coverage_table(M, [(X, Y)], **k), tau=TAUS, target=WORDS,
        area=[torch.zeros(1, 32, 32, dtype=bool),
            torch.zeros(2, 16, 16, dtype=bool)]) + [lambda: focus_area.coverage_table(M, [(X, Y + 9)], target='truth')],
    'focus_area.energy_mask': each(lambda v: focus_area.energy_mask(MAPS, (8, 8), v),
        *TAUS) + each(lambda v: focus_area.energy_mask(v, (8, 8)), MAPS[0], MAPS*nan,
        None) + each(lambda v: focus_area.energy_mask(MAPS, v), *SIZES),
    'focus_area.region': each(lambda v: focus_area.region(M, X, v, Y), MAPS[:1], MAPS[0],
        None) + options(lambda **k: focus_area.region(M, X, MAPS, Y, **k), tau=TAUS, rule=WORDS),
    'focus_area.distribution': each(focus_area.distribution, [], [inf], [2.], [-1.], 'x', None,
        [[.5]]) + each(lambda v: focus_area.distribution([.5], v), *COUNTS),
    'focus_area.bootstrap_means': each(focus_area.bootstrap_means, [], [nan], 'x', None,
        5) + each(lambda v: focus_area.bootstrap_means([.5], v), *COUNTS),
    'focus_area.summary': each(focus_area.summary, [], [inf], [[nan]], 'x', None, 5) + each(lambda v: focus_area.summary([.5], v), *COUNTS),
    'erf.impact_map': each(lambda v: erf.impact_map(M, v), X[:0], X*nan, X*inf, [], X[0], [(), ()], [X, torch.rand(1, 3, 16, 16)],
        *BATCHES) + each(lambda v: erf.impact_map(v, X), *MODELS)
        + options(lambda **k: erf.impact_map(M, X, **k), stage=WORDS, center=WORDS, relu=WORDS, batch_size=[*COUNTS, 10**30]),
    'erf.impact_replicates': options(lambda **k: erf.impact_replicates(M, X, **k), replicates=[*COUNTS[1:], 10**12]),
    'erf.impact_histogram': each(erf.impact_histogram, IMPACT*nan, IMPACT + inf, IMPACT[0], IMPACT[:0], IMPACT[0, 0], IMPACT.numpy(),
        IMPACT.to(torch.complex64), None, 5, 'x') + each(lambda v: erf.impact_histogram(IMPACT, v), *COUNTS, 10**12),
    'erf.erf_size': each(lambda v: erf.erf_size(torch.ones(100, dtype=torch.long), v), 100, *COUNTS[1:]) + each(erf.erf_size, None, [1, 2],
        torch.tensor(5), torch.ones(0)),
    'erf.interval': each(erf.interval, torch.ones(0), torch.tensor([nan]), None) + each(lambda v: erf.interval(torch.rand(9), v), 0, 1,
        *TAUS),
    'erf.coupled_impacts': each(lambda v: erf.coupled_impacts(M, v), X[:1], X[:0],
        *BATCHES) + each(lambda v: erf.coupled_impacts(M, X, stage=v), *WORDS),
    'erf.calibrate': each(lambda v: erf.calibrate(models.create_model('resnet18', 5, width=.25), v), [], X[:0], X[0], None),
    'erf.activity_table': each(lambda v: erf.activity_table(M, v), [], None, [(X[0, 0], Y)],
        X[0]) + options(lambda **k: erf.activity_table(M, [(X, Y)], **k), part=[0, *TAUS], stage=WORDS),
    'erf.center_value': each(lambda v: erf.center_value(FEATURES, v), *WORDS) + each(erf.center_value, FEATURES[0, 0], FEATURES[..., :0]),
    'cam.class_activation_map': each(lambda v: cam.class_activation_map(FEATURES, W, v), Y[:1], Y + 9, Y - 1, Y*1., Y.bool(), [0, 1],
        None) + [lambda: cam.class_activation_map(FEATURES[0], W, Y), lambda: cam.class_activation_map(FEATURES, W[:, :3], Y)],
    'cam.normalize_map': each(cam.normalize_map, MAPS[0, 0], MAPS[:, :0], None),
    'cam.erasing_mask': options(lambda **k: cam.erasing_mask(MAPS, (8, 8), **k), tau=TAUS, mask=WORDS, normalize=WORDS,
        omega=[nan, inf, -1, 'x', None]) + each(lambda v: cam.erasing_mask(v, (8, 8)), MAPS[0], MAPS[:, :0],
        None) + each(lambda v: cam.erasing_mask(MAPS, v), *SIZES),
    'cam.erase': each(lambda v: cam.erase(X, MASK, v), 'black', *WORDS) + each(lambda v: cam.erase(X, v), MASK[..., :16],
        torch.ones(3, 1, 32, 32), MASK[0], None) + each(lambda v: cam.erase(X, MASK, 'black', v), 5, 'x', (1, 2), ((1,), (1,)),
        ((0,)*3, (0,)*3)),
    'cam.cam_erase': each(lambda v: cam.cam_erase(M, X, M.stage_features(X, 'stage4'), Y, v), *WORDS,
        'stage3') + [lambda: cam.cam_erase(M, X, M.stage_features(X, 'stage4'), Y + 9)],
    'losses': [lambda f=f, a=a: f(*a) for f in (losses.instance_consistency, losses.category_consistency)
        for a in [(Z, v) for v in (Z[:1], Z[:, :2], Z[0], None)] + [(Z[:0], Z[:0])] + [(Z, Z, v) for v in WORDS]] + [
        lambda: losses.instance_consistency(Z, Z, 'correlation')],
    'models.create_model': each(lambda v: models.create_model(v, 5), *WORDS) + each(lambda v: models.create_model('resnet18', v), *COUNTS,
        10**12)
        + options(lambda **k: models.create_model('resnet18', 5, **k), width=[0, -1, 5, nan, inf, 10**400, 'x', None, True],
            weights=['x', '', 5, nan, SNOW, LONG, 'a\0b', '/', ['imagenet']], small_input=['x', None, 5], side=['x', None, 1]),
    'models.wrap': each(models.wrap, NoHead(), nn.Sequential(), *MODELS) + each(lambda v: models.wrap(M.net, v), {}, None, {'stage3': 'x'},
        {'stage4': ''}, {'stage4': 5}, {'stage4': 'fc'}, ['layer4'], 'x')
        + each(lambda v: models.wrap(M.net, head=v), 'layer4', *WORDS) + [lambda: models.wrap(M.net, {'stage4': 'layer4'}, side=True)],
    'StagedClassifier': each(lambda v: M.stage_features(X, v), *WORDS) + each(lambda v: M.stage_features(X, 'stage4', v),
        *WORDS) + each(lambda v: M(X, stages=(v,)), *WORDS) + each(M.stage_head, *WORDS),
    'models.weights_file': [lambda: weights.weights_file('x', 'resnet18'), lambda: weights.weights_file('places365', 'resnet34'),
        lambda: weights.weights_file('places365', None)],
    'data.draw_concepts': [lambda a=a: data.draw_concepts(*a)
        for a in [(v, 'train', 5, 32) for v in WORDS] + [('scenes', v, 5, 32) for v in WORDS] + [('scenes', 'train', v, 32)
            for v in (*COUNTS, 10**12)] + [('scenes', 'train', 5, v) for v in (*COUNTS, 10**6)]
        + [('scenes', 'train', 5, 32, v) for v in COUNTS[1:]]],
    'data.sprite': [lambda a=a: data.sprite(*a) for a in [('x', 20), *(('sofa', v) for v in COUNTS), ('sofa', 20, 2), ('sofa', 20, 0, 9),
        ('sofa', 20, 0, 0, -1), ('sofa', 20, 0, 0, 0, 99)]],
    'data.load': each(lambda v: data.load(v, 'val', 32, 4), *WORDS, 'folder:', 'folder:x', 'folder:/dev/null', 'folder:a\0b',
        f'folder:{LONG}', 'packed:x', 'packed:~no_such_user', 'places365:x', 'places365:~no_such_user', 'places365-small:x@y',
        'imagenet:x', [])
        + each(lambda v: data.load('concept_scenes', v, 32, 4), *WORDS) + each(lambda v: data.load('concept_scenes', 'val', v, 4), *COUNTS,
            8, 10**6) + each(lambda v: data.load('concept_scenes', 'val', 32, v), *COUNTS, 10**12)
        + each(lambda v: data.load('concept_scenes', 'val', 32, 4, v), *COUNTS[1:]),
    'data names': [lambda f=f, v=v: f(v)
        for f in (data.count, data.check_data, data.parse_name, data.is_drawn, lambda v: data.fingerprint(v, 32), data.pack)
        for v in WORDS] + each(lambda v: data.fingerprint('concept_scenes', v), *COUNTS, 10**6),
    'data.batches': [lambda k=k, v=v: first(data.batches(**{**dict(images=S, scheme='simple', size=28, stats=STATS), k: v}))
        for k, vs in dict(scheme=WORDS, size=[*COUNTS, 10**6],
            stats=[None, (), 5, 'x', ((1,), (1,)), ((.5,)*3, (0.,)*3), ((nan,)*3, (1,)*3)],
        batch=COUNTS, index=[[], [9], [-1], [.5], [True], 'x', 5], shard=[(2, 2), (0, 0), (-1, 1), 5, 'x'],
        device=['x', 'meta', 'cuda:99', 1.5]).items() for v in vs],
    'data.crop_matrices': each(lambda v: data.crop_matrices('simple', torch.tensor([[4, 4]]), v),
        *COUNTS) + each(lambda v: data.crop_matrices(v, torch.tensor([[4, 4]]), 4), *WORDS),
    'data.decode': each(data.decode, 'x', '', '/', 'a\0b', LONG, None, 5),
    'data.evidence': [lambda: data.evidence(S, 'x', 28), lambda: data.evidence(S, 'simple', 0), lambda: data.evidence(S, 'simple', 'x')],
    'data.pick': each(lambda v: data.pick(S, v), torch.tensor([9]), torch.tensor([-1]), torch.tensor([.5]), 'x', None),
    'methods.get_method': each(methods.get_method, *WORDS,
        []) + [lambda n=n, k=k, v=v: methods.get_method(n, **{k: v})
        for n, bad in dict(pcl=dict(tau=TAUS, x=[1], omega=[nan, inf, -1, 10**400, 'x'], side_weight=[nan, None], ipc_weight=['x', True],
            cpc_weight=[-1],
        detach=[1, 'x', None], mask=WORDS, fill=WORDS, stage=WORDS, target=WORDS, ipc_distance=WORDS, cpc_distance=WORDS),
        has=dict(drop_rate=TAUS, patches=[(), '', None, [nan], [-1], [True], 'x', '1'*5000, '²', {}, 1.5]),
        acol=dict(threshold=[0, 1, *TAUS], output=WORDS),
        adl=dict(stage=WORDS, drop_rate=TAUS, threshold=TAUS), amloss=dict(weight=[nan, -1], sigma=TAUS, omega=['x']),
        baseline=dict(tau=[.5])).items() for k, vs in bad.items() for v in vs],
    'methods on tensors': each(lambda v: methods.hide_patches(X, v), [], [64], [-1], [nan], [1.5], None,
        'x') + each(lambda v: methods.hide_patches(X, [8], v), *TAUS) + [lambda: methods.fuse(Z, Z, 'x'), lambda: methods.fuse(Z, Z[:1])]
        + each(lambda v: methods.attention_dropout(FEATURES, v), *TAUS),
    'training.recipe_for': each(runs.recipe_for, *WORDS, []) + each(lambda v: runs.recipe_for('smoke', v),
        *WORDS) + options(lambda **k: runs.recipe_for('smoke', **k), x=[1], arch=WORDS, data=WORDS, method=WORDS,
        options=[None, 5, [], {'x': 1}, {1: 2}], seed=COUNTS[1:],
        size=[*COUNTS, 10**6], width=[0, -1, 5, nan, 'x', None, True], small_input=['x', None, 1], train=[*COUNTS, 10**12], val=COUNTS,
        data_seed=COUNTS[1:], epochs=COUNTS[1:], batch=COUNTS, lr=[-1, nan, inf, 10**400, 'x', None, True], momentum=[-1, 1, nan, 'x'],
        weight_decay=[-1, nan],
        gamma=[-1, None], validate_every=COUNTS[1:], amp=['x', None], channels_last=['x', None], threads=COUNTS[1:], accumulate=COUNTS,
        compile=['x', 1], sync_bn=['x', 1], weights=['x', None]),
    'training': each(lambda v: training.learning_rate(v, .1, .5), *WORDS) + each(lambda v: training.evaluate(M, S, v, 28, STATS),
        *WORDS) + [lambda: training.evaluate(M, data.pick(S, torch.arange(0)), 'simple', 28, STATS)],
    'runs': each(lambda v: runs.train_all([], workers=v), *COUNTS[1:]) + each(runs.check_engine, 'x', 'dask:', 'dask:x.json',
        f'dask:{LONG}.json', None, 5) + each(runs.checks, 'x'),
    'core': each(core.usable_device, 'x', SNOW, LONG, 'meta', 'cuda:99', 'cpu:x', 5, 1.5, nan, [], {}) + each(core.resolve, None, 5, nan,
        LONG, '~no_such_user') + each(lambda v: core.threads(v).__enter__(), *COUNTS) + each(lambda v: core.choose(v, 'abc', 'letter'),
        *WORDS, LONG, [], 10**5000),
    'experiment.image_files': each(experiment.image_files, 'x', 'a\0b', LONG, None, 5, nan, {}, ['x'], ['a\0b'], [None]),
    'reproduce': each(lambda v: reproduce.plan([v]), *WORDS) + each(lambda v: reproduce.plan(profile=v),
        *WORDS) + each(lambda v: reproduce.plan(archs=[v]), *WORDS) + each(lambda v: reproduce.estimate([], v), *WORDS),
}


@pytest.mark.parametrize('name', CALLS)
def test_public_function(name):
    "Whatever it is given, the answer is one line."
    with contextlib.redirect_stderr(io.StringIO()):
        for call in CALLS[name]: refused(call)


def test_bad_calls_leave_nothing_behind():
    "The network is as it was: no hook, the same mode, the same numbers."
    assert not M.training and not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m)
        for m in M.modules()) and all(p.requires_grad for p in M.parameters())
    assert focus_area.focus_area(M, X).coverage.shape == (2,) and torch.isfinite(erf.impact_map(M, X)).all()


# Images

def bad_files(folder):
    "Files that are no images, or not all of one: name -> what the message says."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'empty.jpg').write_bytes(b'')
    (folder/'words.jpg').write_text('not a picture')
    whole = photo(folder/'cut.jpg', 200, 200).read_bytes()
    (folder/'cut.jpg').write_bytes(whole[:len(whole)//2])
    (folder/'loop.png').symlink_to('loop.png')
    (folder/'gone.png').symlink_to('nowhere.png')
    (folder/'folder.png').mkdir()
    Image.new('1', (20_000, 20_000)).save(folder/'bomb.png')
    return {'empty.jpg': 'formats', 'words.jpg': 'formats', 'cut.jpg': 'truncated', 'loop.png': 'symbolic links',
        'gone.png': 'No such file', 'folder.png': 'directory', 'bomb.png': 'decompression bomb'}


def test_bad_files_are_refused_by_name(tmp_path):
    "Decoded alone, in memory, or by a worker from disk."
    for name, why in bad_files(tmp_path).items():
        disk = data.ImageSet(data.Files(tmp_path, [name]), torch.zeros(1, dtype=torch.long), ('a',))
        for call in (lambda: data.decode(tmp_path/name), lambda: first(data.batches(disk, 'simple', 28, STATS, 1, workers=0))):
            refused(call, name, why)


def test_bad_files_are_left_out_by_choice(tmp_path, capsys):
    "An error, unless one asks for them to be left out: then with a count, and a list to be edited."
    folder = tmp_path/'set of mine'
    for split in ('train', 'val'):
        for i in range(4): photo(folder/split/f'class {i % 2}'/f'{i}.png', seed=i)
    name, names = f'folder:{folder}', sorted(bad_files(folder/'train'/'class 0'))
    refused(lambda: data.load(name, 'train', 28), 'train/class 0/bomb.png', '--skip')
    assert refused(lambda: check(NBS/'qualitative.ipynb', scenes=name), 'bomb.png') and not (folder/data.SKIP).exists()
    assert data.main(['check', name, '--read']) == 1 and '7 of 15 images cannot be read' in capsys.readouterr().out
    assert data.main(['check', name, '--skip']) == 0
    said = capsys.readouterr().out
    assert all(f'train/class 0/{n}' in said for n in names) and 'train: 4 images, 2 classes' in said
    assert (folder/data.SKIP).read_text().splitlines() == [f'train/class 0/{n}' for n in names]
    assert len(data.load(name, 'train', 28)) == 4 and runs.main(['--profile', 'smoke', '--quiet', '--data', name, '--batch', '4']) == 0
    (folder/data.SKIP).unlink(); sources.forget()
    refused(lambda: data.load(name, 'train', 28), 'bomb.png')


def test_unusual_files_are_read(tmp_path):
    "The first picture of an animation, all turns of EXIF, one pixel, 20,000 pixels wide or high: into batches by both ways and schemes."
    pictures = [Image.new('RGB', (20, 10), c) for c in ('red', 'lime')]
    for ending in ('png', 'webp', 'tiff'):
        pictures[0].save(tmp_path/f'moves.{ending}', save_all=True, append_images=pictures[1:],
            **dict(lossless=True) if ending == 'webp' else {})
        assert data.decode(tmp_path/f'moves.{ending}')[:, 5, 5].tolist() == [255, 0, 0]
    for turn in range(1, 9):
        exif = Image.Exif(); exif[0x112] = turn
        photo(tmp_path/f'turned{turn}.jpg', 60, 40, exif=exif)
        assert data.decode(tmp_path/f'turned{turn}.jpg').shape[1:] == ((40, 60) if turn < 5 else (60, 40))
    Image.new('RGB', (1, 1), 'red').save(tmp_path/'dot.png')
    photo(tmp_path/'wide.png', 20_000, 3); photo(tmp_path/'high.jpg', 3, 20_000)
    names = sorted(p.name for p in tmp_path.iterdir())
    disk = data.ImageSet(data.Files(tmp_path, names), torch.arange(len(names)), tuple(names))
    memory = data.ImageSet([disk.images[i] for i in range(len(names))], disk.labels, disk.classes)
    for scheme in data.SCHEME_NAMES:
        for train in (False, True):
            a, b = (first(data.batches(s, scheme, 28, ((0, 0, 0), (1/255,)*3), len(names), train))[0] for s in (disk, memory))
            assert a.shape == (len(names), 3, 28, 28) and torch.isfinite(a).all() and (a - b).abs().mean() < 2


def test_a_class_of_one_split_only_is_named(tmp_path):
    "Which class, and where it is missing; a class that is a link to nowhere, too."
    for split, names in dict(train='abc', val='ab').items():
        for c in names: photo(tmp_path/split/f'class {c}'/'0.png')
    refused(lambda: data.check_data(f'folder:{tmp_path}'), "'class c'", 'missing in val/')
    (tmp_path/'train'/'class c').rename(tmp_path/'val'/'class c')
    refused(lambda: check(NBS/'erf.ipynb', scenes=f'folder:{tmp_path}'), "'class c'", 'missing in train/')
    (tmp_path/'train'/'class c').symlink_to('class c')
    refused(lambda: data.check_data(f'folder:{tmp_path}'), 'class c', 'a link that leads nowhere')


def test_names_with_spaces_and_beyond_ascii(pictures, tmp_path, capsys):
    "A folder of any name: checked, packed, trained on; results to a folder of any name; a file name that is not text."
    name, out = f'folder:{pictures}', tmp_path/f'runs of {SNOW}'
    assert data.main(['check', name]) == 0 and 'train: 6 images, 2 classes' in capsys.readouterr().out
    assert data.main(['pack', name, str(tmp_path/f'packed {SNOW}'), '--quiet']) == 0 and data.main(['check',
        f"packed:{tmp_path/f'packed {SNOW}'}"]) == 0
    assert runs.main(['--profile', 'smoke', '--quiet', '--data', name, '--batch', '6', '--out',
        str(out)]) == 0 and (out/'run.json').exists()
    P = check(NBS/'qualitative.ipynb', scenes=name, images=f'{pictures.parent}', out=str(out))
    assert len(P['images']) == 12
    before = data.fingerprint(name, 28)
    photo(tmp_path/'new.png').rename(pictures/'train'/'wood & field'/os.fsdecode(b'\xff.png'))
    sources.forget()
    assert data.fingerprint(name, 28) != before and len(data.load(name, 'train', 28)) == 7


@pytest.mark.parametrize('content', ['', '[]', '{}', '<<<<<<< HEAD\n{"cells": []}'])
def test_damaged_notebook_of_an_experiment(tmp_path, monkeypatch, content):
    "A merge conflict or half a file is named, in one line."
    (path := tmp_path/'erf.ipynb').write_text(content)
    monkeypatch.setattr(notebooks, 'notebook_path', lambda name: path)
    with pytest.raises(InputError, match='is not a notebook') as e: notebooks.parameters_of('erf')
    assert str(path) in str(e.value) and '\n' not in str(e.value)
