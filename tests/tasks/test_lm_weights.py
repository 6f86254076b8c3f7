"""Weights in and out: our own files, GPT-2's in the layout of Hugging Face, adapters."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tasks import small_gpt
from tests.tasks.small_gpt import tokens
from trainerkit.errors import UserError
from trainerkit.nn.lora import add_lora
from trainerkit.tasks.lm import GPT, Lora, merge_lora, save_huggingface
from trainerkit.tasks.lm.huggingface import from_huggingface, to_huggingface

GPT2 = {"positions": "learned", "activation": "gelu_tanh"}


def gpt(**options):
    return small_gpt.gpt(**GPT2 | options)


def written_by_hand(network):
    """The network's weights as Hugging Face's GPT-2 has them: input first, names of its own."""
    state = network.state_dict()
    content = {
        "wte.weight": state["token_embedding.weight"],
        "wpe.weight": state["position_embedding.weight"],
        "ln_f.weight": state["final_norm.weight"],
        "ln_f.bias": state["final_norm.bias"],
    }
    for i in range(2):
        for theirs, ours in (("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.out"),
                             ("mlp.c_fc", "feed_forward.up"), ("mlp.c_proj", "feed_forward.down")):  # fmt: skip
            content[f"h.{i}.{theirs}.weight"] = state[f"blocks.{i}.{ours}.weight"].T.contiguous()
            content[f"h.{i}.{theirs}.bias"] = state[f"blocks.{i}.{ours}.bias"]
        for theirs, ours in (("ln_1", "norm1"), ("ln_2", "norm2")):
            for kind in ("weight", "bias"):
                content[f"h.{i}.{theirs}.{kind}"] = state[f"blocks.{i}.{ours}.{kind}"]
        content[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # the mask, which older files hold
    return content


# Our own files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_our_own_comes_back_with_and_without_the_task_s_prefix(tmp_path, suffix):
    network = gpt(tie_embeddings=False)
    for prefix in ("", "network."):
        state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
        path = tmp_path / f"weights{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
        again = gpt(tie_embeddings=False, weights=str(path))
        assert torch.equal(again(tokens()), network(tokens()))


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(gpt().state_dict(), path)
    with pytest.raises(UserError, match="does not fit this network") as caught:
        GPT(24, 16, 3, 24, 4, **GPT2, weights=path)
    assert "blocks.2.norm1.weight is missing" in str(caught.value)
    with pytest.raises(UserError, match=r"token_embedding\.weight is \(23, 24\), the network's \(24, 24\)"):
        GPT(24, 16, 2, 24, 4, **GPT2, weights=path)
    with pytest.raises(UserError, match="position_embedding.weight is not in the network"):
        GPT(23, 16, 2, 24, 4, activation="gelu_tanh", weights=path)
    with pytest.raises(UserError, match="there is no such file"):
        gpt(weights=tmp_path / "nothing.pt")


# Hugging Face's layout


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_gpt2_s_layout_is_read_from_a_folder_and_from_a_file(tmp_path, name, prefix):
    network = gpt()
    content = {prefix + key: tensor for key, tensor in written_by_hand(network).items()}
    content["lm_head.weight"] = network.state_dict()["token_embedding.weight"].clone()
    save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(content, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        again = gpt(weights=str(path))
        assert torch.equal(again(tokens()), network(tokens()))
    untied = gpt(tie_embeddings=False, weights=str(tmp_path))
    assert torch.equal(untied(tokens()), network(tokens()))


def test_an_output_layer_of_its_own_is_not_dropped(tmp_path):
    network = gpt(tie_embeddings=False)
    content = {f"transformer.{key}": tensor for key, tensor in written_by_hand(network).items()}
    content["lm_head.weight"] = network.output.weight.detach().clone()
    save_file(content, tmp_path / "model.safetensors")
    assert torch.equal(gpt(tie_embeddings=False, weights=str(tmp_path))(tokens()), network(tokens()))
    with pytest.raises(UserError, match="is not the token embedding; give tie_embeddings=false|does not fit"):
        gpt(weights=str(tmp_path))


def test_weights_in_several_files_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"in several files \(model.safetensors.index.json\), which are not read; save"):
        gpt(weights=str(tmp_path))


def test_writing_and_reading_that_layout_are_inverse(tmp_path):
    network = gpt()
    state = from_huggingface(to_huggingface(network))
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    save_huggingface(network, tmp_path)
    by_hand = {f"transformer.{key}": t for key, t in written_by_hand(network).items() if ".attn.bias" not in key}
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == by_hand.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in by_hand.items())
    assert torch.equal(gpt(weights=str(tmp_path))(tokens()), network(tokens()))


def test_what_no_shape_shows_is_compared_with_the_config(tmp_path):
    save_huggingface(gpt(), tmp_path)
    with pytest.raises(UserError, match="n_heads=6: the weights need 4"):
        GPT(23, 16, 2, 24, 6, **GPT2, weights=str(tmp_path))
    with pytest.raises(UserError, match="activation=gelu: the weights need gelu_tanh"):
        gpt(activation="gelu", weights=str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))
    with pytest.raises(UserError, match="layer_norm_epsilon=1e-06 in the file: this network's is 1e-05"):
        gpt(weights=str(tmp_path))
    for key, value in {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=f"{key}={value} in the file: this network has it {not value}"):
            gpt(weights=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has none of model.safetensors, pytorch_model.bin"):
        gpt(weights=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"positions": "rope"}, "positions=rope"),
        ({"tie_embeddings": False}, "tie_embeddings=false"),
        ({"activation": "swiglu"}, "activation=swiglu"),
        ({"norm": "rmsnorm"}, "norm=rmsnorm or bias=false"),
        ({"bias": False}, "norm=rmsnorm or bias=false"),
        ({"qk_norm": True}, "qk_norm=true"),
        ({"n_kv_heads": 2}, "n_kv_heads"),
        ({"logit_softcap": 30.0}, "logit_softcap"),
    ],
)
def test_a_network_that_is_no_gpt2_is_not_written_as_one(tmp_path, options, part):
    with pytest.raises(ValueError, match=f"network: is no GPT-2.*it has {part}"):
        save_huggingface(gpt(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_logits_equal_those_of_transformers_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    options = {"vocab_size": 23, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**options, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = gpt(weights=str(tmp_path / "theirs")).eval()
    expected = theirs(tokens()).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens()), expected, atol=1e-5, rtol=1e-5)

    save_huggingface(gpt(), tmp_path / "ours", end_of_text=22)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert theirs.config.eos_token_id == 22
    torch.testing.assert_close(theirs(tokens()).logits, gpt()(tokens()), atol=1e-5, rtol=1e-5)


# Adapters


def test_only_the_chosen_adapters_learn_and_they_begin_with_no_effect():
    pytest.importorskip("peft")
    network = gpt()
    add_lora(network, Lora(r=3, targets=["*.attention.qkv", "blocks.1.feed_forward.*"]))
    assert torch.equal(network(tokens()), gpt()(tokens()))
    layers = [
        "blocks.0.attention.qkv",
        "blocks.1.attention.qkv",
        "blocks.1.feed_forward.up",
        "blocks.1.feed_forward.down",
    ]
    expected = {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert trainable.keys() == expected
    assert all(3 in p.shape for p in trainable.values())
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    for _ in range(2):  # the first step moves B alone, since B is zero
        optimizer.zero_grad()
        network(tokens()).logsumexp(-1).mean().backward()
        optimizer.step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == expected


def trained_adapters():
    network = gpt()
    add_lora(network, Lora(r=3, alpha=6.0, targets="*.attention.*"))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return network.eval()


def test_an_adapter_adds_alpha_over_r_times_b_a():
    pytest.importorskip("peft")
    network = trained_adapters()
    layer, x = network.blocks[0].attention.qkv, torch.randn(5, 24)
    base = layer.base_layer
    weight = base.weight + 6.0 / 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias, atol=1e-5, rtol=1e-5)


def test_merged_adapters_give_the_same_logits_in_a_plain_network(tmp_path):
    pytest.importorskip("peft")
    network = trained_adapters()
    expected = network(tokens())
    assert not torch.allclose(expected, gpt()(tokens()), atol=0.1)
    merge_lora(network)
    assert network.state_dict().keys() == gpt().state_dict().keys()
    assert all(p.requires_grad for p in network.parameters())
    save_huggingface(network, tmp_path)
    plain = gpt(weights=str(tmp_path))
    torch.testing.assert_close(plain(tokens()), expected, atol=2e-4, rtol=2e-4)


def test_a_file_with_adapters_comes_back_and_one_without_gets_new_ones(tmp_path):
    pytest.importorskip("peft")
    network, lora = trained_adapters(), Lora(r=3, alpha=6.0, targets="*.attention.*")
    with pytest.raises(ValueError, match="it has lora, which must be merged first"):
        to_huggingface(network)
    save_file(network.state_dict(), tmp_path / "adapted.safetensors")
    again = gpt(weights=str(tmp_path / "adapted.safetensors"), lora=lora).eval()
    assert torch.equal(again(tokens()), network(tokens()))
    save_file(gpt().state_dict(), tmp_path / "base.safetensors")
    as_mapping = {"r": 3, "alpha": 6.0, "targets": ["*.attention.*"]}
    fresh = gpt(weights=str(tmp_path / "base.safetensors"), lora=as_mapping).eval()
    assert fresh.state_dict().keys() == network.state_dict().keys()
    assert torch.equal(fresh(tokens()), gpt()(tokens()))
    with pytest.raises(
        UserError, match="adapted.safetensors: holds adapters besides the network's weights; give lora="
    ):
        gpt(weights=str(tmp_path / "adapted.safetensors"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 0}, "lora.r=0: must be a whole number, 1 or more"),
        ({"r": 2.5}, "lora.r=2.5: must be a whole number, 1 or more"),
        ({"alpha": 0.0}, "lora.alpha=0.0: must be a number above 0"),
        ({"alpha": "x"}, "lora.alpha=x: must be a number above 0"),
        ({"rank": 8}, "lora.rank=8: there is no such key; it has r, alpha, dropout, targets"),
        (5, "lora=5: must be null or have the keys r, alpha, dropout, targets"),
        ({"dropout": 1.0}, "lora.dropout=1.0: must be from 0 to below 1"),
        ({"targets": []}, r"lora.targets=\[\]: must be a pattern"),
        (
            {"targets": "*.attention.qvk"},
            r"lora.targets=\*.attention.qvk: matches no linear layer; the nearest are blocks",
        ),
    ],
)
def test_wrong_adapters_say_what_is_allowed(lora, message):
    with pytest.raises(ValueError, match=message):
        gpt(lora=lora)


def test_without_peft_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"lora needs the package peft, which is not installed:\n  pip install"):
        gpt(lora={"r": 2})
