import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trainerkit.adapters import AdapterLayout, map_adapter, read_adapter, write_adapter
from trainerkit.errors import UserError

LAYERS = [["blocks.0.up", 6, 10], ["blocks.0.down", 10, 6], ["blocks.1.up", 6, 10], ["blocks.1.down", 10, 6]]


def factors_for(layout, *before, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*before, *shape, generator=generator) for name, shape in layout.shapes.items()}


def write_raw(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def raw(rank=2, prefix="base_model.model.", infix="", layers=LAYERS):
    tensors = {}
    for number, (name, inside, outside) in enumerate(layers):
        generator = torch.Generator().manual_seed(number)
        tensors[f"{prefix}{name}.lora_A{infix}.weight"] = torch.randn(rank, inside, generator=generator)
        tensors[f"{prefix}{name}.lora_B{infix}.weight"] = torch.randn(outside, rank, generator=generator)
    return tensors


def test_layers_that_differ_in_numbers_alone_are_a_type_and_stand_by_depth():
    layers = [["h.10.attn.q", 4, 8], ["h.2.attn.q", 4, 8], ["head", 4, 5], ["h.2.mlp.out", 8, 4]]
    layout = AdapterLayout(layers, rank=2, scaling=0.5)
    assert [one.pattern for one in layout.types] == ["h.*.attn.q", "head", "h.*.mlp.out"]
    assert [one.label for one in layout.types] == ["q", "head", "out"]
    assert layout.types[0].names == ("h.2.attn.q", "h.10.attn.q")
    assert [one.depths for one in layout.types] == [(1, 2), (0,), (1,)]  # 'head' has no number, which comes first
    assert layout.depths == 3
    assert (layout.types[2].in_features, layout.types[2].out_features) == (8, 4)
    assert layout.names == ["h.2.attn.q", "h.10.attn.q", "head", "h.2.mlp.out"]
    assert layout.shapes == {
        "A/q": (2, 2, 4), "B/q": (2, 8, 2), "A/head": (1, 2, 4), "B/head": (1, 5, 2), "A/out": (1, 2, 8), "B/out": (1, 4, 2),
    }  # fmt: skip
    assert layout.numel == sum(math.prod(shape) for shape in layout.shapes.values())


def test_the_layers_of_a_layout_make_the_same_layout_again():
    layout = AdapterLayout([["b.3.x", 4, 8], ["a", 3, 3], ["b.1.x", 4, 8]], rank=3, scaling=2)
    again = AdapterLayout(json.loads(json.dumps(layout.layers)), layout.rank, layout.scaling)
    assert again.types == layout.types
    assert again.layers == layout.layers


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["enc.0.attn.q", "dec.0.attn.q"], ["enc_attn_q", "dec_attn_q"]),
        (["a.0.self.q", "a.0.cross.q", "a.0.v"], ["self_q", "cross_q", "v"]),
        (["m.experts.0", "m.experts.0.up"], ["experts", "up"]),
        (["a.b", "a.0.b"], ["a_b", "a_n_b"]),
        (["x.y.z", "w.z", "y_z"], ["x_y_z", "w_z", "y_z"]),
        (["0", "0.1"], ["n", "n_n"]),
    ],
)
def test_each_type_has_a_label_of_its_own_as_short_as_can_be(names, labels):
    found = [one.label for one in AdapterLayout([[name, 2, 2] for name in names], rank=1).types]
    assert found == labels
    nn.ModuleDict({label: nn.Identity() for label in found})  # no dots


def test_layers_of_one_name_and_several_shapes_are_a_type_each():
    layers = [["0", 8, 16], ["2", 16, 4], ["4", 8, 16], ["h.0.up", 2, 3], ["h.1.up", 2, 4], ["h.1.up_2x3", 2, 2]]
    layout = AdapterLayout(layers, rank=2)
    assert [one.label for one in layout.types] == ["n_8x16", "n_16x4", "up_2x3", "up_2x4", "up_2x3_"]
    assert [one.names for one in layout.types] == [("0", "4"), ("2",), ("h.0.up",), ("h.1.up",), ("h.1.up_2x3",)]
    assert [one.depths for one in layout.types] == [(0, 3), (2,), (0,), (1,), (1,)]
    assert AdapterLayout(layout.layers, rank=2).types == layout.types


def test_packing_and_unpacking_give_the_layers_back_with_and_without_a_batch():
    layout = AdapterLayout(LAYERS, rank=2)
    factors = factors_for(layout)
    layers = layout.unpack(factors)
    assert list(layers) == layout.names
    assert torch.equal(layers["blocks.1.down"][0], factors["A/down"][1])
    packed = layout.pack(layers)
    assert all(torch.equal(packed[name], factors[name]) for name in layout.keys)
    many = layout.unpack(factors_for(layout, 3))
    assert many["blocks.0.up"][1].shape == (3, 10, 2)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "layers=\\[\\]: an adapter changes at least one"),
        ([["a", 2, 2], ["a", 2, 2]], {}, "layers=a: is named twice"),
        ([["a", 2]], {}, "each must be a name and two sizes"),
        ([["a", 2, 0]], {}, "each must be a name and two sizes"),
        ([["a..b", 2, 2]], {}, "each must be a name and two sizes"),
        ([["a", 2, 2]], {"rank": 0}, "rank=0: must be 1 or more"),
        ([["a", 2, 2]], {"scaling": math.nan}, "scaling=nan: must be a number other than 0"),
    ],
)
def test_impossible_layouts_are_refused(layers, options, message):
    with pytest.raises(ValueError, match=message):
        AdapterLayout(layers, **({"rank": 2} | options))


def test_what_is_written_is_read_again_number_by_number(tmp_path):
    layout = AdapterLayout(LAYERS, rank=2, scaling=1.5)
    factors = factors_for(layout)
    write_adapter(tmp_path / "new" / "one", layout, factors)
    adapter = read_adapter(tmp_path / "new" / "one", "path")
    assert (adapter.rank, adapter.scaling) == (2, 1.5)
    # Sorted by name and number; the layout has the same layers.
    assert [layer[0] for layer in adapter.layers] == ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up"]
    assert sorted(adapter.layers) == sorted(LAYERS)
    again = AdapterLayout(adapter.layers, adapter.rank, adapter.scaling).pack(adapter.factors)
    assert all(torch.equal(again[name], factors[name]) for name in layout.keys)
    assert sorted(path.name for path in (tmp_path / "new" / "one").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_a_failed_write_leaves_no_folder_that_looks_whole(tmp_path, monkeypatch):
    layout = AdapterLayout(LAYERS, rank=2)
    write_adapter(tmp_path, layout, factors_for(layout))
    monkeypatch.setattr("trainerkit.adapters.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_adapter(tmp_path, layout, factors_for(layout, seed=1))
    with pytest.raises(UserError, match=f"path={tmp_path}: has no adapter_config.json"):
        read_adapter(tmp_path, "path")


@pytest.mark.parametrize(("prefix", "infix"), [("base_model.model.", ""), ("", ""), ("base_model.model.", ".default")])
def test_the_names_that_peft_and_those_who_save_without_it_give_are_read(tmp_path, prefix, infix):
    adapter = read_adapter(write_raw(tmp_path, raw(prefix=prefix, infix=infix)), "path")
    assert sorted(adapter.layers) == sorted(LAYERS)
    assert torch.equal(adapter.factors["blocks.1.up"][0], raw()["base_model.model.blocks.1.up.lora_A.weight"])


def test_scaling_is_alpha_over_the_rank_or_its_root(tmp_path):
    assert read_adapter(write_raw(tmp_path, raw(4), r=4, lora_alpha=6), "path").scaling == 1.5
    assert read_adapter(write_raw(tmp_path, raw(4), r=4, lora_alpha=6, use_rslora=True), "path").scaling == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_become_float32_and_stay_what_they_are_while_they_lie_in_the_file(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in raw().items()}
    folder = write_raw(tmp_path, tensors)
    a, _ = read_adapter(folder, "path").factors["blocks.0.up"]
    assert a.dtype == torch.float32
    assert torch.equal(a, tensors["base_model.model.blocks.0.up.lora_A.weight"].float())
    assert map_adapter(folder, "path").factors["blocks.0.up"][0].dtype == dtype


def changed(**changes):
    """Tensors of an adapter with some exchanged; None takes one away."""
    tensors = raw() | {f"base_model.model.blocks.0.{name}": tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


A = "up.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensor"),
        (changed(**{A: None}), "the layer 'blocks.0.up' has a lora_B without its other half"),
        (changed(**{A: torch.zeros(3, 6)}), r"A \(3, 6\), B \(10, 2\): must be \(r, in\) and \(out, r\)"),
        (changed(**{A: torch.zeros(2, 6, 1)}), r"must be \(r, in\) and \(out, r\)"),
        (changed(**{A: torch.zeros(2, 0)}), r"must be \(r, in\) and \(out, r\)"),
        (raw(3), "the layer 'blocks.0.down' has rank 3, and adapter_config.json says r=2; all must have one"),
        (changed(**{A: torch.zeros(2, 6, dtype=torch.int8)}), "torch.int8 and torch.float32: must be floating point"),
        (changed(**{A: torch.full((2, 6), math.nan)}), "the layer 'blocks.0.up' has numbers that are not finite"),
        (changed(**{"up.lora_magnitude_vector": torch.ones(10)}), "lora_magnitude_vector', which is no A or B"),
        (changed(**{"up.lora_B.bias": torch.ones(10)}), "lora_B.bias', which is no A or B"),
        (changed(**{"up.lora_A.other.weight": torch.zeros(2, 6)}), "holds two adapters of the layer"),
    ],
)  # fmt: skip
def test_weights_that_are_no_adapter_are_refused_with_the_file_and_the_layer(tmp_path, tensors, message):
    folder = write_raw(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(folder, "path")
    assert str(caught.value).startswith(f"path={folder / 'adapter_model.safetensors'}: ")


def test_numbers_whose_sum_overflows_are_finite(tmp_path):
    folder = write_raw(tmp_path, changed(**{A: torch.full((2, 6), 3e38)}))
    assert read_adapter(folder, "path").factors["blocks.0.up"][0][0, 0] == 3e38


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, 'peft_type="LOHA": must be "LORA"'),
        ({"r": "8"}, 'r="8": must be a whole number from 1 on'),
        ({"r": True}, "r=true: must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha=null: must be a number other than 0"),
        ({"lora_alpha": 0}, "lora_alpha=0: must be a number other than 0"),
        ({"use_dora": True}, "use_dora=true: must be absent or false"),
        ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights="pissa_niter_4": must be one that leaves the base'),
        ({"alpha_pattern": {"up": 32}}, r'alpha_pattern=\{"up": 32\}: must be empty: all layers need the same alpha'),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\]: must be empty"),
    ],
)
def test_configurations_of_another_method_are_refused(tmp_path, config, message):
    folder = write_raw(tmp_path, raw(), **config)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(folder, "path")
    assert str(caught.value).startswith(f"path={folder / 'adapter_config.json'}: ")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="has no adapter_config.json"):
        read_adapter(tmp_path, "path")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="has no adapter_model.safetensors; save adapter_model.bin again"):
        read_adapter(tmp_path, "path")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_adapter(tmp_path, "path")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_adapter(tmp_path, "path")


def test_factors_of_another_layout_are_not_written(tmp_path):
    layout = AdapterLayout(LAYERS, rank=2)
    with pytest.raises(ValueError, match="factors=.*must have the shapes"):
        write_adapter(tmp_path, layout, factors_for(layout, 1))
    bad = factors_for(layout)
    bad["B/up"][0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=r"factors=\['B/up'\]: must be finite"):
        write_adapter(tmp_path, layout, bad)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


LLAMA = [
    [f"model.layers.{i}.self_attn.{name}", 16, out] for i in (0, 1) for name, out in (("q_proj", 16), ("v_proj", 8))
]
# Of transformers about what peft asks it.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated.*:FutureWarning")
TOKENS = torch.arange(10)[None]


@PEFT_WARNS
def test_peft_loads_what_is_written_and_the_model_gives_what_w_plus_scaled_ba_gives(tmp_path, language_model):
    peft = pytest.importorskip("peft")
    layout = AdapterLayout(LLAMA, rank=3, scaling=0.7)
    factors = factors_for(layout)
    write_adapter(tmp_path, layout, factors, task_type="CAUSAL_LM")
    with torch.no_grad():
        bare = language_model(TOKENS).logits
        for name, (a, b) in layout.unpack(factors).items():
            language_model.get_submodule(name).weight += layout.scaling * b @ a
        expected = language_model(TOKENS).logits
        for name, (a, b) in layout.unpack(factors).items():
            language_model.get_submodule(name).weight -= layout.scaling * b @ a
        adapted = peft.PeftModel.from_pretrained(language_model, str(tmp_path)).eval()(TOKENS).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted - bare).abs().max() > 0.01


@PEFT_WARNS
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read(tmp_path, language_model, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora)
    model = peft.get_peft_model(language_model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, "path")
    assert sorted(adapter.layers) == sorted(LLAMA)
    assert (adapter.rank, adapter.scaling) == (4, 3.0 if rslora else 1.5)
    for name, (a, b) in adapter.factors.items():
        layer = model.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(adapter.scaling * b @ a, delta)


def test_what_transformers_saves_without_peft_around_it_is_read(tmp_path, language_model):
    peft = pytest.importorskip("peft")
    language_model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    language_model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, "path")
    assert sorted(adapter.layers) == sorted(LLAMA)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(LLAMA)
