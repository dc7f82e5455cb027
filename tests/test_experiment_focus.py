"""The experiments on the focus area as a user runs them: Figures 1 to 4 and Table 1 at the smallest profile."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import NBS, check, contents, papermill, printed
from pcl_nb import claims, focus_area, plots, reproduce
from pcl_nb.base import core
from pcl_nb.lab import results

NAMES = 'focus_area', 'qualitative', 'target_class'


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "All three experiments in one store: the folder, and what was in it when they had ended."
    folder = tmp_path_factory.mktemp('focus')
    for name, given in dict(focus_area=dict(archs='resnet18,shufflenet_v2_x1_5'), qualitative={},
        target_class=dict(archs='resnet18')).items(): run(name, folder, repeats=2, **given)
    return SimpleNamespace(folder=folder, results=folder/'out', files=contents(folder/'out'))


def run(name, folder, out=None, **given):
    "Run an experiment at the smallest profile; its results go to `out`."
    done = papermill(NBS/f'{name}.ipynb', folder, profile='smoke', out=out or folder/'out', **given)
    assert done.returncode == 0, done.stderr[-3000:]


def read(smoke, name):
    "The numbers and the provenance of a result."
    return pd.read_csv(smoke.results/f'{name}.csv'), json.loads((smoke.results/f'{name}.json').read_text())


def seeds(table, **of):
    "The seeds of some rows."
    return sorted(set(table[np.logical_and.reduce([table[k] == v for k, v in of.items()])].seed))


@pytest.mark.parametrize('name',
    ['fig1', 'fig1_distances', 'fig2', 'fig3', 'focus_evidence', 'fig4_resnet18', 'fig4_groups_resnet18', 'table1'])
def test_result_has_numbers_and_provenance(smoke, name):
    "Each result has its table and says how it came about; those that are pictures have something on them."
    table, about = read(smoke, name)
    assert len(table) and {'settings', 'parameters', 'runs', 'versions', 'revision'} <= set(about)
    assert about['versions'] == core.versions()
    if name in ('fig1', 'fig2', 'fig3', 'focus_evidence', 'fig4_resnet18'):
        with Image.open(smoke.results/f'{name}.png') as picture:
            assert min(picture.size) > 100 and len(np.unique(np.array(picture.convert('L')))) > 10


def test_every_run_is_measured(smoke):
    "A row a run and quantity, with the interval over images of a mean; the baseline has twice as many runs."
    table = results.measurements(smoke.results)
    assert set(table.quantity) == {'top1', 'focus', 'focus on objects', 'shrunk', 'misled'} and (table.settings == '').all()
    assert table.run.notna().all() and set(table.data) == {'concept_scenes'}
    for quantity in ('top1', 'focus'):
        for network, many in dict(scenes=4, pcl=2, ipc=2, init=1).items():
            assert seeds(table, arch='resnet18', network=network, scheme='simple', quantity=quantity) == [*range(many)]
    assert seeds(table, network='pcl:target=truth', quantity='top1') == [0, 1]
    objects = table[table.quantity == 'focus on objects']
    assert objects.groupby('scheme').seed.nunique().to_dict() == dict(simple=4, complex=2) and set(objects.network) == {'scenes'}
    focus = table[table.quantity == 'focus']
    assert (focus.low <= focus.value).all() and (focus.value <= focus.high).all() and table[table.quantity == 'top1'].low.isna().all()


def test_distributions_are_whole(smoke):
    "Shares of every distribution add up to 1, and the figures have their schemes, data sets, networks and runs."
    for name in ('fig1', 'fig2', 'fig3'):
        table, _ = read(smoke, name)
        assert np.allclose(table.groupby(['arch', 'network', 'scheme', 'seed', 'data']).share.sum(), 1, atol=1e-4)
    one, two, three = (read(smoke, name)[0] for name in ('fig1', 'fig2', 'fig3'))
    assert set(one.scheme) == set(plots.FIG1) and set(one.data) == {'scenes', 'objects'}
    assert [seeds(one, scheme=s) for s in ('simple', 'complex')] == [[0, 1, 2, 3], [0, 1]]
    assert set(two.network) == set(plots.FIG2) and two.arch.nunique() == 2
    assert [seeds(two, network=n) for n in plots.FIG2] == [[0, 1, 2, 3], [0, 1]]
    assert set(three.network) == set(plots.FIG3) and set(three.arch) == {'resnet18'}


def test_mean_of_a_distribution_is_the_measurement(smoke):
    "What is recorded as focus area is the mean of what the figure shows, to the width of a bin."
    shares = read(smoke, 'fig2')[0]
    means = shares.assign(of=shares.share*(shares.bin + .5)/20).groupby(['arch', 'network', 'seed']).of.sum()
    focus = results.measurements(smoke.results).query("quantity == 'focus' and scheme == 'simple'").set_index(['arch', 'network', 'seed'])
    assert np.allclose(means, focus.value[means.index], atol=.026)


def test_distances_are_those_of_the_drawn_distributions(smoke):
    "Summed over bins they are total variations of the pairs of runs in figure 1's table."
    table, distances = (read(smoke, name)[0] for name in ('fig1', 'fig1_distances'))
    distances = distances.groupby('data')[['runs', 'schemes']].sum()
    for data in ('scenes', 'objects'):
        rows = table[table.data == data].pivot(index=['scheme', 'seed'], columns='bin', values='share')
        far = {(a, b): abs(rows.loc[a] - rows.loc[b]).sum()/2 for a in rows.index for b in rows.index if a < b}
        for column, alike in dict(runs=True, schemes=False).items():
            mean = np.mean([v for (a, b), v in far.items() if (a[0] == b[0]) == alike])
            assert np.isclose(distances[column][data], mean, atol=1e-4)


def test_single_images_have_a_control(smoke):
    "Shares of PCL's runs against the baseline of the same seed, and of each baseline against the next."
    table = results.measurements(smoke.results).query("quantity in ['shrunk', 'misled']")
    assert [seeds(table, network=n) for n in ('pcl', 'scenes')] == [[0, 1], [0, 1, 2, 3]]
    assert table.value.between(0, 1).all() and (table.low <= table.value).all() and (table.images == 64).all()
    groups, about = read(smoke, 'fig4_groups_resnet18')
    assert groups.groupby('network').images.sum().to_dict() == {'pcl': 64, 'control': 64}
    assert about['runs']['resnet18 scenes 1'] == read(smoke, 'fig1')[1]['runs']['resnet18 scenes simple 1']


def test_control_of_one_run_is_a_second_baseline():
    "One run of each network: the control is trained all the same."
    recipes = reproduce.recipes_of(reproduce.Job('qualitative', dict(profile='smoke')))
    assert list(recipes) == [('resnet18', 'scenes', 0), ('resnet18', 'scenes', 1), ('resnet18', 'pcl', 0)]


def test_evidence_is_measured_for_every_rule_and_network(smoke):
    "Recall and precision are shares, and a region's chance levels stand beside."
    table, _ = read(smoke, 'focus_evidence')
    assert set(table.rule) == set(focus_area.RULES) and set(table.network) == set(plots.EVIDENCE)
    assert table[['coverage', 'recall', 'precision', 'evidence']].apply(lambda c: c.between(0, 1)).all(axis=None)


def test_table_is_read_alike_in_every_form(smoke):
    "Markdown and LaTeX hold what the CSV holds, and none of the paper's numbers."
    runs, _ = read(smoke, 'table1')
    mean = 100*runs[runs.target == 'prediction'].top1.mean()
    for ending in ('md', 'tex'):
        text = (smoke.results/f'table1.{ending}').read_text()
        assert f'{mean:.2f}' in text and '49.52' not in text and 'paper' not in text
    assert len(runs) == 4 and set(runs.target) == {'truth', 'prediction'}


def test_repeat_trains_nothing_and_gives_the_same_numbers(smoke):
    "A second run of each takes the networks from the store and ends with the same tables, measurements included."
    run('focus_area', smoke.folder, archs='resnet18,shufflenet_v2_x1_5', repeats=2)
    assert 'to be trained: none' in printed(smoke.folder/'executed.ipynb')
    now = contents(smoke.results)
    assert 'measurements.csv' in now and [n for n in smoke.files if n.endswith('.csv') and now[n] != smoke.files[n]] == []


def test_figures_are_of_one_run_of_the_notebook_and_measurements_of_all(smoke, tmp_path):
    "Another part of the figures, another architecture: the picture holds what was asked for, the table of measurements everything."
    out = tmp_path/'out'
    shutil.copytree(smoke.results, out)
    before = results.measurements(out)
    run('focus_area', smoke.folder, out, archs='shufflenet_v2_x1_5', figure='2')
    figure = pd.read_csv(out/'fig2.csv')
    assert set(figure.arch) == {'shufflenet_v2_x1_5'} and set(figure.seed) == {0}
    assert results.measurements(out).equals(before)
    run('target_class', smoke.folder, out, archs='shufflenet_v2_x1_5')
    assert set(pd.read_csv(out/'table1.csv').arch) == {'shufflenet_v2_x1_5'}
    assert set(results.measurements(out).query("network == 'pcl:target=truth'").arch) == {'resnet18', 'shufflenet_v2_x1_5'}


def test_other_settings_are_recorded_apart(smoke, tmp_path):
    "Another threshold gives rows of its own, which no verdict rests on."
    run('focus_area', smoke.folder, tmp_path, archs='resnet18', figure='2', tau=.8)
    table = results.measurements(tmp_path)
    assert set(table.settings) == {'tau=0.8'} and len(claims.judge(table)) == 0


def test_own_images_are_shown(smoke, tmp_path):
    "Pictures of any size, by file and by folder; the project's own figure stays as it is."
    (tmp_path/'some').mkdir()
    for i, size in enumerate([(40, 60), (90, 50), (28, 28)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)).save(tmp_path/'some'/f'{i}.png')
    run('qualitative', smoke.folder, images=f"{tmp_path/'some'},{tmp_path/'some'/'1.png'}", groups=2)
    assert len(pd.read_csv(smoke.results/'own_images.csv')) == 4
    assert (smoke.results/'fig4_resnet18.csv').read_bytes() == smoke.files['fig4_resnet18.csv']
    assert (smoke.results/'measurements.csv').read_bytes() == smoke.files['measurements.csv']


@pytest.mark.parametrize('name', NAMES)
def test_defaults_are_valid(name):
    "The parameters cell itself passes."
    assert check(NBS/f'{name}.ipynb')['profile'] == 'smoke'


@pytest.mark.parametrize('notebook, name, value, named', [
    ('focus_area', 'figure', '4', 'valid: 1, 2, 3, evidence, all'),
    ('focus_area', 'archs', 'resnet19', "did you mean 'resnet18'?"),
    ('focus_area', 'rule', 'half', 'valid: threshold, energy, sufficient'),
    ('focus_area', 'tau', 1.5, '1.5 is not a number from 0 to 1'),
    ('focus_area', 'tau', -.1, 'is not a number from 0 to 1'),
    ('focus_area', 'tau', float('nan'), 'is not a number from 0 to 1'),
    ('focus_area', 'tau', True, 'is not a number from 0 to 1'),
    ('focus_area', 'stage', 'stage5', 'valid: stage4'),
    ('focus_area', 'seeds', 2, "unknown parameter 'seeds'"),
    ('focus_area', 'repeats', 0, 'give a number of 1 to 100'),
    ('focus_area', 'repeats', '3,resnet19:5', "did you mean 'resnet18'?"),
    ('focus_area', 'bins', 1, 'is not a whole number from 2 to 1000'),
    ('focus_area', 'objects', 'folder:nowhere', 'give folder:PATH'),
    ('focus_area', 'pcl', 'tau=2', 'a number from 0 to 1'),
    ('focus_area', 'taw', .5, "did you mean 'tau'?"),
    ('qualitative', 'arch', 'resnet19', "did you mean 'resnet18'?"),
    ('qualitative', 'images', 'nowhere.jpg', "'nowhere.jpg' does not exist"),
    ('qualitative', 'repeats', '101', 'give a number of 1 to 100'),
    ('qualitative', 'groups', 0, 'is not a whole number from 1 to 12'),
    ('qualitative', 'rule', 'half', 'valid: threshold'),
    ('target_class', 'archs', '', 'give at least one'),
    ('target_class', 'method', 'baseline', 'valid: pcl, ipc, cpc, pcl_s4'),
    ('target_class', 'pcl', 'target=truth', 'leave it out'),
    ('target_class', 'repeats', 1.5, 'give a number of 1 to 100'),
])
def test_bad_value_is_refused_in_one_line(notebook, name, value, named):
    "The message says what is valid, on one line; nothing is computed."
    with pytest.raises(core.InputError) as refused: check(NBS/f'{notebook}.ipynb', **{name: value})
    assert named in str(refused.value) and '\n' not in str(refused.value)


def test_bad_images_are_refused(tmp_path):
    "An empty folder and a file that does not decode: one line each."
    (tmp_path/'empty').mkdir(); (tmp_path/'not.jpg').write_bytes(b'no image')
    for path, named in ((tmp_path/'empty', 'holds no image'), (tmp_path/'not.jpg', 'is not an image that can be read')):
        with pytest.raises(core.InputError, match=named): check(NBS/'qualitative.ipynb', images=str(path))
