"""Probes: small models fitted on frozen latents, to see what an encoder has learned.

`labels` says what is asked, `features` what a probe may see (latents, or a baseline's features),
`models` are the small models themselves, `scoring` fits and scores them, `finetuning` trains the
encoder with them, `summary` makes tables.
"""
