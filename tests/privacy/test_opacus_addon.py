"""Opacus' optimizer, loader and accountant around fedmed's clipping."""

import copy
import doctest
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks.nets import ViT
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fedmed
from fedmed.errors import IncompatibleModel
from fedmed.privacy import opacus_addon
from fedmed.privacy.clipping.bookkeeping import CHOOSER
from fedmed.privacy.compat import make_compatible
from fedmed.privacy.opacus_addon import BookKeepingModule, make_private

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")
LR, CLIP = 0.5, 0.05


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 3),
    ).double()


def batch(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn((n, 1, 8, 8), generator=g, dtype=torch.float64)
    return images, torch.randint(0, 3, (n,), generator=g)


def private(net, data=None, **options):
    options = {
        "noise_multiplier": 0.0,
        "max_grad_norm": CLIP,
        "poisson_sampling": False,
        "criterion": nn.CrossEntropyLoss(),
        "data_loader": DataLoader(data or TensorDataset(*batch(12)), batch_size=6),
        **options,
    }
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR)
    return make_private(module=net, optimizer=optimizer, **options)


def expected(net, images, targets, units, divisor, loss=F.cross_entropy, clip=CLIP):
    """Weights after one step of plain SGD on the sum of clipped gradients, unit by unit."""
    after = copy.deepcopy(net)
    parameters = list(after.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for unit in units.unique():
        mine = units == unit
        whole = loss(after(images[mine]), targets[mine])
        grads = torch.autograd.grad(whole, parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        norm = torch.sqrt(sum((g**2).sum() for g in grads)).item()
        for total, g in zip(sums, grads, strict=True):
            total += g * min(1.0, clip / norm)
    with torch.no_grad():
        for p, total in zip(parameters, sums, strict=True):
            p -= LR * total / divisor
    return after


def worst(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def train(parts, optimizer):
    for part in parts:
        part.backward()
        optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip", [CLIP, 1e6])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_step_is_that_of_naive_clipping(n, clip, reduction):
    net = network()
    images, targets = batch(n)
    # 12 records at a rate of 1/2: divided by 6, whatever the size of the batch.
    divisor = 6 if reduction == "mean" else 1
    wanted = expected(net, images, targets, torch.arange(n), divisor, clip=clip)
    criterion = nn.CrossEntropyLoss(reduction="none" if n == 2 else reduction)
    model, optimizer, criterion, _ = private(
        net, max_grad_norm=clip, loss_reduction=reduction, criterion=criterion
    )
    loss = criterion(model(images), targets)
    assert loss.item() == pytest.approx(
        F.cross_entropy(net(images), targets, reduction=reduction).item()
    )
    loss.backward()
    optimizer.step()
    assert type(optimizer) is DPOptimizerFastGradientClipping
    assert worst(net, wanted) <= 1e-9


def test_a_public_batch_size_is_the_divisor():
    net = network()
    images, targets = batch(5)
    wanted = expected(net, images, targets, torch.arange(5), 8)
    model, optimizer, criterion, _ = private(net, expected_batch_size=8)
    criterion(model(images), targets).backward()
    optimizer.step()
    assert worst(net, wanted) <= 1e-9


@pytest.mark.parametrize("zeroes", [True, False])
def test_two_physical_batches_are_one_step(zeroes):
    net = network()
    images, targets = batch(9)
    wanted = expected(net, images, targets, torch.arange(9), 6)
    model, optimizer, criterion, _ = private(net)
    before = copy.deepcopy(net)
    for rows, last in ((slice(0, 4), False), (slice(4, 9), True)):
        optimizer.signal_skip_step(do_skip=not last)
        criterion(model(images[rows]), targets[rows]).backward()
        assert worst(net, before) == 0
        optimizer.step()
        if zeroes:
            optimizer.zero_grad()
    assert worst(net, wanted) <= 1e-9
    # The next step starts from nothing.
    wanted = expected(net, images, targets, torch.arange(9), 6)
    criterion(model(images), targets).backward()
    optimizer.step()
    assert worst(net, wanted) <= 1e-9


def test_steps_by_patient():
    net = network()
    model, optimizer, criterion, _ = private(net)
    for seed, units in enumerate(([5, 9, 5, 2, 9, 5, 7], [3, 3, 3], [1, 0, 1], [4])):
        images, targets = batch(len(units), seed)
        wanted = expected(net, images, targets, torch.tensor(units), 6)
        model.set_units(torch.tensor(units))
        logits = model(images)
        assert torch.allclose(logits, net(images))  # in the batch's own order
        criterion(logits, targets).backward()
        optimizer.step()
        assert worst(net, wanted) <= 1e-9
    with pytest.raises(ValueError, match="set_units"):
        model(images)
    model.set_units(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="set_units"):
        model(images)


class Patients(Dataset):
    """An item is a patient with one or two images."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return (*batch(1 + i % 2, seed=i), torch.full((1 + i % 2,), i))


def test_a_loader_of_patients_through_the_memory_manager():
    net = network()
    columns = zip(*(Patients()[i] for i in range(6)), strict=True)
    images, targets, units = (torch.cat(column) for column in columns)
    wanted = expected(net, images, targets, units, 6)
    loader = DataLoader(
        Patients(), batch_size=6, collate_fn=lambda b: [torch.cat(c) for c in zip(*b, strict=True)]
    )
    # A rate of 1: the Poisson batch is everybody.
    model, optimizer, criterion, loader = private(net, data_loader=loader, poisson_sampling=True)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=4, optimizer=optimizer
    ) as parts:
        seen = 0
        for x, y, who in parts:
            seen += 1
            optimizer.zero_grad()
            model.set_units(who)
            criterion(model(x), y).backward()
            optimizer.step()
    assert seen == 2
    assert worst(net, wanted) <= 1e-9


def test_an_empty_batch_is_a_step_of_noise():
    net = network()
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, criterion, loader = private(
        net, noise_multiplier=2.0, poisson_sampling=True, privacy_engine=engine
    )
    images, targets = loader.collate_fn([])  # what a Poisson loader gives when none is drawn
    assert len(images) == 0
    before = copy.deepcopy(net)
    criterion(model(images), targets).backward()
    optimizer.step()
    assert engine.accountant.history == [(2.0, 0.5, 1)]
    assert worst(net, before) > 0


def test_noise_and_accounting_are_those_of_opacus():
    net = nn.Linear(300, 100)
    engine = PrivacyEngine(accountant="rdp")
    data = TensorDataset(torch.randn(40, 300), torch.randint(0, 100, (40,)))
    model, optimizer, criterion, _ = private(
        net,
        data,
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=3.0,
        max_grad_norm=0.2,
        poisson_sampling=True,
        privacy_engine=engine,
        noise_generator=torch.Generator().manual_seed(5),
    )
    before = net.weight.detach().clone()
    images, targets = data[:4]
    criterion(model(images), targets).backward()
    clipped = net.weight.grad.clone()
    optimizer.step()
    noise = (before - net.weight.detach()) * 10 / LR - clipped
    assert noise.std().item() == pytest.approx(3.0 * 0.2, rel=0.02)  # of 30,000 draws: 0.4 %
    assert abs(noise.mean().item()) < 5 * 0.6 / 30_000**0.5
    assert engine.accountant.history == [(3.0, 0.25, 1)]
    one = engine.get_epsilon(delta=1e-3)
    criterion(model(images), targets).backward()
    optimizer.signal_skip_step(do_skip=True)
    optimizer.step()
    assert engine.get_epsilon(delta=1e-3) == one > 0
    criterion(model(images), targets).backward()
    optimizer.step()
    assert engine.get_epsilon(delta=1e-3) > one


def small_vit():
    return ViT(1, (8, 8), (4, 4), 16, 32, 2, 2, classification=True, num_classes=3, spatial_dims=2)


def in_place():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(144, 3),
    )


@pytest.mark.parametrize("build", [small_vit, in_place])
def test_networks_that_opacus_does_not_take_train(build):
    torch.manual_seed(0)
    net, _ = make_compatible(build())
    net = net.double()
    images, targets = batch(5)

    def logits(x):
        return x[0] if isinstance(x, tuple) else x

    def loss(outputs, targets):
        return F.cross_entropy(logits(outputs), targets)

    wanted = expected(net, images, targets, torch.arange(5), 6, loss)
    model, optimizer, criterion, _ = private(net)
    criterion(logits(model(images)), targets).backward()
    optimizer.step()
    assert worst(net, wanted) <= 1e-9
    model(images[:0])


def test_segmentation_with_a_loss_of_monai():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)).double()
    images, _ = batch(4)
    masks = (images > 0).double()
    wanted = expected(net, images, masks, torch.arange(4), 6, DiceLoss(sigmoid=True))
    model, optimizer, criterion, _ = private(net, criterion=DiceLoss(sigmoid=True))
    criterion(model(images), masks).backward()
    optimizer.step()
    assert worst(net, wanted) <= 1e-9


def test_evaluation_and_state_are_those_of_the_network():
    net = nn.Sequential(network(), nn.Dropout(0.5))
    model, _, criterion, _ = private(net)
    images, targets = batch(3)
    assert list(model.state_dict()) == [f"_module.{name}" for name in net.state_dict()]
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    model.eval()
    assert not net.training
    assert torch.equal(model(images), net(images))
    loss = criterion(model(images), targets)
    assert loss.item() == pytest.approx(F.cross_entropy(net(images), targets).item())
    with pytest.raises(RuntimeError, match="training mode"):
        loss.backward()
    model.train()
    with torch.no_grad():
        assert model.recorded is None
        model(images)
        assert model.recorded is None
    assert model.to_standard_module() is net


def test_the_proof_moves_no_stream_and_leaves_the_network_in_training():
    net = nn.Sequential(network(), nn.Dropout(0.5))
    model = BookKeepingModule(net)
    images, _ = batch(3)
    torch.manual_seed(3)
    found = model(images)
    torch.manual_seed(3)
    assert torch.equal(found, net(images))
    assert all(layer.training for layer in model.modules())


def test_the_proof_settles_no_way_for_training():
    images, _ = batch(3)
    known = set(CHOOSER._best)
    BookKeepingModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 7).double()))(images)
    assert set(CHOOSER._best) == known


class MixesImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 3).double()

    def forward(self, x):
        x = x.flatten(1)
        return self.layer(x - x.mean(0))


def test_networks_that_mix_samples_are_refused():
    with pytest.raises(IncompatibleModel, match="over the batch"):
        private(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    model, *_ = private(MixesImages())
    with pytest.raises(IncompatibleModel, match="mixes samples"):
        model(batch(4)[0])


@pytest.mark.parametrize(
    "criterion",
    [
        lambda logits, y: F.cross_entropy(logits, y),
        lambda logits, y: F.cross_entropy(logits / logits.norm(), y, reduction="none"),
        DiceLoss(batch=True, softmax=True, to_onehot_y=False),
    ],
    ids=["one-number", "normalised", "dice-of-the-batch"],
)
def test_criteria_that_mix_samples_are_refused(criterion):
    model, _, criterion, _ = private(network(), criterion=criterion)
    images, targets = batch(3)
    if isinstance(criterion._loss, DiceLoss):
        targets = F.one_hot(targets, 3)
    with pytest.raises(ValueError, match="sample"):
        criterion(model(images), targets)


def test_ways_around_the_clipping_are_refused():
    net = network()
    model, _, criterion, _ = private(net)
    images, targets = batch(4)
    with pytest.raises(RuntimeError, match="wrapped criterion"):
        F.cross_entropy(model(images), targets).backward()
    with pytest.raises(RuntimeError, match="wrapped criterion"):
        (criterion(model(images), targets) * 2).backward()
    early = criterion(model(images), targets)
    model(images)
    with pytest.raises(RuntimeError, match="wrapped criterion"):
        early.backward()
    model(images)
    with pytest.raises(RuntimeError, match="latest forward"):
        criterion(net(images), targets).backward()
    assert all(p.grad is None for p in net.parameters())


def test_a_penalty_on_the_weights_in_the_criterion_is_refused():
    net = network()

    def penalised(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none") + net[5].weight.square().sum()

    model, _, criterion, _ = private(net, criterion=penalised)
    images, targets = batch(4)
    with pytest.raises(IncompatibleModel, match="followed by sample"):
        criterion(model(images), targets).backward()
    assert all(p.grad is None for p in net.parameters())


def test_frozen_parameters_stay():
    net = network()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net)
    model, optimizer, criterion, _ = private(net)
    images, targets = batch(4)
    train([criterion(model(images), targets)], optimizer)
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[5].weight, before[5].weight)


def test_clipping_follows_the_bound_of_the_optimizer():
    net = network()
    images, targets = batch(4)
    wanted = expected(net, images, targets, torch.arange(4), 6, clip=CLIP / 3)
    model, optimizer, criterion, _ = private(net)
    optimizer.max_grad_norm = CLIP / 3  # what Opacus' schedulers do
    train([criterion(model(images), targets)], optimizer)
    assert worst(net, wanted) <= 1e-9


@pytest.mark.parametrize("units", [[0, 1, 2, 3], [0, 1, 0, 2]])
def test_autocast(units):
    net = network().float()
    images, targets = batch(4)
    images = images.float()
    wanted = expected(net, images, targets, torch.tensor(units), 6)
    start = copy.deepcopy(net)
    model, optimizer, criterion, _ = private(net)
    model.set_units(torch.tensor(units))
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model(images), targets)
    loss.backward()
    optimizer.step()
    assert worst(net, wanted) <= 0.05 * worst(start, wanted)


def test_the_example_of_the_docstring():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = doctest.testmod(opacus_addon)
    assert found.attempted > 5
    assert found.failed == 0


@pytest.mark.parametrize("option", ["batch_first", "grad_sample_mode", "wrap_model"])
def test_options_that_clipping_relies_on_cannot_be_given(option):
    with pytest.raises(TypeError, match=option):
        private(network(), **{option: False})


def test_a_run_is_that_of_opacus_ghost_clipping():
    def run(make, mode):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        data = TensorDataset(torch.randn(50, 8).double(), torch.randint(0, 3, (50,)))
        sampling = torch.Generator().manual_seed(9)
        model, optimizer, criterion, loader = make(
            module=net,
            optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
            data_loader=DataLoader(data, batch_size=7, generator=sampling),
            criterion=nn.CrossEntropyLoss(),
            noise_multiplier=1.1,
            max_grad_norm=0.3,
            noise_generator=torch.Generator().manual_seed(4),
            **mode,
        )
        for images, targets in loader:
            optimizer.zero_grad()
            criterion(model(images), targets).backward()
            optimizer.step()
        return net, optimizer.expected_batch_size

    engine, theirs = PrivacyEngine(accountant="rdp"), PrivacyEngine(accountant="rdp")
    ours, size = run(make_private, {"privacy_engine": engine})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on hooks at the first layer
        net, their_size = run(theirs.make_private, {"grad_sample_mode": "ghost"})
    # Opacus adds 1e-6 to each norm.
    assert 0 < worst(ours, net) < 1e-6
    assert engine.accountant.history == theirs.accountant.history
    assert size == their_size == 6  # 50 records at 1/8, floored


def test_indices_as_input():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3)).double()
    words = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 1, 2, 0])
    wanted = expected(net, words, targets, torch.arange(4), 6)
    model, optimizer, criterion, _ = private(net)
    train([criterion(model(words), targets)], optimizer)
    assert worst(net, wanted) <= 1e-9


def test_parameters_of_reduced_precision_are_refused():
    # Rounding a clipped sum to so few bits may take it past the bound.
    model, _, criterion, _ = private(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).bfloat16())
    images, targets = batch(4)
    with pytest.raises((IncompatibleModel, RuntimeError)):  # by the proof, or by torch
        criterion(model(images.bfloat16()), targets).backward()


def test_nothing_else_of_fedmed_imports_it():
    package = Path(fedmed.__file__).parent
    assert [p.name for p in package.rglob("*.py") if "opacus_addon import" in p.read_text()] == [
        "opacus_addon.py"  # its own example
    ]
