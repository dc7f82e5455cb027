"""Public weights: files of the same form as the real ones, served on the loopback address."""
import hashlib
import os
import pickle
import struct
import threading
from collections import namedtuple
from dataclasses import asdict, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image

from conftest import NBS, papermill, printed
from pcl_nb import models, reproduce, runs, training
from pcl_nb.base import core, weights


class Quiet(SimpleHTTPRequestHandler):
    "Serves a folder; a name that begins with `short-` promises more than it sends."
    def log_message(self, *args): pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    "An empty folder that is served, and an empty cache; what is asked for goes there."
    served, cache = tmp_path/'served', tmp_path/'cache'
    served.mkdir()
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=served)) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        monkeypatch.setenv('PCL_NB_WEIGHTS_URL', f'http://127.0.0.1:{s.server_port}')
        monkeypatch.setenv('PCL_NB_WEIGHTS', str(cache))
        yield served, cache
        s.shutdown()


def vouch(cache, path):
    "Say that a served file is trusted."
    cache.mkdir(exist_ok=True)
    with open(cache/'SHA256SUMS', 'a') as f: f.write(f'{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n')


def csail(path, arch='resnet18', zipped=False):
    "A checkpoint as CSAIL's: parallel names, other entries beside the weights, the format before zip files."
    torch.manual_seed(1)
    net = getattr(torchvision.models, arch)(num_classes=365)
    state = {f'module.{k}': v for k, v in net.state_dict().items() if 'num_batches_tracked' not in k}
    torch.save(dict(epoch=90, arch=arch, state_dict=state, best_prec1=np.float64(54.7)), path, _use_new_zipfile_serialization=zipped)
    return net.eval()


@pytest.mark.parametrize('zipped', [False, True])
def test_places365_weights_are_fetched_once_and_fit(server, zipped):
    "Features and logits are those of the published network; a second time nothing is fetched."
    served, cache = server
    net = csail(served/'resnet18_places365.pth.tar', zipped=zipped)
    vouch(cache, served/'resnet18_places365.pth.tar')
    model = models.create_model('resnet18', 365, weights='places365').eval()
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model(x), net(x))
    (served/'resnet18_places365.pth.tar').unlink()
    torch.testing.assert_close(models.create_model('resnet18', 365, weights='places365').eval()(x), net(x))
    assert sorted(p.name for p in cache.iterdir()) == ['SHA256SUMS', 'resnet18_places365.pth.tar']


class Python2(pickle._Pickler):
    "Writes what Python 2 and a PyTorch of 2017 wrote: strings as bytes, tensors without gradients, storages that lay on a GPU."
    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        raw = text.encode('latin1')
        self.write(b'U' + bytes([len(raw)]) + raw)
        self.memoize(text)
    dispatch[str] = save_str

    def save_bytes(self, raw): self.save_str(raw.decode('latin1'))       # one type in Python 2
    dispatch[bytes] = save_bytes

    def reducer_override(self, o):
        if not isinstance(o, torch.Tensor): return NotImplemented
        self.storages[str(id(o))] = o
        return torch._utils._rebuild_tensor, (Storage(str(id(o)), o.numel()), 0, tuple(o.shape), o.stride())

    def persistent_id(self, o):
        if isinstance(o, Storage): return 'storage', torch.cuda.FloatStorage, o.key, 'cuda:0', o.size, None


Storage = namedtuple('Storage', 'key size')


def write_python2(o, path):
    "An object in the format of 2017, by `Python2`."
    with open(path, 'wb') as f:
        for part in (0x1950a86a20f9469cfc6c, 1001,
            dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4)), o):
            p = Python2(f, 2); p.storages = {}; p.dump(part)
        keys = sorted(p.storages); pickle.dump(keys, f, 2)
        for k in keys: f.write(struct.pack('<q', p.storages[k].numel()) + p.storages[k].contiguous().numpy().tobytes())


def test_checkpoint_of_python_2_is_read(server):
    "Every peculiarity at once: byte strings, a NumPy number whose bytes are no text, tensors of the GPU, the format before zip files."
    served, cache = server
    path = served/'resnet18_places365.pth.tar'
    net, checkpoint = csail(path), torch.load(path, weights_only=False)
    assert not np.float64(54.7).tobytes().isascii()
    write_python2(checkpoint, path)
    raw = path.read_bytes().replace(b'numpy._core', b'numpy.core')
    path.write_bytes(raw)
    assert all(s in raw for s in (b'ctorch.cuda\nFloatStorage', b'_rebuild_tensor\n', b'U\x06cuda:0', b'module.conv1.weight',
        b'numpy.core.multiarray\nscalar')) and b'X\x08\0\0\0' not in raw[:5000]
    vouch(cache, path)
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(models.create_model('resnet18', 365, weights='places365').eval()(x), net(x))


def test_resnet50_of_places365_has_a_known_hash(server):
    "Another file under the name is refused and not kept, unless a line of the user's vouches for it."
    served, cache = server
    (served/'resnet50_places365.pth.tar').write_bytes(b'another file')
    with pytest.raises(core.InputError, match='should have 46529c86.*it was not kept'): weights.weights_file('places365', 'resnet50')
    assert list(cache.iterdir()) == []
    vouch(cache, served/'resnet50_places365.pth.tar')
    assert weights.weights_file('places365', 'resnet50').read_bytes() == b'another file'


def test_a_file_nobody_vouches_for_is_refused_until_somebody_does(server):
    "The message is the line to add."
    served, cache = server
    csail(served/'resnet18_places365.pth.tar')
    with pytest.raises(core.InputError, match='no known checksum') as raised: models.create_model('resnet18', 365, weights='places365')
    line = str(raised.value).split("add the line '")[1].split("'")[0]
    (cache/'SHA256SUMS').write_text(line + '\n')
    assert models.create_model('resnet18', 365, weights='places365').num_classes == 365
    (cache/'resnet18_places365.pth.tar').write_bytes(b'something else')
    with pytest.raises(core.InputError, match='should have'): models.create_model('resnet18', 365, weights='places365')


def imagenet(served, arch, monkeypatch, change=lambda state: state):
    "torchvision's file of an architecture, its name with the right beginning of the hash."
    torch.manual_seed(1)
    net = getattr(torchvision.models, arch)()
    torch.save(change(net.state_dict()), served/'x')
    name = f"{arch}-{hashlib.sha256((served/'x').read_bytes()).hexdigest()[:8]}.pth"
    (served/'x').rename(served/name)
    monkeypatch.setitem(weights.PUBLIC['imagenet'].files, arch, name)
    return net.eval()


def test_imagenet_weights_fit_all_five(server, monkeypatch):
    "DenseNet's file has names of an older release."
    def older(state):
        return {k.replace('.norm1.', '.norm.1.').replace('.norm2.', '.norm.2.').replace('.conv1.', '.conv.1.').replace('.conv2.',
            '.conv.2.') if 'denselayer' in k else k: v for k, v in state.items()}
    x = torch.randn(1, 3, 64, 64)
    for arch in models.ARCHS:
        net = imagenet(server[0], arch, monkeypatch, older if arch == 'densenet121' else lambda s: s)
        torch.testing.assert_close(models.create_model(arch, 1000, weights='imagenet').eval()(x), net(x))
    assert models.create_model('resnet18', 7, weights='imagenet', side=True)(x).shape == (1, 7)      # other classes: heads that start anew


def test_wrong_hash_or_half_a_file_is_no_file(server, monkeypatch):
    "Of a wrong file nothing stays; what has arrived of an incomplete one is kept for the next attempt, under another name."
    served, cache = server
    imagenet(served, 'resnet18', monkeypatch)
    file = served/models.PUBLIC['imagenet'].files['resnet18']
    file.write_bytes(file.read_bytes()[:-1] + b'?')
    with pytest.raises(core.InputError, match='it was not kept'): models.create_model('resnet18', 1000, weights='imagenet')
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(Quiet, 'copyfile', lambda self, source, out: out.write(source.read(1000)))
    with pytest.raises(core.InputError, match='ended after 1000 of'): models.create_model('resnet18', 1000, weights='imagenet')
    assert sorted(p.name for p in cache.iterdir()) == [f'.{file.name}.etag', f'.{file.name}.part']


class Evil:
    "Pickled, it would write a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('make',
    [lambda o, f: torch.save(o, f), lambda o, f: torch.save(o, f, _use_new_zipfile_serialization=False),
        lambda o, f: f.write_bytes(pickle.dumps(o))], ids=['zip', 'legacy', 'pickle'])
def test_code_in_a_file_is_not_run(server, tmp_path, make):
    "Even vouched for, a file that is more than weights is refused in one line."
    served, cache = server
    make(dict(state_dict=Evil(tmp_path/'pwned')), served/'resnet18_places365.pth.tar')
    vouch(cache, served/'resnet18_places365.pth.tar')
    with pytest.raises(core.InputError, match='is refused') as raised: models.create_model('resnet18', 365, weights='places365')
    assert '\n' not in str(raised.value) and not (tmp_path/'pwned').exists()


@pytest.mark.parametrize('given, named', [
    (dict(arch='densenet121', weights='places365'), 'there are of resnet18, resnet50'),
    (dict(arch='resnet18', weights='imagenet', width=.5), 'give width 1'),
    (dict(arch='resnet18', weights='nowhere.pt'), 'give imagenet, places365'),
    (dict(arch='resnet18', weights='imagenet'), 'place the file as'),
])
def test_what_is_not_there_is_said_in_one_line(server, given, named):
    "Nothing is served: the message says which file belongs where."
    with pytest.raises(core.InputError) as raised: models.create_model(num_classes=365, **given)
    assert named in str(raised.value) and '\n' not in str(raised.value)


def test_a_published_network_is_a_run_of_no_epochs(server, monkeypatch):
    "Stored like any other, with the statistics that the weights expect; no data is asked for."
    net = imagenet(server[0], 'resnet18', monkeypatch)
    recipe = runs.recipe_for('public', data='folder:not there', weights='imagenet')
    fitted = runs.run(recipe, progress=False)
    assert fitted.stats == weights.PUBLIC['imagenet'].stats and len(fitted.classes) == 1000
    for p in server[1].iterdir(): p.unlink()
    again = runs.run(recipe, progress=False).model.net.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items())


def test_a_published_network_keeps_its_name(server):
    "Where the data lie does not rename it."
    a, b = (runs.recipe_for('public', data=f'folder:{d}', weights='imagenet') for d in ('here', 'there'))
    assert a.key == b.key == core.digest(asdict(replace(a, data='')))
    assert a.key != replace(a, arch='resnet34').key != replace(a, weights='places365').key


def test_public_weights_are_fine_tuned(server, monkeypatch):
    "Another head, the statistics of the weights, everything else as they are at the start."
    net = imagenet(server[0], 'resnet18', monkeypatch)
    recipe = runs.recipe_for('public', data='concept_scenes', train=16, val=16, weights='imagenet', size=32, epochs=1, batch=8, lr=1e-6,
        method='pcl', threads=1)
    fitted = training.fit(recipe, progress=False)
    assert fitted.stats == weights.PUBLIC['imagenet'].stats and fitted.model.num_classes == fitted.model.side_head.out_features == 16
    torch.testing.assert_close(fitted.model.net.layer1[0].conv1.weight.cpu(), net.layer1[0].conv1.weight, rtol=0, atol=1e-3)
    assert (fitted.model.net.layer1[0].conv1.weight.cpu() != net.layer1[0].conv1.weight).any()


def photos(folder):
    "Four validation images of one class, and none for training."
    rng = np.random.default_rng(0)
    (folder/'val'/'coast').mkdir(parents=True)
    for i in range(4): Image.fromarray(rng.integers(0, 255, (80, 90, 3), np.uint8)).save(folder/'val'/'coast'/f'{i}.jpg')
    return f'folder:{folder}'


def test_pcl_reproduce_plans_the_public_profile(tmp_path, capsys):
    "Fifteen networks less the three that nobody publishes; without photographs, and for other figures, one line says what to give."
    given = ['--profile', 'public', '--only', 'fig5,fig6', '--dry-run']
    assert reproduce.main([*given, '--scenes', photos(tmp_path)]) == 0
    assert '12 networks' in capsys.readouterr().out
    for argv, named in [(given, 'give scenes as folder:PATH'),
        ([*given, '--only', 'fig7', '--scenes', f'folder:{tmp_path}'], 'give figures 5 and 6')]:
        with pytest.raises(SystemExit): reproduce.main(argv)
        assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_figures_5_and_6_from_public_weights(server, tmp_path, monkeypatch):
    "Validation images alone; an architecture that nobody trained on scenes is drawn without them."
    served, cache = server
    csail(served/'resnet18_places365.pth.tar'); vouch(cache, served/'resnet18_places365.pth.tar')
    for arch in ('resnet18', 'shufflenet_v2_x1_5'):
        path = served/models.PUBLIC['imagenet'].files[arch]       # the real name with other weights: trusted by its line, not by its name
        torch.save(getattr(torchvision.models, arch)().state_dict(), path); vouch(cache, path)
    run = dict(profile='public', scenes=photos(tmp_path/'photos'), arch='resnet18,shufflenet_v2_x1_5', size=64, images=4, bootstrap=4)
    done = papermill(NBS/'erf.ipynb', tmp_path, figures='7', **run)
    assert done.returncode and 'profile public has the networks init, objects, scenes' in done.stderr
    done = papermill(NBS/'erf.ipynb', tmp_path, figures='5,6', **run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'shufflenet_v2_x1_5: no public places365 weights; left out' in printed(tmp_path/'executed.ipynb')
    table = pd.read_csv(tmp_path/'results'/'public'/'fig6.csv')
    assert table.groupby('arch').network.unique().map(set).to_dict() == {'resnet18': {'init', 'objects', 'scenes'},
        'shufflenet_v2_x1_5': {'init', 'objects'}}
