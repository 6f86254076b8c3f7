"""Where the tokens of a text are kept, and what they are known by."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerkit.data.shard_workers import cannot_write, only_one, tell, write_parts
from trainerkit.data.shards import Job, State, TokenStream, counts, file_state, open_split
from trainerkit.data.text_files import SPLITS, Source
from trainerkit.data.text_pieces import plan_parts
from trainerkit.data.tokenizers import Tokenizer, digest, from_content, train_bpe
from trainerkit.errors import UserError
from trainerkit.files import replacing, write_json

_FORMAT = 2
# A file that was written so shortly before it was hashed may change again without another time of change.
_RACY_NANOSECONDS = 2_000_000_000
# What BPE learns from, at most; more changes little.
_BPE_CHARACTERS = 100_000_000


@dataclass(frozen=True)
class Corpus:
    """A text whose tokens are there.

    Args:
        job: what was tokenised.
        key: hash of the sources' names, sizes and contents, the tokenizer and the settings; the same for a BPE that was
            learnt and for its tokenizer.json.
        tokenizer: by what.
        tokens: in each split.
        bytes: of text in each split.
        documents: in each split.
    """

    job: Job
    key: str
    tokenizer: Tokenizer
    tokens: tuple[int, int, int]
    bytes: tuple[int, int, int]
    documents: tuple[int, int, int]

    def stream(self, split: int) -> TokenStream:
        """The tokens of a split."""
        return open_split(self.job.folder, len(self.job.parts), split, self.tokenizer)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/trainerkit`, or `~/.cache/trainerkit`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainerkit"


def tokenized(
    sources: Sequence[Source],
    tokenizer: Tokenizer | int,
    *,
    cache_dir: Path,
    fractions: tuple[float, float],
    field: str,
    end_of_text: str | None,
    part_bytes: int,
    workers: int | None,
) -> Corpus:
    """The tokens of a text: from the cache, or made now.

    Args:
        sources: the files.
        tokenizer: one, or the number of tokens of a BPE that is learnt from the training part.
        cache_dir: the folder below which they are kept.
        fractions: shares of validation and test.
        field: of a line of JSON.
        end_of_text: name of the separating token, see `JsonTokenizer`.
        part_bytes: text of a part.
        workers: processes, see `write_parts`.

    Raises:
        UserError: for text that cannot be read, or a cache folder that cannot be written.
        ValueError: for a number of tokens that BPE cannot reach.
    """
    try:
        states, digests, changed = _hashed(sources, cache_dir)
        known_by = {
            "format": _FORMAT,
            "sources": [(s.name, s.mode, size, d) for s, (size, _), d in zip(sources, states, digests, strict=True)],
            "tokenizer": {"bpe": tokenizer} if isinstance(tokenizer, int) else digest(tokenizer),
            "settings": [fractions, field, part_bytes],
        }
        folder = cache_dir / "text" / _key(known_by)
        job = Job(folder, sources, states, plan_parts(sources, part_bytes), fractions, field, end_of_text)
        found = _found(job, known_by, tokenizer)
        if found is not None:
            return found
        if changed:
            tell(f"{changed} has changed since it was last read: the text is tokenised anew")
        with only_one(folder):
            made = _tokenizer(job, tokenizer)
            write_parts(job, made, workers)
        found = _found(job, known_by, made)
    except OSError as error:
        raise cannot_write(error, cache_dir) from error
    if found is None:
        raise UserError(f"{folder}: what was just written is not there any more; is the disk full?")
    return found


def _key(known_by: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:32]


def _found(job: Job, known_by: dict[str, Any], tokenizer: Tokenizer | int) -> Corpus | None:
    saved = job.folder / "tokenizer.json"
    if isinstance(tokenizer, int):
        if not saved.exists():
            return None
        tokenizer = from_content(saved.read_text(encoding="utf-8"), str(saved))
    parts = [counts(job.folder, part, tokenizer) for part in range(len(job.parts))]
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None

    def total(name: str) -> tuple[int, int, int]:
        first, second, third = (sum(part[name][split] for part in whole) for split in range(len(SPLITS)))
        return first, second, third

    key = _key(known_by | {"tokenizer": digest(tokenizer)})
    return Corpus(job, key, tokenizer, total("tokens"), total("bytes"), total("documents"))


def _tokenizer(job: Job, tokenizer: Tokenizer | int) -> Tokenizer:
    """The tokenizer, trained if it is not there yet, and kept beside the shards."""
    saved = job.folder / "tokenizer.json"
    if isinstance(tokenizer, int) and saved.exists():
        return from_content(saved.read_text(encoding="utf-8"), str(saved))
    if isinstance(tokenizer, int):
        tell(f"learning {tokenizer} tokens from the training part")
        content = train_bpe(_training_text(job), tokenizer)
    else:
        content = tokenizer.content
    if content != "bytes":
        with replacing(saved) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return from_content(content, str(saved), job.end_of_text)


def _training_text(job: Job) -> Any:
    """Text of the training split, of parts in an order by hash where it is not all."""
    order = sorted(range(len(job.parts)), key=lambda part: hashlib.blake2b(str(part).encode()).digest())
    characters = 0
    for part in order:
        for piece in job.pieces(part):
            if piece.split == 0:
                yield piece.text
                characters += len(piece.text)
                if characters >= _BPE_CHARACTERS:
                    return


def _hashed(sources: Sequence[Source], cache_dir: Path) -> tuple[list[State], list[str], str]:
    """Each file's state and the hash of its content, which is read again only if the state is another.

    What was found is kept for the next run, by the files' places; files whose content is another now are named last.
    """
    places = "\n".join(str(source.path) for source in sources)
    memo = cache_dir / "sources" / f"{hashlib.sha256(places.encode()).hexdigest()[:32]}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(memo.read_text(encoding="utf-8"))
    states, digests, changed = [], [], []
    for source in sources:
        before = known.get(str(source.path))
        try:
            state = file_state(source.path)
            if before is not None and tuple(before["state"]) == state:
                found = before["digest"]
            else:
                with source.path.open("rb") as file:
                    found = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise UserError(f"{source.path}: cannot be read ({error.strerror or error}).") from error
        if before is not None and before["digest"] != found:
            changed.append(source)
        states.append(state)
        digests.append(found)
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    now = time.time_ns()
    content = {
        str(source.path): {"state": state, "digest": found}
        for source, state, found in zip(sources, states, digests, strict=True)
        if now - state[1] > _RACY_NANOSECONDS
    }
    remembered = known | content
    if remembered != known:
        write_json(memo, remembered)
    return states, digests, f"{changed[0].path}{more}" if changed else ""
