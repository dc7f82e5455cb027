"Networks and images as people have them: shared modules, fixed sizes, foreign checkpoints, low precision, every form of image."
import copy
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from pcl_nb import cam, erf, focus_area, methods, models, speedups, statistics
from pcl_nb.base.core import InputError

STATS = (.485, .456, .406), (.229, .224, .225)
ONE = {'stage4': 'body'}


def refused(call, *names):
    "An `InputError` of one line that holds `names`."
    with pytest.raises(InputError) as e: call()
    said = str(e.value)
    assert '\n' not in said and len(said) < 500 and all(n in said for n in names), said


class Net(nn.Module):
    "A body, pooled, and a head; `fixed`: the pooling's window."
    def __init__(self, channels=3, fixed=0, stride=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 5, stride, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.pool, self.fc = nn.AvgPool2d(fixed) if fixed else nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)
    def forward(self, x): return self.fc(self.pool(self.body(x)).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().eval()


def naive_map(features, head, target): return torch.einsum('k,khw->hw', head.weight[target], features)


def naive_impact(net, features, x):
    "Mean over images of |dy/dx|, one image at a time."
    total = 0
    for image in x:
        image = image[None].clone().requires_grad_()
        F = features(image)
        total = total + torch.autograd.grad(F[0, :, F.shape[2]//2, F.shape[3]//2].mean(), image)[0].abs().mean(1)[0]
    return total/len(x)


# A module that is called more than once

class Twice(Net):
    "Logits of the image and of its mirror image, averaged."
    def forward(self, x): return (super().forward(x) + super().forward(x.flip(3)))/2


class Siamese(Net):
    "A body called twice, a head once."
    def forward(self, x): return self.fc((self.body(x) + self.body(x.flip(3))).mean((2, 3)))


class TwoHeads(Net):
    "A head called twice on one pooled map."
    def forward(self, x):
        f = self.body(x).mean((2, 3))
        return (self.fc(f) + self.fc(f))/2


class SharedReLU(nn.Module):
    "One activation for all layers, as a stage."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Linear(8, 5)
    def forward(self, x): return self.fc(self.act(self.b(self.act(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize('make, stage, named', [(Twice, 'body', ('stage4 (body)', 'called 2 times', 'wrap the part')),
    (Siamese, 'body', ('stage4 (body)', 'called 2 times')), (SharedReLU, 'act', ('stage4 (act)', 'called 2 times', 'once: a, b')),
    (TwoHeads, 'body', ('head (fc)', 'called 2 times', 'body'))])
def test_module_called_more_than_once_is_refused(make, stage, named):
    "A stage or head of several calls has no one map: the message names it, the number of calls, and modules called once."
    refused(lambda: models.wrap(make(), {'stage4': stage}, 'fc'), *named)


def test_second_call_at_run_time_is_refused(net):
    "A network that calls a stage again for other images, or in training, than in the probe."
    class Later(Net):
        again = False
        def forward(self, x): return super().forward(x) + (0*super().forward(x) if self.again else 0)
    model = models.wrap(Later().eval(), ONE, 'fc')
    model.net.again = True
    refused(lambda: model(torch.randn(1, 3, 32, 32), stages=('stage4',)), 'stage4 (body) is called more than once')


def test_last_relu_that_is_shared(net):
    "relu='before' leaves out the call that ends the stage, not another one of the same module."
    class Shared(SharedReLU):
        def __init__(self): super().__init__(); self.end = nn.Identity()
        def forward(self, x): return self.fc(self.end(self.act(self.b(self.act(self.a(x))))).mean((2, 3)))
    model, x = models.wrap(Shared().eval(), {'stage4': 'end'}, 'fc'), torch.randn(2, 3, 32, 32)
    n = model.net
    torch.testing.assert_close(model.stage_features(x, 'stage4', 'before'), n.b(n.a(x).relu()))


def test_pairs_are_folded_only_if_called_once():
    "A convolution or normalisation that is called twice keeps its own."
    class Shared(Net):
        def forward(self, x): return self.fc((self.body(x) + 0*self.body[1](self.body[0](x)).mean()).mean((2, 3)))
    model, x = models.wrap(Shared().double().eval(), {'stage4': 'body.4'}, 'fc'), torch.randn(2, 3, 64, 64).double()
    want = model(x)
    with speedups.folded(model): assert model._pairs == [] and torch.equal(model(x), want)


# Sizes

@pytest.mark.parametrize('window, stride', [(7, 16), (14, 8)])
def test_fixed_pooling(window, stride):
    "As CSAIL's networks for 224 px: found, equal to the naive map, and never wrong for another size."
    torch.manual_seed(0)
    net = Net(fixed=window, stride=stride).double().eval()
    model, x = models.wrap(net, ONE, 'fc'), torch.randn(2, 3, 224, 224).double()
    assert model.input_shape == (3, 224, 224)
    found = focus_area.focus_area(model, x)
    with torch.no_grad():
        for i, m in enumerate(found.mask):
            a = naive_map(net.body(x[i:i+1])[0], net.fc, net(x[i:i+1]).argmax().item())
            a = nn.functional.interpolate(((a - a.min())/(a.max() - a.min()))[None, None], size=(224, 224), mode='bilinear')[0, 0]
            assert ((a >= .5) != m).sum() <= 2
    torch.testing.assert_close(erf.impact_map(model, x), naive_impact(net, net.body, x), rtol=1e-9, atol=1e-15)
    refused(lambda: focus_area.focus_area(model, torch.randn(1, 3, 96, 96)), 'does not run on images of 96x96 px', 'does at 224x224 px')
    refused(lambda: focus_area.focus_area(model, torch.randn(1, 3, 272, 272)), 'does not read the global average', '224x224 px')   # pools a corner


def test_fixed_input_size():
    "224 or 299 px alone; a given size; one line where no size works."
    class Fixed(Net):
        takes = 299, 299
        def forward(self, x):
            assert tuple(x.shape[-2:]) == self.takes, f'takes {self.takes}'
            return super().forward(x)
    model = models.wrap(Fixed(), ONE, 'fc')
    assert model.input_shape == (3, 299, 299)
    with speedups.folded(model): assert len(model._pairs) == 1                     # found with images that it takes
    refused(lambda: focus_area.focus_area(model, torch.randn(1, 3, 64, 64)), 'does at 299x299 px')
    refused(lambda: erf.impact_map(model, torch.randn(1, 3, 64, 64)), 'does at 299x299 px')
    refused(lambda: models.wrap(Fixed(), ONE, 'fc', size=224), 'does not run on images of 224x224 px', 'takes (299, 299)', 'give size=')
    other = Fixed(); other.takes = 96, 64
    refused(lambda: models.wrap(other, ONE, 'fc'), '64x64, 224x224, 299x299', 'give size=')
    model = models.wrap(other, ONE, 'fc', size=(96, 64))
    assert erf.impact_map(model, torch.randn(1, 3, 96, 64)).shape == (96, 64)
    for bad in (0, -1, 1.5, 'x', (64,), (64, 'x'), True): refused(lambda: models.wrap(Net(), ONE, 'fc', size=bad), 'give pixels, or (height, width)')


def test_inception_and_vit():
    "torchvision's Inception takes 75 px or more; a ViT has no feature maps, which is said, not its own assertion."
    model = models.wrap(torchvision.models.inception_v3(num_classes=5, init_weights=False), {'stage4': 'Mixed_7c'}, 'fc')
    assert model.input_shape == (3, 224, 224) and not model._rectified
    refused(lambda: models.wrap(torchvision.models.VisionTransformer(224, 32, 1, 2, 32, 64, num_classes=5), {'stage4': 'encoder.ln'}, 'heads.head'),
        'stage4 (encoder.ln) does not give feature maps')


def test_last_stage_is_found_at_the_size_of_the_network():
    "A second branch for a network with fixed pooling."
    class Staged(Net):
        def __init__(self): super().__init__(fixed=7, stride=16); self.body = nn.Sequential(self.body[:3], self.body[3:])
    model = models.wrap(Staged().eval(), {'stage3': 'body.0', 'stage4': 'body.1'}, 'fc')
    two = methods.get_method('acol').prepare(model)
    assert two.input_shape == (3, 224, 224) and two(torch.randn(2, 3, 224, 224)).shape == (2, 5)


# A ReLU that is no module

@pytest.fixture(scope='module')
def dense():
    "torchvision's DenseNet121 in double precision, whose batch normalisation has seen data."
    torch.manual_seed(0)
    net = torchvision.models.densenet121(num_classes=5)
    with torch.no_grad(): net(torch.randn(6, 3, 64, 64))
    return net.double().eval()


STAGES = {'stage3': 'features.transition3.relu', 'stage4': 'features'}


def test_torchvisions_densenet(dense):
    "It applies its last ReLU as a function: features, maps and impact are behind it, as those of the built-in network are."
    model, own = models.wrap(dense, STAGES, 'classifier'), models.create_model('densenet121', 5).double().eval()
    own.net.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 96, 96).double()
    with torch.no_grad():
        logits, f = model(x, stages=('stage3', 'stage4'))
        assert f['stage4'].min() == 0 and torch.equal(logits, dense(x))
        torch.testing.assert_close(model.head(f['stage4'].mean((2, 3))), logits)
        for stage in STAGES: torch.testing.assert_close(f[stage], own.stage_features(x, stage))
        for relu in models.RELU:
            torch.testing.assert_close(model.stage_features(x, 'stage4', relu), own.stage_features(x, 'stage4', relu))
    a, b = focus_area.focus_area(model, x), focus_area.focus_area(own, x)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.prediction, b.prediction)
    for relu in models.RELU: torch.testing.assert_close(erf.impact_map(model, x, relu=relu), erf.impact_map(own, x, relu=relu), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('name', ['pcl', 'adl', 'acol', 'amloss', 'has'])
def test_methods_on_torchvisions_densenet(dense, name):
    "Each method's losses equal those of the built-in network."
    own, found = models.create_model('densenet121', 5).double(), []
    own.net.load_state_dict(dense.state_dict())
    options = dict(erased_norm='running') if name in ('pcl', 'amloss') else {}
    method = methods.get_method(name, **dict(stage='stage4', **options) if name in ('pcl', 'adl') else options)
    for model in (models.wrap(copy.deepcopy(dense), STAGES, 'classifier'), own):
        model = method.prepare(model.train() if name == 'adl' else model.eval())
        torch.manual_seed(0)
        found.append(method.losses(model, torch.randn(2, 3, 64, 64).double(), torch.tensor([0, 1])))
    torch.testing.assert_close(found[0][0], found[1][0]); torch.testing.assert_close(found[0][1], found[1][1])


# Checkpoints

OLD = dict(zip(('norm1.', 'relu1.', 'conv1.', 'norm2.', 'relu2.', 'conv2.'), ('norm.1.', 'relu.1.', 'conv.1.', 'norm.2.', 'relu.2.', 'conv.2.')))


@pytest.mark.parametrize('prefix', ['', 'module.', 'net.', 'model.', 'module.net.', '_orig_mod.', 'backbone.model.'])
def test_foreign_checkpoint_is_opened(tmp_path, prefix):
    "Whatever prefix torchvision's names have, alone or in a checkpoint, with and without a side head."
    def opened(arch='resnet18', classes=5, **given): return models.create_model(arch, classes, width=.25, weights=tmp_path/'w.pt', **given)
    net = models.create_model('resnet18', 5, width=.25).net
    assert set(net.state_dict()) == set(torchvision.models.resnet18().state_dict())
    state = {prefix + k: v for k, v in net.state_dict().items()}
    for file in (state, {'state_dict': state, 'epoch': 3}, {'model': state, 'epoch': 3}):
        torch.save(file, tmp_path/'w.pt')
        found = opened().net.state_dict()
        assert all(torch.equal(v, found[k]) for k, v in net.state_dict().items())
    if not prefix.endswith('net.'): assert opened(side=True).side_head is not None              # else a network that was saved without
    refused(lambda: opened(classes=6), 'fc.weight is (5, 128) there, (6, 128) here')
    refused(lambda: opened('resnet34'), 'missing there')


def test_densenets_checkpoints_are_opened(tmp_path, dense):
    "torchvision's fine-tuned DenseNet121, with today's names and those of 2017."
    state, x = dense.state_dict(), torch.randn(1, 3, 64, 64)
    def older(k):
        for new, old in OLD.items() if 'denselayer' in k else (): k = k.replace(new, old)
        return 'module.' + k
    for names in (lambda k: k, older):
        torch.save({'state_dict': {names(k): v.float() for k, v in state.items()}}, tmp_path/'w.pt')
        model = models.create_model('densenet121', 5, weights=tmp_path/'w.pt').eval()
        torch.testing.assert_close(model(x).double(), dense(x.double()), rtol=1e-3, atol=1e-4)


def test_own_checkpoint_in_a_wrapper_is_opened(tmp_path):
    "A staged network with its side head, saved from a parallel wrapper."
    model = models.create_model('resnet18', 5, width=.25, side=True)
    torch.save(nn.DataParallel(model).state_dict(), tmp_path/'w.pt')
    again = models.create_model('resnet18', 5, width=.25, side=True, weights=tmp_path/'w.pt')
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


# Modes of autograd

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('made_inside', ['', 'images', 'images and network'])
def test_without_gradients(net, mode, made_inside):
    "Every analysis gives inside what it gives outside, also for inference tensors; the network is as it was."
    def analyses(model, x):
        return (erf.impact_map(model, x), erf.impact_replicates(model, x, replicates=3)[1], focus_area.focus_area(model, x).coverage,
            *erf.coupled_impacts(model, x)[:2], torch.tensor(erf.activity_table(model, x).to_numpy()),
            erf.calibrate(model, x).net.body[1].running_var.clone())
    given = torch.randn(4, 3, 48, 48).double()
    want = analyses(models.wrap(copy.deepcopy(net), ONE, 'fc'), given)
    with mode() if made_inside else torch.enable_grad(): x = given.clone()
    with mode() if 'network' in made_inside else torch.enable_grad(): model = models.wrap(copy.deepcopy(net), ONE, 'fc')
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    with mode(): found = analyses(model, x)
    for a, b in zip(found, want): torch.testing.assert_close(a.clone(), b, rtol=1e-10, atol=1e-12)
    assert not any(t.requires_grad for t in found) and before == {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    if mode is torch.inference_mode:
        for a, b in zip(analyses(model, x)[:4], want[:4]): assert a.shape == b.shape            # outside, of what was made inside


def test_network_that_detaches_says_so(net):
    "A network without a gradient has no impact map."
    class Detached(Net):
        def forward(self, x): return super().forward(x.detach())
    refused(lambda: erf.impact_map(models.wrap(Detached(), ONE, 'fc'), torch.randn(1, 3, 32, 32)), 'stage4 has no gradient')


# Precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_network(dtype):
    "The results are those of the same weights in float32, to the bit; the weights stay as they are."
    torch.manual_seed(0)
    half = Net().to(dtype).eval()
    single, x = copy.deepcopy(half).float(), torch.randn(4, 3, 64, 64)
    a, b = (models.wrap(n, ONE, 'fc') for n in (half, single))
    kept = {k: (id(v), v.dtype) for k, v in half.named_parameters()}
    for rule in focus_area.RULES:
        for found, want in zip(focus_area.focus_area(a, x, rule=rule), focus_area.focus_area(b, x, rule=rule)): assert torch.equal(found, want)
    for f in (erf.impact_map, lambda *g: erf.coupled_impacts(*g)[0], lambda *g: torch.tensor(erf.activity_table(*g).to_numpy())):
        found, want = f(a, x), f(b, x)
        assert found.dtype == want.dtype and torch.equal(found, want)
    assert kept == {k: (id(v), v.dtype) for k, v in half.named_parameters()} and all(t.dtype == dtype for t in half.state_dict().values() if t.is_floating_point())
    refused(lambda: erf.calibrate(a, x), 'keeps its statistics in', 'call model.float() first')


def test_autocast_and_half_precision_images(net):
    "Autocast changes no bit; half-precision images are taken as the numbers that they hold."
    model, x = models.wrap(net.float(), ONE, 'fc'), torch.randn(4, 3, 64, 64)
    want = focus_area.focus_area(model, x), erf.impact_map(model, x), erf.coupled_impacts(model, x)[0]
    with torch.autocast('cpu', torch.bfloat16): found = focus_area.focus_area(model, x), erf.impact_map(model, x), erf.coupled_impacts(model, x)[0]
    assert all(map(torch.equal, found[0], want[0])) and torch.equal(found[1], want[1]) and torch.equal(found[2], want[2])
    h = x.bfloat16()
    assert torch.equal(erf.impact_map(model, h), erf.impact_map(model, h.float()))
    assert torch.equal(focus_area.focus_area(model, h).mask, focus_area.focus_area(model, h.float()).mask)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_maps_are_computed_in_float32(dtype):
    "Class activation map, normalisation, regions and the erased image of half-precision features, also under autocast."
    torch.manual_seed(0)
    f, w, t = torch.rand(2, 64, 7, 7).to(dtype), torch.randn(5, 64).to(dtype), torch.tensor([1, 3])
    want = cam.class_activation_map(f.double(), w.double(), t)
    for mode in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=mode): found = cam.class_activation_map(f, w, t)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
    low = want.to(dtype)
    assert cam.normalize_map(low).dtype == torch.float32 and torch.isfinite(cam.normalize_map(low)).all()
    assert torch.equal(focus_area.energy_mask(low, (64, 64), .7), focus_area.energy_mask(low.float(), (64, 64), .7))
    assert torch.equal(cam.erasing_mask(low, (64, 64)), cam.erasing_mask(low.float(), (64, 64)))
    assert cam.erase(torch.rand(2, 3, 64, 64).to(dtype), cam.erasing_mask(low, (64, 64))).dtype == dtype
    assert erf.center_value(torch.full((1, 4096, 1, 1), 1.).to(dtype)).item() == 1


# Maps without contrast

def test_flat_maps_are_undefined():
    "CIFAR-10's images through a stem for 224 px: one position, no coverage ratio, one warning that says what to do."
    model, x = models.create_model('resnet18', 5, width=.25), torch.randn(6, 3, 32, 32)
    for rule in focus_area.RULES:
        with pytest.warns(UserWarning, match=r'of 6 of 6 images is undefined.*small_input=True') as said: found = focus_area.focus_area(model, x, rule=rule)
        assert len(said) == 1 and found.coverage.isnan().all() and not found.mask.any()
    with pytest.warns(UserWarning, match='of 6 of 6') as said:
        table = focus_area.coverage_table(model, [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))], area=torch.ones(6, 32, 32, dtype=torch.bool))
    assert len(said) == 1 and table[['coverage', 'recall', 'precision']].isna().to_numpy().all()
    s = focus_area.summary(table.coverage)
    assert (s['n'], s['undefined']) == (0, 6) and np.isnan(s['mean']) and focus_area.distribution(table.coverage).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not focus_area.focus_area(model, torch.randn(2, 3, 96, 96)).coverage.isnan().any()


def test_flat_maps_among_others():
    "What is defined is as it was; undefined images pair with nothing in a comparison."
    model = models.create_model('resnet18', 5, width=.25, small_input=True)
    with torch.no_grad(), pytest.warns(UserWarning, match='of 1 of 3'):
        found = focus_area.focus_area(model, [torch.randn(3, 32, 32), torch.randn(3, 8, 8), torch.randn(3, 32, 32)])
    assert found.coverage.isnan().tolist() == [False, True, False]
    a, b = np.array([.2, np.nan, .4, .6]), np.array([.1, .3, .2, .3])
    draws = statistics.draws(4, 50)
    keep = [0, 2, 3]
    assert statistics.relative(a, b, draws) == statistics.relative(a[keep], b[keep], draws[:, keep])
    assert np.isnan(statistics.relative(a*np.nan, b, draws)['difference'])


# Images in every form

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Five images of one size: as files, in PIL, as arrays, and normalised by hand."
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    arrays = rng.integers(0, 256, (5, 40, 48, 3), dtype=np.uint8)
    for i, a in enumerate(arrays): Image.fromarray(a).save(folder/f'{i}.png')
    (folder/'.hidden.png').write_bytes(b'')
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in STATS)
    x = (torch.from_numpy(arrays).permute(0, 3, 1, 2)/255 - mean)/std
    return SimpleNamespace(folder=folder, arrays=arrays, pil=[Image.fromarray(a) for a in arrays], x=x, files=[folder/f'{i}.png' for i in range(5)])


def forms(p):
    "name -> the five images in a form of its own."
    class Pairs(torch.utils.data.Dataset):
        def __init__(self, items): self.items = items
        def __len__(self): return len(self.items)
        def __getitem__(self, i): return self.items[i % 5], i                     # never an IndexError
    Images = type('Images', (Pairs,), dict(__getitem__=lambda self, i: self.items[i % 5]))
    return dict(tensor=p.x, tensors=list(p.x), batches=[p.x[:2], p.x[2:]], generator=(x for x in p.x), pil=p.pil, array=p.arrays,
        arrays=list(p.arrays), bytes=torch.from_numpy(p.arrays).permute(0, 3, 1, 2), folder=p.folder, path=str(p.folder), files=p.files,
        loader=torch.utils.data.DataLoader(Pairs(p.x), 2), alone=torch.utils.data.DataLoader(Pairs(p.x), batch_size=None),
        dataset=Pairs(p.x), images=Images(p.x), pictures=Pairs(p.pil), picture_files=Pairs(p.files))


FORMS = list(forms(SimpleNamespace(x=torch.zeros(5, 3, 1, 1), pil=[], arrays=np.zeros((5, 1, 1, 3), np.uint8), folder='', files=[])))


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_images(pictures, net, form):
    "Focus area and impact map of each form are those of the normalised tensor; a stream is taken once."
    model = models.wrap(net.float(), ONE, 'fc', stats=STATS)
    want, impact = focus_area.focus_area(model, pictures.x), erf.impact_map(model, pictures.x)
    found = focus_area.focus_area(model, forms(pictures)[form], batch_size=3)
    assert torch.equal(found.prediction, want.prediction) and (found.mask != want.mask).sum() <= 4
    torch.testing.assert_close(erf.impact_map(model, forms(pictures)[form], batch_size=3), impact, rtol=1e-3, atol=1e-6)


def test_one_image_in_every_form(pictures, net):
    "A picture, an array, a path."
    model = models.wrap(net.float(), ONE, 'fc')
    want = erf.impact_map(model, pictures.x[:1])
    for one in (pictures.pil[0], pictures.arrays[0], pictures.files[0], str(pictures.files[0]), torch.from_numpy(pictures.arrays[0]).permute(2, 0, 1)):
        torch.testing.assert_close(erf.impact_map(model, one, stats=STATS), want, rtol=1e-3, atol=1e-6)
        assert focus_area.focus_area(model, one, stats=STATS).mask.shape == (1, 40, 48)
        refused(lambda: erf.impact_map(model, one), 'give stats=(mean, std)', '.485')
        refused(lambda: focus_area.focus_area(model, one), 'give stats=(mean, std)')


def test_labels_and_tables_of_datasets(pictures, net):
    "A dataset of pictures and labels is what `coverage_table` takes, too; targets go with a stream."
    model = models.wrap(net.float(), ONE, 'fc', stats=STATS)
    pairs = [(im, i % 5) for i, im in enumerate(pictures.pil)]
    table = focus_area.coverage_table(model, pairs)
    assert table.label.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(table.coverage, focus_area.focus_area(model, pictures.x).coverage, atol=2e-3)
    target = torch.tensor([4, 3, 2, 1, 0])
    a, b = (focus_area.focus_area(model, given, target=target, batch_size=2) for given in (pictures.x, iter(pictures.pil)))
    assert (a.mask != b.mask).sum() <= 4
    for wrong in (target[:4], target.repeat(2)): refused(lambda: focus_area.focus_area(model, iter(pictures.pil), target=wrong, batch_size=2), 'classes; give one for each')
    refused(lambda: focus_area.coverage_table(model, pictures.pil), 'yields no labels')


def test_sizes(pictures, net):
    "Resized to one size, or each as it is; an impact map needs one."
    model = models.wrap(net.float(), ONE, 'fc', stats=STATS)
    mixed = [pictures.pil[0], pictures.pil[1].resize((30, 20)), pictures.pil[2]]
    assert [tuple(m.shape) for m in focus_area.focus_area(model, mixed).mask] == [(40, 48), (20, 30), (40, 48)]
    assert focus_area.focus_area(model, mixed, size=32).mask.shape == (3, 32, 32)
    assert erf.impact_map(model, mixed, size=(24, 40)).shape == (24, 40)
    refused(lambda: erf.impact_map(model, mixed), 'different sizes', 'give size=')
    for bad in (0, 'x', (3,), 1.5, True): refused(lambda: erf.impact_map(model, mixed, size=bad), 'give pixels, or (height, width)')
    for bad in (5, 'x', (1, 2), ((1,), (1,)), ((0,)*3, (0,)*3), ((.5,)*3, (float('nan'),)*3)):
        refused(lambda: erf.impact_map(model, mixed, stats=bad), 'mean and standard deviation')
        refused(lambda: models.wrap(net, ONE, 'fc', stats=bad), 'mean and standard deviation')


def test_bad_images_are_named(tmp_path, net):
    "One line for a folder without images, a file that is none, an array of another kind, a network of other channels."
    model = models.wrap(net.float(), ONE, 'fc', stats=STATS)
    (tmp_path/'words.png').write_text('no image')
    for given, named in {str(tmp_path/'gone'): 'is not a file', tmp_path/'words.png': 'words.png', '': 'is not a file'}.items():
        refused(lambda: focus_area.focus_area(model, given), named)
    (tmp_path/'empty').mkdir()
    refused(lambda: focus_area.focus_area(model, tmp_path/'empty'), 'holds no image')
    for given in (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8,), np.uint8), {'x': 1}, [{}], [[1, 2, 3]], object()):
        for f in (focus_area.focus_area, erf.impact_map): refused(lambda: f(model, given), '')


@pytest.mark.parametrize('given, end', [(torch.rand(4, 3, 32, 32), 1), (torch.rand(4, 3, 32, 32)*255, 255)])
def test_images_that_were_not_normalised(net, given, end):
    "One warning a call, of all analyses; none for normalised images, black ones, or a network that takes [0,1]."
    model = models.wrap(net.float(), ONE, 'fc')
    for f in (focus_area.focus_area, erf.impact_map):
        with pytest.warns(UserWarning, match=rf'in \[0,{end}\]: they were not normalised') as said: f(model, [given[:2], given[2:]])
        assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        erf.impact_map(model, given/end*2 - 1); erf.impact_map(model, torch.zeros(1, 3, 32, 32))
        if end == 1: erf.impact_map(model, given, stats=((0,)*3, (1,)*3))


def test_grayscale_networks(pictures):
    "One input channel: tensors of one channel, pictures in colour turned gray; three channels are refused by name."
    torch.manual_seed(0)
    net = Net(channels=1).double().eval()
    model, x = models.wrap(net, ONE, 'fc', stats=((.5,), (.25,))), torch.randn(3, 1, 40, 48).double()
    assert model.input_shape == (1, 64, 64)
    torch.testing.assert_close(erf.impact_map(model, x), naive_impact(net, net.body, x), rtol=1e-9, atol=1e-15)
    gray = torch.stack([torch.from_numpy(np.array(im.convert('L'))) for im in pictures.pil])[:, None]
    a, b = (focus_area.focus_area(model, given) for given in (pictures.pil, (gray/255 - .5)/.25))
    assert (a.mask == b.mask).float().mean() > .98
    assert torch.equal(focus_area.focus_area(model, gray).mask, b.mask)
    assert torch.equal(focus_area.focus_area(model, gray[:, 0].numpy()[0]).mask, b.mask[:1])
    for f in (focus_area.focus_area, erf.impact_map): refused(lambda: f(model, torch.randn(2, 3, 32, 32)), '(B,1,H,W)')
    refused(lambda: erf.coupled_impacts(model, torch.randn(2, 3, 32, 32)), '(B,1,H,W)')
    colour = models.wrap(Net(), ONE, 'fc', stats=STATS)
    assert focus_area.focus_area(colour, pictures.pil[0].convert('L')).mask.shape == (1, 40, 48)
    refused(lambda: models.wrap(net, ONE, 'fc', stats=STATS), 'of 1 channel')


def test_stream_is_not_held(net):
    "Of a long stream one batch is alive at a time."
    import gc, weakref
    model, alive, most = models.wrap(net.float(), ONE, 'fc'), weakref.WeakSet(), 0
    def stream():
        nonlocal most
        for _ in range(40):
            x = torch.randn(3, 24, 24); alive.add(x)
            most = max(most, len(alive))
            yield x
    erf.impact_map(model, stream(), batch_size=4); focus_area.focus_area(model, stream(), batch_size=4); gc.collect()
    assert most <= 6


# Wrappers of networks

def test_wrapped_networks(net):
    "What torch.compile and parallel training make of a network is analysed as the network; a scripted one is refused in one line."
    net, x = net.float(), torch.randn(2, 3, 48, 48)
    want = focus_area.focus_area(models.wrap(net, ONE, 'fc'), x).mask
    for outer in (torch.compile, nn.DataParallel, lambda n: torch.optim.swa_utils.AveragedModel(n), lambda n: nn.DataParallel(torch.compile(n))):
        for model in (models.wrap(outer(net), ONE, 'fc'), outer(models.wrap(net, ONE, 'fc'))):
            assert torch.equal(focus_area.focus_area(model, x).mask, want) and erf.impact_map(model, x).shape == (48, 48)
    for scripted in (torch.jit.script(net), torch.jit.trace(net, x)): refused(lambda: models.wrap(scripted, ONE, 'fc'), 'TorchScript', 'give the original nn.Module')
    refused(lambda: models.wrap(torch.export.export(net, (x,)), ONE, 'fc'), 'is not a network')
    refused(lambda: models.wrap(torch.export.export(net, (x,)).module(), ONE, 'fc'), '')


def test_network_that_gives_no_logits(net):
    "A tuple or a dictionary instead of logits is named."
    class Pair(Net):
        def forward(self, x): return super().forward(x), x
    refused(lambda: models.wrap(Pair(), ONE, 'fc'), 'gives tuple, not the 5 logits')


def test_a_network_can_be_sent_to_another_process():
    "A wrapped network survives pickling."
    model = models.create_model('resnet18', 5, width=.25, side=True).eval()
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad(): assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
