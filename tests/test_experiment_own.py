"""your_own.ipynb as a user runs it: on drawn scenes, and on a folder."""
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from conftest import NBS, check, papermill, printed
from pcl_nb import data, methods, models, training
from pcl_nb.base import core

NOTEBOOK = NBS/'your_own.ipynb'
SMALL = dict(train=32, val=32, size=32, epochs=1)


@pytest.mark.slow
def test_a_folder_of_ones_own(tmp_path):
    "From a folder with a blank in its name to a figure with numbers; what is printed is about this folder."
    for split in ('train', 'val'):
        images = data.draw_concepts('scenes', split, 32, 37)
        for i, (image, label) in enumerate(zip(images.images, images.labels)):
            path = tmp_path/'my scenes'/split/('indoor' if label % 2 else 'outdoor')/f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    done = papermill(NOTEBOOK, tmp_path, scenes=f"folder:{tmp_path/'my scenes'}", **SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path/'results'/'your_own'/'focus_area.csv').stat().st_size and '32 training and 32 validation images of 2 classes' in printed(tmp_path/'executed.ipynb')


@pytest.mark.parametrize('given, named', [
    (dict(scenes='folder:nowhere'), 'does not exist; give folder:PATH'),
    (dict(batch=1), 'batch: 1 is not a whole number from 2 up'),
    (dict(size=8), 'size: 8 is not a whole number from 32'),
    (dict(device='tpu'), "device 'tpu' cannot be used here"),
])
def test_bad_value_is_refused_in_one_line(given, named):
    "The message names what is valid."
    with pytest.raises(core.InputError) as raised: check(NOTEBOOK, **given)
    assert named in str(raised.value) and '\n' not in str(raised.value)


def test_the_loop_in_the_text_trains_as_the_package_does():
    "`losses` with one backward pass gives the gradients of `training.train_step`."
    grads = []
    for own in (True, False):
        torch.manual_seed(0)
        model = models.create_model('resnet18', 5, width=.25, small_input=True, side=True, init='torchvision').double().train()
        x, y = torch.randn(6, 3, 32, 32).double(), torch.arange(6) % 5
        optimizer, method = torch.optim.SGD(model.parameters(), 0.), methods.get_method('pcl')
        if own: sum(method.losses(model, x, y)[1].values()).backward()
        else: training.train_step(model, method, optimizer, x, y)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)
