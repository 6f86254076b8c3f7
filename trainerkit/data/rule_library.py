"""The library of rule adapters as folders that `peft` reads, made once and kept in the cache.

base.safetensors            the network that is adapted, a `trainerkit.nn.residual.ResidualNetwork`
descriptions.jsonl          ten sentences for each adapter, one of them in a wording that training never sees
and_red_glass/              an adapter, and so on for each rule
    adapter_config.json
    adapter_model.safetensors
    examples.safetensors    objects and answers, half of them yes
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # comes with torch
from torch import Tensor
from tqdm import tqdm

from trainerkit.adapters import Factors, write_adapter
from trainerkit.data.lora_examples import EXAMPLES
from trainerkit.data.rule_world import (
    BalancedObjects,
    Recipe,
    World,
    answers,
    balanced_accuracy,
    base_layout,
    train_adapters,
    train_base,
)
from trainerkit.data.rules import TEMPLATES, UNSEEN, Rule, some_rules, split_rules
from trainerkit.data.shard_workers import cannot_write, tell
from trainerkit.files import flush
from trainerkit.functional.random import RandomStream
from trainerkit.nn.residual import ResidualNetwork
from trainerkit.nn.weights import load_weights

_FORMAT = 1
_BASE = "base.safetensors"
# What the objects of the examples and those of the evaluation are drawn by, beside the recipe's seed.
_EXAMPLES, _EVALUATION = 1_000_003, 2_000_003
_EVALUATED = 512  # objects a rule
_AT_ONCE = 64  # rules, which bounds memory


@dataclass(frozen=True)
class RuleLibrary:
    """What is made, and how it is known.

    Args:
        recipe: of the world and the adapters.
        rules: how many, from 21 to 340.
        val_rules: how many of them are held out for validation.
        test_rules: for the test.
        examples: objects with answers that are kept of each rule, an even number.

    Raises:
        ValueError: for an impossible value.
    """

    recipe: Recipe
    rules: int = 340
    val_rules: int = 25
    test_rules: int = 50
    examples: int = 128

    def __post_init__(self) -> None:
        if self.examples < 2 or self.examples % 2:
            raise ValueError(f"examples={self.examples}: must be even, 2 or more")
        split_rules(self.all(), self.val_rules, self.test_rules)

    def all(self) -> list[Rule]:
        """The rules."""
        return some_rules(self.rules)

    @property
    def key(self) -> str:
        """Hash of everything that the folder's content depends on, torch's own arithmetic among it."""
        known_by = {"format": _FORMAT, "torch": torch.__version__, **asdict(self)}
        known_by["sentences"] = [template.say(rule) for rule in self.all() for template in TEMPLATES]
        return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:24]

    def folder(self, cache_dir: Path) -> Path:
        """The library's folder, made if it is not there: a minute or less, and a line on the screen meanwhile.

        What is there is whole: it is made under another name and renamed. One process of a machine makes it, others
        wait.

        Raises:
            trainerkit.errors.UserError: if the cache folder cannot be written.
        """
        folder = cache_dir / "rule_adapters" / self.key
        if folder.is_dir():
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _only_one(folder):
                if not folder.is_dir():
                    _make(self, folder)
        except OSError as error:
            raise cannot_write(error, cache_dir) from error
        return folder


def base_network(folder: Path) -> ResidualNetwork:
    """The network that the adapters of a library are for, frozen.

    Raises:
        trainerkit.errors.UserError: if its file is damaged.
    """
    with RandomStream(0):  # initial weights, which are replaced
        network = ResidualNetwork()
    load_weights(network, folder / _BASE)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def task_accuracy(network: ResidualNetwork, recipe: Recipe, rules: Sequence[Rule], factors: Factors | None) -> Tensor:
    """How often the network answers right, yes and no counting the same, on objects that no adapter was trained on.

    Args:
        network: of `base_network`.
        recipe: that of the library; its seed decides the objects, a rule's do not depend on which others there are.
        rules: (T,).
        factors: an adapter for each rule, (T, n, r, in) and (T, n, out, r); None for the network as it is.

    Returns:
        Balanced accuracy, (T,), on the CPU.
    """
    layout = base_layout(recipe.rank)
    world = World(recipe.noise, recipe.seed)
    found = []
    for start in range(0, len(rules), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        generator = torch.Generator().manual_seed(recipe.seed + _EVALUATION)
        numbers, expected = BalancedObjects(rules[part]).draw(_EVALUATED, generator)
        inputs = world.draw(numbers, generator, same_noise=True)
        if factors is None:
            said = network(inputs)
        else:
            mine = {key: factors[key][part].detach().float().cpu() for key in layout.keys}
            said = answers(network, layout, mine, inputs)
        found.append(balanced_accuracy(said, expected))
    return torch.cat(found)


class _only_one:
    """Let one process of the machine make a folder; others wait here, and find it made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FileLock(folder.with_name(f".{folder.name}.lock"))

    def __enter__(self) -> None:
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            tell(f"another process is making {self.folder}; waiting for it")
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _make(library: RuleLibrary, folder: Path) -> None:
    """The caller holds the lock."""
    for torn in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a run that was killed
        shutil.rmtree(torn, ignore_errors=True)
    rules = library.all()
    tell(f"training {len(rules)} adapters, an example library, into {folder}")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name  # a folder of its own, for the other is private
        made.mkdir()
        _write(library, rules, made)
        flush(made)
        made.rename(folder)
    flush(folder.parent)


def _write(library: RuleLibrary, rules: Sequence[Rule], folder: Path) -> None:
    from safetensors.torch import save  # late: callbacks need only torch and lightning

    recipe, layout = library.recipe, base_layout(library.recipe.rank)
    world = World(recipe.noise, recipe.seed)
    network = train_base(recipe, world)
    (folder / _BASE).write_bytes(save(network.state_dict()))
    factors = train_adapters(recipe, world, network, rules, _progress)
    generator = torch.Generator().manual_seed(recipe.seed + _EXAMPLES)
    numbers, expected = BalancedObjects(rules).draw(library.examples, generator)
    inputs = world.draw(numbers, generator)
    # Yes and no in turn: what is taken from the beginning is balanced too.
    order = torch.arange(library.examples).reshape(2, -1).T.flatten()
    lines = []
    for row, (rule, split) in enumerate(
        zip(rules, split_rules(rules, library.val_rules, library.test_rules), strict=True)
    ):
        write_adapter(folder / rule.name, layout, {key: value[row] for key, value in factors.items()}, _BASE)
        examples = {"inputs": inputs[row, order].contiguous(), "targets": expected[row, order].contiguous()}
        (folder / rule.name / EXAMPLES).write_bytes(save(examples))
        for number, template in enumerate(TEMPLATES):
            line = {"adapter": rule.name, "description": template.say(rule), "split": split}
            lines.append(line | ({"wording": "unseen"} if number == UNSEEN else {}))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "descriptions.jsonl").write_text(text, encoding="utf-8")


def _progress(steps: Iterable[int]) -> Iterable[int]:
    # disable=None: only where somebody watches.
    yield from tqdm(steps, desc="training adapters", unit="step", disable=None)
