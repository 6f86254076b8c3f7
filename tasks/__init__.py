"""One folder per documented trainer, each a LightningModule task."""
