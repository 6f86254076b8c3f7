"""340 adapters for yes/no rules, made on the spot in less than a minute: `data=rule_adapters`, nothing is fetched.

A small network knows objects by their colour, shape, size, material and place. Each adapter has it answer one question:
'is it red', 'is it red and made of glass', 'is it red or made of glass'. Ten sentences describe each, one of them in a
wording that training never sees. All 'is' rules and most of the others train; 25 rules validate and 50 test.

Balanced accuracy on objects that no adapter was trained on, mean over the rules: 0.49 without an adapter, 0.99 with the
rule's own, 0.49 with the mean of all, 0.50 with another rule's. See `trainerkit.data.rules` for the rules, `rule_world`
for the training and `rule_library` for the folder.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.data.lora_folders import InMemory
from trainerkit.data.lora_library import LoraLibrary
from trainerkit.data.rule_library import RuleLibrary, base_network, task_accuracy
from trainerkit.data.rule_world import Recipe, base_layout
from trainerkit.data.rules import Rule
from trainerkit.data.task_embeddings import HashedNgrams, TaskEmbedding
from trainerkit.data.text_cache import default_cache_dir
from trainerkit.nn.residual import ResidualNetwork


class RuleAdapters(LoraLibrary):
    """The adapters of the rules, in batches as `LoraDataset` gives them.

    Args:
        rank: of the adapters.
        rules: how many there are, from 21 to 340: all that ask for one value, then the others in an order by hash.
        val_rules: how many of the others are held out for validation.
        test_rules: for the test.
        steps: of the adapters' training.
        objects: that an adapter sees in a step, half of them yes.
        noise: standard deviation of what is added to each number of an object.
        base_steps: of the base network's training.
        examples: objects with answers that are kept of each rule, for `examples_per_task`.
        library_seed: of all of these.
        embedding: of the descriptions; None for `HashedNgrams(word_ngrams=1)`.
        batch_size: adapters a batch and process.
        examples_per_task: examples that a batch has of each adapter's rule, drawn anew in each epoch; None for none.
        description: what prediction writes an adapter for; without it, for every known description of the library.
        description_file: the same from a file, see `LoraLibrary`.
        in_memory: whether adapters are kept in memory, see `LoraLibrary`.
        num_workers: processes that read ahead.
        cache_dir: where the library is kept; None for `$XDG_CACHE_HOME/trainerkit`, or `~/.cache/trainerkit`.
        seed: of order, descriptions and examples; not of the library.

    Raises:
        ValueError: for an impossible argument.
    """

    def __init__(
        self,
        *,
        rank: int = 4,
        rules: int = 340,
        val_rules: int = 25,
        test_rules: int = 50,
        steps: int = 160,
        objects: int = 64,
        noise: float = 0.2,
        base_steps: int = 400,
        examples: int = 128,
        library_seed: int = 0,
        embedding: TaskEmbedding | None = None,
        batch_size: int = 32,
        examples_per_task: int | None = None,
        description: str | None = None,
        description_file: str | None = None,
        in_memory: InMemory = "auto",
        num_workers: int = 0,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        if library_seed < 0:
            raise ValueError(f"library_seed={library_seed}: must be 0 or more")
        if examples_per_task is not None and examples_per_task > examples:
            raise ValueError(f"examples_per_task={examples_per_task}: there are examples={examples} of each rule")
        recipe = Recipe(rank, steps, objects, noise, base_steps, seed=library_seed)
        self.library = RuleLibrary(recipe, rules, val_rules, test_rules, examples)
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        options: dict[str, Any] = {"description": description, "description_file": description_file}
        super().__init__(
            str(self._cache_dir),
            embedding=HashedNgrams(word_ngrams=1) if embedding is None else embedding,
            # As the descriptions say; what has no share need not be there.
            val_fraction=val_rules / rules,
            test_fraction=test_rules / rules,
            batch_size=batch_size,
            examples_per_task=examples_per_task,
            in_memory=in_memory,
            num_workers=num_workers,
            seed=seed,
            **options,
        )
        self._made: Path | None = None
        self._base: ResidualNetwork | None = None

    def make_folder(self) -> Path:
        """The library's folder in the cache; its adapters are trained if it is not there."""
        if self._made is None:
            self._made = self.library.folder(self._cache_dir)
        return self._made

    @property
    def layout(self) -> AdapterLayout:
        """Which layers the adapters change; known before they are trained."""
        return base_layout(self.library.recipe.rank)

    # What the task and its report read.

    def rules_of(self, rows: Tensor) -> list[Rule]:
        """The rules of the adapters with these numbers."""
        by_name = {rule.name: rule for rule in self.library.all()}
        names = self.folders.names
        return [by_name[names[row]] for row in rows.tolist()]

    def base_network(self) -> ResidualNetwork:
        """The network that the adapters are for, frozen: objects (…, 48) to logits of no and yes (…, 2)."""
        return base_network(self.make_folder())

    def task_accuracy(self, factors: Factors | None, rows: Tensor) -> Tensor:
        """How often the base network answers right with these adapters, yes and no counting the same.

        Args:
            factors: an adapter for each row, (N, n, r, in) and (N, n, out, r); None for the network as it is.
            rows: numbers of adapters, (N,): whose rule is asked for.

        Returns:
            Balanced accuracy on 512 objects a rule, the same ones each time, that no adapter was trained on, (N,).
        """
        if self._base is None:
            self._base = self.base_network()
        return task_accuracy(self._base, self.library.recipe, self.rules_of(rows), factors)
