"""The configs that ship, one YAML per choice."""
