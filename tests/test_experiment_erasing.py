"""The experiments on erasing methods and on ReLU activity as a user runs them, at the smallest profile."""
import json
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import NBS, check, contents, papermill
from pcl_nb import claims, methods, reproduce, runs, training
from pcl_nb.base import core
from pcl_nb.lab import results


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Both experiments in one store: the folder, and what was in it when they had ended."
    folder = tmp_path_factory.mktemp('erasing')
    for name, given in dict(erasing_methods=dict(repeats=2, steps=3), relu_activity=dict(archs='resnet18', coupled=4, repeats=2)).items():
        done = papermill(NBS/f'{name}.ipynb', folder, profile='smoke', **given)
        assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, results=folder/'results'/'smoke', files=contents(folder/'results'))


def test_every_method_is_compared(smoke):
    "A row a method: cost and parameters relative to what it is, accuracy over its runs."
    table = pd.read_csv(smoke.results/'erasing_methods_resnet18.csv').set_index('network')
    assert list(table.index) == ['scenes', 'has', 'acol', 'adl', 'adl:official', 'adl:stage=stage3+stage4', 'amloss', 'amloss:weight=0.5',
                                 'amloss:weight=2', 'pcl'] and table.runs.tolist() == [4] + [2]*9
    assert table.cost['scenes'] == 1 and (table.cost > 0).all()
    base = table.loc['scenes']
    for name in ('has', 'adl', 'amloss'):
        assert table.parameters_training[name] == table.parameters_evaluation[name] == base.parameters_training
    assert table.parameters_evaluation['acol'] == table.parameters_training['acol'] > base.parameters_training
    assert table.parameters_training['pcl'] > table.parameters_evaluation['pcl'] == base.parameters_evaluation, 'the side head is for training alone'
    assert np.isfinite(table[['top1', 'focus', 'erf_stage4', 'top1_std']]).all(axis=None)
    assert np.allclose(table.estimate[1:], (table.top1 - base.top1)[1:], atol=1e-5)


def test_every_run_of_every_method_is_measured(smoke):
    "Accuracy, focus area and ERF of each run; methods by the names that claims use."
    table = results.measurements(smoke.results)
    needed = {n for c in ('C19', 'C20', 'C21') for p in claims.CLAIMS[c].parts for n, _ in p.weights}
    assert needed <= set(table.network)
    for quantity in ('top1', 'focus', 'erf stage4'):
        seeds = table[table.quantity == quantity].groupby('network').seed.nunique()
        assert seeds['scenes'] == 4 and (seeds[[*needed - {'scenes'}]] == 2).all()


def test_appendix_b_is_judged_from_the_runs(smoke):
    "C19 to C21 have the runs that they need; one epoch decides nothing."
    found = claims.judge(results.measurements(smoke.results), only='C19 C20 C21')
    assert found.claim.tolist() == ['C19', 'C20', 'C21'] and (found.verdict == '').all()
    assert not found.evidence.str.contains('(top1)', regex=False).any(), 'a network is missing'


def test_variant_has_one_name_and_one_run():
    "A weight of 2 and of 2.0 is one method and one run; the default's is the method's own."
    given = dict(profile='smoke', compare='amloss:weight=2.0,amloss:weight=2,amloss:weight=1,amloss,adl:stage=stage3+stage4')
    recipes = reproduce.recipes_of(reproduce.Job('erasing_methods', given))
    assert [n for _, n, _ in recipes] == ['scenes', 'amloss:weight=2', 'amloss', 'adl:stage=stage3+stage4']
    assert [r.options for r in recipes.values()] == [{}, {'weight': 2.}, {}, {'stage': 'stage3+stage4'}]


def test_open_choices_change_one_thing():
    "Each alternative differs from the default in what it is about, and has as many runs; the baseline has twice as many."
    recipes = reproduce.recipes_of(reproduce.Job('open_choices', dict(profile='smoke', repeats='2')))
    for (network, text, seed), r in recipes.items():
        changed = {f.name for f in fields(r) if getattr(r, f.name) != getattr(recipes[network, '', seed], f.name)}
        want = {'init'} if text.startswith('init=') else {'gamma'} if 'gamma' in text else {'options'} if text.startswith(('pcl.', 'acol.')) else set()
        assert changed == want, (network, text)
    seeds = {}
    for network, text, seed in recipes: seeds.setdefault((network, text), []).append(seed)
    assert all(s == list(range(4 if n in ('scenes', 'complex') else 2)) for (n, _), s in seeds.items())
    options = {text: r.options for (n, text, _), r in recipes.items() if n in ('pcl', 'acol')}
    for text, want in {'': {}, 'pcl.erased_norm=running': dict(erased_norm='running'), 'pcl.erased_norm=mixed': dict(erased_norm='mixed'),
                       'pcl.normalize=after': dict(normalize='after'), 'acol.branch_b=apart': dict(branch_b='apart')}.items():
        assert options[text] == want
    assert {recipes[n, 'init=torchvision', 0].init for n in ('init', 'objects', 'scenes', 'pcl')} == {'torchvision'}
    assert ('scenes', 'pcl.mask=soft', 0) not in recipes      # what an alternative does not change is not measured again


def test_open_choices_of_one_run_have_no_verdicts(smoke, tmp_path):
    "Estimates and arrows alone; the alternatives' rows stand beside the default's."
    (tmp_path/'runs').symlink_to(smoke.folder/'runs')
    done = papermill(NBS/'open_choices.ipynb', tmp_path, profile='smoke', choices='U1,U11,U16')
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path/'results'/'smoke'
    table, rows = pd.read_csv(folder/'open_choices_resnet18.csv'), results.measurements(folder)
    assert set(table.choice) == {'U1', 'U11', 'U16'} and table.verdict.isna().all() and table.survives.all()
    assert set(rows.settings) == {'', 'tau=0.3', 'tau=0.7', 'rule=energy', 'rule=energy;tau=0.8', 'rule=sufficient', 'center=mean4',
                                  'images_from=objects', 'images_from=own'}
    own = rows[(rows.settings == 'images_from=own') & (rows.network == 'scenes') & (rows.quantity == 'erf stage4')].value.item()
    assert own == rows[(rows.settings == '') & (rows.network == 'scenes') & (rows.quantity == 'erf stage4')].value.item()
    assert (folder/'open_choices_resnet18.svg').stat().st_size < 10**6


def test_second_branch_apart_is_fixed_by_the_seed():
    "A recipe gives the same branch B each time, another than the copy's and another seed's; branch A is the copy's."
    def built(seed=0, **options):
        recipe = runs.recipe_for('smoke', method='acol', options=options, seed=seed)
        return training.build_model(recipe, 16).state_dict()
    apart, again, copied, other = built(branch_b='apart'), built(branch_b='apart'), built(), built(1, branch_b='apart')
    assert all(torch.equal(apart[k], again[k]) for k in apart)
    weights = [k for k in apart if k.startswith('branch_b.') and apart[k].dim() == 4]
    assert weights and not any(torch.equal(apart[k], s[k]) for k in weights for s in (copied, other))
    assert all(torch.equal(apart[k], copied[k]) for k in apart if not k.startswith(('branch_b.', 'head_b.')))


def test_configuration_is_what_the_methods_say(smoke):
    "The table holds every setting of every erasing method."
    table = pd.read_csv(smoke.results/'erasing_configuration.csv')
    assert len(table) == sum(len(methods.METHODS[m].__dataclass_fields__) for m in methods.OFFICIAL)
    for ending in ('md', 'tex'): assert 'Hide-and-Seek' in (smoke.results/f'erasing_configuration.{ending}').read_text()


@pytest.mark.parametrize('name',
    ['erasing_methods_resnet18', 'erasing_methods_resnet18_focus', 'relu_activity', 'relu_coupling', 'relu_correlations'])
def test_result_has_numbers_and_provenance(smoke, name):
    "Each result has its table and says how it came about."
    about = json.loads((smoke.results/f'{name}.json').read_text())
    assert len(pd.read_csv(smoke.results/f'{name}.csv')) and {'settings', 'parameters', 'runs', 'versions', 'revision'} <= set(about)


def test_activity_is_a_share(smoke):
    "Activity and region lie between 0 and 1, for every network and stage."
    table = pd.read_csv(smoke.results/'relu_activity.csv')
    assert len(table) == 10 and table[['positive', 'region']].apply(lambda c: c.between(0, 1)).all(axis=None)
    assert dict(zip(table.network, table.runs)) == dict(init=2, objects=2, scenes=4, pcl=2, pcl_s4=2)
    assert np.isfinite(table[['erf', 'erf_std', 'positive_std', 'top1']]).all(axis=None)


def test_activity_is_recorded_for_every_run(smoke):
    "What C16 compares on scenes, on objects and on each network's own images (U16), for each run."
    rows = results.measurements(smoke.results)
    rows = rows[(rows.arch == 'resnet18') & (rows.quantity == 'positive stage4') & rows.settings.str.contains('coupled=4')]
    own = rows[rows.network.isin(['scenes', 'objects'])].pivot(index=['network', 'seed'], columns='settings', values='value')
    assert list(own) == ['coupled=4', 'coupled=4;images_from=objects', 'coupled=4;images_from=own'] and len(own) == 6
    assert own.loc['scenes', 'coupled=4'].equals(own.loc['scenes', 'coupled=4;images_from=own'].rename('coupled=4'))
    assert own.notna().all(axis=None) and (own.loc['scenes'].nunique(axis=1) == 2).all()
    assert set(rows.network) == {'init', 'objects', 'scenes', 'pcl', 'pcl_s4'}


def test_coupling_is_measured_for_every_run(smoke):
    "C15 rests on two passes of one network; what falls on other images of the batch is a share."
    rows = results.measurements(smoke.results)
    rows = rows[rows.quantity.isin(['coupling', 'running', 'elsewhere'])]
    assert rows.groupby(['network', 'quantity']).size().unstack().eq({'objects': 2, 'pcl': 2, 'scenes': 4}, axis=0).all(axis=None)
    assert rows.images.eq(4).all() and (rows.low <= rows.high).all()
    table = pd.read_csv(smoke.results/'relu_coupling.csv')
    assert len(table) == 3 and table.elsewhere.between(0, 1).all() and {'coupling std', 'running std', 'runs'} <= set(table)


@pytest.mark.parametrize('notebook', ['erasing_methods', 'relu_activity'])
def test_defaults_are_valid(notebook):
    "The parameters cell itself passes."
    assert check(NBS/f'{notebook}.ipynb')['profile'] == 'smoke'


def test_coupling_takes_enough_images():
    "C15 rests on 96 images unless told otherwise."
    assert check(NBS/'relu_activity.ipynb')['coupled'] == 96


@pytest.mark.parametrize('notebook, name, value, named', [
    ('erasing_methods', 'compare', 'hide_and_seek', 'valid: baseline, side'),
    ('erasing_methods', 'compare', 'amloss:official', 'unknown method'),
    ('erasing_methods', 'compare', 'amloss:weight=heavy', 'give a finite number of 0 or more'),
    ('open_choices', 'choices', 'U99', 'unknown open choice'),
    ('erasing_methods', 'arch', 'resnet19', "did you mean 'resnet18'?"),
    ('erasing_methods', 'steps', 1, 'is not a whole number from 3 to 1000'),
    ('erasing_methods', 'tau', 2, 'is not a number from 0 to 1'),
    ('erasing_methods', 'repeats', 0, 'give a number of 1 to 100'),
    ('relu_activity', 'archs', 'vgg', 'unknown architecture'),
    ('relu_activity', 'coupled', 1, 'is not a whole number from 2 to 1024'),
    ('relu_activity', 'scenes', 'places', 'valid: concept_scenes'),
    ('relu_activity', 'images_from', 'places', 'valid: scenes, objects, own'),
])
def test_bad_value_is_refused_in_one_line(notebook, name, value, named):
    "The message says what is valid, on one line; nothing is computed."
    with pytest.raises(core.InputError) as refused: check(NBS/f'{notebook}.ipynb', **{name: value})
    assert named in str(refused.value) and '\n' not in str(refused.value)
