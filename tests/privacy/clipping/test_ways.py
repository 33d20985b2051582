"""All ways of a layer's norms and sums agree with autograd, whichever the timing would choose."""

import pytest
import torch
from oracle import ONE_EACH, SEVERAL, Batch, Recorder, assert_batch_exact, random_batch
from torch import nn

from fedmed.privacy.clipping.choice import Way

LINEAR = [Way("products", None)] + [Way(n, "product") for n in ("products", "gram")]
FORMS = ("loop", "grouped", "unfold")
CONVOLUTION = [Way(form, None) for form in FORMS] + [
    Way(norms, sums)
    for norms in (*FORMS, "gram", "pixel gram")
    for sums in ("convolution", "unfold")
]
# Wide enough for Gram matrices to be worth a trial, with every setting of the geometry.
LAYERS = {
    "plain": (lambda: nn.Conv2d(24, 32, 3, padding=1), (24, 2, 2)),
    "pointwise": (lambda: nn.Conv2d(24, 32, 1, stride=2), (24, 3, 3)),
    "stride": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (16, 4, 3)),
    "dilation": (lambda: nn.Conv2d(24, 32, 2, dilation=2, padding=1), (24, 3, 3)),
    "groups": (lambda: nn.Conv2d(48, 96, 3, groups=2, padding=1), (48, 2, 2)),
    "narrow": (lambda: nn.Conv2d(48, 32, (3, 2), padding=(3, 1), dilation=(1, 2)), (48, 2, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(32, 24, 3, stride=2, padding=1), (32, 2, 2)),
    "transposed narrow": (
        lambda: nn.ConvTranspose2d(24, 32, (2, 3), dilation=(1, 2), padding=1),
        (24, 3, 2),
    ),
    "output padding": (
        lambda: nn.ConvTranspose2d(24, 32, 2, dilation=2, padding=1, output_padding=1),
        (24, 3, 3),
    ),
    "transposed groups": (lambda: nn.ConvTranspose1d(64, 32, 3, groups=2), (64, 3)),
    "volume": (lambda: nn.Conv3d(16, 24, (3, 1, 2), padding=(1, 0, 0)), (16, 2, 2, 3)),
}
# Ungrouped layers alone can be unfolded to one product.
UNGROUPED = {name for name in LAYERS if "groups" not in name}
# Their Gram matrices of pixels are dearer than twice the gradient, or they have no neighbours.
NO_PIXEL_GRAM = {"pointwise"}


class Folded(nn.Module):
    """Three windows of each image are rows of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(24, 32, 2)

    def forward(self, x):
        return self.layer(x.reshape(-1, 24, 2)).reshape(len(x), -1)


def exact_by(way, model, shape, batch):
    recorder = Recorder(way)
    images, targets = random_batch(shape, len(batch.units))
    assert_batch_exact(model.double(), batch, images, targets, choosers=[recorder])
    return recorder


@pytest.mark.parametrize("batch", [ONE_EACH, Batch((1, 3, 0, 1, 3), 5)], ids=["one", "several"])
@pytest.mark.parametrize("way", CONVOLUTION, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_convolution(name, way, batch):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    recorder = exact_by(way, layer(), shape, batch)
    closed = (name not in UNGROUPED and "unfold" in (way.norms, way.sums)) or (
        name in NO_PIXEL_GRAM and way.norms == "pixel gram"
    )
    if batch is ONE_EACH and not closed:
        assert way in recorder.taken
    if way in recorder.possible:
        assert way in recorder.taken


@pytest.mark.parametrize("way", LINEAR, ids=str)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 2, 64)])
@pytest.mark.parametrize("batch", [ONE_EACH, SEVERAL], ids=["one", "several"])
def test_linear(way, shape, batch):
    torch.manual_seed(0)
    recorder = exact_by(way, nn.Sequential(nn.Linear(64, 48)), shape, batch)
    assert way in recorder.taken


@pytest.mark.parametrize("way", CONVOLUTION, ids=str)
def test_windows_folded_into_the_batch(way):
    torch.manual_seed(0)
    exact_by(way, Folded(), (72, 2), Batch((1, 3, 0, 1, 3), 5))


def test_the_cases_try_every_way():
    """Adding a way without forcing it here would leave it unseen."""
    possible = set()
    for build, shape in LAYERS.values():
        possible |= exact_by(CONVOLUTION[0], build(), shape, ONE_EACH).possible
    assert possible == set(CONVOLUTION)
    assert exact_by(LINEAR[0], nn.Linear(64, 48), (64,), ONE_EACH).possible == set(LINEAR)


def test_a_remembered_way_fits_more_units():
    torch.manual_seed(0)
    model, recorder = nn.Conv2d(2, 4, 2).double(), Recorder(Way("unfold", "unfold"))
    for n in (2, 3, 4):
        images, targets = random_batch((2, 4, 4), n)
        batch = Batch(tuple(range(n)), n)
        assert_batch_exact(model, batch, images, targets, choosers=[recorder])
