"""Making a LoRA: from an upload to pictures with captions, to batches of crops, to trained low-rank pairs."""
