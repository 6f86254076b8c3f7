"""Contrastive retrieval: `python -m trainerkit task=retrieval`."""
