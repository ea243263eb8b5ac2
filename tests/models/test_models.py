"""Models: exact sizes, the same weights on any number of ranks, and Hugging Face folders to continue from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.parametrization import Dense
from lowrank_train.models import build as models
from lowrank_train.models import fsdp
from lowrank_train.models.families import FAMILIES
from tests.distributed import run_distributed
from tests.runs import tiny as tiny_size

VOCABULARY = 301  # uneven over 2 ranks
TINY = dict(tiny_size(family) for family in FAMILIES)
PUBLISHED = {
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
    "llama_3b": 2_685_831_680,
    "llama_7b": 6_738_415_616,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1.3b": 1_315_758_080,
    "opt_2.7b": 2_651_596_800,
    "opt_6.7b": 6_658_473_984,
    "mistral_7b": 7_241_732_096,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
}
SMALL_LLAMAS = {"llama_9m": (128, 352, 4), "llama_20m": (256, 688, 4), "llama_35m": (384, 1024, 6)}


def llama_size(hidden: int, intermediate: int, layers: int, vocabulary: int = 32000) -> int:
    layer = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    return 2 * vocabulary * hidden + layers * layer + hidden


def tiny(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig(name=name, overrides={**TINY[name], **changes})


def filled(model: ModelConfig, *, seed: int = 0, shard: bool = False, folder: str | None = None) -> PreTrainedModel:
    """A model with weights in float64, as the trainer makes it; on several ranks if there are some."""
    architecture = models.architecture(model, vocab_size=VOCABULARY)
    made = models.skeleton(architecture, torch.float64)
    plain = models.skeleton(architecture, torch.float64)
    if shard:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("shard",))
        fsdp.shard_model(made, mesh, optim.find("dct_adamw"), "float64")
    ranks = Ranks(0, 1, torch.device("cpu"), mesh=Mock(), patient=Mock())  # dense layers need no other rank
    if folder is None:
        models.initialize(made, plain, Dense(), ranks, seed)
    else:
        models.load_weights(made, plain, folder, Dense(), ranks)
    return made


def whole(model: PreTrainedModel) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("name", models.SIZES)
def test_parameter_counts_are_exact(name: str) -> None:
    model = models.skeleton(models.architecture(ModelConfig(name=name)), torch.float32)
    expected = llama_size(*SMALL_LLAMAS[name]) if name in SMALL_LLAMAS else PUBLISHED[name]
    assert models.parameter_count(model) == expected


def test_the_formula_for_small_llamas_gives_the_published_sizes_and_their_names() -> None:
    assert llama_size(512, 1376, 8) == PUBLISHED["llama_60m"]
    assert llama_size(4096, 11008, 32) == PUBLISHED["llama_7b"]
    assert [round(llama_size(*numbers) / 1e6) for numbers in SMALL_LLAMAS.values()] == [9, 20, 35]


def test_llama_head_is_untied_and_opt_head_is_tied() -> None:
    llama, opt = filled(tiny("llama_9m")), filled(tiny("opt_125m"))
    assert llama.get_output_embeddings().weight is not llama.get_input_embeddings().weight
    assert opt.get_output_embeddings().weight is opt.get_input_embeddings().weight


@pytest.mark.parametrize("name", TINY)
def test_initial_weights_have_the_usual_statistics(name: str) -> None:
    weights = dict(filled(tiny(name)).named_parameters())
    seen = 0
    for key, value in weights.items():
        if value.ndim == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), key
            assert abs(value.mean().item()) < 0.02 * 4 / value.numel() ** 0.5, key
            seen += 1
        elif key.endswith("bias"):
            assert not value.any(), key
        else:
            assert torch.equal(value, torch.ones_like(value)), key  # of a norm
    assert seen >= 14


@pytest.mark.parametrize("name", TINY)
def test_no_two_matrices_start_equal_and_the_seed_decides(name: str) -> None:
    first, other = filled(tiny(name)), filled(tiny(name), seed=1)
    matrices = [value.flatten()[:50] for value in first.parameters() if value.ndim == 2]
    distinct = {tuple(value.tolist()) for value in matrices}
    assert len(distinct) == len(matrices)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.ndim == 2]
    assert not any(same)


@pytest.mark.parametrize("name", TINY)
def test_initial_weights_do_not_depend_on_the_number_of_ranks(name: str) -> None:
    alone = whole(filled(tiny(name)))

    def sharded() -> tuple[dict[str, Tensor], bool]:
        model = filled(tiny(name), shard=True)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return whole(model), tied

    for world_size in (1, 2):
        for weights, tied in run_distributed(sharded, world_size):
            assert_same_tensors(weights, alone)
            assert tied == (name in ("opt_125m", "qwen3_0.6b"))


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_those_of_a_model_that_transformers_built(name: str) -> None:
    """Buffers are not in the state dict: rotary frequencies left unset would show here."""
    mine = filled(tiny(name))
    theirs = AutoModelForCausalLM.from_config(models.architecture(tiny(name), vocab_size=VOCABULARY)).double()
    theirs.load_state_dict(mine.state_dict())
    ids = torch.randint(VOCABULARY, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(mine.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-12, atol=1e-12)


def test_rotary_frequencies_follow_an_override_of_the_heads() -> None:
    """transformers derives head_dim and key-value heads from others; an override must reach them."""
    config = models.architecture(tiny("llama_9m"))
    assert (config.head_dim, config.num_key_value_heads) == (16, 2)
    assert models.architecture(tiny("llama_9m", num_key_value_heads=1)).num_key_value_heads == 1


def test_llama_positions_are_extended_and_token_ids_set() -> None:
    config = models.architecture(tiny("llama_9m"), vocab_size=VOCABULARY, seq_len=5000, eos_token_id=7)
    assert (config.max_position_embeddings, config.vocab_size, config.eos_token_id) == (5000, VOCABULARY, 7)


def test_opt_does_not_silence_the_token_that_was_its_padding() -> None:
    assert models.architecture(tiny("opt_125m")).pad_token_id is None
    assert filled(tiny("opt_125m")).get_input_embeddings().weight[1].any()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Hugging Face folder of each tiny model, with weights unlike a fresh model's."""
    made = {}
    for name in TINY:
        model = AutoModelForCausalLM.from_config(models.architecture(tiny(name), vocab_size=VOCABULARY)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hugging_face_folder_is_continued_from_exactly(folders: dict[str, str], name: str, world_size: int) -> None:
    expected = whole(AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float64))

    def load() -> dict[str, Tensor]:
        return whole(filled(ModelConfig(name=folders[name]), shard=True, folder=folders[name]))

    for weights in run_distributed(load, world_size):
        assert_same_tensors(weights, expected)


def error(model: ModelConfig, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        models.architecture(model, **settings)
    return str(caught.value)


def test_unknown_model_names_the_closest() -> None:
    message = error(ModelConfig(name="lama_60m"))
    assert "did you mean 'llama_60m'" in message
    assert "opt_6.7b" in message


def test_folder_of_another_kind_of_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "'gpt2' model; expected one of llama, opt" in error(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model_type": "no such model"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_folder_with_an_unusable_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert str(tmp_path) in error(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("name", TINY)
def test_unknown_override_names_the_closest(folders: dict[str, str], name: str) -> None:
    for model in (tiny(name, num_hidden_layer=3), ModelConfig(name=folders[name], overrides={"num_hidden_layer": 3})):
        assert "did you mean 'num_hidden_layers'" in error(model)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("hidden_size", -32),
        ("hidden_size", "wide"),
        ("hidden_size", 32.5),
        ("num_hidden_layers", None),
    ],
)
def test_overrides_that_make_no_model(name: str, key: str, value: Any) -> None:
    assert key in error(tiny(name, **{key: value})).replace("hidden size", "hidden_size").replace(
        "attention heads", "num_attention_heads"
    )


def test_vocabulary_smaller_than_the_tokenizers(folders: dict[str, str]) -> None:
    assert "500" in error(ModelConfig(name=folders["llama_9m"]), vocab_size=500)
    assert "100" in error(tiny("llama_9m", vocab_size=100), vocab_size=VOCABULARY)


def test_opt_has_no_more_positions_than_it_learned() -> None:
    assert "64 learned positions" in error(tiny("opt_125m"), seq_len=65)
    assert models.architecture(tiny("opt_125m"), seq_len=40).max_position_embeddings == 64


def test_weights_of_another_shape_or_none(folders: dict[str, str], tmp_path: Path) -> None:
    folder = folders["llama_9m"]
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())  # and no weights
    for overrides, weights in (({"num_hidden_layers": 3}, folder), ({"intermediate_size": 64}, folder), ({}, tmp_path)):
        with pytest.raises(UserError, match=r"model\.name="):
            filled(ModelConfig(name=folder, overrides=overrides), folder=str(weights))


def test_a_weight_that_the_folder_lacks_is_not_left_to_chance(folders: dict[str, str], tmp_path: Path) -> None:
    source = Path(folders["llama_9m"])
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no weights for 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        filled(ModelConfig(name=str(tmp_path)), folder=str(tmp_path))


@pytest.mark.parametrize("key", ["num_key_value_heads", "intermediate_size", "hidden_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_sizes_below_one_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"model.overrides.{key}={value}; expected a whole number >= 1"):
        models.architecture(ModelConfig(name="llama_9m", overrides={key: value}))
