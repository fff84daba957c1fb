"""Images and who sees them: datasets, decoding, the samplers that draw batches, and the members' splits."""
