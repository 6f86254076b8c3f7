"""What a run writes loads without running code, and what a stranger sent does not run on the way in."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.support import ROOT, SMALL_MAE, smooth_spectra
from tests.test_loading import Payload
from trainerkit.callbacks._step_records import START, make_record
from trainerkit.cli import main
from trainerkit.compose import choices, compose_config, config_loader
from trainerkit.errors import UserError
from trainerkit.hydra_parts import check_hydra, check_node
from trainerkit.loading import read_safetensors
from trainerkit.plugins import AllowList
from trainerkit.run import run
from trainerkit.testing._kill_runs import SMALL

QUICK = ["trainer=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=3", "callbacks.progress_bar=null"]
# Callbacks that are for one task's predictions, and what is written then; every task has a line here.
PREDICTING = {"mae": "callbacks=[default,latent_clusters]"}
PREDICTING |= dict.fromkeys(("classification", "gan", "lm", "retrieval", "t2l"), "callbacks=[default]")
PREDICTED = {
    "mae": {"latent.npy", "clusters.npy", "clusters.json", "predictions.safetensors"},
    "classification": {"class.npy", "probability.npy", "predictions.safetensors"},
    "gan": {"picture.npy", "class.npy", "predictions.safetensors"},
    "lm": {"tokens.npy", "text.jsonl", "predictions.safetensors"},
    "retrieval": {"embedding.npy", "query.npy", "predictions.safetensors"},
    "t2l": {"adapter_model.safetensors", "adapter_config.json"},  # in folders of their own, in this format alone
}  # fmt: skip
BARE = [*(option for option in SMALL_MAE if not option.startswith("callbacks")), "callbacks=none", "logger=none"]
SAVING = [option.replace("=none", "=[crash_safe_checkpoint,best_weights]") for option in BARE[:-1]] + BARE[-1:]


def tasks():
    with config_loader() as loader:
        return choices(loader, "task")


def all_callbacks():
    """trainerkit's own, by their files' names."""
    files = sorted((ROOT / "configs" / "callbacks").glob("*.yaml"))
    return [path.stem for path in files if "_target_: trainerkit.callbacks" in path.read_text()]


def refused(arguments, capsys):
    """What the command line says to arguments that it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 12, said
    return said


# What is written


def load_safely(path):
    """Load a file without running code from it; False for one that holds none by its kind."""
    if path.suffix in (".ckpt", ".pt"):
        torch.load(path, weights_only=True)
    elif path.suffix == ".safetensors":
        read_safetensors(path, "path")
    elif path.suffix in (".npy", ".npz"):
        np.load(path, allow_pickle=False)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    elif path.suffix == ".yaml":
        yaml.safe_load(path.read_text(encoding="utf-8"))
    else:
        assert path.suffix in (".txt", ".csv", ".png"), f"{path}: of a kind that this test does not know"
        return False
    return True


@pytest.fixture(scope="module", params=tasks())
def written(request, tmp_path_factory):
    """The folder of a run with every callback that works with it: trained, tested, predicted in both formats."""
    folder = tmp_path_factory.mktemp(request.param)
    options = [f"task={request.param}", *SMALL[request.param](folder), f"out_dir={folder}/run", *QUICK]
    refused = {"gradient_accumulation"} if request.param == "gan" else set()  # each of its turns has its own
    chosen = f"callbacks=[default,{','.join(name for name in all_callbacks() if name not in refused)}]"
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        main([*options, chosen])
        main([*options, "stage=predict", PREDICTING[request.param]])
        if "predictions.safetensors" in PREDICTED[request.param]:
            main([*options, "stage=predict", "callbacks.save_predictions.format=safetensors"])
    return request.param, folder / "run"


@pytest.mark.filterwarnings("ignore")  # callbacks that do not go together say so; here all are to write
def test_everything_that_a_run_writes_loads_without_running_code(written):
    task, folder = written
    paths = [path for path in folder.rglob("*") if path.is_file()]
    loaded = [path for path in paths if load_safely(path)]
    found = {path.name for path in loaded}
    assert found >= {
        "last.ckpt", "best.ckpt", "best_model.safetensors", "training_history.json", "config.yaml", "results.json",
        "environment.json", "hparams.yaml", *PREDICTED[task],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_hyperparameters_in_a_checkpoint_are_json(written):
    _, folder = written
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(folder / "checkpoints" / name, weights_only=True)
        saved = checkpoint["hyper_parameters"]
        assert type(saved) is dict
        assert saved
        assert json.loads(json.dumps(saved, allow_nan=False)) == saved
    assert yaml.safe_load(next(folder.rglob("hparams.yaml")).read_text()) == saved
    _, facts = read_safetensors(folder / "best_model.safetensors", "path")
    assert json.loads(facts["config"]) == saved


# What is read


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run without extras, whose checkpoint the tests change."""
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "spectra.npy", smooth_spectra())
    main([*SAVING, f"data.path={folder}/spectra.npy", f"out_dir={folder}/run", "trainer.max_epochs=1"])
    return folder


@pytest.fixture
def stranger(finished, tmp_path, monkeypatch):
    """A stranger's run: its checkpoints are whole, and run a command when they are unpickled."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "spectra.npy", tmp_path)
    checkpoint = torch.load(finished / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["made_by"] = Payload(tmp_path / "ran")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()  # a stranger's files come without manifests
    for name in ("last.ckpt", "best.ckpt"):
        torch.save(checkpoint, tmp_path / "run" / "checkpoints" / name)
    return tmp_path


WAYS = {
    "resume=auto": ["out_dir=run", "trainer.max_epochs=3"],
    "resume=PATH": ["out_dir=mine", "resume=run/checkpoints/last.ckpt", "trainer.max_epochs=3"],
    "stage=validate": ["out_dir=run", "stage=validate"],
    "stage=test": ["out_dir=mine", "stage=test", "resume=run/checkpoints/best.ckpt"],
    "stage=predict": ["out_dir=run", "stage=predict"],
    "weights": ["out_dir=mine", "stage=validate", "resume=null", "task.network.weights=run/checkpoints/best.ckpt"],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_code_in_a_checkpoint_runs_only_with_trust(stranger, way, capsys):
    arguments = [*SAVING, "data.path=spectra.npy", *way]
    said = refused(arguments, capsys)
    assert "holds pickled code, which was not run: " in said
    assert f"{os.system.__module__}.system" in said
    assert "add trust=true to the command line" in said
    assert not (stranger / "ran").exists()
    main([*arguments, "trust=true"])
    assert (stranger / "ran").exists()
    assert "warning: trust=true: files are unpickled whole, which runs whatever code" in capsys.readouterr().err


def test_no_config_and_no_folder_of_a_run_can_say_that_it_is_trusted(stranger, capsys):
    (stranger / "mine" / "experiment").mkdir(parents=True)
    arguments = ["--config-dir", "mine", *SAVING, "data.path=spectra.npy", "out_dir=run", "experiment=kind"]
    for value in ("true", "${oc.decode:true}", "${nothing}", "null"):
        text = f"# @package _global_\n# Kind.\ntrust: {value}\n"
        (stranger / "mine" / "experiment" / "kind.yaml").write_text(text)
        assert "trust: only the command line may set it" in refused(arguments, capsys), value
    with open(stranger / "run" / "overrides.txt", "a") as file:
        file.write("trust=true\n++trust=true\nhydra.searchpath=[pkg://nowhere]\n")
    said = refused(["stage=test", "out_dir=run"], capsys)
    assert "holds pickled code, which was not run" in said
    assert not (stranger / "ran").exists()


@pytest.mark.parametrize("key", ["resume", "task.network.weights"])
def test_a_run_that_is_trained_again_is_not_trusted_because_its_folder_says_so(stranger, key, capsys):
    cfg = OmegaConf.load(stranger / "run" / "config.yaml")
    hashes = {"_target_": "trainerkit.callbacks.StepHashes", "dirname": "step_hashes"}
    cfg = OmegaConf.merge(cfg, {"trust": True, "resume": None, "callbacks": {"step_hashes": hashes}})
    OmegaConf.update(cfg, key, "run/checkpoints/last.ckpt")
    OmegaConf.save(cfg, stranger / "run" / "config.yaml")
    records = stranger / "run" / "step_hashes" / "rank0.jsonl"
    records.parent.mkdir()
    record = make_record(1, 0, {"batch": bytes(32)}, START)
    records.write_text(record.names_line() + record.as_line())
    assert "holds pickled code, which was not run" in refused(["replay", "run"], capsys)
    assert not (stranger / "ran").exists()
    with pytest.raises(SystemExit):  # the record is none of a run, or there is no step left
        main(["replay", "run", "trust=true"])
    assert (stranger / "ran").exists()


def test_weights_alone_are_evaluated_and_nothing_else(stranger, capsys):
    exported = "resume=run/best_model.safetensors"
    main([*BARE, "data.path=spectra.npy", "stage=test", "out_dir=new", exported])
    results = json.loads((stranger / "run" / "results.json").read_text())["metrics"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "test/mse" in line)
    assert float(line.split()[-1]) == pytest.approx(results["test/mse"], rel=1e-4)
    said = refused([*BARE, "data.path=spectra.npy", "out_dir=new", exported], capsys)
    assert "holds weights alone; training goes on from a checkpoint" in said
    said = refused(
        [*BARE, "data.path=spectra.npy", "stage=test", "out_dir=n", exported, "task.network.latent_dim=5"], capsys
    )
    assert "does not fit this config" in said


def test_arrays_of_objects_are_not_unpickled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    objects = np.array([[Payload(tmp_path / "ran")] * 40], dtype=object)
    np.save("objects.npy", objects)
    np.savez("objects.npz", x=objects)
    np.savez("labels.npz", x=smooth_spectra(), y=np.array([Payload(tmp_path / "ran")] * 400, dtype=object))
    for name, more in {"objects.npy": [], "objects.npz": [], "labels.npz": ["data.label=y"]}.items():
        said = refused([*BARE, f"data.path={name}", "out_dir=run", *more], capsys)
        assert f"{name}: " in said
        assert "holds Python objects, which are not read because they can run code" in said
    assert not (tmp_path / "ran").exists()
    np.load("objects.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists()  # the payload is a real one


# What a config asks for

TOUCH = "{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [ran]}]}"
TARGETS = {
    "plain": [f"task.augment={TOUCH}"],
    "in a list": [f"+task.augment={{_target_: torch.nn.Identity, a: [{TOUCH}]}}"],
    "in a mapping": [f"+task.augment={{_target_: torch.nn.Identity, a: {{b: {TOUCH}}}}}"],
    "under a number": [f"+task.augment={{_target_: torch.nn.Identity, 1: {TOUCH}}}"],
    "as an argument": [f"+task.augment={{_target_: torch.nn.Identity, _args_: [{TOUCH}]}}"],
    "not recursive": [f"+task.augment={{_target_: torch.nn.Identity, _recursive_: false, a: {TOUCH}}}"],
    "converted": [f"+task.augment={{_target_: torch.nn.Identity, _convert_: object, a: {TOUCH}}}"],
    "partial": ["+task.augment={_target_: os.system, _partial_: true, command: touch ran}"],
    "interpolated name": ["+x=os.system", "+task.augment._target_=${x}"],
    "interpolated node": [f"+x={TOUCH}", "task.augment=${x}"],
    "made by a resolver": [f"task.augment='${{oc.create:{TOUCH}}}'"],
    "decoded": [f"task.augment='${{oc.decode:\"{TOUCH}\"}}'"],
    "an attribute of the data": ["+task.augment={_target_: '${data_module:__class__}'}"],
    "a module in torch": ["+task.augment={_target_: torch.os.system, _args_: [touch ran]}"],
    "a program": ["+task.augment={_target_: trainerkit.__main__.main}"],
    "globals of a function": ["+task.augment={_target_: trainerkit.optim.warmup_cosine.__globals__}"],
    "a callback": [f"+callbacks={{x: {TOUCH}}}"],
    "the data": [f"data={TOUCH}"],
    "the logger": [f"+logger={{x: {TOUCH}}}"],
    "builtins": ["+task.augment={_target_: builtins.eval, _args_: [\"open('ran','w')\"]}"],
}
# An interpolation behind backslashes is text when it is looked at first, and a target when it is resolved once more.
TARGETS |= {
    f"behind {count} backslashes": [f"{key}='{chr(92) * count}${{oc.create:{TOUCH}}}'"]
    for count in (1, 2, 3, 7)
    for key in ("task.network.weights",)
}  # fmt: skip


@pytest.fixture(scope="module")
def composed():
    """The config that the attacks change; composing takes most of a run's start."""
    return compose_config([*BARE, "data.path=spectra.npy", "stage=validate", "resume=null", "out_dir=run"])


@pytest.mark.parametrize("attack", TARGETS.values(), ids=TARGETS)
def test_no_way_of_writing_a_target_gets_past_the_list(composed, tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    np.save("spectra.npy", smooth_spectra(rows=60))
    cfg = copy.deepcopy(composed)
    for override in OverridesParser.create().parse_overrides(attack):
        OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    with pytest.raises(UserError):
        run(cfg, [], AllowList())
    assert not (tmp_path / "ran").exists()


def test_the_same_config_without_an_attack_runs_and_with_allow_an_attack_succeeds(composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("spectra.npy", smooth_spectra(rows=60))
    run(copy.deepcopy(composed), [], AllowList())
    cfg = copy.deepcopy(composed)
    OmegaConf.update(cfg, "callbacks.x", OverridesParser.create().parse_override(f"x={TOUCH}").value(), force_add=True)
    with pytest.raises(UserError, match="callbacks.x: must build a Callback, not a NoneType"):
        run(cfg, [], AllowList(["pathlib"]))
    assert (tmp_path / "ran").exists()


HYDRA = {
    "a callback": "hydra: {callbacks: {x: {_target_: os.system, command: touch ran}}}",
    "a callback through Hydra": "hydra: {callbacks: {x: {_target_: hydra.utils.instantiate, config: {}}}}",
    "a callback deep in Hydra": "hydra: {callbacks: {x: {_target_: hydra.core.utils.os.system, command: touch ran}}}",
    "a launcher": "hydra: {launcher: {_target_: subprocess.Popen, args: [touch, ran]}}",
    "a logging factory": "hydra: {job_logging: {version: 1, root: {}, handlers: {x: {'()': os.system, command: touch ran}}}}",
    "a logging class": "hydra: {job_logging: {version: 1, root: {}, handlers: {x: {class: logging.os.system}}}}",
    "an external object": "hydra: {job_logging: {version: 1, root: {}, handlers: {x: {class: logging.StreamHandler, stream: 'ext://os.system'}}}}",
    "the environment": "hydra: {job: {env_set: {LD_PRELOAD: ./evil.so}}}",
    "the list of what is trusted": "hydra: {job: {env_set: {TRAINERKIT_ALLOW: os}}}",
}  # fmt: skip


@pytest.mark.parametrize("text", HYDRA.values(), ids=HYDRA)
def test_what_hydra_would_run_for_a_sweep_is_refused(text):
    with pytest.raises(UserError, match=r"^hydra\."):
        check_node(yaml.safe_load(text)["hydra"], AllowList(), ["task=mae"])


def test_every_choice_of_a_sweep_is_looked_at_before_the_first_runs(tmp_path):
    texts = {
        "experiment/kind": "seed: 1",
        "experiment/evil": HYDRA["a callback"],
        "experiment/sweeps": "hydra: {sweeper: {params: {optimizer: 'adam,evil'}}}",
        "experiment/own": "hydra: {sweeper: {params: {hydra.run.dir: 'x,y'}}}",
        "optimizer/evil": HYDRA["a callback"],
    }
    for name, text in texts.items():
        path = tmp_path / "mine" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n# What it is.\n{text}\n")
    mine = str(tmp_path / "mine")
    check_hydra(["task=mae", "experiment=kind", "seed=1,2"], AllowList(), mine)
    for choice in ("experiment=kind,evil", "experiment=sweeps"):
        with pytest.raises(UserError, match=r"hydra.callbacks.x._target_=os.system: configs may build only from"):
            check_hydra(["task=mae", choice], AllowList(), mine)
    with pytest.raises(UserError, match="hydra.run.dir=x,y: Hydra's own keys cannot be swept over"):
        check_hydra(["task=mae", "experiment=own"], AllowList(), mine)


def test_every_combination_of_a_sweep_is_looked_at_and_what_it_starts_from(tmp_path):
    (tmp_path / "extra").mkdir()
    primary = (ROOT / "configs" / "train.yaml").read_text()
    together = "  - optional extra@_global_: ${optimizer}_${scheduler}\n  - override hydra/job_logging"
    (tmp_path / "train.yaml").write_text(primary.replace("  - override hydra/job_logging", together))
    mine, evil = str(tmp_path), f"# @package _global_\n{HYDRA['a logging factory']}\n"
    sweep = ["task=mae", "optimizer=adam,sgd", "scheduler=exponential,cosine", "seed=range(9)"]
    check_hydra(sweep, AllowList(), mine)
    # The second of both groups; what the task has by default, which the sweep does not name.
    for name in ("sgd_cosine", "adamw_warmup_cosine"):
        path = tmp_path / "extra" / f"{name}.yaml"
        path.write_text(evil)
        with pytest.raises(UserError, match=r"hydra.job_logging.handlers.x.\(\)=os.system: must be one of"):
            check_hydra(sweep, AllowList(), mine)
        path.unlink()


def test_more_combinations_than_can_be_looked_at_are_refused():
    many = ",".join(["adam"] * 50)
    with pytest.raises(UserError, match="This sweep has 2500 combinations of choices, and at most 2000"):
        check_hydra(["task=mae", f"optimizer={many}", "scheduler=" + many.replace("adam", "cosine")], AllowList())


def test_what_the_user_says_of_hydra_on_the_command_line_holds(tmp_path):
    said = ["+hydra.job.env_set.A='1'", "hydra/job_logging=default", "hydra.run.dir=x", "hydra.sweep.dir=y"]
    check_hydra(["task=mae", "seed=1,2", *said], AllowList())
    with pytest.raises(UserError, match="Sweeping over Hydra's configuration is not supported"):
        check_hydra(["task=mae", "hydra.run.dir=x,y"], AllowList())
    with pytest.raises(UserError, match=r"os.system: configs may build only from"):
        check_hydra(["task=mae", "+hydra.callbacks.x._target_=os.system"], AllowList())


def test_a_folder_cannot_send_hydra_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for text, message in {
        "hydra: {searchpath: [pkg://evil]}": "only the command line may",
        "a: [": "cannot be read",
    }.items():
        (tmp_path / "mine" / "train.yaml").write_text(text)
        assert message in refused(["--config-dir", "mine", "task=mae"], capsys)


def test_the_resolved_config_of_a_child_process_is_held_to_the_same_list(composed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("spectra.npy", smooth_spectra(rows=60))
    cfg = copy.deepcopy(composed)
    OmegaConf.update(cfg, "task.augment", {"_target_": "os.system", "command": "touch ran"})
    OmegaConf.save(cfg, "child.yaml")
    monkeypatch.setenv("TRAINERKIT_RESOLVED_CONFIG", "child.yaml")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "task.augment._target_=os.system: configs may build only from" in refused(["task=mae"], capsys)
    assert not (tmp_path / "ran").exists()


def test_every_task_is_covered():
    assert (
        set(PREDICTING)
        == set(PREDICTED)
        == set(tasks())
        == {path.stem for path in (ROOT / "configs" / "task").glob("*.yaml")}
    )
