"""The focus area against torchcam's class activation maps, which no one here wrote."""
import pytest
import torch
import torch.nn.functional as F
import torchvision

from pcl_nb import focus_area, models

torchcam = pytest.importorskip('torchcam.methods')
LAYERS = {'resnet18': ('layer4', 'fc'), 'resnet50': ('layer4', 'fc'), 'shufflenet_v2_x1_5': ('conv5', 'fc')}


@pytest.fixture(params=LAYERS)
def network(request):
    "A network of torchvision's whose batch normalisation has seen data."
    torch.manual_seed(0)
    net = torchvision.models.get_model(request.param, num_classes=11)
    with torch.no_grad():
        for _ in range(3): net(torch.randn(8, 3, 64, 64))
    return net.eval(), *LAYERS[request.param]


@pytest.mark.parametrize('tau', [.3, .5, .7])
def test_masks_agree_with_torchcam(network, tau):
    "Thresholded alike, the regions are the same: intersection over union above 0.99 for every image."
    net, layer, head = network
    torch.manual_seed(1)
    x = torch.randn(6, 3, 96, 128)
    with torchcam.CAM(net, layer, head, input_shape=(3, 96, 128)) as cam:
        scores = net(x)
        maps = cam(scores.argmax(1).tolist(), scores)[0]
    want = F.interpolate(maps[:, None], size=(96, 128), mode='bilinear', align_corners=False)[:, 0] >= tau
    found = focus_area.focus_area(models.wrap(net, {'stage4': layer}, head), x, tau=tau)
    assert torch.equal(found.prediction, scores.argmax(1))
    union = (want | found.mask).flatten(1).sum(1)
    assert (union > 0).all() and ((want & found.mask).flatten(1).sum(1)/union > .99).all()
