"""The translating network: the formula of both spaces, masks, greedy decoding, batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.hyperbolic import lorentz
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.hyperbolic.spaces import SPACES
from lowrank_train.hyperbolic.translation.config import TranslationConfig, TranslationModelConfig
from lowrank_train.hyperbolic.translation.data import Pairs, batches, padded
from lowrank_train.hyperbolic.translation.network import LINEAR_MAPS, Translator
from lowrank_train.hyperbolic.translation.train import batch_loss, translate
from lowrank_train.layers.spectral import to_spectral
from lowrank_train.text.labels import IGNORED
from tests.reference import lorentz_transformer as reference

END, WORDS = 0, 20
SIZES = {"places": 12, "width": 8, "inner_width": 12, "layers": 2, "heads": 2}
GEOMETRIES = list(SPACES)


def network(geometry: str, k: float = 1.0, seed: int = 0) -> Translator:
    """In float64, in evaluation, every parameter away from where it begins."""
    torch.manual_seed(seed)
    made = Translator(TranslationModelConfig(geometry, curvature=k, **SIZES), WORDS).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name not in made.points():
                parameter.add_(0.3 * torch.randn_like(parameter))
        for points in made.points().values():  # drawn in float32
            points.copy_(lorentz.on_manifold(points[:, 1:], k))
    return made


def pairs(count: int = 30, seed: int = 0) -> Pairs:
    draw = np.random.default_rng(seed)
    source, target = (
        [[*draw.integers(1, WORDS, draw.integers(1, 8)).tolist(), END] for _ in range(count)] for _ in range(2)
    )
    return Pairs([""] * count, [""] * count, source, target)


def train(net: Translator, some: Pairs, method: str, epochs: int, lr: float = 0.05) -> None:
    groups = optim.param_groups(net)
    for group in groups:
        group["lr"] = 0.1 if group["role"] == "points" else lr
    optimizer = optim.create(method, groups, lr=lr)
    for epoch in range(epochs):
        for indices in batches(some, tokens=100, seed=0, epoch=epoch):
            batch_loss(net, padded(some, indices, END)).backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("k", [1.0, 0.5])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_scores_are_those_of_the_formulas(geometry: str, k: float) -> None:
    """Of a padded batch, against a reference that sees one pair at a time and has no masks."""
    net = network(geometry, k)
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    space = {"lorentz": reference.Lorentz, "euclidean": reference.Euclidean}[geometry](k, SIZES["heads"])
    some = pairs(3)
    batch = padded(some, [0, 1, 2], END)
    assert len(set(batch.lengths.tolist())) > 1
    got = net(batch.source, batch.lengths, batch.read)
    for i in range(3):
        read = [END, *some.target[i][:-1]]
        expected = reference.scores(space, weights, SIZES["layers"], some.source[i], read)
        np.testing.assert_allclose(got[i, : len(read)].detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nobody_sees_padding_or_what_comes_later(geometry: str) -> None:
    net = network(geometry)
    source, lengths = torch.randint(1, WORDS, (2, 7)), torch.tensor([4, 7])
    read = torch.randint(1, WORDS, (2, 6))
    before = net(source, lengths, read)

    def changed(what: Tensor, row: int, place: int) -> Tensor:
        other = what.clone()
        other[row, place] = other[row, place] % (WORDS - 1) + 1
        return other

    for place in (4, 5, 6):  # padding of the first sentence
        assert torch.equal(net(changed(source, 0, place), lengths, read), before)
    for place in range(4):  # the sentence itself is seen, by all that is read, and by its own translation only
        difference = (net(changed(source, 0, place), lengths, read) - before).abs().amax(-1)
        assert difference[0].min() > 1e-6
        assert difference[1].max() == 0
    for place in range(6):
        difference = (net(source, lengths, changed(read, 1, place)) - before).abs().amax(-1)
        assert difference[1, :place].sum() == 0
        assert difference[1, place:].min() > 1e-6
        assert difference[0].max() == 0


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_greedy_decoding_is_teacher_forcing_with_its_own_words(geometry: str) -> None:
    """Each word is the best one after those before it; and companions in the batch change nothing."""
    torch.manual_seed(0)
    net, some = Translator(TranslationModelConfig(geometry, **SIZES), WORDS).double(), pairs(40)
    some = some._replace(target=[source[:1] * (len(source) - 1) + [END] for source in some.source])
    train(net, some, "adamw", epochs=15, lr=0.01)  # else all sentences are equally long
    written = translate(net, some, end=END, longest=10)
    assert len({len(words) for words in written} - {10}) > 1
    for i, words in enumerate(written):
        source, length = torch.tensor([some.source[i]]), torch.tensor([len(some.source[i])])
        best = net(source, length, torch.tensor([[END, *words]]))[0].argmax(-1).tolist()
        assert best[: len(words)] == words
        assert END not in words
        assert len(words) == 10 or best[len(words)] == END
        assert net.translate(source, length, end=END, longest=10) == [words]


@torch.no_grad()
def test_loss_is_of_the_targets_alone() -> None:
    net, some = network("lorentz"), pairs(5)
    whole = padded(some, list(range(5)), END)
    total = sum(float(batch_loss(net, padded(some, [i], END), mean=False)) for i in range(5))
    assert float(batch_loss(net, whole, mean=False)) == pytest.approx(total, rel=1e-12)
    assert float(batch_loss(net, whole)) == pytest.approx(total / sum(map(len, some.target)), rel=1e-12)


@pytest.mark.parametrize("method", ["adamw", "sst"])
def test_everything_stays_on_the_manifold(method: str) -> None:
    k = 0.5
    net, some = network("lorentz", k).float(), pairs()
    if method == "sst":
        to_spectral(net, 2, layers=LINEAR_MAPS)
    began = {name: points.detach().clone() for name, points in net.points().items()}
    assert sorted(began) == ["decision.centres", "source.words.weight", "target.words.weight"]
    train(net, some, method, epochs=4)
    for name, points in net.points().items():
        assert lorentz.distance(points, began[name], k).max() > 0.1, name
        lorentz.check_points(points, k, name=name)
    batch = padded(some, list(range(10)), END)
    memory, seen = net.encode(batch.source, batch.lengths)
    for x in (memory, net.decode(batch.read, memory, seen)):
        lorentz.check_points(x, k)


@pytest.mark.parametrize("geometry", SPACES)
def test_no_word_is_preferred_at_first(geometry: str) -> None:
    """The loss of an untrained network is that of equal chances, log(words)."""
    torch.manual_seed(0)
    sizes = {"places": 20, "width": 32, "inner_width": 64, "layers": 2, "heads": 4}
    network = Translator(TranslationModelConfig(geometry, **sizes), 1000)
    tokens = torch.randint(1000, (8, 12))
    with torch.no_grad():
        scores = network(tokens, torch.full((8,), 12), tokens)
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.randint(1000, (96,)))
    assert float(loss) == pytest.approx(math.log(1000), abs=0.5)


def test_roles_of_the_parameters() -> None:
    def roles(geometry: str) -> dict[str, str]:
        groups = optim.param_groups(network(geometry))
        return {name: group["role"] for group in groups for name, _ in group["params"]}

    hyperbolic, euclidean = roles("lorentz"), roles("euclidean")
    assert hyperbolic["decision.centres"] == hyperbolic["source.words.weight"] == "points"
    assert euclidean["decision.linear.weight"] == "head"
    assert euclidean["target.words.weight"] == "embedding"
    assert euclidean["target.places"] == hyperbolic["target.places"] == "vector"
    for found in (hyperbolic, euclidean):
        matrices = [name for name, role in found.items() if role == "matrix" and name[:6] in ("encode", "decode")]
        assert len(matrices) == 2 * (4 + 2) + 2 * (4 + 4 + 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, r"model\.width=9 with model\.heads=2; expected a multiple"),
        ({"width": 2}, r"model\.width=2 with model\.heads=2; expected a multiple of the heads, of 2 or more"),
    ],
)
def test_a_width_that_does_not_divide_by_the_heads_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Translator(TranslationModelConfig(**{**SIZES, **change}), WORDS)


@pytest.mark.parametrize("change", ["inner_width=1", "layers=0", "heads=0", "places=0", "dropout=1"])
def test_sizes_out_of_range_are_refused(change: str) -> None:
    with pytest.raises(UserError, match=rf"model\.{change}(\.0)?; expected a number"):
        load_recipe(TranslationConfig, [f"model.{change}"])


# ------------------------------------------------------------------------------------------------------------- batches


def test_an_epoch_has_every_pair_once_in_batches_that_fit() -> None:
    some = pairs(200)
    found = batches(some, tokens=60, seed=1, epoch=0)
    assert sorted(index for batch in found for index in batch) == list(range(200))
    for indices in found:
        batch = padded(some, indices, END)
        assert batch.source.numel() + batch.read.numel() <= 60 or len(indices) == 1
    assert found == batches(some, tokens=60, seed=1, epoch=0)
    assert found != batches(some, tokens=60, seed=1, epoch=1)
    assert found != batches(some, tokens=60, seed=2, epoch=0)
    in_padding = sum(padded(some, indices, END).labels.eq(IGNORED).sum() for indices in found)
    assert in_padding < 0.1 * sum(map(len, some.target))
    assert [len(batch) for batch in batches(some, tokens=1, seed=0, epoch=0)] == [1] * 200


def test_a_batch_is_shifted_and_padded() -> None:
    some = Pairs([""] * 2, [""] * 2, [[5, 6, END], [7, END]], [[1, END], [2, 3, 4, END]])
    batch = padded(some, [0, 1], END)
    assert batch.source.tolist() == [[5, 6, END], [7, END, END]]
    assert batch.lengths.tolist() == [3, 2]
    assert batch.read.tolist() == [[END, 1, END, END], [END, 2, 3, 4]]
    assert batch.labels.tolist() == [[1, END, IGNORED, IGNORED], [2, 3, 4, END]]
