"""Files that were damaged, or made to harm: refused in words, with nothing run and nothing allocated."""

import json
import os
import pickle
import shutil
import struct
import tracemalloc

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file, save_file

from trainerkit.callbacks.best_weights import load_best_weights
from trainerkit.errors import UserError
from trainerkit.loading import check_checkpoint, read_json, read_pickle, read_safetensors, trusting


def safetensors(header, data=bytes(16), length=None):
    """The bytes of a file with this header, which may be text, and these data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


GOOD = {"a": tensor(0, 16)}
BAD_HEADERS = {
    "of no bytes": (b"", "it has 0 bytes"),
    "of seven bytes": (bytes(7), "it has 7 bytes"),
    "length of 2^63": (safetensors(GOOD, length=2**63), "its header claims 9223372036854775808 bytes, the file"),
    "length of 2^64-1": (safetensors(GOOD, length=2**64 - 1), "its header claims 18446744073709551615 bytes"),
    "length one beyond the file": (safetensors(GOOD, b"", len(json.dumps(GOOD)) + 1), "its header claims"),
    "no JSON": (safetensors("{"), "its header is not JSON"),
    "no text": (struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe", "its header is not JSON"),
    "deep JSON": (safetensors("[" * 200_000), "its header is not JSON"),
    "a number of 5,000 digits": (safetensors('{"a": %s}' % ("9" * 5000)), "its header is not JSON"),
    "a list": (safetensors("[]"), "its header is not a JSON object"),
    "a name twice": (safetensors('{"a": 1, "a": 1}'), "'a' stands there twice"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "__metadata__ in its header must hold texts"),
    "no place": (safetensors({"a": {"dtype": "F32", "shape": [4]}}), "'a' has no dtype, shape and data_offsets"),
    "unknown type": (safetensors({"a": tensor(0, 16, dtype="F128")}), "'a' has the unknown dtype 'F128'"),
    "negative size": (safetensors({"a": tensor(0, 16, (-4,))}), "'a' has an impossible shape or place"),
    "sizes that are true": (safetensors({"a": tensor(0, 16, (True,))}), "'a' has an impossible shape or place"),
    "a thousand dimensions": (safetensors({"a": tensor(0, 4, (1,) * 1000)}), "'a' has an impossible shape or place"),
    "backwards": (safetensors({"a": tensor(16, 0)}), "'a' has an impossible shape or place"),
    "beyond the file": (safetensors({"a": tensor(0, 2**62, (2**60,))}), "'a' ends at byte 4611686018427387904 of the data"),
    "shape larger than its bytes": (safetensors({"a": tensor(0, 16, (2**40,))}), "does not fit into 16 bytes"),
    "shape that overflows": (safetensors({"a": tensor(0, 16, (2**62, 2**62, 4))}), "does not fit into 16 bytes"),
    "overlap": (safetensors({"a": tensor(0, 16), "b": tensor(8, 16, (2,))}), "'b' overlaps 'a'"),
    "gap": (safetensors({"a": tensor(0, 4, (1,)), "b": tensor(8, 16, (2,))}), "'b' leaves a gap after 'a'"),
    "bytes left over": (safetensors(GOOD, bytes(17)), "1 bytes at the end belong to no tensor"),
    "cut short": (safetensors(GOOD, bytes(15)), "'a' ends at byte 16 of the data, which has 15"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_safetensors_header_that_lies_is_refused_without_allocating(tmp_path, content, message):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            read_safetensors(path, "weights")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    said = str(refused.value)
    assert said.startswith(f"weights={path}: is not a whole safetensors file: ")
    assert message in said
    assert "get it anew" in said
    assert len(said) < 700
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_best_weights(path)


def test_a_sound_file_of_every_type_is_read_as_the_library_reads_it(tmp_path):
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    kinds += (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8)
    state = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    state |= {"empty": torch.empty(0, 5), "scalar": torch.tensor(2.0)}
    path = tmp_path / "weights.safetensors"
    save_file(state, path, {"format": "pt", "by": "é"})
    found, texts = read_safetensors(path, "weights")
    assert texts == {"format": "pt", "by": "é"}
    expected = load_file(path)
    assert found.keys() == expected.keys() == state.keys()
    assert all(torch.equal(found[name].to(torch.complex64), state[name].to(torch.complex64)) for name in state)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "needed are weight_map"),
        ('{"weight_map": [1]}', "must give each weight a file in the same folder"),
        ('{"weight_map": {"a": "../../weights.safetensors"}}', "must give each weight a file in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "must give each weight a file in the same folder"),
        ('{"weight_map": {"a": ""}}', "must give each weight a file in the same folder"),
        ('{"weight_map": {"a": 5}}', "must give each weight a file in the same folder"),
    ],
)
def test_an_index_leads_only_to_files_beside_it(tmp_path, index, message):
    path = tmp_path / "weights.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(UserError, match=message):
        load_best_weights(path)


@pytest.mark.parametrize("tied", ["{", "[]", '{"b": 1}', '{"b": "nothing"}'])
def test_tied_names_must_lead_somewhere(tmp_path, tied):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors", {"tied": tied})
    with pytest.raises(UserError, match="tied"):
        load_best_weights(tmp_path / "w.safetensors")


class Payload:
    """A real one: unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


CHECKPOINT = {
    "state_dict": {"w": torch.ones(3000)}, "epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.6.6",
    "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": [],
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_named_and_run_only_when_trusted(tmp_path, zipped):
    marker, path = tmp_path / "ran", tmp_path / "stranger.ckpt"
    content = CHECKPOINT | {"hyper_parameters": {"width": 3, "made_by": Payload(marker)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as refused:
        check_checkpoint(path, "resume", to_train=True)
    assert not marker.exists()
    said = str(refused.value)
    assert said.startswith(f"resume={path}: ")
    assert f"{os.system.__module__}.system" in said
    assert (
        "holds pickled code, which was not run" if zipped else "cannot be read without running code from it"
    ) in said
    assert "would do whatever its maker wanted, with your rights" in said
    assert "add trust=true to the command line" in said
    with trusting(True):
        check_checkpoint(path, "resume", to_train=True)
    assert marker.exists()
    with pytest.raises(UserError):
        check_checkpoint(path, "resume", to_train=True)  # trust has ended with its context


def sharded(folder, value):
    """A folder of torch.distributed.checkpoint with tensors, plain values and `value`."""
    linear = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    plain = {"a": [1, "b", None], "half": torch.ones(2, dtype=torch.bfloat16)}
    state = {"state_dict": linear.state_dict(), "optimizer": optimizer.state_dict(), "plain": plain, "value": value}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    torch.save({"epoch": 1}, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*")
def test_code_in_a_folder_of_shards_is_refused_wherever_it_stands(tmp_path):
    check_checkpoint(sharded(tmp_path / "sound", 5), "resume", to_train=True)
    marker = tmp_path / "ran"
    folders = {"values": sharded(tmp_path / "values", Payload(marker))}
    for place in (".metadata", "meta.pt"):
        folder = folders[place] = tmp_path / place.strip(".")
        shutil.copytree(tmp_path / "sound", folder)
        (torch.save if place == "meta.pt" else lambda value, path: path.write_bytes(pickle.dumps(value)))(
            Payload(marker), folder / place
        )
    outside = folders["outside"] = tmp_path / "outside"
    shutil.copytree(tmp_path / "sound", outside)
    metadata = pickle.loads((outside / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../sound/__0_0.distcp"
    (outside / ".metadata").write_bytes(pickle.dumps(metadata))
    for place, folder in folders.items():
        with pytest.raises(UserError, match=f"^resume={folder}: .*(system|leads out of the folder)"):
            check_checkpoint(folder, "resume", to_train=True)
        assert not marker.exists(), place
    with pytest.raises(UserError, match="cannot be read without running code from it, or is damaged"):
        (tmp_path / "sound" / "__0_0.distcp").write_bytes(b"")
        check_checkpoint(tmp_path / "sound", "resume", to_train=True)


def test_damage_is_named(tmp_path):
    whole = tmp_path / "whole.ckpt"
    torch.save(CHECKPOINT, whole)
    check_checkpoint(whole, "resume", to_train=True)
    content = whole.read_bytes()
    inside = content.index(torch.ones(500).numpy().tobytes()) + 400
    flipped = content[:inside] + bytes([content[inside] ^ 1]) + content[inside + 1 :]
    cases = {"cut": content[:1000], "empty": b"", "text": b"hello", "flipped": flipped, "zeros": bytes(5000)}
    for name, damaged in cases.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(damaged)
        for read in (read_pickle, lambda path, key: check_checkpoint(path, key, to_train=False)):
            with pytest.raises(UserError, match=f"^resume={path}: (is damaged|cannot be read)"):
                read(path, "resume")
    # torch itself reads the flipped bit as a weight.
    assert not torch.equal(
        torch.load(tmp_path / "flipped.ckpt", weights_only=True)["state_dict"]["w"], torch.ones(3000)
    )


@pytest.mark.parametrize(
    "content", [5, [], {}, {"state_dict": {}}, CHECKPOINT | {"epoch": "1"}, {"w": torch.ones(2)}, None, torch.ones(2)]
)
def test_what_is_no_checkpoint_says_what_it_lacks(tmp_path, content):
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"is no whole checkpoint of Lightning; it lacks .*epoch"):
        check_checkpoint(path, "resume", to_train=True)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", '{"a": 1}', "\udcff"])
def test_json_that_is_not_what_a_run_writes_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"^out_dir={path}: is not "):
        read_json(path, "out_dir", "metrics")
