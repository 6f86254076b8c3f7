"""The adapters of a library, in memory or read from their files batch by batch, and statistics over them.

Shapes: N adapters, n layers of a type, r the rank, in and out the features of a layer.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import normalize

from trainerkit.adapter_layout import AdapterLayout, Factors
from trainerkit.adapters import WEIGHTS, Adapter, check_finite, map_adapter, natural
from trainerkit.errors import UserError

InMemory = bool | Literal["auto"]
_SMALL = 2**30  # bytes that 'auto' keeps in memory
_CHUNK = 2**26  # bytes of adapters that are in memory at once where they are streamed
# Of adapters that were trained from one A, more than this of their A's energy is common; else about none.
_NEARLY_ALL = 0.95
_COMMON = 0.1


class AdapterFolders:
    """A folder with a folder of PEFT for each adapter; all of one rank, for the same layers.

    Adapters with another alpha keep what they do: B is multiplied with what their scaling is of the others'.

    Args:
        root: the folder; of its folders, all but the hidden ones are adapters.
        key: what named it, for messages.
        in_memory: whether all are kept there, in float32; 'auto' if they take less than 1 GiB. Else a batch's are read
            from their files, and memory does not grow with their number.

    Raises:
        UserError: if there is none, or one that cannot be read (`read_adapter`) or differs in rank or layers from the
            first; names the files.
    """

    def __init__(self, root: Path, key: str, in_memory: InMemory = "auto") -> None:
        if not root.is_dir():
            raise UserError(f"{key}={root}: is no folder; needed is one with a folder for each adapter.")
        folders = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
        self.folders = sorted(folders, key=lambda folder: natural(folder.name))
        if not self.folders:
            raise UserError(f"{key}={root}: has no folder of an adapter ({WEIGHTS}, adapter_config.json) in it.")
        self._key = key
        first = map_adapter(self.folders[0], key)
        scalings = [first.scaling]
        for folder in self.folders[1:]:
            adapter = map_adapter(folder, key)
            self._check_same(folder, adapter, first)
            scalings.append(adapter.scaling)
        scaling = Counter(scalings).most_common(1)[0][0]
        self.layout = AdapterLayout(first.layers, first.rank, scaling)
        self._multiply_b = torch.tensor([each / scaling for each in scalings])
        self._tell_of_scalings(scalings, scaling)
        self.in_memory = 4 * self.layout.numel * len(self) < _SMALL if in_memory == "auto" else in_memory
        self._packed: Factors | None = None

    @property
    def names(self) -> list[str]:
        """Of the folders."""
        return [folder.name for folder in self.folders]

    def __len__(self) -> int:
        return len(self.folders)

    def load(self) -> None:
        """Read all that is kept in memory; done before workers are started, they share it."""
        if self.in_memory and self._packed is None:
            self._packed = self._read(torch.arange(len(self)))

    def factors(self, rows: Tensor) -> Factors:
        """Of the adapters with these numbers, (B, n, r, in) and (B, n, out, r) for each type, float32.

        Raises:
            UserError: for a file that was damaged since, or has a number that is not finite.
        """
        self.load()
        if self._packed is not None:
            return {name: packed[rows] for name, packed in self._packed.items()}
        different, places = rows.unique(return_inverse=True)
        if len(different) == len(rows):
            return self._read(rows)
        return {name: read[places] for name, read in self._read(different).items()}

    def statistics(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation (divided by N) over these adapters, (n, r, in) and (n, out, r) for each type.

        A part of them at a time, so that memory does not grow with their number: T. Chan et al., Algorithms for
        computing the sample variance, The American Statistician 1983.
        """
        count = 0
        means = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.layout.shapes.items()}
        squares = {name: torch.zeros_like(mean) for name, mean in means.items()}
        for some in rows.split(max(1, _CHUNK // (4 * self.layout.numel))):
            share = len(some) / (count + len(some))
            for name, factor in self.factors(some).items():
                of_some = factor.double()
                difference = of_some.mean(0) - means[name]
                squares[name] += (of_some - of_some.mean(0)).square().sum(0) + difference.square() * (count * share)
                means[name] += difference * share
            count += len(some)
        return {name: (mean.float(), (squares[name] / count).sqrt().float()) for name, mean in means.items()}

    def shares_initial_a(self, rows: Tensor, at_most: int = 32) -> bool | None:
        """Whether these adapters were, by all appearance, trained from one initial A.

        BA is the same for (RA, BR⁻¹) with any R: only adapters with one A to begin with have factors that can be
        compared number by number. Then their A's have much in common, and else nothing: the cosine of two A's, all
        layers together, is 0 for A's that were drawn independently, with a standard deviation of 1 / √(numbers of A).
        Of 40 adapters that were trained from one A in large steps the mean was 0.55, of 40 that were trained in the
        same way, each from its own, 0.001.

        Args:
            rows: which adapters.
            at_most: so many of them are read.

        Returns:
            Whether of 95 % of all pairs the cosine is above 0.1 and above 4 standard deviations: of adapters from two
            A's it is of no more than half of them. None for fewer than two adapters.
        """
        cosines = self.cosines_of_a(rows, at_most)
        if cosines is None:
            return None
        numbers = sum(math.prod(shape) for name, shape in self.layout.shapes.items() if name.startswith("A/"))
        return float((cosines > max(_COMMON, 4 / math.sqrt(numbers))).double().mean()) >= _NEARLY_ALL

    def cosines_of_a(self, rows: Tensor, at_most: int = 32) -> Tensor | None:
        """The cosine of each pair of A's, all layers together, (pairs,); None for fewer than two adapters."""
        count = min(len(rows), at_most)
        if count < 2:
            return None
        units = []
        for row in rows[torch.linspace(0, len(rows) - 1, count).long()].split(1):
            factors = self.factors(row)
            units.append(
                normalize(torch.cat([factors[f"A/{one.label}"].flatten() for one in self.layout.types]), dim=0)
            )
        stacked = torch.stack(units)
        first, second = torch.triu_indices(count, count, 1)
        return (stacked @ stacked.T)[first, second]

    def _read(self, rows: Tensor) -> Factors:
        factors = {name: torch.empty(len(rows), *shape) for name, shape in self.layout.shapes.items()}
        for place, row in enumerate(rows.tolist()):
            folder = self.folders[row]
            adapter = map_adapter(folder, self._key)
            if sorted(adapter.layers) != sorted(self.layout.layers) or adapter.rank != self.layout.rank:
                raise UserError(f"{self._key}={folder / WEIGHTS}: was exchanged while it was in use.")
            for one in self.layout.types:
                a, b = factors[f"A/{one.label}"][place], factors[f"B/{one.label}"][place]
                for number, name in enumerate(one.names):
                    a[number], b[number] = adapter.factors[name]
                    check_finite((a[number], b[number]), folder, self._key, name)
                b *= self._multiply_b[row]
        return factors

    def _check_same(self, folder: Path, adapter: Adapter, first: Adapter) -> None:
        here, there = folder / WEIGHTS, self.folders[0] / WEIGHTS

        def refuse(problem: str) -> UserError:
            return UserError(f"{self._key}={here}: {problem}; all adapters of a library need the same layers and rank.")

        if adapter.rank != first.rank:
            raise refuse(f"has rank {adapter.rank}, and {there} has {first.rank}")
        own, others = ({layer[0]: layer[1:] for layer in one.layers} for one in (adapter, first))
        for problem, names in (("lacks", others.keys() - own), ("has", own.keys() - others)):
            if names:
                less = "has not" if problem == "has" else "has"
                listed = _some(sorted(names, key=natural))
                raise refuse(f"{problem} the layers {listed}, which {there} {less}")
        for name, sizes in own.items():
            if sizes != others[name]:
                raise refuse(f"the layer {name} has in_features, out_features {sizes}, in {there} {others[name]}")

    def _tell_of_scalings(self, scalings: list[float], scaling: float) -> None:
        other = next((row for row, each in enumerate(scalings) if each != scaling), None)
        if other is not None:
            count = sum(each != scaling for each in scalings)
            first = self.folders[scalings.index(scaling)]
            rank_zero_warn(
                f"{self._key}: {count} of {len(self)} adapters have another scaling (of alpha and rank) than the rest: "
                f"{self.folders[other]} {scalings[other]:g}, {first} {scaling:g}. Their B is multiplied by the "
                "quotient, so that they do what they did.",
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
