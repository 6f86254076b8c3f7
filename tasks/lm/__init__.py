"""Language modelling with a small GPT: `python -m trainerkit task=lm`."""

from trainerkit.nn.lora import Lora, merge_lora
from trainerkit.tasks.lm.cache import KeyValueCache
from trainerkit.tasks.lm.generation import generate, sample
from trainerkit.tasks.lm.huggingface import save_huggingface
from trainerkit.tasks.lm.network import GPT
from trainerkit.tasks.lm.samples import TextSamples
from trainerkit.tasks.lm.task import LanguageModelTask

__all__ = [
    "GPT",
    "KeyValueCache",
    "LanguageModelTask",
    "Lora",
    "TextSamples",
    "generate",
    "merge_lora",
    "sample",
    "save_huggingface",
]
