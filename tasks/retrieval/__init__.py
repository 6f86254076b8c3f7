"""Contrastive retrieval: `python -m trainerkit task=retrieval`."""

from trainerkit.tasks.retrieval.distillation import Distillation, embedding_mse, similarity_kl
from trainerkit.tasks.retrieval.encoder import Encoder
from trainerkit.tasks.retrieval.faiss_index import FaissIndex
from trainerkit.tasks.retrieval.gather import gather
from trainerkit.tasks.retrieval.gradient_cache import GradientCache
from trainerkit.tasks.retrieval.hard_negatives import HardNegatives
from trainerkit.tasks.retrieval.metrics import EvaluationSet, retrieval_metrics
from trainerkit.tasks.retrieval.neighbours import Neighbours
from trainerkit.tasks.retrieval.pictures import ImageCNN, ImageViT
from trainerkit.tasks.retrieval.search import ranks, top_k
from trainerkit.tasks.retrieval.similarity import similarity
from trainerkit.tasks.retrieval.task import RetrievalTask
from trainerkit.tasks.retrieval.teacher import Teacher
from trainerkit.tasks.retrieval.texts import TextBag, TextTransformer

__all__ = [
    "Distillation",
    "Encoder",
    "EvaluationSet",
    "FaissIndex",
    "GradientCache",
    "HardNegatives",
    "ImageCNN",
    "ImageViT",
    "Neighbours",
    "RetrievalTask",
    "Teacher",
    "TextBag",
    "TextTransformer",
    "embedding_mse",
    "gather",
    "ranks",
    "retrieval_metrics",
    "similarity",
    "similarity_kl",
    "top_k",
]
