"""The product of a spectral layer: both ways against autograd of the literal formula, and what they keep and cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_train.layers import spectral
from lowrank_train.layers.spectral import SpectralLinear
from lowrank_train.layers.spectral_product import factored_is_cheaper, spectral_product
from lowrank_train.optim.spectral.factors import decode, encode

PATHS = ["factored", "materialised"]
GRADIENTS = ["enhanced", "plain"]
SHAPES = {  # out, in, rank
    "wide": (5, 9, 2),
    "tall": (9, 5, 2),
    "square": (6, 6, 4),
    "rank 1": (5, 7, 1),
    "full rank, wide": (4, 7, 4),
    "full rank, tall": (7, 4, 4),
    "full rank, square": (5, 5, 5),
    "one row": (1, 6, 1),
    "one column": (6, 1, 1),
}
FROZEN = [None, "float32", "bfloat16", "float16", "8bit"]


def layer(out: int, width: int, rank: int, *, dtype: torch.dtype = torch.float64, **settings: Any) -> SpectralLinear:
    """Factors neither unit nor orthogonal, because the product must not rely on that; in 8 bits, codes and scales."""
    made = SpectralLinear(width, out, rank, dtype=dtype, **settings)
    values = {}
    for name, param in made.named_parameters():
        if not name.endswith("scale"):
            values[name] = torch.randn(param.shape, dtype=torch.float64)
    if made.frozen_dtype == "8bit" and rank < min(out, width):
        for name in ("u_frozen", "v_frozen"):
            values[name], values[f"{name}_scale"] = encode(values[name])
    for name, value in values.items():
        made.get_parameter(name).data.copy_(value)
    return made


def loss_of(y: Tensor) -> Tensor:
    """Every entry of dL/dY differs and depends on Y."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return (weights * y.sin()).sum()


def gradients(made: SpectralLinear, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of x and of all trained parameters."""
    x = x.detach().requires_grad_()
    y = made(x)
    trained = {name: param for name, param in made.named_parameters() if param.requires_grad}
    found = torch.autograd.grad(loss_of(y), [x, *trained.values()])
    return {"y": y.detach(), **dict(zip(["x", *trained], found, strict=True))}


def factors(made: SpectralLinear) -> dict[str, Tensor]:
    """Whole factors in float64, decoded: u (k, out), sigma (k,), v (k, in)."""
    whole = {}
    for kind in ("u", "sigma", "v"):
        parts = [made.get_parameter(f"{kind}_active").detach().double()]
        if made.rank < min(made.out_features, made.in_features):
            scale = getattr(made, f"{kind}_frozen_scale", None)
            stored = made.get_parameter(f"{kind}_frozen").detach()
            parts.append(decode(stored, None if scale is None else scale.detach(), torch.float64))
        whole[kind] = torch.cat(parts)
    return whole


def literal(made: SpectralLinear, x: Tensor) -> dict[str, Tensor]:
    """What ``gradients`` gives, with W formed and G = dL/dW taken by autograd; Eq. 8, 9, 14 and 15 from G."""
    whole = factors(made)
    weight = torch.einsum("k,ko,ki->oi", whole["sigma"], whole["u"], whole["v"]).requires_grad_()
    bias = None if made.bias is None else made.bias.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    y = nn.functional.linear(x, weight, bias)
    leaves = [x, weight] if bias is None else [x, weight, bias]
    dx, g, *dbias = torch.autograd.grad(loss_of(y), leaves)
    r = made.rank
    column = whole["sigma"][:r, None] if made.gradient == "plain" else 1.0
    dsigma = torch.einsum("ko,oi,ki->k", whole["u"], g, whole["v"])
    expected = {
        "y": y.detach(),
        "x": dx,
        "u_active": column * (whole["v"][:r] @ g.mT),
        "sigma_active": dsigma[:r],
        "v_active": column * (whole["u"][:r] @ g),
    }
    if r < len(dsigma):
        expected["sigma_frozen"] = dsigma[r:]
    if dbias:
        expected["bias"] = dbias[0]
    return expected


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        torch.testing.assert_close(got[name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=name)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """In norm, for arithmetic in few bits."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm()
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_formula(shape: str, bias: bool, gradient: Any, path: Any) -> None:
    out, width, rank = SHAPES[shape]
    made = layer(out, width, rank, bias=bias, gradient=gradient, path=path)
    x = torch.randn(11, width, dtype=torch.float64)
    assert_close(gradients(made, x), literal(made, x))


@pytest.mark.parametrize("path", PATHS)
def test_plain_gradients_are_those_of_autograd_and_enhanced_ones_lack_sigma(path: Any) -> None:
    plain = layer(5, 9, 3, gradient="plain", path=path)
    enhanced = layer(5, 9, 3, gradient="enhanced", path=path)
    enhanced.load_state_dict(plain.state_dict())
    x = torch.randn(8, 9, dtype=torch.float64)
    leaves = {name: param.detach().clone().requires_grad_() for name, param in plain.named_parameters()}
    weight = sum(
        torch.einsum("k,ko,ki->oi", leaves[f"sigma_{part}"], leaves[f"u_{part}"], leaves[f"v_{part}"])
        for part in ("active", "frozen")
    )
    trained = [name for name, param in plain.named_parameters() if param.requires_grad]
    found = torch.autograd.grad(loss_of(x @ weight.mT + leaves["bias"]), [leaves[name] for name in trained])
    expected = dict(zip(trained, found, strict=True))
    got = {name: value for name, value in gradients(plain, x).items() if name in expected}
    assert_close(got, expected)
    column = plain.sigma_active.detach()[:, None]
    expected.update({name: expected[name] / column for name in ("u_active", "v_active")})
    got = {name: value for name, value in gradients(enhanced, x).items() if name in expected}
    assert_close(got, expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_triplet_of_value_zero_learns_with_the_enhanced_gradient_only(path: Any) -> None:
    for gradient in GRADIENTS:
        made = layer(5, 7, 2, gradient=gradient, path=path)
        made.sigma_active.data[1] = 0
        found = gradients(made, torch.randn(6, 7, dtype=torch.float64))
        for name in ("u_active", "v_active"):
            assert bool(found[name][1].any()) == (gradient == "enhanced")
        assert found["sigma_active"][1] != 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [(7,), (2, 5), (2, 3, 4), (1,), (2, 1), ()], ids=str)
def test_any_leading_dimensions(batch: tuple[int, ...], path: Any) -> None:
    """As ``nn.Linear``, a single vector without a batch included."""
    made = layer(5, 6, 2, path=path)
    x = torch.randn(*batch, 6, dtype=torch.float64)
    assert_close(gradients(made, x), literal(made, x))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens_give_an_empty_output_and_zero_gradients(batch: tuple[int, ...], path: Any) -> None:
    made = layer(5, 6, 2, path=path)
    x = torch.randn(*batch, 6, dtype=torch.float64, requires_grad=True)
    y = made(x)
    assert y.shape == (*batch, 5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for name, param in made.named_parameters():
        if param.requires_grad:
            assert param.grad is not None, name
            assert not param.grad.any(), name


@pytest.mark.parametrize("path", PATHS)
def test_strided_inputs_and_an_expanded_output_gradient(path: Any) -> None:
    made = layer(5, 6, 2, path=path)
    x = torch.randn(6, 4, 3, dtype=torch.float64).permute(2, 1, 0)[:, ::2]
    assert_close(gradients(made, x), literal(made, x))
    for tensor in made.parameters():
        tensor.grad = None
    made(x).sum().backward()  # dL/dY has stride 0
    weight = factors(made)
    g = torch.ones(5, 6, dtype=torch.float64) * x.sum((0, 1))
    torch.testing.assert_close(made.u_active.grad, weight["v"][:2] @ g.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_an_input_without_gradient_changes_nothing_else(path: Any) -> None:
    made = layer(5, 6, 2, path=path)
    x = torch.randn(7, 6, dtype=torch.float64)
    loss_of(made(x)).backward()
    expected = literal(made, x)
    for name, param in made.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.grad, expected[name], rtol=1e-10, atol=1e-10)
        else:
            assert param.grad is None
    assert x.grad is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("held", ["u_active", "sigma_active", "v_active", "sigma_frozen", "bias"])
def test_a_held_parameter_gets_no_gradient_and_changes_nothing_else(held: str, path: Any) -> None:
    made = layer(5, 6, 2, path=path)
    made.get_parameter(held).requires_grad_(False)
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = literal(made, x)
    del expected[held]
    assert_close(gradients(made, x), expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("frozen_dtype", FROZEN)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_agree(shape: str, frozen_dtype: str | None, gradient: Any) -> None:
    out, width, rank = SHAPES[shape]
    made = layer(out, width, rank, frozen_dtype=frozen_dtype, gradient=gradient)
    x = torch.randn(2, 4, width, dtype=torch.float64)
    found = []
    for path in PATHS:
        made.path = path  # type: ignore[assignment]
        found.append(gradients(made, x))
    assert_close(*found)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16", "float16", "8bit"])
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_frozen_vectors_in_few_bits_act_as_their_decoded_values(shape: str, frozen_dtype: str, path: Any) -> None:
    out, width, rank = SHAPES[shape]
    made = layer(out, width, rank, frozen_dtype=frozen_dtype, path=path)
    before = {name: param.detach().clone() for name, param in made.named_parameters()}
    x = torch.randn(7, width, dtype=torch.float64)
    decoded = layer(out, width, rank, path=path)
    whole = factors(made)
    for name, param in decoded.named_parameters():
        kind, _, part = name.partition("_")
        param.data.copy_(
            before["bias"] if name == "bias" else whole[kind][slice(rank) if part == "active" else slice(rank, None)]
        )
    assert_close(gradients(made, x), gradients(decoded, x))
    for name, param in made.named_parameters():
        assert torch.equal(param, before[name]), f"{name} was changed"


@pytest.mark.parametrize(
    ("tokens", "out", "width", "rank", "expected"),
    [
        (8192, 2048, 2048, 64, False),  # square, many tokens
        (131072, 768, 768, 64, False),
        (8192, 8192, 2048, 64, True),  # feed-forward of OPT-1.3B, up and down
        (8192, 2048, 8192, 64, True),
        (131072, 5461, 2048, 128, True),  # of LLaMA-1.3B: cheaper than dense however many tokens
        (256, 2048, 2048, 64, True),  # few tokens
        (1, 768, 768, 768, True),
        (0, 64, 64, 8, True),
    ],
)
def test_the_cheaper_way(tokens: int, out: int, width: int, rank: int, expected: bool) -> None:
    assert factored_is_cheaper(tokens, out, width, rank) == expected


def test_the_cheaper_way_changes_once_as_tokens_grow_and_ignores_orientation() -> None:
    for out, width, rank in ((768, 768, 64), (1024, 1536, 64), (2048, 5461, 128)):
        answers = [factored_is_cheaper(tokens, out, width, rank) for tokens in range(0, 20000, 250)]
        assert answers == sorted(answers, reverse=True)
        assert answers == [factored_is_cheaper(tokens, width, out, rank) for tokens in range(0, 20000, 250)]


@pytest.mark.parametrize(
    ("path", "batch", "factored"),
    [
        ("auto", (2, 40), False),
        ("auto", (1, 2), True),
        ("auto", (2,), True),
        ("factored", (2, 40), True),
        ("materialised", (1, 2), False),
    ],
)
def test_a_layer_takes_the_way_it_is_told(
    path: Any, batch: tuple[int, ...], factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def spy(*args: Any, **settings: Any) -> Tensor:
        taken.append(settings["factored"])
        return spectral_product(*args, **settings)

    monkeypatch.setattr(spectral, "spectral_product", spy)
    layer(8, 8, 2, path=path)(torch.randn(*batch, 8, dtype=torch.float64))
    assert taken == [factored]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen_dtype", [None, "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_matrix_waits_for_backward(path: Any, frozen_dtype: str | None, dtype: torch.dtype) -> None:
    out, width, rank, tokens = 16, 24, 3, 5
    made = layer(out, width, rank, dtype=torch.float32, frozen_dtype=frozen_dtype, path=path)
    own = {param.data_ptr() for param in made.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = made(x)
    assert saved
    new = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert max(tensor.numel() for tensor in new) <= tokens * width, [tuple(tensor.shape) for tensor in new]
    assert not any(set(tensor.shape) == {out, width} for tensor in saved)
    y.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_kept_without_gradients(path: Any) -> None:
    made = layer(5, 6, 2, path=path)
    x = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        y = made(x)
    assert y.grad_fn is None
    torch.testing.assert_close(y, literal(made, x)["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("frozen_dtype", FROZEN)
def test_a_bfloat16_input_is_computed_in_bfloat16(path: Any, gradient: Any, frozen_dtype: str | None) -> None:
    made = layer(24, 40, 6, dtype=torch.float32, frozen_dtype=frozen_dtype, gradient=gradient, path=path)
    x = (torch.randn(3, 20, 40) / 30).bfloat16()  # the sine of the loss stays nearly linear
    found = gradients(made, x)
    assert (found["y"].dtype, found["x"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert all(value.dtype == torch.float32 for name, value in found.items() if name not in ("x", "y"))
    assert_near(found, literal(made, x), 2e-2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen_dtype", [None, "8bit"])
@pytest.mark.parametrize("inside", [True, False])  # where backward is called
def test_autocast(path: Any, frozen_dtype: str | None, inside: bool) -> None:
    made = layer(24, 40, 6, dtype=torch.float32, frozen_dtype=frozen_dtype, path=path)
    x = torch.randn(3, 20, 40) / 30
    expected = literal(made, x)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
        reference = nn.Linear(40, 24)(x)
        if inside:
            loss_of(y.float()).backward()
    if not inside:
        loss_of(y.float()).backward()
    assert y.dtype == reference.dtype == torch.bfloat16
    found = {"y": y.detach(), "x": x.grad}
    found.update({name: param.grad for name, param in made.named_parameters() if param.requires_grad})
    assert all(value.dtype == torch.float32 for name, value in found.items() if name != "y")
    assert_near(found, expected, 2e-2)
    assert all(param.grad is None for param in made.parameters() if not param.requires_grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "computed"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_autocast_converts_other_inputs_in_few_bits_as_for_a_linear_layer(
    given: torch.dtype, computed: torch.dtype, path: Any
) -> None:
    made = layer(24, 40, 6, dtype=torch.float32, path=path)
    x = (torch.randn(20, 40) / 30).to(given)
    expected = literal(made, x)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=computed):
        y = made(x)
        assert y.dtype == nn.Linear(40, 24)(x).dtype == computed
    loss_of(y.float()).backward()
    found = {"y": y.detach(), "x": x.grad}
    found.update({name: param.grad for name, param in made.named_parameters() if param.requires_grad})
    assert_near(found, expected, 2e-2)


def test_autocast_leaves_float64_alone_as_for_a_linear_layer() -> None:
    made = layer(5, 6, 2)
    x = torch.randn(7, 6, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, literal(made, x)["y"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("frozen_dtype", [None, "8bit"])
def test_activation_checkpointing_gives_identical_gradients(
    path: Any, use_reentrant: bool, frozen_dtype: str | None
) -> None:
    block = nn.Sequential(
        layer(8, 6, 2, frozen_dtype=frozen_dtype, path=path),
        nn.GELU(),
        layer(6, 8, 3, frozen_dtype=frozen_dtype, path=path),
    )
    found = []
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    for checkpointed in (False, True):
        block.zero_grad()
        x.grad = None
        y = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
        loss_of(y).backward()
        found.append([y.detach(), x.grad, *(param.grad for param in block.parameters() if param.requires_grad)])
    assert all(value is not None for value in found[1])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen_dtype", [None, "8bit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_without_graph_breaks(path: Any, frozen_dtype: str | None, dtype: torch.dtype) -> None:
    made = layer(8, 6, 2, dtype=torch.promote_types(dtype, torch.float32), frozen_dtype=frozen_dtype, path=path)
    x = torch.randn(2, 5, 6).to(dtype)
    eager = gradients(made, x)
    before = {name: param.detach().clone() for name, param in made.named_parameters()}
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = x.detach().requires_grad_()
    y = compiled(x)
    loss_of(y).backward()
    found = {"y": y.detach(), "x": x.grad}
    found.update({name: param.grad for name, param in made.named_parameters() if param.requires_grad})
    if dtype == torch.bfloat16:
        assert_near(found, eager, 1e-2)
    else:
        assert_close(found, eager, 1e-12)
    for name, param in made.named_parameters():
        assert torch.equal(param, before[name]), f"{name} was changed"


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_used_twice_adds_its_gradients(path: Any) -> None:
    made = layer(6, 6, 2, path=path)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = gradients(made, x)
    trained = [name for name in expected if name not in ("x", "y")]
    y = torch.stack([made(part) for part in x])
    found = torch.autograd.grad(loss_of(y), [made.get_parameter(name) for name in trained])
    assert_close(dict(zip(trained, found, strict=True)), {name: expected[name] for name in trained})


@pytest.mark.parametrize("path", PATHS)
def test_second_derivatives_are_right_or_refused(path: Any) -> None:
    """Never silently wrong, although what backward reads of forward has no graph of its own."""
    made = layer(5, 6, 2, gradient="plain", path=path)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    trained = [param for param in made.parameters() if param.requires_grad]

    def norm_of_gradients(y: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.autograd.grad(loss_of(y), trained, create_graph=True))  # type: ignore[return-value]

    weight = sum(
        made.get_parameter(f"u_{part}").mT * made.get_parameter(f"sigma_{part}") @ made.get_parameter(f"v_{part}")
        for part in ("active", "frozen")
    )
    expected = torch.autograd.grad(norm_of_gradients(x @ weight.mT + made.bias), x)[0]
    first = norm_of_gradients(made(x))
    try:
        found = torch.autograd.grad(first, x)[0]
    except RuntimeError:
        return
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
