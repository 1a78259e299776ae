"""openlora-node: serve many LoRA adapters over one base model and pay the people behind every answer."""

__version__ = "0.1.0"
