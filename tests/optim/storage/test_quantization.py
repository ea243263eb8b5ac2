"""Moments in 8 or 4 bits, or in another type: the codes, which tensors have them, training, ranks, files."""

from __future__ import annotations

import copy
import io
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lowrank_train import optim
from lowrank_train.optim.core.common_updates import ADAMW
from lowrank_train.optim.shards.layout import StateTensor
from lowrank_train.optim.storage.quantization import BLOCK, as_stored, dequantize, quantize, read
from tests.distributed import run_distributed
from tests.optim.models import assert_equal, gradient, prepare, run_steps, states, weights
from tests.tiers import only_first_quick


class Code(NamedTuple):
    """Of the first moment, which is signed, or of the second."""

    signed: bool
    bits: int


FIRST, SECOND, FIRST_4, SECOND_4 = Code(True, 8), Code(False, 8), Code(True, 4), Code(False, 4)

every_code = pytest.mark.parametrize("code", [FIRST, SECOND, FIRST_4, SECOND_4], ids=str)
every_width = pytest.mark.parametrize("width", [32, 127, 128, 129, 300])


def moment(code: Code, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many magnitudes, within rows and between them."""
    value = torch.randn(rows, width, dtype=dtype) * 10 ** torch.empty(rows, width, dtype=dtype).uniform_(-3, 0)
    value = value * 10 ** torch.linspace(-4, 4, rows, dtype=dtype).unsqueeze(1)
    return value if code.signed else value.square()


def encoded(value: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    codes = empty_codes(value, code)
    scale = torch.empty(value.shape[0], math.ceil(value.shape[1] / BLOCK))
    quantize(value, codes, scale, code.signed)
    return codes, scale


def empty_codes(value: Tensor, code: Code) -> Tensor:
    rows, width = value.shape
    if code.bits == 4:
        return torch.empty(rows, math.ceil(width / 2), dtype=torch.uint8)
    return torch.empty(rows, width, dtype=torch.int8 if code.signed else torch.uint8)


def there_and_back(value: Tensor, code: Code) -> Tensor:
    return dequantize(*encoded(value, code), value.shape[1], code.signed, value.dtype)


def magnitudes(value: Tensor) -> Tensor:
    """The largest magnitude of the block that each number is in."""
    return torch.cat([block.abs().amax(1, keepdim=True).expand_as(block) for block in value.split(BLOCK, 1)], 1)


# ---------------------------------------------------------------------------------------------------------- the codes


@every_code
@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_to_the_nearest_code_of_the_block(code: Code, width: int, dtype: torch.dtype) -> None:
    value = moment(code, 40, width, dtype)
    decoded = there_and_back(value, code)
    assert decoded.dtype == dtype
    largest = magnitudes(value)
    unit = value.abs() / largest
    if code.signed:  # (c / 127)^2 with c off by 1/2 at most
        bound = (unit.sqrt() + 0.5 / (2 ** (code.bits - 1) - 1)).square() - unit
    elif code == SECOND:  # (c / 255)^4, or the smallest code there is
        bound = ((unit.sqrt().sqrt() + 0.5 / 255).pow(4) - unit).clamp_min(255.0**-4)
    else:
        bound = ((unit.sqrt() + 0.5 / 16).square() - unit).clamp_min(16.0**-2)
    assert ((decoded - value).abs() <= bound * largest * (1 + 1e-4)).all()
    assert (decoded.sign() * value.sign() >= 0).all()


@every_code
def test_relative_error_of_a_typical_moment(code: Code) -> None:
    value = torch.randn(200, 256) if code.signed else torch.randn(200, 256).square()
    error = (there_and_back(value, code) - value).norm() / value.norm()
    below, above = (0.001, 0.007) if code.bits == 8 else (0.02, 0.15)
    assert below < error < above, "or it is not so many bits"


@every_code
def test_the_largest_number_of_a_block_is_kept_and_nothing_drifts(code: Code) -> None:
    value = moment(code, 40, 300)
    codes, scale = encoded(value, code)
    once = dequantize(codes, scale, 300, code.signed, torch.float32)
    largest = value.abs() == magnitudes(value)
    torch.testing.assert_close(once[largest], value[largest], rtol=1e-6, atol=0)
    again, scale_again = encoded(once, code)
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, scale)


def test_a_positive_second_moment_never_becomes_zero() -> None:
    """Divided by its root, a zero would turn a small momentum into a step of any length."""
    value = torch.cat([torch.ones(3, 1), torch.full((3, 40), 1e-30), torch.zeros(3, 60)], 1)
    decoded = there_and_back(value, SECOND)
    assert (decoded[:, 1:41] > 0).all()
    assert not decoded[:, 41:].any(), "and a zero stays one"
    assert torch.equal(decoded[:, 0], torch.ones(3))


@every_code
def test_blocks_of_zeros_and_no_rows(code: Code) -> None:
    value = moment(code, 6, 300)
    value[:, 128:256] = 0
    value[3] = 0
    codes, scale = encoded(value, code)
    decoded = dequantize(codes, scale, 300, code.signed, torch.float32)
    assert not decoded[:, 128:256].any()
    assert not decoded[3].any()
    assert not scale[:, 1].any()
    assert decoded.isfinite().all()
    assert there_and_back(value[:0], code).shape == (0, 300)


@every_code
def test_tiny_numbers_are_no_nonsense(code: Code) -> None:
    """Down to where float32 ends."""
    value = torch.full((2, 40), 1e-38) * torch.linspace(0.1, 1, 40)
    decoded = there_and_back(value, code)
    assert decoded.isfinite().all()
    assert (decoded - value).abs().max() < 1e-38


@every_code
def test_blocks_do_not_touch_each_other(code: Code) -> None:
    value = moment(code, 4, 300)
    before = there_and_back(value, code)
    value[2, 128:256] *= 1e6
    after = there_and_back(value, code)
    after[2, 128:256] = before[2, 128:256]
    assert torch.equal(after, before)


@every_code
@pytest.mark.parametrize("widths", [[150, 150], [100, 100, 100], [1, 127, 128, 44], [0, 300], [260, 0, 40]])
def test_columns_shared_by_ranks_get_the_codes_of_the_whole(code: Code, widths: list[int]) -> None:
    """A rank whose columns begin within a block shares its scale with its neighbour."""
    if code.bits == 4 and any(width % 2 for width in widths):
        widths = [2 * round(width / 2) for width in widths]  # two columns share a byte
    value = moment(code, 20, sum(widths))
    codes, scale = encoded(value, code)
    own, offset, offered = [], 0, torch.zeros_like(scale)

    def largest_of_all(scale_of_one_rank: Tensor) -> Tensor:
        offered.copy_(torch.maximum(offered, scale_of_one_rank))
        assert (scale_of_one_rank <= scale).all()
        return scale

    for part in value.split(widths, 1):
        mine, mine_scale = empty_codes(part, code), torch.empty_like(scale)
        quantize(part, mine, mine_scale, code.signed, offset, largest_of_all)
        assert torch.equal(mine_scale, scale)
        own.append((mine, dequantize(mine, mine_scale, part.shape[1], code.signed, torch.float32, offset)))
        offset += part.shape[1]
    assert torch.equal(offered, scale), "each block's largest number is on one of the ranks"
    assert torch.equal(torch.cat([mine for mine, _ in own], 1), codes)
    whole = dequantize(codes, scale, sum(widths), code.signed, torch.float32)
    assert torch.equal(torch.cat([decoded for _, decoded in own], 1), whole)


# --------------------------------------------------------------------------------------------- what is stored in them


def layout(*shape: int, key: str = "exp_avg", kind: Any = "rows") -> dict[str, StateTensor]:
    return {key: StateTensor(shape, torch.float32, kind)}


@pytest.mark.parametrize(
    ("shape", "quantised"),
    [
        ((64, 64), True),
        ((128, 32), True),
        ((63, 65), False),  # 4095 numbers
        ((4096,), False),
        ((1, 4096), True),
        ((4096, 1), False),
        ((1000, 31), False),  # too narrow for a scale of its own
        ((32, 16, 16), False),
        ((), False),
    ],
)
def test_only_matrices_of_4096_numbers_and_32_columns_have_codes(shape: tuple[int, ...], quantised: bool) -> None:
    stored = as_stored(layout(*shape), "8bit")
    if quantised:
        scales = StateTensor((shape[0], math.ceil(shape[1] / 128)), torch.float32, "rows")
        assert stored == {"exp_avg": StateTensor(shape, torch.int8, "rows"), "exp_avg_scale": scales}
    else:
        assert stored == layout(*shape)


def test_moments_alone_are_stored_otherwise() -> None:
    param = nn.Parameter(torch.empty(64, 300))
    whole = {
        **ADAMW.state("weight", param, {}),
        "momentum": StateTensor((64, 300), torch.float32, "parameter"),
        "basis": StateTensor((64, 300), torch.float32, "replicated"),
        "error_feedback": StateTensor((64, 300), torch.float32, "rows"),
        "column_age": StateTensor((64,), torch.int32, "replicated"),
        "limiter_norm": StateTensor((), torch.float32, "replicated"),
    }
    moments = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, "momentum": torch.int8}
    for state_dtype, dtypes in [
        (None, dict.fromkeys(moments, torch.float32)),
        ("float32", dict.fromkeys(moments, torch.float32)),
        ("bfloat16", dict.fromkeys(moments, torch.bfloat16)),
        ("8bit", moments),
        ("4bit", dict.fromkeys(moments, torch.uint8)),
    ]:
        stored = as_stored(whole, state_dtype)
        scales = {f"{key}_scale" for key in moments} if state_dtype in ("8bit", "4bit") else set()
        assert stored.keys() == whole.keys() | scales
        for key in whole.keys() - moments.keys():
            assert stored[key] == whole[key]
        assert {key: stored[key].dtype for key in moments} == dtypes
        assert all(stored[key].layout == "parameter" for key in moments)
        assert all(stored[key] == StateTensor((64, 3), torch.float32, "leading") for key in scales)


@pytest.mark.parametrize("name", ["adamw", "dct_adamw", "apollo"])
@pytest.mark.parametrize("state_dtype", ["8 bit", "2bit", "int8", "float64", "float16", 8, torch.bfloat16])
def test_an_unknown_state_dtype_is_refused(name: str, state_dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^state_dtype=.*; expected None or one of float32, bfloat16, 8bit, 4bit$"):
        optim.create(name, nn.Linear(8, 8), state_dtype=state_dtype)


def test_a_rule_may_give_some_parameters_another_state_dtype() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    groups = optim.param_groups(model, rules={"^0": {"state_dtype": "8bit"}})
    optimizer = optim.DCTAdamW(groups, state_dtype="bfloat16")
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.int8
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model[1].bias]["exp_avg"].dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------- training


def regression(state_dtype: str | None, name: str, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a two-layer network on data of another one; final state."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 64))
    model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)
    settings: dict[str, Any] = {} if name == "adamw" else {"rank": 48, "refresh_interval": 20, "basis": "dct"}
    optimizer = optim.create(name, model, lr=3e-3, weight_decay=0.0, state_dtype=state_dtype, **settings)
    losses = []
    for _ in range(120):
        x = torch.randn(64, 96)
        loss = (model(x.to(dtype)).float() - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, states(model, optimizer)


@pytest.mark.parametrize("name", only_first_quick(["adamw", "dct_adamw", "low_rank_adamw"]))
def test_training_in_fewer_bits_is_close_to_training_in_32(name: str) -> None:
    full, _ = regression(None, name, torch.float32)
    for state_dtype, code, tolerance in [("8bit", torch.int8, 0.03), ("4bit", torch.uint8, 0.25)]:
        losses, state = regression(state_dtype, name, torch.float32)
        assert state["0.weight.exp_avg"].dtype == code
        assert state["0.weight.exp_avg_sq"].dtype == torch.uint8
        assert state["0.bias.exp_avg"].dtype == torch.float32
        end, end_full = (sum(values[-10:]) / 10 for values in (losses, full))
        assert end_full < 0.3 * full[0], "or there was nothing to learn"
        assert abs(end - end_full) < tolerance * end_full
        assert losses != full


@pytest.mark.parametrize("name", ["adamw", "dct_adamw"])
def test_float32_state_of_bfloat16_weights_is_as_exact_as_that_of_float32_weights(name: str) -> None:
    """Gradients are the same; only the weights' rounding differs."""
    finals = {}
    for dtype, state_dtype in [(torch.float32, None), (torch.bfloat16, "float32"), (torch.bfloat16, None)]:
        torch.manual_seed(0)
        model = nn.Linear(48, 64, dtype=dtype)
        optimizer = optim.create(name, model, state_dtype=state_dtype, **({} if name == "adamw" else {"rank": 8}))
        for step in range(12):
            for key, param in model.named_parameters():
                param.grad = gradient(key, param.shape, step).bfloat16().to(dtype)
            optimizer.step()
        finals[dtype, state_dtype] = states(model, optimizer)
    exact = finals[torch.float32, None]
    for key in ("weight.exp_avg", "weight.exp_avg_sq", "bias.exp_avg", "bias.exp_avg_sq"):
        value, rounded = finals[torch.bfloat16, "float32"][key], finals[torch.bfloat16, None][key]
        assert (value.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
        size = exact[key].abs().max()
        assert (value - exact[key]).abs().max() < 1e-6 * size
        assert (rounded.float() - exact[key]).abs().max() > 1e-4 * size, "or there would be no point in it"


@pytest.mark.parametrize("name", ["adamw", "dct_adamw", "fira"])
def test_bfloat16_state_of_float32_weights(name: str) -> None:
    finals = []
    for state_dtype in (None, "bfloat16"):
        torch.manual_seed(0)
        model = nn.Linear(48, 64)
        settings = {} if name == "adamw" else {"rank": 8, "refresh_interval": 5}
        optimizer = optim.create(name, model, lr=1e-2, state_dtype=state_dtype, **settings)
        run_steps(model, optimizer, 0, 12)
        finals.append(weights(model))
        dtypes = {key: value.dtype for key, value in optimizer.state[model.weight].items() if key.startswith("exp_avg")}
        assert dtypes == dict.fromkeys(["exp_avg", "exp_avg_sq"], torch.bfloat16 if state_dtype else torch.float32)
    for key, value in finals[0].items():
        difference = (finals[1][key] - value).abs().max()
        # 12 updates of about 1e-2, whose moments are rounded to 2^-9
        assert 0 < difference < 12 * 1e-2 * 2**-5


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit", "4bit"])
def test_parameters_of_any_number_of_dimensions(state_dtype: str) -> None:
    """A logit scale has none, a convolution four; and frozen to no layout in memory."""
    params = [nn.Parameter(torch.ones(shape)) for shape in [(), (3,), (70, 80), (4, 3, 2, 2)]]
    params.append(nn.Parameter(torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.ones(80, 70).mT))
    optimizer = optim.AdamW(params, lr=0.1, weight_decay=0.0, state_dtype=state_dtype)
    for param in params:
        param.grad = torch.empty_like(param).copy_(gradient("any", param.shape, 0))
    optimizer.step()
    for param in params:
        torch.testing.assert_close(param.detach(), 1 - 0.1 * param.grad.sign(), rtol=0.02, atol=0.02)
        assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit", "4bit"])
def test_blocks_of_rows_make_the_whole(state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step converts some rows at a time, and counts once."""
    finals = []
    for numbers in (2**19, 1):
        monkeypatch.setattr(optim.shards.blocks, "_CPU_BLOCK_NUMBERS", numbers)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(60, 80, dtype=torch.float64), nn.Linear(80, 60, dtype=torch.float64))
        optimizer = optim.create("dct_adamw", model, rank=60, refresh_interval=2, state_dtype=state_dtype)
        run_steps(model, optimizer, 0, 5)
        assert all(state["step"] == 5 for state in optimizer.state.values())
        finals.append({**weights(model), **states(model, optimizer)})
    assert_equal(*finals, 1e-12)


# ------------------------------------------------------------------------------------------------------ files and ranks

# 300 columns are not cut at multiples of 128 by 2 or 3 ranks; 132 directions make a block of 128 and one of 4.
SHAPES = {"embedding": (40, 300), "tall": (150, 132), "wide": (132, 180), "small": (30, 60)}
LOW_RANK = {"rank": 132, "refresh_interval": 3}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw 8bit": ("adamw", {"state_dtype": "8bit"}),
    "dct_adamw 8bit": ("dct_adamw", {"state_dtype": "8bit", **LOW_RANK}),
    "dct_adamw 4bit": ("dct_adamw", {"state_dtype": "4bit", **LOW_RANK}),
    "muon 4bit": ("muon", {"state_dtype": "4bit"}),  # knows of no codes: it is handed copies
}


class Model(nn.Module):
    """Never run: gradients are set by hand."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            if name == "embedding":
                self.embedding = nn.Embedding(*shape, dtype=torch.float64)
            else:
                self.add_module(name, nn.Linear(*reversed(shape), dtype=torch.float64))


def build(case: str, model: nn.Module) -> optim.MatrixOptimizer:
    name, settings = SETTINGS[case]
    groups = optim.param_groups(model, rules={"small": {"rank": 30}} if "rank" in settings else {"small": {}})
    return optim.create(name, groups, lr=1e-2, **settings)


def new_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def shard(model: nn.Module, kind: str) -> None:
    """Along columns wherever FSDP2 accepts that, or along rows."""
    world_size = dist.get_world_size()

    def place(param: nn.Parameter) -> Shard:
        divisible = param.ndim == 2 and param.shape[1] % world_size == 0
        return Shard(1 if kind == "columns" and divisible else 0)

    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), shard_placement_fn=place)


def trained(name: str, kind: str | None, steps: int = 4) -> dict[str, Tensor]:
    model = new_model()
    if kind is not None:
        shard(model, kind)
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, steps)
    return {**weights(model), **states(model, optimizer)}


def test_the_model_of_these_tests_has_codes_of_every_kind() -> None:
    model = new_model()
    for name in SETTINGS:
        optimizer = build(name, model)
        coded = {
            key for key, p in model.named_parameters() if any(k.endswith("_scale") for k in optimizer.state[p])
        }  # fmt: skip
        assert coded == {f"{key}.weight" for key in SHAPES if key != "small"}
        assert optimizer.state[model.embedding.weight]["exp_avg_scale"].shape == (40, 3)
    optimizer = build("dct_adamw 8bit", model)
    assert optimizer.state[model.tall.weight]["exp_avg_scale"].shape == (150, 2)


@pytest.mark.parametrize("kind", only_first_quick(["rows", "columns"], 2))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_codes_do_not_depend_on_the_number_of_ranks(kind: str, world_size: int) -> None:
    def worker() -> dict[str, dict[str, Tensor]]:
        model = new_model()
        shard(model, kind)
        offsets = {p.placements[0] for p in model.parameters() if isinstance(p, DTensor)}
        assert offsets == ({Shard(0), Shard(1)} if kind == "columns" else {Shard(0)})
        return {name: trained(name, kind) for name in SETTINGS}

    by_rank = run_distributed(worker, world_size)
    for name in SETTINGS:
        expected = trained(name, None)
        for results in by_rank:
            assert_equal(results[name], expected, 1e-12)  # the codes themselves, being integers, bit for bit


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit", "4bit"])
def test_an_empty_shard_counts_its_steps_too(state_dtype: str) -> None:
    """Or a checkpoint might take the count from that rank."""

    def worker() -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2000, 3, dtype=torch.float64), nn.LayerNorm(3, dtype=torch.float64))
        shard(model, "rows")
        optimizer = optim.create("adamw", model, state_dtype=state_dtype)
        run_steps(model, optimizer, 0, 2)
        return [state["step"].item() for state in optimizer.state.values()]

    assert run_distributed(worker, 4) == [[2.0] * 4] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_in_few_bits_is_bit_exact(name: str, dtype: torch.dtype) -> None:
    model = new_model().to(dtype)
    optimizer = build(name, model)
    run_steps(model, optimizer, 0, 2)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    resumed = build(name, twin)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert_equal(states(twin, resumed), states(model, optimizer))
    run_steps(model, optimizer, 2, 5)
    run_steps(twin, resumed, 2, 5)
    assert_equal(weights(twin), weights(model))
    assert_equal(states(twin, resumed), states(model, optimizer))


def test_codes_are_not_loaded_where_there_are_none() -> None:
    saved = build("adamw 8bit", new_model()).state_dict()
    model = new_model()
    plain = optim.create("adamw", optim.param_groups(model, rules={"small": {}}))
    with pytest.raises(ValueError, match=r"the saved state of 'embedding\.weight' has .*'exp_avg_scale'.*; expected"):
        plain.load_state_dict(saved)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_keeps_its_codes_on_any_number(tmp_path: Any) -> None:
    def save() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        results, files = {}, {}
        for name in SETTINGS:
            model = new_model()
            shard(model, "columns")
            optimizer = build(name, model)
            run_steps(model, optimizer, 0, 2)
            model_state, optimizer_state = get_state_dict(model, optimizer)
            files[name] = copy.deepcopy({"model": model_state, "optim": optimizer_state})
            saved = {**weights(model), **states(model, optimizer)}
            run_steps(model, optimizer, 2, 5)
            results[name] = (saved, {**weights(model), **states(model, optimizer)})
        dcp.save(files, checkpoint_id=tmp_path)
        return results

    def load(kind: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        made = {}
        for name in SETTINGS:
            model = new_model(seed=1)
            shard(model, kind)
            made[name] = (model, build(name, model))
        files = {}
        for name, (model, optimizer) in made.items():
            model_state, optimizer_state = get_state_dict(model, optimizer)
            files[name] = {"model": model_state, "optim": optimizer_state}
        dcp.load(files, checkpoint_id=tmp_path)
        results = {}
        for name, (model, optimizer) in made.items():
            set_state_dict(
                model, optimizer, model_state_dict=files[name]["model"], optim_state_dict=files[name]["optim"]
            )
            loaded = {**weights(model), **states(model, optimizer)}
            run_steps(model, optimizer, 2, 5)
            results[name] = (loaded, {**weights(model), **states(model, optimizer)})
        return results

    expected, _ = run_distributed(save, 2)
    for world_size, kind in ((1, "rows"), (3, "rows"), (3, "columns")):
        for results in run_distributed(load, world_size, kind):
            for name, (loaded, final) in results.items():
                assert loaded["embedding.weight.exp_avg"].dtype in (torch.int8, torch.uint8)
                assert loaded["embedding.weight.exp_avg_sq"].dtype == torch.uint8
                assert_equal(loaded, expected[name][0])
                assert_equal(final, expected[name][1], 1e-12)


def test_two_columns_of_a_byte_are_not_torn_apart() -> None:
    def worker() -> str:
        model = nn.Linear(66, 64)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(p.ndim - 1))
        with pytest.raises(
            ValueError, match=r"'weight', of shape .64, 66., is sharded into 33 columns a rank: shard it"
        ):
            optim.create("adamw", model, state_dtype="4bit")
        return optim.create("adamw", model, state_dtype="8bit").state[model.weight]["exp_avg"].dtype

    assert run_distributed(worker, 2) == [torch.int8] * 2


@pytest.mark.parametrize("state_dtype", ["8bit", "4bit"])
def test_a_restart_of_relora_leaves_no_moment(state_dtype: str) -> None:
    model = prepare("relora", nn.Sequential(nn.Linear(160, 128, bias=False)), rank=32)
    optimizer = optim.create("relora", model, restart_every=2, warmup_steps=1, state_dtype=state_dtype)
    run_steps(model, optimizer, 0, 2)
    for slot in optimizer.slots():
        for key in {"exp_avg", "exp_avg_sq"} & slot.state.keys():
            assert f"{key}_scale" in slot.state
            assert not read(slot.state, key, slice(None), slot.param.shape[1], torch.float32).any()
