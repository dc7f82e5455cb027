"""The experiments on erasing methods and on ReLU activity as a user runs them, at the smallest profile."""
import json
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import NBS, check, contents, papermill
from pcl_nb import claims, core, methods, reproduce, results, training


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Both experiments in one store: the folder, and what was in it when they had ended."
    folder = tmp_path_factory.mktemp('erasing')
    for name, given in dict(erasing_methods=dict(repeats=2, steps=3), relu_activity=dict(archs='resnet18', coupled=4)).items():
        done = papermill(NBS/f'{name}.ipynb', folder, profile='smoke', out=folder/'out', **given)
        assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, results=folder/'out', files=contents(folder/'out'))


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
    "Each alternative differs from the default in what it is about; the default's recipe is the base's."
    recipes = reproduce.recipes_of(reproduce.Job('open_choices', dict(profile='smoke')))
    for (network, choice), r in recipes.items():
        if not choice or network in ('acol', 'complex'): continue
        changed = {f.name for f in fields(r) if getattr(r, f.name) != getattr(recipes[network, ''], f.name)}
        assert changed <= ({'init'} if choice.startswith('U14') else {'options'}), (network, choice)
    options = {c: r.options for (n, c), r in recipes.items() if n in ('pcl', 'acol')}
    for choice, want in {'U13 apart': {}, 'U13 running': dict(erased_norm='running'), 'U13 mixed': dict(erased_norm='mixed'),
                         'U17 after, PCL': dict(normalize='after'), 'U18 copy': {}, 'U18 apart': dict(branch_b='apart')}.items():
        assert options[choice] == want
    assert {recipes[n, f'U14 {i}'].init for n in ('init', 'objects', 'scenes', 'pcl') for i in ('torchvision',)} == {'torchvision'}


def test_second_branch_apart_is_fixed_by_the_seed():
    "A recipe gives the same branch B each time, another than the copy's and another seed's; branch A is the copy's."
    def built(seed=0, **options):
        recipe = training.recipe_for('smoke', method='acol', options=options, seed=seed)
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
    ['erasing_methods_resnet18', 'erasing_methods_resnet18_focus', 'relu_activity', 'relu_comparisons', 'relu_coupling',
        'relu_correlations', 'relu_claims'])
def test_result_has_numbers_and_provenance(smoke, name):
    "Each result has its table and says how it came about."
    about = json.loads((smoke.results/f'{name}.json').read_text())
    assert len(pd.read_csv(smoke.results/f'{name}.csv')) and {'settings', 'parameters', 'runs', 'versions', 'revision'} <= set(about)


def test_activity_is_a_share(smoke):
    "Activity and region lie between 0 and 1, for every network and stage."
    table = pd.read_csv(smoke.results/'relu_activity.csv')
    assert len(table) == 10 and table[['positive', 'region']].apply(lambda c: c.between(0, 1)).all(axis=None)


def test_every_choice_of_images_stands_beside_the_chosen_one(smoke):
    "C16 is measured on scenes, on objects and on each network's own images (U16); the verdict rests on the chosen ones."
    table = pd.read_csv(smoke.results/'relu_comparisons.csv')
    for what in ('positive', 'region'):
        rows = table[(table.a == 'scenes') & (table.b == 'objects') & (table.stage == what)]
        assert rows.images_from.tolist() == ['scenes', 'objects', 'own'] and rows.chosen.tolist() == [True, False, False]
        assert rows.difference.nunique() == 3 and rows.learned.notna().all()
    compared = set(zip(table.a, table.stage))
    assert {('pcl', 'positive'), ('pcl', 'positive at stage 3'), ('pcl_s4', 'positive')} <= compared


def test_coupling_is_compared_with_the_same_statistics_held_constant(smoke):
    "C15 rests on two passes of one network; what falls on other images of the batch is a share."
    verdicts = pd.read_csv(smoke.results/'relu_claims.csv').set_index('claim')
    assert list(verdicts.index) == ['C22', 'C15', 'C16', 'C18'] and 'running' not in verdicts.evidence['C15']
    assert verdicts.evidence['C15'].count('coupled - ') == 3 and 'region' not in verdicts.evidence['C16']
    table = pd.read_csv(smoke.results/'relu_coupling.csv')
    assert table.images.eq(4).all() and len(table) == 3 and table.elsewhere.between(0, 1).all()
    assert (table.elsewhere_low <= table.elsewhere).all() and (table.elsewhere <= table.elsewhere_high).all()


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
