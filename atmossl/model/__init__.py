"""Networks behind the contract encode(view) and decode(latents, view)."""
