"""From records to packed batches: reading, decoding, prompts, the plan, placement, packing."""
