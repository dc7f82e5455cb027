"""The experiments on the focus area as a user runs them: Figures 1 to 4 and Table 1 at the smallest profile."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import NBS, check, contents, papermill, printed
from pcl_nb import core, focus_area, plots

NAMES = 'focus_area', 'qualitative', 'target_class'


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "All three experiments in one store: the folder, and what was in it when they had ended."
    folder = tmp_path_factory.mktemp('focus')
    for name, given in dict(focus_area=dict(archs='resnet18,shufflenet_v2_x1_5', seeds=2), qualitative={},
        target_class=dict(archs='resnet18', seeds=2)).items():
        done = papermill(NBS/f'{name}.ipynb', folder, profile='smoke', **given)
        assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(folder=folder, results=folder/'results'/'smoke', files=contents(folder/'results'))


def read(smoke, name):
    "The numbers and the provenance of a result."
    return pd.read_csv(smoke.results/f'{name}.csv'), json.loads((smoke.results/f'{name}.json').read_text())


@pytest.mark.parametrize('name',
    ['fig1', 'fig1_distances', 'fig2', 'fig3', 'focus_evidence', 'focus_coverage', 'focus_claims', 'fig4_resnet18',
        'fig4_groups_resnet18', 'fig4_claims_resnet18', 'table1', 'table1_claims'])
def test_result_has_numbers_and_provenance(smoke, name):
    "Each result has its table and says how it came about; those that are pictures have something on them."
    table, about = read(smoke, name)
    assert len(table) and {'settings', 'parameters', 'runs', 'versions', 'revision'} <= set(about)
    assert about['versions'] == core.versions()
    if name in ('fig1', 'fig2', 'fig3', 'focus_evidence', 'fig4_resnet18'):
        with Image.open(smoke.results/f'{name}.png') as picture:
            assert min(picture.size) > 100 and len(np.unique(np.array(picture.convert('L')))) > 10


def test_distributions_are_whole(smoke):
    "Shares of every distribution add up to 1, and figure 1 has both schemes, data sets and seeds."
    for name in ('fig1', 'fig2', 'fig3'):
        table, _ = read(smoke, name)
        assert np.allclose(table.groupby(['arch', 'network', 'scheme', 'seed', 'data']).share.sum(), 1, atol=1e-4)
    one, two, three = (read(smoke, name)[0] for name in ('fig1', 'fig2', 'fig3'))
    assert set(one.scheme) == set(plots.FIG1) and set(one.data) == {'scenes', 'objects'} and one.seed.nunique() == 2
    assert set(two.network) == set(plots.FIG2) and two.arch.nunique() == 2
    assert set(three.network) == set(plots.FIG3) and set(three.arch) == {'resnet18'}


def test_distances_are_those_of_the_drawn_distributions(smoke):
    "Summed over bins they are total variations of the pairs of runs in figure 1's table, and stand in the evidence of C1."
    table, distances = (read(smoke, name)[0] for name in ('fig1', 'fig1_distances'))
    distances = distances.groupby('data')[['runs', 'schemes']].sum()
    for data in ('scenes', 'objects'):
        rows = table[table.data == data].pivot(index=['scheme', 'seed'], columns='bin', values='share')
        far = {(a, b): abs(rows.loc[a] - rows.loc[b]).sum()/2 for a in rows.index for b in rows.index if a < b}
        for column, alike in dict(runs=True, schemes=False).items():
            mean = np.mean([v for (a, b), v in far.items() if (a[0] == b[0]) == alike])
            assert np.isclose(distances[column][data], mean, atol=1e-4)
    evidence = read(smoke, 'focus_claims')[0].set_index('claim').evidence['C1']
    assert f"runs {distances.runs['scenes']:.2f}, schemes {distances.schemes['scenes']:.2f} of the images" in evidence


def test_single_images_have_a_control(smoke):
    "C7's second baseline is figure 1's of the next seed; its groups stand beside PCL's, its shares in the evidence."
    groups, about = read(smoke, 'fig4_groups_resnet18')
    assert about['runs']['another seed'] == read(smoke, 'fig1')[1]['runs']['resnet18 scenes simple 1']
    assert groups.groupby('network').images.sum().to_dict() == {'pcl': 64, 'another seed': 64}
    assert 'between two baselines' in read(smoke, 'fig4_claims_resnet18')[0].evidence[0]


def test_evidence_is_measured_for_every_rule_and_network(smoke):
    "Recall and precision are shares, and a region's chance levels stand beside."
    table, _ = read(smoke, 'focus_evidence')
    assert set(table.rule) == set(focus_area.RULES) and set(table.network) == set(plots.EVIDENCE)
    assert table[['coverage', 'recall', 'precision', 'evidence']].apply(lambda c: c.between(0, 1)).all(axis=None)


def test_table_is_read_alike_in_every_form(smoke):
    "Markdown and LaTeX say what the CSV holds."
    runs, _ = read(smoke, 'table1')
    mean = 100*runs[runs.target == 'prediction'].top1.mean()
    for ending in ('md', 'tex'): assert f'{mean:.2f}' in (smoke.results/f'table1.{ending}').read_text()
    assert len(runs) == 4 and set(runs.target) == {'truth', 'prediction'}


def test_repeat_trains_nothing_and_gives_the_same_numbers(smoke):
    "A second run of each takes the networks from the store and ends with the same tables."
    done = papermill(NBS/'focus_area.ipynb', smoke.folder, profile='smoke', archs='resnet18,shufflenet_v2_x1_5', seeds=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'to be trained: none' in printed(smoke.folder/'executed.ipynb')
    now = contents(smoke.folder/'results')
    assert [n for n in smoke.files if n.endswith('.csv') and now[n] != smoke.files[n]] == []


def test_part_run_again_keeps_the_rest(smoke):
    "A run of one figure and one architecture changes no number, and says where the rows come from that it did not obtain."
    done = papermill(NBS/'focus_area.ipynb', smoke.folder, profile='smoke', archs='shufflenet_v2_x1_5', figure='2')
    assert done.returncode == 0, done.stderr[-3000:]
    now = contents(smoke.folder/'results')
    assert [n for n in smoke.files if n.endswith('.csv') and now[n] != smoke.files[n]] == []
    others = read(smoke, 'fig2')[1]['others']
    assert [r for s in others for r in s['rows']] == ['resnet18 scenes',
        'resnet18 pcl'] and all({'runs', 'revision', 'versions'} <= set(s) for s in others)


def test_verdicts_of_several_runs_cover_both_choices(smoke, tmp_path):
    "With repeats there are several runs of each network, and rows of other architectures stay those of one run."
    results = tmp_path/'results'/'smoke'
    shutil.copytree(smoke.results, results); (tmp_path/'runs').symlink_to(smoke.folder/'runs')
    done = papermill(NBS/'focus_area.ipynb', tmp_path, profile='smoke', archs='shufflenet_v2_x1_5', figure='2', seeds=2, repeats=2)
    assert done.returncode == 0, done.stderr[-3000:]
    figure, table = (pd.read_csv(results/f'{name}.csv') for name in ('fig2', 'focus_comparisons'))
    assert figure.groupby('arch').seed.nunique().to_dict() == {'resnet18': 1, 'shufflenet_v2_x1_5': 2}
    assert table[table.arch == 'resnet18'].runs.eq(1).all() and table[table.arch == 'shufflenet_v2_x1_5'].runs.eq(2).all()
    claims = pd.read_csv(results/'focus_claims.csv').set_index(['arch', 'claim'])
    assert '2 runs' in claims.evidence['shufflenet_v2_x1_5', 'C3'] and 'runs' not in claims.evidence['resnet18', 'C3']


def test_another_architecture_joins_the_table(smoke):
    "Table 1 of a second architecture keeps the rows of the first."
    before, _ = read(smoke, 'table1')
    done = papermill(NBS/'target_class.ipynb', smoke.folder, profile='smoke', archs='shufflenet_v2_x1_5', seeds=2)
    assert done.returncode == 0, done.stderr[-3000:]
    now, claims = read(smoke, 'table1')[0], read(smoke, 'table1_claims')[0]
    assert now[now.arch == 'resnet18'].reset_index(drop=True).equals(before) and set(claims.arch) == {'resnet18', 'shufflenet_v2_x1_5'}


def test_own_images_are_shown(smoke, tmp_path):
    "Pictures of any size, by file and by folder; the project's own figure stays as it is."
    (tmp_path/'some').mkdir()
    for i, size in enumerate([(40, 60), (90, 50), (28, 28)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)).save(tmp_path/'some'/f'{i}.png')
    done = papermill(NBS/'qualitative.ipynb', smoke.folder, profile='smoke', images=f"{tmp_path/'some'},{tmp_path/'some'/'1.png'}",
        groups=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(pd.read_csv(smoke.results/'own_images.csv')) == 4
    assert (smoke.results/'fig4_resnet18.csv').read_bytes() == smoke.files['smoke/fig4_resnet18.csv']


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
    ('focus_area', 'seeds', 0, 'is not a whole number from 1 to 100'),
    ('focus_area', 'repeats', 0, 'is not a whole number from 1 to 100'),
    ('focus_area', 'bins', 1, 'is not a whole number from 2 to 1000'),
    ('focus_area', 'objects', 'folder:nowhere', 'give folder:PATH'),
    ('focus_area', 'pcl', 'tau=2', 'a number from 0 to 1'),
    ('focus_area', 'taw', .5, "did you mean 'tau'?"),
    ('qualitative', 'arch', 'resnet19', "did you mean 'resnet18'?"),
    ('qualitative', 'images', 'nowhere.jpg', "'nowhere.jpg' does not exist"),
    ('qualitative', 'groups', 0, 'is not a whole number from 1 to 12'),
    ('qualitative', 'rule', 'half', 'valid: threshold'),
    ('target_class', 'archs', '', 'give at least one'),
    ('target_class', 'method', 'baseline', 'valid: pcl, ipc, cpc, pcl_s4'),
    ('target_class', 'pcl', 'target=truth', 'leave it out'),
    ('target_class', 'seeds', 1.5, 'is not a whole number'),
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
