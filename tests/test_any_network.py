"""Networks by name on photographs: any_network.ipynb, pcl-measure, and what they refuse."""
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import NBS, ROOT, check, papermill
from pcl_nb import networks
from pcl_nb.base import core
from pcl_nb.lab import survey

FAMILIES = ('efficientnet_lite0', 'timm:convnext_atto@none', 'timm:swin_tiny_patch4_window7_224@none',
    'timm:vit_tiny_patch16_224@none', 'torchvision:vgg11@none', 'torchvision:regnet_y_400mf@none')


def test_seven_families_in_one_table(tmp_path):
    "Networks with maps, maps with channels last, tokens; an untrained head of zeros has no focus area, and says so."
    done = papermill(NBS/'any_network.ipynb', tmp_path, networks=','.join(FAMILIES), images=2, bootstrap=10, shown=2)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path/'results'/'any_network'
    table = pd.read_csv(folder/'networks.csv')
    assert set(table.network) == set(FAMILIES)
    assert table.area20.le(table.area99).all() and table.share.between(0, 1).all() and (table.images == 2).all()
    assert (table.height == 224).all() and table.images_per_second.gt(0).all()
    real = table[table.network == 'efficientnet_lite0']
    assert real.field_height.tolist() == [7, 19, 67, 339, math.inf] and real.focus.tolist()[-1] == 'CAM'
    assert set(table.kind) == {'maps', 'channels last', 'tokens'}
    assert set(pd.read_csv(folder/'any_network_differences.csv').network) == set(FAMILIES[1:])
    assert json.loads((folder/'networks.json').read_text())['files'] == ['grace_hopper.jpg', 'motorcycle_left.png']
    with Image.open(folder/'any_network.png') as picture: assert picture.width > 600


def test_command(tmp_path, capsys):
    "Tables, an overlay a photograph, an impact map a layer; the same numbers as the functions give."
    for i, colour in enumerate(('teal', 'gold')): Image.new('RGB', (90 + i, 60), colour).save(tmp_path/f'{colour}.png')
    photos = [*survey.sample_photographs()[:1], tmp_path/'gold.png', tmp_path/'teal.png']
    args = ['efficientnet_lite0', '--photos', ','.join(map(str, photos)), '--out', str(tmp_path/'out'), '--device', 'cpu']
    assert survey.main([*args, '--quiet', '--bootstrap', '10', '--batch', '2']) == 0
    covered = pd.read_csv(tmp_path/'out'/'coverage.csv')
    assert covered.class_name[0] == 'military uniform' and covered.file.tolist() == list(map(str, photos))
    for name in covered.overlay:
        with Image.open(tmp_path/'out'/name) as picture: assert picture.size == (224, 224)
    net = networks.network('efficientnet_lite0')
    x = torch.cat([x for _, _, x in survey.photographs(photos, net)])
    focus = networks.network_focus(net, x)
    assert covered.coverage.to_numpy() == pytest.approx(focus.coverage.numpy(), abs=1e-4)
    rows = pd.read_csv(tmp_path/'out'/'networks.csv')
    assert rows.erf.tolist()[2] == networks.erf_report(networks.layer_impact(net, x, '_blocks.4'))['erf']
    assert len(list((tmp_path/'out'/'efficientnet_lite0').glob('impact_*.png'))) == len(rows)
    assert 'efficientnet_lite0' in capsys.readouterr().out


PHOTOS = ROOT.parent/'shared'/'data'/'photos'/'scenes'

@pytest.mark.skipif(not PHOTOS.exists(), reason='no photographs to develop against')
def test_scenes_of_photographs():
    "A real network on real scenes: coverage is defined, and the deeper the layer, the larger its ERF."
    files = survey.chosen_photographs(str(PHOTOS), 8)
    found = survey.survey('efficientnet_lite0', files, device='cpu', progress=False, theory=False, replicates=10)
    sizes = [r['erf'] for r in found.rows]
    assert len(files) == 8 and sizes == sorted(sizes) and all(0 < c < 1 for c in found.coverage)


@pytest.mark.parametrize('name, value, said', [
    ('networks', '', "unknown network ''"), ('networks', 'torchvision:resnet19', 'nearest of 80: resnet18'),
    ('networks', 'resnet18', 'torchvision:resnet18'), ('networks', 'file:nowhere.pth@resnet18', 'is missing'),
    ('photos', 'nowhere.jpg', "'nowhere.jpg' does not exist"), ('center', '3', 'row:column'),
    ('center', '200:0', 'positions'), ('layers', 'classifier', 'no map'), ('tau', 2, 'is not a number from 0 to 1'),
    ('rule', 'half', 'valid: threshold'), ('size', -1, 'is not a whole number'), ('images', 1.5, 'is not a whole number')])
def test_one_line_names_what_is_valid(name, value, said, capsys):
    "In the command, exit code 2 and the same line."
    args = [value] if name == 'networks' else ['torchvision:squeezenet1_1@none', f'--{name}', str(value)]
    options = ['--device', 'cpu', '--quiet', *(['--images', '1'] if name != 'images' else [])]
    with pytest.raises(SystemExit) as e: survey.main([*args, *options])
    last = capsys.readouterr().err.strip().splitlines()[-1].replace('invalid int value', 'is not a whole number')
    assert e.value.code == 2 and last.startswith('pcl-measure: error: ') and said in last


def test_damaged_photograph_is_named(tmp_path, capsys):
    (tmp_path/'a.jpg').write_bytes(b'no picture')
    with pytest.raises(SystemExit): survey.main(['torchvision:squeezenet1_1@none', '--photos', str(tmp_path), '--quiet'])
    assert 'a.jpg' in capsys.readouterr().err.strip().splitlines()[-1]


def test_experiments_that_train_say_where_a_name_belongs():
    "erf.ipynb and focus_area.ipynb compare networks that they train."
    with pytest.raises(core.InputError, match='papermill nbs/any_network.ipynb'): check(NBS/'erf.ipynb', arch='torchvision:resnet50')
    with pytest.raises(core.InputError, match='papermill nbs/any_network.ipynb'):
        check(NBS/'focus_area.ipynb', archs='resnet18,places365:resnet18')


def test_own_network_by_name(tmp_path):
    "your_own.ipynb trains PCL from pretrained weights."
    given = dict(network='efficientnet_lite0', size=96, train=64, val=32, epochs=1)
    done = papermill(NBS/'your_own.ipynb', tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path/'results'/'your_own'/'focus_area.csv').stat().st_size
