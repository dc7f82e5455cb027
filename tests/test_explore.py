"""The explorer without a browser: what it refuses, and what papermill leaves behind."""
import json

import pandas as pd
import pytest
from PIL import Image

from conftest import NBS, check, papermill
from pcl_nb.base import core


@pytest.mark.parametrize('name, value, named', [
    ('arch', 'resnet19', "did you mean 'resnet18'?"), ('image', -1, 'is not a whole number from 0'),
    ('images', 'nowhere.jpg', "'nowhere.jpg' does not exist"),
    ('rule', 'half', 'valid: threshold'), ('tau', 1.5, 'is not a number from 0 to 1')])
def test_bad_value_is_refused_in_one_line(name, value, named):
    "The message names the parameter and what is valid."
    with pytest.raises(core.InputError, match=f'parameter {name}: ') as e: check(NBS/'explore.ipynb', **{name: value})
    assert named in str(e.value) and '\n' not in str(e.value)


@pytest.mark.slow
def test_papermill_leaves_the_view(tmp_path):
    "Own images by their number; two networks' numbers, the picture, the time of an update; a number too large is refused."
    for i, colour in enumerate(('teal', 'gold')): Image.new('RGB', (60, 40 + i), colour).save(tmp_path/f'{colour}.png')
    given = dict(profile='smoke', workers=1, images=f"{tmp_path/'gold.png'},{tmp_path/'teal.png'}")
    done = papermill(NBS/'explore.ipynb', tmp_path, image=1, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    base = tmp_path/'results'/'smoke'/'explore_resnet18'
    table, about = pd.read_csv(f'{base}.csv'), json.loads(base.with_suffix('.json').read_text())
    assert set(table.network) == {'baseline', 'PCL'} and len(table) == 10 and set(table.image) == {'teal.png'} and table.coverage.between(0,
        1).all()
    assert about['parameters']['image'] == 1 and 0 < about['update_seconds'] < 1
    with Image.open(base.with_suffix('.png')) as picture: assert picture.width > 800
    done = papermill(NBS/'explore.ipynb', tmp_path, image=2, **given)
    assert done.returncode and 'parameter image: 2 does not exist; give 0 to 1' in done.stderr
